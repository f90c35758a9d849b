"""Kernels of a decode step on this GPU: which tile is fastest, by device time, and what each shape's floor is.

    python benchmarks/kernels.py                       # all products of the 7B shape, for 1, 8 and 32 rows
    python benchmarks/kernels.py --rows 1 --products gate_up down
    python benchmarks/kernels.py --weights nf4         # and those of 16-entry tables
    python benchmarks/kernels.py --tiny                # small shapes, on any machine: shows that the script works

Prints one row per product, the fastest tiles first, and the lines that `jaxgen/kernels/tiles.py` wants. Times are those
of the kernels themselves, from JAX's profiler: a clock around a program of a few microseconds measures the host. Every
launch reads another copy of the weight, so that none is found in the chip's cache.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from jaxgen.kernels import dense_row, dense_rows, int4_row, int4_rows
from jaxgen.quant import Int4, Lookup4

PRODUCTS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
_TINY = {name: (out // 256, inputs // 16) for name, (out, inputs) in PRODUCTS.items()}
GROUPS = {"int4": 128, "nf4": 64}
_CACHE = 170e6  # bytes: more than any chip's cache holds


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A tile, and the kernel that runs with it on `(weight, x)`."""

    tile: Any
    run: Callable[[Any, Any], Any]


def kernel_times(run: Callable[[], Any]) -> dict[str, tuple[float, int]]:
    """Microseconds in all, and launches, of each kernel that `run` starts. `run` has been compiled before."""
    totals: collections.Counter[str] = collections.Counter()
    launches: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            lines = plane.lines if "GPU" in plane.name else ()
            for event in itertools.chain.from_iterable(line.events for line in lines if line.name.startswith("Stream")):
                totals[event.name] += event.duration_ns / 1e3
                launches[event.name] += 1
    return {name: (total, launches[name]) for name, total in totals.most_common()}


def race(candidates: Sequence[Candidate], weights: Sequence[Any], x: Any) -> list[tuple[float, Any]]:
    """Microseconds per launch and tile, the fastest first; what the compiler refuses is left out."""

    def compiled(candidate: Candidate) -> Any:
        try:
            program = jax.jit(candidate.run).lower(weights[0], x).compile()
            jax.block_until_ready(program(weights[0], x))
        except Exception:  # too much shared memory, most often: the others are worth having
            return None
        return program

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        programs = list(pool.map(compiled, candidates))
    results = []
    for candidate, program in zip(candidates, programs, strict=True):
        if program is not None:
            times = kernel_times(lambda: [program(weight, x) for weight in weights])  # noqa: B023
            mine = times.items() if candidate.tile == "XLA" else own_kernels(times)
            total = sum(time for _, (time, _) in mine)
            results.append((total / len(weights), candidate.tile))
    return sorted(results, key=lambda result: result[0])


def own_kernels(times: dict[str, tuple[float, int]]) -> list[tuple[str, tuple[float, int]]]:
    """Those of `jaxgen.kernels`, without what prepares their arguments."""
    return [(name, time) for name, time in times.items() if name.startswith(("int4_", "lookup_", "dense_"))]


def candidates(shape: tuple[int, int], product: str, rows: int, kind: str) -> Iterable[Candidate]:
    """What may be fastest for a product of the 7B shape, with what stands around it in a step."""
    out, inputs = shape
    ones, swiglu = jnp.ones((inputs,), jnp.bfloat16), product == "gate_up"
    interpret = jax.default_backend() != "gpu"
    around: dict[str, Any] = {"norm": (ones, 1e-5), "swiglu": swiglu, "interpret": interpret}
    if product in ("o", "down"):
        around = {"residual": jnp.zeros((1, out), jnp.bfloat16), "interpret": interpret}
    options: dict[str, Any] = {"swiglu": swiglu, "interpret": interpret}
    if kind == "bf16" and rows > 1:
        sizes = [(64, 128, 4, 4), (64, 128, 2, 3), (64, 64, 2, 5), (64, 256, 4, 3), (128, 64, 8, 4), (128, 128, 4, 3)]
        for (outputs, columns, warps, stages), splits in itertools.product(sizes, (1,) if swiglu else (1, 2, 4, 8)):
            if swiglu or interpret or 90 <= out // outputs * splits <= 520:
                tile = dense_rows.Tile(outputs, columns, splits, warps, stages)
                yield Candidate(tile, lambda w, x, t=tile: dense_rows.dense_rows_product(x, w, tile=t, **options))
        if not swiglu:
            yield Candidate("XLA", lambda w, x: x.T @ w.T)
    elif kind == "bf16":
        for tile in itertools.starmap(dense_row.Tile, [(4, 512, 4), (8, 512, 4), (2, 1024, 4), (4, 1024, 4)]):
            yield Candidate(tile, lambda w, x, t=tile: dense_row.dense_row_product(x, w, tile=t, **around))
    elif rows == 1:
        sizes = [(8, 16, 2), (4, 16, 2), (8, 32, 4), (4, 32, 4), (8, 8, 2), (4, 8, 1), (16, 16, 2), (16, 8, 1)]
        for (height, blocks, warps), ahead in itertools.product(sizes, (False, True)):
            tile = int4_row.Tile(height, blocks * 128 // GROUPS[kind], warps, ahead)
            yield Candidate(tile, lambda w, x, t=tile: int4_row.int4_row_product(x, w, tile=t, **around))
    else:
        sizes = [
            (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (64, 32, 2, 4), (64, 128, 4, 2),
            (128, 32, 8, 3), (128, 32, 4, 3),
        ]  # fmt: skip
        for (outputs, words, warps, stages), splits in itertools.product(sizes, (1,) if swiglu else (1, 2, 4, 8)):
            if swiglu or interpret or 120 <= out // outputs * splits <= 520:
                tile = int4_rows.Tile(outputs, words, splits, warps, stages)
                yield Candidate(tile, lambda w, x, t=tile: int4_rows.int4_rows_product(x, w, tile=t, **options))


def weights_of(shape: tuple[int, int], kind: str) -> list[Any]:
    """Random weights, as many as no cache holds."""
    out, inputs = shape
    copies = int(_CACHE / (out * inputs * (2 if kind == "bf16" else 0.5))) + 1
    keys = jax.random.split(jax.random.key(0), copies if jax.default_backend() == "gpu" else 1)
    if kind == "bf16":
        return [jax.random.normal(key, (out, inputs), jnp.bfloat16) for key in keys]
    return [random_weight(key, shape, kind) for key in keys]


def random_weight(key: jax.Array, shape: tuple[int, int], kind: str) -> Int4 | Lookup4:
    """Packed codes of a kind, as kernels read them, in groups of its usual size; so small that sums stay finite."""
    (out, inputs), group = shape, GROUPS[kind]
    packed = jax.random.bits(key, (out, inputs // 2), jnp.uint8)
    if kind == "int4":
        return Int4(packed, jnp.full((out, inputs // group), 0.004, jnp.bfloat16), planar=group)
    scale = jnp.full((out, inputs // group), 0.03, jnp.float32)
    return Lookup4(packed, scale, jnp.linspace(-1, 1, 16), planar=group)


def races(
    shapes: dict[str, tuple[int, int]], rows: Iterable[int], products: Iterable[str], kind: str, most: int | None
) -> Iterable[dict[str, Any]]:
    """One finished row after the other."""
    for product, count in itertools.product(products, rows):
        shape = shapes[product]
        x = jax.random.normal(jax.random.key(1), (count, shape[1]), jnp.bfloat16)
        x = x if count == 1 else int4_rows.as_columns(x)
        weights = weights_of(shape, kind)
        results = race(list(candidates(shape, product, count, kind))[:most], weights, x)
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights[0]))
        yield {
            "product": product, "rows": count, "weights": kind, "bytes": nbytes,
            "microseconds": [[round(time, 1), str(tile)] for time, tile in results[:4]],
            "best": results[0][1],
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--products", nargs="+", default=list(PRODUCTS), choices=list(PRODUCTS))
    parser.add_argument("--weights", default="int4", choices=["int4", "nf4", "bf16"])
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    shapes, most = (_TINY, 2) if options.tiny else (PRODUCTS, None)
    for row in races(shapes, options.rows, options.products, options.weights, most):
        out, inputs = shapes[row["product"]]
        shape = (out, inputs) if row["rows"] == 1 else (row["rows"], out, inputs)
        print(row["product"], row["microseconds"], flush=True)
        print(f"    {shape}: {row['best']},", flush=True)


if __name__ == "__main__":
    main()
