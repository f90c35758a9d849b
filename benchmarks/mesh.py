"""What lies on each of 2, 4 and 8 H200, and what they tell each other in a decode step, compiled without any of them.

    python benchmarks/mesh.py --json > benchmarks/results/mesh.json

Needs what `benchmarks/gpu_aot.py` does. Nothing runs, and no weight is allocated. Two layers are compiled, and what
they tell each other is multiplied; the bytes of weights and cache are counted for all layers.
"""

import argparse
import collections
import dataclasses
import json
import math
import re
import sys
from typing import Any

import gpu_aot  # first: it decides how JAX starts
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen import GenerationConfig, MistralConfig, MixtralConfig
from jaxgen.generation.options.config import resolve
from jaxgen.generation.programs import stages
from jaxgen.generation.programs.inputs import BatchLayout, static_options, traced_options
from jaxgen.generation.programs.structure import Structure, value_of
from jaxgen.generation.prompts.prefill import Prompts
from jaxgen.generation.searches.search import search_for
from jaxgen.models.families import family_of
from jaxgen.parallel import fit
from jaxgen.parallel.layout import MODEL, Layout

LONG = {"max_position_embeddings": 32768, "sliding_window": None}
SHAPES = {
    "7B": MistralConfig(**LONG),
    "24B": MistralConfig(
        vocab_size=131072, hidden_size=5120, intermediate_size=32768, num_hidden_layers=40, head_dim=128, **LONG
    ),
    "Mixtral": MixtralConfig(**LONG),
}
WEIGHTS = {"7B": ("bf16", "int4"), "24B": ("bf16", "int4"), "Mixtral": ("bf16",)}
_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
_COLLECTIVE = re.compile(rf"= \(?([^=]*?) ({_KINDS})(-start)?\(")
_ARRAY = re.compile(r"\b[a-z]+(\d+)\[([\d,]*)\]")


def h200(count: int) -> Any:
    """The GPUs that are not there, in one host."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=gpu_aot.CARDS["h200"], topology=f"1x1x{count}"
    )
    return Mesh(np.array(topology.devices), (MODEL,))


def abstract(config: Any, weights: str) -> Any:
    """The model without its numbers."""
    if weights == "int4":
        options = argparse.Namespace(xla=False, scale_dtype="bfloat16", rank=0)
        return gpu_aot.abstract_model(config, weights, 128, options)
    return nnx.eval_shape(lambda: family_of(config)(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))


def parameters(model: Any) -> dict[str, Any]:
    return {".".join(map(str, path)): value_of(variable) for path, variable in nnx.to_flat_state(nnx.state(model))}


def compiled(config: Any, weights: str, layers: int, batch: int, mesh: Mesh) -> tuple[Any, Layout]:
    """The decode step of so many layers, and how it is divided."""
    config = config.with_layers(range(layers))
    model = abstract(config, weights)
    model.layout = layout = Layout.of(mesh, config)

    def placed(tree: Any, specs: Any) -> Any:
        def place(x: Any, spec: PartitionSpec) -> Any:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(layout.mesh, spec))

        return jax.tree.map(place, tree, specs)

    def everywhere(tree: Any) -> Any:
        return placed(tree, jax.tree.map(lambda _: PartitionSpec(), tree))

    graph, state = nnx.split(model)
    structure = Structure(graph, list(nnx.to_flat_state(state)))
    arrays = [placed(value, layout.specs(config, name, value)) for name, value in parameters(model).items()]
    asked = resolve({}, None, GenerationConfig(eos_token_id=2))
    static = static_options(asked)
    total = gpu_aot.PROMPT + gpu_aot.NEW
    rows = BatchLayout(static, 1, total, config.cache_slots(total, 0), False)
    traced = everywhere(traced_options(asked, config.vocab_size))
    numbers = np.zeros(batch, np.int32)
    table = np.zeros((batch, gpu_aot.PROMPT), np.int32)
    prompts = everywhere(Prompts(table, numbers, numbers, np.zeros((batch, 2), np.uint32), np.zeros(batch, bool)))
    key = everywhere(jax.eval_shape(lambda: jax.random.key(0)))
    search = search_for(static)
    begun = jax.eval_shape(
        lambda w, p, k, c: stages._run_prefill(search, structure, w, None, None, p, k, c, rows),
        arrays, prompts, key, traced,
    )  # fmt: skip
    heads = PartitionSpec(None, layout.over("heads") or None)
    cache = placed(begun.cache, jax.tree.map(lambda _: heads, begun.cache))
    begun = dataclasses.replace(everywhere(begun), cache=cache)
    stage: Any = stages._kernels_int4_on_gpu if weights == "int4" else stages._kernels_on_gpu
    if config.routing(0) is not None:  # experts have no kernels
        stage = stage.otherwise
    until = everywhere(np.array(gpu_aot.NEW, np.int32))
    models = (search, structure, arrays, None, None)
    lowered = stage._jitted.trace(*models, begun, until, traced, rows.static).lower(lowering_platforms=("cuda",))
    return lowered.compile(stage.compiler_options or None), layout


def collectives(executable: Any) -> dict[str, list[int]]:
    """The bytes of each result that devices make together, by kind."""
    found: dict[str, list[int]] = collections.defaultdict(list)
    for result, kind, started in _COLLECTIVE.findall(executable.as_text()):
        arrays = [(int(bits) // 8, map(int, filter(None, dims.split(",")))) for bits, dims in _ARRAY.findall(result)]
        sizes = [size * math.prod(dims) for size, dims in arrays]
        found[kind].append(max(sizes) if started else sum(sizes))
    return dict(found)


def measure(name: str, weights: str, devices: int, layers: int, batch: int) -> dict[str, Any]:
    """One row of the table."""
    config = SHAPES[name]
    executable, layout = compiled(config, weights, layers, batch, h200(devices))
    memory, found = executable.memory_analysis(), collectives(executable)
    embedding, *sums = found.get("all-reduce", [0])  # the text is in the order of the program
    logits = sum(found.get("all-gather", []))
    share = next(s for s in fit.shares(config, parameters(abstract(config, weights)), 2, devices) if s.data == 1)
    return {
        "shape": name,
        "weights": weights,
        "devices": devices,
        "batch": batch,
        "weight_bytes": share.weights,
        "cache_bytes_per_row": share.cache,
        "compiled_layers": layers,
        "collectives": {kind: len(sizes) for kind, sizes in found.items()},
        "embedding_bytes": embedding,
        "layer_bytes": sum(sums) // layers,
        "logits_bytes": logits,
        "step_bytes": embedding + logits + sum(sums) // layers * config.num_hidden_layers,
        "copied_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "parts": {axis: layout.parts(axis) for axis in ("heads", "mlp", "vocab")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--devices", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--layers", type=int, default=2, help="how many are compiled")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="a list of objects, instead of the table")
    options = parser.parse_args()
    rows = [
        measure(shape, weights, devices, options.layers, options.batch)
        for shape in options.shapes
        for weights in WEIGHTS[shape]
        for devices in options.devices
    ]
    sys.stdout.write((json.dumps(rows, indent=1) if options.json else gpu_aot.table(rows)) + "\n")


if __name__ == "__main__":
    main()
