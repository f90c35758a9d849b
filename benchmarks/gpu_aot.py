"""What XLA makes of prefill and decode on an H200, compiled on a machine without a GPU.

    python benchmarks/gpu_aot.py                     # the Mistral-7B shape, whole and cut to 2 layers
    python benchmarks/gpu_aot.py --layers 2 --batch 1 8 32 --group-size 64 --json

Needs the CUDA plugin of the installed JAX, without the CUDA libraries behind it:

    pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION

Nothing runs: these are facts about the compiled program (buffers, kernels, fusions), not times. Without a device
nothing is autotuned, so the tile sizes that a device would choose are not known here.
"""

import argparse
import collections
import contextlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Before JAX starts. Otherwise the plugin looks for a driver, finds none, and is not registered.
os.environ["JAX_PLATFORMS"] = "cpu"
DUMP = Path(tempfile.mkdtemp(prefix="gpu_aot"))
os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 --xla_dump_to={DUMP} --xla_dump_hlo_as_text"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxgen import GenerationConfig, MistralConfig, MistralForCausalLM
from jaxgen.generation.options.config import resolve
from jaxgen.generation.programs import stages
from jaxgen.generation.programs.inputs import BatchLayout, static_options, traced_options
from jaxgen.generation.programs.structure import Structure
from jaxgen.generation.prompts.prefill import Prompts
from jaxgen.generation.searches.search import search_for
from jaxgen.models.layers import QuantizedWeight
from jaxgen.quant import Int4, Lookup4, Weight
from jaxgen.quant.adapted import Adapted
from jaxgen.quant.planar import block_size

# From NVIDIA's data sheet and CUDA's guide for compute capability 9.0; the driver and runtime versions decide which
# CUDA graphs XLA dares to build.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048  core_count: 132
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536  registers_per_block_limit: 65536  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000  l2_cache_size: 52428800  device_memory_size: 151397597184
  device_address_bits: 64  device_vendor: "NVIDIA Corporation"  name: "NVIDIA H200"
  driver_version: "13.0.0"  runtime_version: "12.9.0"  compile_time_toolkit_version: "12.9.0"  dnn_version: "9.10.0"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""

A100 = (
    H200.replace("core_count: 132", "core_count: 108").replace("1.98", "1.41").replace("NVIDIA H200", "NVIDIA A100")
    .replace("shared_memory_per_core: 233472", "shared_memory_per_core: 167936")
    .replace("optin: 232448", "optin: 166912").replace("4800000000000", "2039000000000")
    .replace("l2_cache_size: 52428800", "l2_cache_size: 41943040").replace("151397597184", "85899345920")
    .replace("major: 9 feature_extension: ACCELERATED_FEATURES", "major: 8")
)  # fmt: skip
CARDS = {"h200": H200, "a100": A100}

PROMPT, NEW = 512, 256
# Not kernels: names for parts of memory, and what the compiler resolves.
_NO_LAUNCH = {"parameter", "get-tuple-element", "tuple", "constant", "bitcast", "after-all", "opt-barrier"}
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")


def device(card: str) -> Any:
    """The GPU that is not there."""
    return topologies.get_topology_desc(platform="cuda", target_config=CARDS[card], topology="1x1x1").devices[0]


def on(gpu: Any) -> Any:
    """Pallas asks which GPU it lowers for; here there is none to ask."""
    sharding = jax.sharding
    if not hasattr(sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    there = sharding.AbstractDevice(device_kind=gpu.device_kind, num_cores=132, platform="gpu")
    mesh = sharding.AbstractMesh((1,), ("x",), axis_types=(sharding.AxisType.Auto,), abstract_device=there)
    return sharding.use_abstract_mesh(mesh)


def shape_of_mistral_7b(layers: int) -> MistralConfig:
    return MistralConfig(num_hidden_layers=layers, sliding_window=4096, max_position_embeddings=32768)


def abstract_model(config: MistralConfig, weights: str, group_size: int, options: argparse.Namespace) -> Any:
    """The model without its numbers: bfloat16, and linear layers of a kind of weights."""
    model = nnx.eval_shape(lambda: MistralForCausalLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    if weights != "bf16":
        for linear in linears(model):
            rows, columns = linear.weight.shape
            groups = 1 if group_size == -1 else columns // group_size
            packed = jax.ShapeDtypeStruct((rows, columns // 2), jnp.uint8)
            planar = 0 if options.xla else block_size(columns // groups)
            if weights == "int4":
                scale = jax.ShapeDtypeStruct((rows, groups), jnp.dtype(options.scale_dtype))
                weight: Weight = Int4(packed, scale, planar=planar)
            else:
                scale, table = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, groups), (16,)))
                weight = Lookup4(packed, scale, table, planar)
            if options.rank:
                down, up = (
                    jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((options.rank, columns), (rows, options.rank))
                )
                weight = Adapted(weight, down, up)
            linear.weight = QuantizedWeight(weight)
    return model


def linears(model: Any) -> list[Any]:
    return [
        linear
        for layer in model.model.layers
        for linear in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
    ]


def lower(
    stage: str, model: Any, batch: int, options: argparse.Namespace, gpu: Any
) -> tuple[Any, dict[str, Any], list[Any]]:
    """The stage as `generate` runs it, lowered for the GPU; its compiler options; and its cache."""
    place = SingleDeviceSharding(gpu)

    def abstract(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    graph, state = nnx.split(model)
    variables = list(nnx.to_flat_state(state))
    structure = Structure(graph, variables)
    weights = [abstract(v.get_value() if hasattr(v, "get_value") else v.value) for _, v in variables]
    config = resolve(options.generate, None, GenerationConfig(eos_token_id=2))
    static, prompt = static_options(config), options.prompt
    total = prompt + NEW
    ahead = static.drafts + 1 if static.drafts else 0
    int8 = config.cache_implementation == "quantized"
    layout = BatchLayout(static, static.num_beams, total, model.config.cache_slots(total, ahead), int8)
    traced = abstract(traced_options(config, model.config.vocab_size))
    numbers = np.zeros(batch, np.int32)
    rows = (np.zeros((batch, prompt), np.int32), numbers, numbers, np.zeros((batch, 2), np.uint32))
    prompts = abstract(Prompts(*rows, np.zeros(batch, bool)))
    key = abstract(jax.eval_shape(lambda: jax.random.key(0)))
    search = search_for(static)
    models = (search, structure, weights, None, None)
    arguments = (*models, prompts, key, traced, layout)
    begun = jax.eval_shape(
        lambda w, p, k, c: stages._run_prefill(search, structure, w, None, None, p, k, c, layout),
        weights,
        *arguments[5:8],
    )
    if stage == "prefill":
        chosen = stages._strict_prefill_on_gpu if options.strict else stages._prefill
    else:
        int4 = any(isinstance(weight, Weight) and weight.fuses for weight in weights)
        chosen = stages._kernels_int4_on_gpu if int4 else stages._kernels_on_gpu
        if options.xla and chosen.otherwise:
            chosen = chosen.otherwise
        chosen = chosen.otherwise if options.fallback and chosen.otherwise else chosen
        strict = stages._strict_decode_on_gpu if options.xla else stages._strict_kernels_on_gpu
        chosen = strict if options.strict else chosen
        until = abstract(np.array(NEW, np.int32))
        arguments = (*models, abstract(begun), until, traced, layout.static)
    # The options go to compile(): lowering for another platform than the process's own drops those of jit.
    with on(gpu):
        return (
            chosen._jitted.trace(*arguments).lower(lowering_platforms=("cuda",)),
            chosen.compiler_options,
            begun.cache,
        )


def measure(
    stage: str, weights: str, batch: int, layers: int, group_size: int, options: argparse.Namespace, gpu: Any
) -> dict[str, Any]:
    """One row of the table."""
    config = shape_of_mistral_7b(layers)
    model = abstract_model(config, weights, group_size, options)
    start = time.perf_counter()
    lowered, compiler_options, cache = lower(stage, model, batch, options, gpu)
    for file in DUMP.iterdir():
        file.unlink()
    if options.no_spilling:
        compiler_options = compiler_options | {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
    executable = lowered.compile(compiler_options or None)
    seconds = time.perf_counter() - start
    memory = executable.memory_analysis()
    program = Program(executable.as_text())
    linear_shapes = {linear.weight.shape for linear in linears(abstract_model(config, "bf16", 0, options))}
    cache_shapes = {leaf.shape for leaf in jax.tree.leaves(cache)}
    return {
        "stage": stage,
        "weights": weights,
        "batch": batch,
        "layers": layers,
        "group_size": group_size if weights != "bf16" else None,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "kv_bytes": sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)),
        "loop_weight_buffers": program.weight_buffers(linear_shapes, cache_shapes) if program.has_loop else 0,
        "weight_transposes": program.weight_transposes(linear_shapes),
        "command_buffers": command_buffers(),
        "linears": 4 * layers if weights != "bf16" else 0,
        "fused_linears": program.fused_int4_linears(linear_shapes),
        "kernels": program.kernels(),
        "launches_per_layer": round(program.launches_in_layers(config.hidden_size) / layers, 2),
        "launches_per_token": len(program.step),
        "compile_seconds": round(seconds, 1),
    }


class Operation:
    """One instruction of an HLO computation that costs a launch."""

    def __init__(self, result: str, opcode: str, rest: str):
        self.opcode, self.rest = opcode, rest
        self.results = [(kind, tuple(map(int, dims.split(",")))) for kind, dims in _ARRAY.findall(result) if dims]
        scope = re.search(r'op_name="([^"]*)"', rest)
        self.scope = scope[1] if scope else ""
        calls = re.search(r"calls=%?([\w.\-]+)", rest)
        self.calls = calls[1] if calls else None


class Program:
    """The text of a compiled module: its entry, and what it launches for each token (or, without a loop, in all)."""

    def __init__(self, text: str):
        self.signatures: dict[str, str] = {}
        bodies: dict[str, list[str]] = {}
        current, entry, loops = "", "", []
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) (\(.*)\{\s*$", line):
                current = header[2]
                bodies[current], self.signatures[current] = [], header[3]
                entry = current if header[1] else entry
            elif current:
                bodies[current].append(line)
                loops += re.findall(r" while\(.*body=%?([\w.\-]+)", line)
        self.has_loop = bool(loops)
        self.bodies = bodies
        self.entry = _operations(bodies[entry])
        # The token loop is the one in the entry; prefill has only loops over blocks of a long prompt.
        self.step = _operations(bodies[loops[-1]]) if loops else self.entry

    def launches_in_layers(self, width: int) -> int:
        """Those in the named scopes of the blocks; and those of no scope, such as the second half of a split sum,
        whose results are not too small for it."""
        unnamed = (op for op in self.step if not op.scope)
        large = sum(any(math.prod(shape) >= width for _, shape in op.results) for op in unnamed)
        return large + sum(bool(re.search(r"/(attention|mlp)/", op.scope)) for op in self.step)

    def weight_buffers(self, weights: set[tuple[int, ...]], caches: set[tuple[int, ...]]) -> int:
        """Results in the loop that are as large as some linear layer's weight (the cache may be, by chance)."""
        sizes = {math.prod(shape) for shape in weights}
        results = itertools.chain.from_iterable(op.results for op in self.step)
        return sum(math.prod(shape) in sizes and shape not in caches for _, shape in results)

    def weight_transposes(self, weights: set[tuple[int, ...]]) -> int:
        """Rearranged copies of weights, made before the loop at every call."""
        sizes = {math.prod(shape) // packed for shape in weights for packed in (1, 2)}
        return sum(
            op.opcode in ("transpose", "copy", "fusion") and math.prod(shape) in sizes and kind in ("s4", "u8", "bf16")
            for op in (self.entry if self.has_loop else [])
            for kind, shape in op.results
        )

    def kernels(self) -> dict[str, int]:
        """How often each of `jaxgen.kernels` is launched."""
        names = (re.search(r'triton.*?name = "(\w+)"', op.rest.replace("\\", "")) for op in self.step)
        return dict(collections.Counter(name[1] for name in names if name))

    def fused_int4_linears(self, weights: set[tuple[int, ...]]) -> int:
        """Kernels of a matrix product that read packed int4 and a scale for each group of it."""
        sizes = {math.prod(shape) for shape in weights}
        count = 0
        for op in self.step:
            if op.opcode == "fusion" and "__triton" in op.rest and op.calls:
                arguments = self.signatures[op.calls].split("->")[0]
                shapes = [(kind, tuple(map(int, dims.split(",")))) for kind, dims in _ARRAY.findall(arguments) if dims]
                packed = [shape for kind, shape in shapes if kind == "s4" and math.prod(shape) in sizes]
                scales = [shape for kind, shape in shapes if kind != "s4" and shape in {p[:-1] for p in packed}]
                count += bool(packed and (scales or any(shape[0] == packed[0][0] for _, shape in shapes[1:])))
        return count


def _operations(lines: list[str]) -> list[Operation]:
    matches = filter(None, map(_INSTRUCTION.match, lines))
    return [Operation(*match.groups()) for match in matches if match[2] not in _NO_LAUNCH]


def command_buffers() -> int:
    """CUDA graphs per token: those that the executed thunks hold inside the loop (without a loop: in all)."""
    files = sorted(DUMP.glob("*thunk_sequence_after_thunk_passes.txt"))
    if not files:  # XLA writes it only where it formed one
        return 0
    return len(re.findall(r"\d+: +kCommandBuffer", files[-1].read_text()))


def table(rows: list[dict[str, Any]]) -> str:
    columns = list(rows[0])
    shown = [[_short(row[column]) for column in columns] for row in rows]
    names = [column.replace("_", " ").split() for column in columns]
    height = max(map(len, names))
    header = [[""] * (height - len(words)) + words for words in names]
    lines = [*zip(*header, strict=True), *shown]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) for line in lines)


def _short(value: Any) -> str:
    return f"{value / 1e6:.2f}M" if isinstance(value, int) and value >= 100_000 else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", default=["decode", "prefill"], choices=["decode", "prefill"])
    parser.add_argument("--weights", nargs="+", default=["int4", "bf16"], choices=["int4", "nf4", "bf16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 32])
    parser.add_argument("--group-size", nargs="+", type=int, default=[128])
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument(
        "--scale-dtype", default="bfloat16", help="of int4 weights: float16 as imported ones often have"
    )
    parser.add_argument("--rank", type=int, default=0, help="of a LoRA adapter beside every int4 weight")
    parser.add_argument("--card", choices=list(CARDS), default="h200")
    parser.add_argument("--xla", action="store_true", help="without the kernels of jaxgen.kernels")
    parser.add_argument("--fallback", action="store_true", help="int4 without experimental compiler options")
    parser.add_argument(
        "--no-spilling", action="store_true", help="fail where a kernel needs more registers than it has"
    )
    parser.add_argument("--strict", action="store_true", help="what `generate(strict=True)` runs")
    parser.add_argument(
        "--generate", type=json.loads, default={}, metavar="JSON", help='options of generate, as {"num_beams": 4}'
    )
    parser.add_argument("--json", action="store_true", help="a list of objects, instead of the table")
    options = parser.parse_args()
    gpu, rows = device(options.card), []
    sizes = {"int4": options.group_size, "nf4": options.group_size, "bf16": [0]}
    for stage, layers, weights in itertools.product(options.stage, options.layers, options.weights):
        for group_size, batch in itertools.product(sizes[weights], options.batch):
            rows.append(measure(stage, weights, batch, layers, group_size, options, gpu))
            for file in DUMP.iterdir():
                file.unlink()
    DUMP.rmdir()
    sys.stdout.write((json.dumps(rows, indent=1) if options.json else table(rows)) + "\n")


if __name__ == "__main__":
    main()
