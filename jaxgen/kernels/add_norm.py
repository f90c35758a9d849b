"""The residual stream between two products, on a GPU: what is to be added to it, and its norm, in one kernel.

A program takes one row. It adds the parts of a split product in their order, in float32, adds the row of the residual
stream, rounds the sum to the stream's dtype, and normalises that as `RMSNorm` does.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxgen.kernels import backend
from jaxgen.kernels.backend import pl


def _kernel(x: Any, weight: Any, *references: Any, eps: float, columns: int) -> None:
    *parts, out, normed = references
    row, width = pl.program_id(0), x.shape[1]
    column = backend.clamped(0, backend.power_of_two(width), width)
    total = jnp.zeros(column.shape, jnp.float32)
    for part in range(parts[0].shape[0] if parts else 0):
        total = total + parts[0][part, row, column].astype(jnp.float32)
    total = (x[row, column].astype(jnp.float32) + total).astype(out.dtype)
    out[row, column] = total
    total = total.astype(jnp.float32)
    squares = total * total
    if len(column) != width:  # the clamped ones are repetitions of the last
        squares = jnp.where(backend.arange(len(column)) < width, squares, 0)
    scaled = total * lax.rsqrt(squares.sum(0) / width + eps)
    result = weight[column] * scaled.astype(normed.dtype)
    if columns:
        normed[column, row] = result
    else:
        normed[row, column] = result


def add_norm(
    x: Float[Array, "B D"],
    parts: Float[Array, "S M D"] | None,
    weight: Float[Array, " D"],
    eps: float,
    *,
    columns: int = 0,
    interpret: bool = False,
) -> tuple[Float[Array, "B D"], Array]:
    """`x` plus the sum of `parts`, if there are any, and its RMS norm: `[B, D]`, or `[D, columns]` for `int4_rows`.

    `parts` may have more than B rows.
    """
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    normed = jax.ShapeDtypeStruct((x.shape[1], columns), x.dtype) if columns else out
    warps = 8 if x.shape[1] >= 2048 else 4
    kernel = functools.partial(_kernel, eps=eps, columns=columns)
    arguments = [x, weight] if parts is None else [x, weight, parts]
    return backend.call(
        kernel, *arguments, grid=(len(x),), out=(out, normed), name="add_norm", warps=warps, interpret=interpret
    )


def add_norm_plainly(
    x: Float[Array, "B D"], parts: Float[Array, "S B D"], weight: Float[Array, " D"], eps: float
) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
    """The same in plain JAX."""
    total = (x.astype(jnp.float32) + parts.astype(jnp.float32).sum(0)).astype(x.dtype)
    wide = total.astype(jnp.float32)
    scaled = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return total, weight * scaled.astype(x.dtype)
