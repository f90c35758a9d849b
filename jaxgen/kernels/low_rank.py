"""The low-rank part of an adapted weight (LoRA), `up @ (down @ x)`, beside the product with its base, on a GPU.

`down @ x` is a launch of its own, of a few outputs; what `up` makes of it is added to the sums of the base's kernel
before they go anywhere: it costs no launch, and reads `up` once.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.kernels import backend
from jaxgen.kernels.backend import pl


def added_to_row(sums: Float[Array, " n"], rows: Array, hidden: Any, up: Any) -> Float[Array, " n"]:
    """A program's sums of one row, with what belongs to them of `up` `[O, r]` times `hidden` `[r]`."""
    rank = up.shape[1]
    inner = backend.clamped(0, backend.power_of_two(rank), rank)
    value = hidden[inner].astype(jnp.float32)
    if len(inner) != rank:
        value = jnp.where(backend.arange(len(inner)) < rank, value, 0)
    return sums + (up[rows[:, None], inner[None, :]].astype(jnp.float32) * value[None]).sum(1)


def added_to_rows(
    total: Float[Array, "n M"], rows: Array, hidden: Any, up: Any, interpret: bool
) -> Float[Array, "n M"]:
    """The same of M rows: `hidden` are parts `[S, M, r]` that are to be added. The first part of `total` has it all."""
    rank, column = up.shape[1], backend.arange(total.shape[1])
    inner = backend.clamped(0, max(16, backend.power_of_two(rank)), rank)
    value = jnp.zeros((len(inner), len(column)), jnp.float32)
    for part in range(hidden.shape[0]):
        value = value + hidden[part, column[None, :], inner[:, None]].astype(jnp.float32)
    if len(inner) != rank:
        value = jnp.where((backend.arange(len(inner)) < rank)[:, None], value, 0)
    tile = up[rows[:, None], inner[None, :]]
    correction = backend.dot(tile, value.astype(tile.dtype), interpret)
    return total + jnp.where(pl.program_id(1) == 0, correction, 0)
