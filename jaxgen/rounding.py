"""Products that are rounded before anything is done with them."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rounded(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The same numbers, of which a product has been rounded to float32 whatever program it is in.

    Where a product and the sum that takes it are in one loop, XLA's compilers make them one operation that rounds
    once (a fused multiply-add), and two products with numbers become one; whether they are in one loop is different in
    different programs. Neither `optimization_barrier` nor `reduce_precision` keeps XLA:CPU from it. A choice does.

    >>> rounded(jnp.array([1.5, -jnp.inf])).tolist()
    [1.5, -inf]
    """
    return jnp.where(jnp.isnan(x), jnp.nan, x)
