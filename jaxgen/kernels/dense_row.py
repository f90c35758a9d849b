"""The product of one row with a weight of 16-bit floats, on a GPU, with what stands around it in the same launch.

As `int4_row`, without anything to unpack: a program computes ROWS outputs, COLUMNS columns at a time, in float32. XLA's
own product is as fast, but its norm, activation and addition are launches of their own, and a long row takes two.
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
from jaxgen.kernels.int4_row import write_row


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program does; of those raced on an H200 this is the fastest, or near it, for every product of a 7B."""

    rows: int = 4
    columns: int = 512
    warps: int = 4


def _kernel(
    weight: Any, x: Any, *references: Any, tile: Tile, eps: float | None, swiglu: bool, residual: bool,
    interpret: bool,
) -> None:  # fmt: skip
    *others, out = references
    norm = others.pop(0) if eps is not None else None
    outputs, inputs = weight.shape
    fma = functools.partial(backend.fma, interpret=interpret)
    clamped = backend.clamped_pairs if swiglu else backend.clamped
    rows = clamped(pl.program_id(0) * tile.rows, tile.rows, outputs)

    def body(step: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total, squares = carry
        column = backend.clamped(step * tile.columns, tile.columns, inputs)
        tile_of_weight = weight[rows[:, None], column[None, :]].astype(jnp.float32)
        value = x[column].astype(jnp.float32)
        if inputs % tile.columns:
            value = jnp.where(step * tile.columns + backend.arange(tile.columns) < inputs, value, 0)
        if norm is not None:
            squares = fma(value, value, squares)
            value = value * norm[column].astype(jnp.float32)
        return fma(tile_of_weight, value[None], total), squares

    empty = jnp.zeros((tile.rows, tile.columns), jnp.float32), jnp.zeros((tile.columns,), jnp.float32)
    total, squares = lax.fori_loop(0, pl.cdiv(inputs, tile.columns), body, empty)
    sums = total.sum(1)
    if eps is not None:
        sums = sums * lax.rsqrt(squares.sum(0) / inputs + eps)
    write_row(out, sums, rows, outputs, others[0] if residual else None, swiglu)


def dense_row_product(
    x: Float[Array, "1 I"],
    weight: Float[Array, "O I"],
    *,
    norm: tuple[Float[Array, " I"], float] | None = None,
    residual: Float[Array, "1 O"] | None = None,
    swiglu: bool = False,
    tile: Tile = Tile(),
    interpret: bool = False,
) -> Float[Array, "1 P"]:
    """`x @ weight.T` for one row, summed in float32 and rounded to x's dtype; options as of `int4_row_product`."""
    arguments = [weight, x[0]]
    arguments += [] if norm is None else [norm[0]]
    arguments += [] if residual is None else [residual[0]]
    kernel = functools.partial(
        _kernel, tile=tile, eps=None if norm is None else norm[1], swiglu=swiglu, residual=residual is not None,
        interpret=interpret,
    )  # fmt: skip
    outputs = len(weight)
    out = jax.ShapeDtypeStruct((outputs // 2 if swiglu else outputs,), x.dtype)
    grid = (pl.cdiv(outputs, tile.rows),)
    return backend.call(
        kernel, *arguments, grid=grid, out=out, name="dense_row", warps=tile.warps, interpret=interpret
    )[None]
