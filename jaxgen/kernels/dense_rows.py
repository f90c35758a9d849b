"""The product of 2 to 64 rows with a weight of 16-bit floats, on a GPU, with what stands around it.

As `int4_rows`, without anything to unpack: rows come as columns `[I, M]`, a program computes some outputs of all rows
over one of the parts that the columns of the weight are split into, and the parts come back apart. XLA's own product
is as fast, but adds up its parts in a launch of its own, and its activation is another one.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxgen.kernels import backend
from jaxgen.kernels.backend import pl
from jaxgen.kernels.int4_rows import write_sums

_PROGRAMS = 256  # that fill a GPU


@dataclasses.dataclass(frozen=True)
class Tile:
    """`outputs` outputs per program, `columns` columns of a row at a time, the columns in `splits` parts."""

    outputs: int = 64
    columns: int = 128
    splits: int = 1
    warps: int = 4
    stages: int = 4


def tile_for(outputs: int, inputs: int, swiglu: bool) -> Tile:
    """Enough programs to fill a GPU, each with at least 1,024 columns; `swiglu` allows no split."""
    splits, rows = 1, 64 if outputs > 512 else 16
    while not swiglu and -(-outputs // rows) * splits < _PROGRAMS and inputs // (2 * splits) >= 1024:
        splits *= 2
    return Tile(outputs=rows, splits=splits)


def _kernel(weight: Any, x: Any, out: Any, *, tile: Tile, swiglu: bool, interpret: bool) -> None:
    outputs, inputs = weight.shape
    clamped = backend.clamped_pairs if swiglu else backend.clamped
    rows_out, rows = clamped(pl.program_id(0) * tile.outputs, tile.outputs, outputs), backend.arange(x.shape[1])
    steps = pl.cdiv(pl.cdiv(inputs, tile.columns), tile.splits)
    even = inputs % (tile.columns * tile.splits) == 0

    def body(step: Any, total: Array) -> Array:
        column, mask = step * tile.columns + backend.arange(tile.columns), None
        if not even:
            mask = jnp.broadcast_to((column < inputs)[:, None], (tile.columns, len(rows)))
            column = jnp.minimum(column, inputs - 1)
        tile_of_weight = weight[rows_out[:, None], column[None, :]]
        return total + backend.dot(tile_of_weight, backend.load(x, (column[:, None], rows[None, :]), mask), interpret)

    first = pl.program_id(1) * steps
    total = lax.fori_loop(first, first + steps, body, jnp.zeros((tile.outputs, len(rows)), jnp.float32))
    write_sums(out, total, rows_out, tile.outputs, outputs, swiglu)


def dense_rows_product(
    x: Float[Array, "I M"],
    weight: Float[Array, "O I"],
    *,
    swiglu: bool = False,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float[Array, "splits M O"] | Float[Array, "P M"]:
    """`x.T @ weight.T` for 16-bit columns x and a weight of their dtype; options and results as of `int4_rows`."""
    (outputs, inputs), rows = weight.shape, x.shape[1]
    tile = tile or tile_for(outputs, inputs, swiglu)
    dtype = x.dtype if tile.splits == 1 else jnp.float32
    shape = (outputs // 2, rows) if swiglu else (tile.splits, rows, outputs)
    return backend.call(
        functools.partial(_kernel, tile=tile, swiglu=swiglu, interpret=interpret), weight, x,
        grid=(pl.cdiv(outputs, tile.outputs), tile.splits), out=jax.ShapeDtypeStruct(shape, dtype), name="dense_rows",
        warps=tile.warps, stages=tile.stages, interpret=interpret,
    )  # fmt: skip
