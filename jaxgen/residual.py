"""The residual stream while decoding by XLA's forms: adding to it, and normalising it for the next projection.

`jaxgen.kernels` do both inside of others.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.lowering import target

Norm = Callable[[Array], Array]


def add_and_norm(x: Float[Array, "B 1 D"], delta: Float[Array, "B 1 D"], norm: Norm) -> tuple[Array, Array]:
    """`x + delta`, and its norm: of what is computed from the norm, keep the first B rows.

    On a GPU and for one row the norm has a second row, and it is the sum. XLA:GPU normalises a matrix in one kernel
    but a lone row in two, and would need another one, every few additions, for the sum. Two rows cost a product no
    more than one: it reads its weight once. Without it a layer of the 7B shape takes three launches more.
    """
    total = x + delta
    if not (target().gpu_decode and len(x) == 1):
        return total, norm(total)
    first = jnp.arange(2)[:, None, None] == 0
    normed = norm(jnp.where(first, total, 0))
    both = jax.lax.optimization_barrier(jnp.where(first, normed, total))  # or the sum would be computed twice
    return both[1:], both
