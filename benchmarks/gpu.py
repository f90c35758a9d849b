"""jaxgen on one GPU: are the kernels right, how fast are decode and prefill of the Mistral-7B shape, what is a step of?

    python benchmarks/gpu.py                       # prints rows and writes benchmarks/results/gpu-CARD.json
    python benchmarks/gpu.py --parts check step    # the main table, in about 4 minutes
    python benchmarks/gpu.py --tiny                # small shapes, on any machine: shows that the script works

Which tile suits which product is the business of `benchmarks/kernels.py`.

Weights are random: nothing is downloaded. Each finished row is printed and written at once, so that an interrupted
run keeps what it has; a part that fails, or that no time is left for, leaves a row that says so.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs the same GPU's memory
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.gpu_promises import one_graph, promises
from benchmarks.kernels import GROUPS, kernel_times, random_weight
from jaxgen import GenerationConfig, MistralConfig, MistralForCausalLM
from jaxgen.cache import LayerCache, Reading, to_int8
from jaxgen.generation.execute import advance, prefill, program_for
from jaxgen.generation.options.config import resolve
from jaxgen.generation.prepare import prepare
from jaxgen.kernels.add_norm import add_norm
from jaxgen.kernels.attend import attend, attend_plainly
from jaxgen.kernels.dense_row import dense_row_product
from jaxgen.kernels.dense_rows import dense_rows_product
from jaxgen.kernels.int4_row import int4_row_product
from jaxgen.kernels.int4_rows import as_columns, int4_rows_product
from jaxgen.models.layers import QuantizedWeight
from jaxgen.quant import Int4, Lookup4

STEPS = 128  # tokens per timing of decode


@dataclasses.dataclass
class Report:
    """Rows as they come, on the terminal and in the file, which is replaced whole each time."""

    file: Path
    deadline: float
    facts: dict[str, Any]
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, part: str, **row: Any) -> None:
        """A finished row."""
        self.rows.append({"part": part, **row})
        print("  ".join(f"{k}={v}" for k, v in self.rows[-1].items()), flush=True)
        aside = self.file.with_suffix(".tmp")
        aside.write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1) + "\n")
        aside.replace(self.file)

    def attempt(self, part: str, what: dict[str, Any], seconds: float, measure: Callable[[], dict[str, Any]]) -> None:
        """Add what `measure` returns, unless less than `seconds` are left."""
        left = self.deadline - time.monotonic()
        if left < seconds:
            self.add(part, **what, skipped=f"{left:.0f} s left")
            return
        start = time.monotonic()
        try:
            result = measure()
        except Exception as error:  # whatever a compiler throws: the other rows are worth having
            result = {"error": f"{type(error).__name__}: {error}"[:300]}
        self.add(part, **what, **result, took_s=round(time.monotonic() - start, 1))


def seconds_of(run: Callable[[], Any], least: float = 0.2) -> float:
    """Seconds per call: the best of three rounds, each of at least `least` seconds. The first call is not counted."""
    jax.block_until_ready(run())
    calls, best = 1, float("inf")
    for _ in range(3):
        while True:
            start = time.perf_counter()
            for _ in range(calls):
                result = run()
            jax.block_until_ready(result)
            elapsed = time.perf_counter() - start
            if elapsed >= least:
                break
            calls *= 2
        best = min(best, elapsed / calls)
    return best


def ceiling(report: Report, tiny: bool) -> float:
    """Bytes per second that a copy or a sum moves, whichever is more: what every floor below is computed with."""
    x = jnp.ones((1 << (20 if tiny else 30),), jnp.bfloat16)
    add, total = jax.jit(lambda a: a + 1), jax.jit(lambda a: a.astype(jnp.float32).sum())
    copied = 2 * x.nbytes / seconds_of(lambda: add(x))
    read = x.nbytes / seconds_of(lambda: total(x))
    report.add("ceiling", copy_gb_s=round(copied / 1e9, 1), read_gb_s=round(read / 1e9, 1))
    return max(copied, read)


def random_model(config: MistralConfig, weights: str) -> Any:
    """Random weights, made on the device, so small that activations stay finite; `weights` of the linear layers."""
    model = nnx.eval_shape(lambda: MistralForCausalLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    key = jax.random.key(0)

    def floats(shape: tuple[int, ...]) -> jax.Array:
        return 0.02 * jax.random.normal(key, shape, jnp.bfloat16)

    for path, variable in nnx.to_flat_state(nnx.state(model)):
        module, shape = model, variable.shape
        for name in path[:-1]:
            module = getattr(module, name) if isinstance(name, str) else module[name]
        if len(shape) == 1:
            value: Any = nnx.Param(jnp.ones(shape, jnp.bfloat16))
        elif weights in GROUPS and "_proj" in str(path[-2]):
            value = QuantizedWeight(random_weight(key, shape, weights))
        else:
            value = nnx.Param(jax.jit(floats, static_argnums=0)(shape))
        setattr(module, path[-1], value)
    return model


def weight_bytes(model: Any) -> int:
    """Bytes that one decode step reads: all weights but the embedding, of which it reads a row."""
    return sum(x.nbytes for x in jax.tree.leaves(nnx.state(model))) - model.model.embed_tokens.weight[...].nbytes


def decode_row(model: Any, batch: int, context: int, bandwidth: float) -> dict[str, Any]:
    """Tokens per second around a context: STEPS tokens, the middle one at `context`."""
    config, prompt = model.config, context - STEPS // 2
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, prompt))
    settings = resolve({"max_new_tokens": STEPS + 1}, None, GenerationConfig())
    start = time.perf_counter()
    request = prepare(model, ids, None, settings)
    program = program_for(model, request)
    state = advance(program, request, prefill(program, request), until=1)
    jax.block_until_ready(state.lengths)  # compiles the loop and does not enter it
    compiling = time.perf_counter() - start
    best = float("inf")
    for _ in range(3):
        state = prefill(program, request)
        jax.block_until_ready(state.lengths)
        start = time.perf_counter()
        jax.block_until_ready(advance(program, request, state).lengths)
        best = min(best, time.perf_counter() - start)
    per_step = best / STEPS
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_size * 2 * context * batch
    floor = (weight_bytes(model) + kv) / bandwidth
    return {
        "ms_per_step": round(1e3 * per_step, 3),
        "tokens_per_s": round(batch / per_step, 1),
        "floor_ms": round(1e3 * floor, 3),
        "share_of_floor": round(floor / per_step, 3),
        "compile_s": round(compiling, 1),
        **memory(),
    }


def prefill_row(model: Any, length: int) -> dict[str, Any]:
    """Prompt tokens per second of one row."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length))
    request = prepare(model, ids, None, resolve({"max_new_tokens": 8}, None, GenerationConfig()))
    program = program_for(model, request)
    start = time.perf_counter()
    jax.block_until_ready(prefill(program, request).lengths)
    compiling = time.perf_counter() - start
    seconds = seconds_of(lambda: prefill(program, request).lengths)
    return {
        "tokens_per_s": round(length / seconds),
        "ms": round(1e3 * seconds, 2),
        "compile_s": round(compiling, 1),
        **memory(),
    }


def prompts_row(model: Any, rows: int, length: int) -> dict[str, Any]:
    """What memory many long prompts take at once, at most: with the weights, with their cache, and beside both."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length))
    request = prepare(model, ids, None, resolve({"max_new_tokens": 8}, None, GenerationConfig()))
    state = prefill(program_for(model, request), request)
    jax.block_until_ready(state.lengths)
    cache = sum(x.nbytes for x in jax.tree.leaves(state.cache))
    found = {"cache_gb": round(cache / 1e9, 3), **memory()}
    if "peak_gb" in found:
        found["beside_gb"] = round(found["peak_gb"] - found["cache_gb"] - weight_bytes(model) / 1e9, 3)
    return found


def memory() -> dict[str, Any]:
    """Device memory in use now, and at most so far."""
    stats = jax.devices()[0].memory_stats() or {}
    names = (("bytes_in_use", "memory_gb"), ("peak_bytes_in_use", "peak_gb"))
    return {name: round(stats[field] / 1e9, 3) for field, name in names if field in stats}


def shape(tiny: bool) -> MistralConfig:
    if not tiny:
        return MistralConfig(sliding_window=None, max_position_embeddings=32768)
    return MistralConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=None,
    )  # fmt: skip


def check(report: Report, tiny: bool) -> None:
    """Every kernel on the device against float64: relative errors, in norm."""
    rng, out, inputs = np.random.default_rng(0), 64, 512 if tiny else 4096
    platform = {"interpret": jax.default_backend() != "gpu"}

    def error(got: Any, exact: np.ndarray) -> float:
        return float(np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact))

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    packed = jnp.asarray(rng.integers(0, 256, (out, inputs // 2), np.uint8))

    def uniform(least: float, most: float, *shape: int) -> jax.Array:
        return jnp.asarray(rng.uniform(least, most, shape), jnp.float32)

    groups = out, inputs // GROUPS["int4"]
    scale, offset = (uniform(*limits, *groups).astype(jnp.bfloat16) for limits in ((0.002, 0.02), (-0.02, 0.02)))
    table = Lookup4(packed, uniform(0.01, 0.1, out, inputs // GROUPS["nf4"]), uniform(-1, 1, 16))
    one, some, dense = normal(1, inputs), normal(8, inputs), normal(out, inputs)
    wide_one, wide_some = np.asarray(one, np.float64), np.asarray(some, np.float64)
    for name, stored in (("int4", Int4(packed, scale, offset)), ("lookup", table)):
        weight, exact = stored.for_kernels(), np.asarray(stored.dequantize(), np.float64)
        result = int4_row_product(one, weight, **platform)
        report.add("check", kernel=f"{name}_row", error=error(result, wide_one @ exact.T))
        rows = int4_rows_product(as_columns(some), weight, **platform)[0, :8]
        report.add("check", kernel=f"{name}_rows", error=error(rows, wide_some @ exact.T))
    product = dense_row_product(one, dense, **platform)
    report.add("check", kernel="dense_row", error=error(product, wide_one @ np.asarray(dense, np.float64).T))
    columns = dense_rows_product(as_columns(some), dense, **platform)
    columns = columns.astype(jnp.float32).sum(0)[:8]
    report.add("check", kernel="dense_rows", error=error(columns, wide_some @ np.asarray(dense, np.float64).T))
    total, _ = add_norm(some, some[None], one[0], 1e-5, **platform)
    report.add("check", kernel="add_norm", error=error(total, 2 * wide_some))
    qkv, cache = normal(1, 3, 2, 6, 128), LayerCache(normal(3, 2, 96, 128), normal(3, 2, 96, 128))
    rotation = (jnp.ones((3, 64), jnp.bfloat16), jnp.zeros((3, 64), jnp.bfloat16))
    positions = jnp.asarray([0, 50, 300], jnp.int32)
    mixed, _ = attend(qkv, rotation, positions, cache, **platform)
    plain, _ = attend_plainly(qkv, rotation, Reading.one(positions), cache)
    report.add("check", kernel="attend", error=error(mixed, np.asarray(plain, np.float64)))
    angles = jnp.asarray(rng.uniform(0, 6, (15, 64)))
    qkv, rotation = (
        normal(1, 15, 2, 6, 128),
        (jnp.cos(angles).astype(jnp.bfloat16), jnp.sin(angles).astype(jnp.bfloat16)),
    )
    for kind in ("bfloat16", "int8"):
        cache = LayerCache(*map(to_int8, (cache.keys, cache.values)), window=90) if kind == "int8" else cache
        starts, counts = jnp.asarray([0, 50, 300], jnp.int32), jnp.asarray([5, 2, 4], jnp.int32)
        reading = Reading.several(starts, counts, 5)
        mixed, after = attend(qkv, rotation, starts, cache, newest=reading.newest, **platform)
        plain, wanted = attend_plainly(qkv, rotation, reading, cache)
        real = np.asarray(reading.real).reshape(-1)
        result = error(mixed[real], np.asarray(plain, np.float64)[real])
        keys, exact = (x.read(jnp.dtype("float32"))[0] for x in (after, wanted))
        report.add("check", kernel=f"attend, 5 tokens, {kind}", error=result, keys=error(keys, np.asarray(exact)))


def decoding(report: Report, tiny: bool, bandwidth: float) -> None:
    """Decode, int4 first; the long context last."""
    for weights in ("int4", "nf4", "bf16"):
        model = random_model(shape(tiny), weights)
        jax.block_until_ready(nnx.state(model))
        report.add("model", weights=weights, weight_gb=round(weight_bytes(model) / 1e9, 3), **memory())
        contexts = [(1, 512), (8, 512), (32, 512)] + [(1, 4096), (8, 4096)] * (weights == "int4")
        contexts = contexts[:2] if weights == "nf4" else contexts
        for batch, context in contexts if not tiny else [(1, 128), (8, 128)]:
            what = {"weights": weights, "batch": batch, "context": context}
            report.attempt("decode", what, 30, lambda b=batch, c=context: decode_row(model, b, c, bandwidth))  # noqa: B023
        del model


def profiles(report: Report, tiny: bool) -> None:
    """What a step is made of: microseconds and launches per step of each kernel."""
    model, steps = random_model(shape(tiny), "int4"), 16
    for batch in (1, 8, 32) if not tiny else (1,):
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, 448 if not tiny else 48))
        settings = resolve({"max_new_tokens": STEPS + 1}, None, GenerationConfig())
        request = prepare(model, ids, None, settings)
        program = program_for(model, request)
        state = advance(program, request, prefill(program, request), until=48)
        jax.block_until_ready(state.lengths)
        times = kernel_times(lambda: advance(program, request, state, until=48 + steps).lengths)  # noqa: B023
        made_of = {name: [round(us / steps, 1), round(n / steps, 1)] for name, (us, n) in times.items()}
        report.add("profile", weights="int4", batch=batch, microseconds_and_launches=made_of)


def prefilling(report: Report, tiny: bool) -> None:
    """Prompts of one row; and what memory many rows take."""
    for weights in ("int4", "bf16"):
        model = random_model(shape(tiny), weights)
        for length in (2048,) if not tiny else (64,):
            what = {"weights": weights, "prompt": length}
            report.attempt("prefill", what, 20, lambda n=length: prefill_row(model, n))  # noqa: B023
        rows, length = (32, 2048) if not tiny else (4, 64)
        what = {"weights": weights, "prompt": length, "batch": rows}
        report.attempt("prompts", what, 20, lambda r=rows, n=length: prompts_row(model, r, n))  # noqa: B023
        del model


def in_torch(report: Report, tiny: bool) -> None:
    """transformers and torch on the same GPU, in a process of their own; their rows are read as they come."""
    # The clock is the machine's, the same in every process.
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_torch.py"), f"--until={report.deadline}"]
    command += ["--tiny"] if tiny else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        killer = threading.Timer(report.deadline - time.monotonic(), process.kill)
        killer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                with contextlib.suppress(ValueError):  # what libraries print
                    report.add("torch", **json.loads(line))
        finally:
            killer.cancel()
    if process.returncode:
        report.add("torch", error=f"exit code {process.returncode} (-9: out of time)")


def facts() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    commit = ""
    with contextlib.suppress(OSError):  # no git there
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()
    installed = {}
    for name in ("jax", "jaxlib", "flax", "torch", "transformers"):
        try:
            installed[name] = version(name)
        except ImportError:
            installed[name] = None
    return {
        "command": "python " + " ".join(sys.argv),
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or None,
        "python": platform.python_version(),
        "versions": installed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--minutes", type=float, default=9.0)
    parts = ["check", "promises", "step", "prefill", "profile", "torch"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=[*parts, "graph"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    card = jax.devices()[0].device_kind.replace(" ", "-").lower()
    file = options.out or ROOT / "benchmarks" / "results" / f"gpu-{card}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    report = Report(file, time.monotonic() + 60 * options.minutes, facts())
    bandwidth = ceiling(report, options.tiny)
    for part in [part for part in (*parts, "graph") if part in options.parts]:
        if part == "check":
            check(report, options.tiny)
        elif part == "promises":
            promises(report, options.tiny, random_model)
        elif part == "graph":
            one_graph(report, options.tiny, random_model)
        elif part == "step":
            decoding(report, options.tiny, bandwidth)
        elif part == "prefill":
            prefilling(report, options.tiny)
        elif part == "profile":
            profiles(report, options.tiny)
        else:
            in_torch(report, options.tiny)


if __name__ == "__main__":
    main()
