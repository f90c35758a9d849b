"""Kernels of a decode step on this GPU: which tile is fastest, by device time, and what each shape's floor is.

    python benchmarks/kernels.py                       # all products of the 7B shape, for 1, 8 and 32 rows
    python benchmarks/kernels.py --rows 1 --products gate_up down

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
from jaxgen.quant import Int4

PRODUCTS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
GROUP = 128
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
    return [(name, time) for name, time in times.items() if name.startswith(("int4_", "dense_"))]


def candidates(product: str, rows: int, dense: bool) -> Iterable[Candidate]:
    """What may be fastest for a product of the 7B shape, with what stands around it in a step."""
    out, inputs = PRODUCTS[product]
    ones, swiglu = jnp.ones((inputs,), jnp.bfloat16), product == "gate_up"
    around: dict[str, Any] = {"norm": (ones, 1e-5), "swiglu": swiglu}
    if product in ("o", "down"):
        around = {"residual": jnp.zeros((1, out), jnp.bfloat16)}
    if dense and rows > 1:
        sizes = [(64, 128, 4, 4), (64, 128, 2, 3), (64, 64, 2, 5), (64, 256, 4, 3), (128, 64, 8, 4), (128, 128, 4, 3)]
        for (outputs, columns, warps, stages), splits in itertools.product(sizes, (1,) if swiglu else (1, 2, 4, 8)):
            if swiglu or 90 <= out // outputs * splits <= 520:
                tile = dense_rows.Tile(outputs, columns, splits, warps, stages)
                yield Candidate(tile, lambda w, x, t=tile: dense_rows.dense_rows_product(x, w, tile=t, swiglu=swiglu))
        if not swiglu:
            yield Candidate("XLA", lambda w, x: x.T @ w.T)
    elif dense:
        for tile in itertools.starmap(dense_row.Tile, [(4, 512, 4), (8, 512, 4), (2, 1024, 4), (4, 1024, 4)]):
            yield Candidate(tile, lambda w, x, t=tile: dense_row.dense_row_product(x, w, tile=t, **around))
    elif rows == 1:
        sizes = [(8, 16, 2), (4, 16, 2), (8, 32, 4), (4, 32, 4), (8, 8, 2), (4, 8, 1)]
        for size, ahead in itertools.product(sizes, (False, True)):
            tile = int4_row.Tile(*size, ahead)
            yield Candidate(tile, lambda w, x, t=tile: int4_row.int4_row_product(x, w, tile=t, **around))
    else:
        sizes = [(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (64, 128, 4, 2), (128, 32, 8, 3)]
        for (outputs, words, warps, stages), splits in itertools.product(sizes, (1,) if swiglu else (1, 2, 4, 8)):
            if swiglu or 120 <= out // outputs * splits <= 520:
                tile = int4_rows.Tile(outputs, words, splits, warps, stages)
                yield Candidate(tile, lambda w, x, t=tile: int4_rows.int4_rows_product(x, w, tile=t, swiglu=swiglu))


def weights_of(product: str, dense: bool) -> list[Any]:
    """Random weights, as many as no cache holds."""
    out, inputs = PRODUCTS[product]
    keys = jax.random.split(jax.random.key(0), int(_CACHE / (out * inputs * (2 if dense else 0.5))) + 1)
    if dense:
        return [jax.random.normal(key, (out, inputs), jnp.bfloat16) for key in keys]
    scale = jnp.full((out, inputs // GROUP), 0.004, jnp.bfloat16)
    return [Int4(jax.random.bits(key, (out, inputs // 2), jnp.uint8), scale, planar=GROUP) for key in keys]


def races(rows: Iterable[int], products: Iterable[str], dense: bool) -> Iterable[dict[str, Any]]:
    """One finished row after the other."""
    for product, count in itertools.product(products, rows):
        inputs = PRODUCTS[product][1]
        x = jax.random.normal(jax.random.key(1), (count, inputs), jnp.bfloat16)
        x = x if count == 1 else int4_rows.as_columns(x)
        weights = weights_of(product, dense)
        results = race(list(candidates(product, count, dense)), weights, x)
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights[0]))
        yield {
            "product": product, "rows": count, "weights": "bf16" if dense else "int4", "bytes": nbytes,
            "microseconds": [[round(time, 1), str(tile)] for time, tile in results[:4]],
            "best": results[0][1],
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--products", nargs="+", default=list(PRODUCTS), choices=list(PRODUCTS))
    parser.add_argument("--dense", action="store_true", help="of 16-bit floats")
    options = parser.parse_args()
    for row in races(options.rows, options.products, options.dense):
        out, inputs = PRODUCTS[row["product"]]
        shape = (out, inputs) if row["rows"] == 1 else (row["rows"], out, inputs)
        print(row["product"], row["microseconds"], flush=True)
        print(f"    {shape}: {row['best']},", flush=True)


if __name__ == "__main__":
    main()
