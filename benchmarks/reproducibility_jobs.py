"""What `reproducibility.py` has computed in a process of its own: `python reproducibility_jobs.py SPEC.json OUT.npz`.

SPEC says which jobs, on which weights, in which variations; it was written by `reproducibility.py`, and every value in
it is plain JSON. OUT gets one array per job, weights, mode and variation. Runs in any interpreter that has jaxgen.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, ROWS, POSITIONS = 640, 64, 2048  # of the draws from given logits

Arrays = dict[str, np.ndarray]


def padded(rows: list[list[int]], side: str, extra: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask: padded left or right, or with a hole before every token while there is room."""
    width = max(map(len, rows)) + extra
    ids, mask = np.full((len(rows), width), 5), np.zeros((len(rows), width), int)
    for row, tokens in enumerate(rows):
        space = width - len(tokens)
        columns = {
            "left": np.arange(space, width),
            "right": np.arange(len(tokens)),
            "holes": np.minimum(2 * np.arange(len(tokens)) + 1, np.arange(len(tokens)) + space),
        }[side]
        ids[row, columns], mask[row, columns] = tokens, 1
    return ids, mask


class Silent:
    """A streamer that shows nothing: what counts is that the loop is left after every few tokens."""

    def put(self, value: Any) -> None: ...

    def end(self) -> None: ...


def load(weights: str) -> Any:
    import jaxgen

    options: dict[str, Any] = {"dtype": "bfloat16"} if weights == "bfloat16" else {"dtype": "float32"}
    return jaxgen.AutoModelForCausalLM.from_pretrained(
        jaxgen.demo.path(), device_map="cpu", load_in_4bit=weights == "int4", **options
    )


def generated(spec: dict[str, Any], call: Callable[..., tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[str, Any]]:
    """Every mode and variation: tokens and log-probabilities [seeds, prompts, new tokens], in the prompts' order."""
    prompts = [*spec["prompts"], *spec["long"]]
    shape = (len(spec["prompts"]), spec["new_tokens"])
    for mode, options in spec["modes"].items():
        for name, variation in spec["variations"].items():
            seeds = spec["seeds"] if options["do_sample"] else [None]
            tokens = np.full((len(seeds), *shape), -1, np.int32)
            logprobs = np.zeros((len(seeds), *shape), np.float32)
            for number, seed in enumerate(seeds):
                for batch in variation["batches"]:
                    ids, mask = padded(
                        [prompts[i] for i in batch], variation.get("side", "left"), variation.get("extra", 0)
                    )
                    new, probabilities = call(ids, mask, batch, seed, options, variation.get("options", {}))
                    for row, prompt in enumerate(batch):
                        if prompt < shape[0]:
                            tokens[number, prompt], logprobs[number, prompt] = new[row], probabilities[row]
            yield f"{mode}/{name}", {"tokens": tokens, "logprobs": logprobs}


def jaxgen_call(model: Any, new_tokens: int) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """A batch through `model.generate`; a prompt's number is its row's id."""
    import jaxgen

    def call(
        ids: np.ndarray, mask: np.ndarray, batch: list[int], seed: Any, options: dict[str, Any], how: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        how = dict(how)
        if "strict" in how:
            how["strict"] = jaxgen.Strict(**how["strict"])
        if "chunk_size" in how:
            how["streamer"] = Silent()
        out = model.generate(
            ids, mask, seed=seed, row_ids=batch, max_new_tokens=new_tokens, eos_token_id=None,
            return_dict_in_generate=True, **options, **how,
        )  # fmt: skip
        return out.sequences[:, ids.shape[1] :], out.logprobs

    return call


def generate(spec: dict[str, Any]) -> Arrays:
    found = {}
    for weights in spec["weights"]:
        for name, arrays in generated(spec, jaxgen_call(load(weights), spec["new_tokens"])):
            found |= {f"{weights}/{name}/{kind}": array for kind, array in arrays.items()}
    return found


def mesh(spec: dict[str, Any]) -> Arrays:
    """The pure function in `jax.jit`: all prompts on one device, and their rows over eight, weights replicated."""
    import jax
    from flax import nnx
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import jaxgen
    from jaxgen.generation.choosing.sample import random_key

    devices = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = (NamedSharding(devices, PartitionSpec(*axes)) for axes in (("data",), ()))
    prompts, found = spec["prompts"], {}
    ids, mask = padded(prompts, "left", 0)
    for weights in spec["weights"]:
        model = load(weights)
        model.generation_config = jaxgen.GenerationConfig()  # without the checkpoint's eos
        graph, state = nnx.split(model)
        for mode, options in spec["modes"].items():
            config = jaxgen.GenerationConfig(
                max_new_tokens=spec["new_tokens"], eos_token_id=None, return_dict_in_generate=True, **options
            )

            def run(state: Any, ids: Any, mask: Any, key: Any, graph: Any = graph, config: Any = config) -> Any:
                out = jaxgen.generate(nnx.merge(graph, state), ids, mask, key=key, config=config)
                return out["sequences"][:, -spec["new_tokens"] :], out["logprobs"]

            results: dict[str, list[Any]] = {"one": [], "eight": []}
            program = jax.jit(run)
            for seed in spec["seeds"] if options["do_sample"] else [0]:
                key = random_key(None, seed)[0]  # all 64 bits of a seed, as `generate(seed=)` takes it
                results["one"].append(jax.device_get(program(state, ids, mask, key)))
                split = [jax.device_put(x, rows) for x in (ids, mask)]
                out = program(jax.device_put(state, everywhere), *split, jax.device_put(key, everywhere))
                if len(out[0].sharding.device_set) != 8:
                    raise RuntimeError("the result is not on eight devices")
                results["eight"].append(jax.device_get(out))
            for name, pairs in results.items():
                tokens, logprobs = zip(*pairs, strict=True)
                found[f"{weights}/{mode}/{name}/tokens"] = np.stack(tokens).astype(np.int32)
                found[f"{weights}/{mode}/{name}/logprobs"] = np.stack(logprobs)
    return found


def seeds(spec: dict[str, Any]) -> Arrays:
    """One prompt under many seeds: in few batches, and some of the seeds alone; also strict."""
    model, found = load("float32"), {}
    new_tokens = spec["new_tokens"]
    call = jaxgen_call(model, new_tokens)
    ids, mask = padded(spec["prompts"][:1], "left", 0)

    def batches(seeds: list[int], size: int, how: dict[str, Any]) -> dict[str, np.ndarray]:
        parts = [
            call(ids, mask, [0] * len(part), part, spec["modes"]["sampled"], how)
            for part in (seeds[start : start + size] for start in range(0, len(seeds), size))
        ]
        tokens, logprobs = (np.concatenate(arrays)[None] for arrays in zip(*parts, strict=True))
        return {"tokens": tokens, "logprobs": logprobs}

    strict = {"strict": {"rows": 8, "tokens": 64}}
    everything, some = list(range(spec["many"])), spec["alone"]
    whole = batches(everything, spec["many"] // 4, {})
    results = {
        "alone": batches(some, 1, {}),
        "together": {name: array[:, some] for name, array in whole.items()},
        "strict alone": batches(some, 1, strict),
        "strict together": batches(some, 8, strict),
    }
    for name, arrays in results.items():
        found |= {f"float32/sampled/{name}/{kind}": array for kind, array in arrays.items()}
    texts = {tuple(row) for row in whole["tokens"][0].tolist()}
    return found | {"different": np.array(len(texts))}


def draws(spec: dict[str, Any]) -> Arrays:
    """Tokens [rows, positions] drawn from given logits with the loop's own function, in different arrangements."""
    import jax
    import jax.numpy as jnp

    from jaxgen.generation.choosing.sample import draw, random_key, row_id_words, row_keys

    positions = spec["positions"]
    # A coarse grid of logits: equal in every version of numpy and JAX.
    grid = np.random.PCG64(0).random_raw(ROWS * VOCABULARY) % 64 / 8.0
    logits = jnp.asarray(grid, jnp.float32).reshape(ROWS, VOCABULARY)
    keys = row_keys(random_key(None, 17)[0], jnp.asarray(row_id_words(None, ROWS)), 1)

    def steps(logits: Any, keys: Any, positions: Any) -> Any:
        """One position after the other, as in the loop."""
        return jax.lax.map(lambda p: draw(logits, keys, jnp.full(len(keys), p)), positions).T

    jitted, p = jax.jit(steps), jnp.arange(positions)
    everything = np.asarray(jitted(logits, keys, p))
    if spec["draws"] == "base":
        return {"base": everything}
    if spec["draws"] == "eight":
        from jax.sharding import AxisType, NamedSharding, PartitionSpec

        devices = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        rows = NamedSharding(devices, PartitionSpec("data"))
        out = jitted(jax.device_put(logits, rows), jax.device_put(keys, rows), p)
        return {"base": everything, "eight": np.asarray(out)}

    def chunks(size: int) -> Iterator[Any]:
        yield from (p[start : start + size] for start in range(0, positions, size))

    order = np.random.default_rng(0).permutation(ROWS)
    back = np.argsort(order)
    twice = jnp.concatenate([logits, logits[:8]]), jnp.concatenate([keys, keys[:8]])  # 8 rows that nobody asked for
    wide = jnp.pad(logits, ((0, 0), (0, 64)), constant_values=-jnp.inf)
    at_once = jax.jit(jax.vmap(draw, in_axes=(None, None, 0), out_axes=1))
    return {
        "base": everything,
        "order": np.asarray(jitted(logits[order], keys[order], p))[back],
        "alone": np.concatenate([np.asarray(jitted(logits[r : r + 1], keys[r : r + 1], p)) for r in range(ROWS)]),
        "idle": np.asarray(jitted(*twice, p))[:ROWS],
        "chunks": np.concatenate([np.asarray(jitted(logits, keys, some)) for some in chunks(128)], 1),
        "at_once": np.concatenate(
            [np.asarray(at_once(logits, keys, jnp.tile(some[:, None], ROWS))) for some in chunks(64)], 1
        ),
        "wide": np.asarray(jitted(wide, keys, p)),
    }  # fmt: skip


def cost(spec: dict[str, Any]) -> Arrays:
    """Tokens per second with and without strict [batches, forms], taking turns; the median of the repeats."""
    import jaxgen

    model = load("float32")
    table = []
    for batch in spec["batches"]:
        ids = np.random.default_rng(0).integers(5, VOCABULARY, (batch, 16))
        rows = max(8, batch)
        forms = [{}, {"strict": jaxgen.Strict(rows=rows)}, {"strict": jaxgen.Strict(rows=rows, tokens=96)}]
        times: list[list[float]] = [[] for _ in forms]
        for repeat in range(spec["repeats"] + 1):
            for form, how in enumerate(forms):
                start = time.perf_counter()
                model.generate(ids, max_new_tokens=64, do_sample=True, seed=0, eos_token_id=None, **how)
                if repeat:  # the first one compiles
                    times[form].append(time.perf_counter() - start)
        table.append([batch * 64 / statistics.median(values) for values in times])
    return {"tokens_per_second": np.array(table)}


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import jax

    jax.config.update("jax_platforms", "cpu")
    if spec["job"] == "mesh" or spec.get("draws") == "eight":
        jax.config.update("jax_num_cpu_devices", 8)
    hits = []
    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if "cache_hits" in name else None)
    if "cache" in spec:
        import jaxgen

        jaxgen.enable_compile_cache(spec["cache"])
    found = {"generate": generate, "mesh": mesh, "seeds": seeds, "draws": draws, "cost": cost}[spec["job"]](spec)
    versions = {module: __import__(module).__version__ for module in ("jax", "flax", "numpy")}
    about = {"versions": {"python": sys.version.split()[0], **versions}, "cache_hits": len(hits)}
    everything: dict[str, Any] = found | {"about": np.array(json.dumps(about))}
    np.savez(sys.argv[2], **everything)


if __name__ == "__main__":
    main()
