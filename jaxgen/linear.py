"""The one matrix product of the model: `x @ weight.T`, in the form that each platform runs fastest."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def product(formula: str, first: Array, second: Array, **options: Any) -> Array:
    """`jnp.einsum` that means float32 where it says float32: the default leaves GPUs free to round operands to TF32."""
    precision = jax.lax.Precision.HIGHEST if first.dtype == jnp.float32 else None
    return jnp.einsum(formula, first, second, precision=precision, **options)


def linear(x: Float[Array, "*rows I"], weight: Float[Array, "O I"]) -> Float[Array, "*rows O"]:
    """`x @ weight.T` for any number of rows; weight `[out, in]` as in HF.

    The platform is chosen when the computation is lowered, not when it is traced.
    """
    return jax.lax.platform_dependent(x, weight, cpu=_weight_first, default=_weight_second)


def _weight_second(x: Float[Array, "*rows I"], weight: Float[Array, "O I"]) -> Float[Array, "*rows O"]:
    return product("...i,oi->...o", x, weight)


def _weight_first(x: Float[Array, "*rows I"], weight: Float[Array, "O I"]) -> Float[Array, "*rows O"]:
    """XLA:CPU reads the weights of 2 to 32 rows two to four times as fast when they are the left operand.

    Without the barrier XLA would fold the transposition into the product, and swap its operands back. Float16 is
    summed in float32, as GPUs do: left alone, XLA:CPU of jax 0.7.2 sums it in float16.
    """
    rows = x.reshape(-1, x.shape[-1])
    sums = jnp.float32 if x.dtype == jnp.float16 else None
    transposed = product("oi,ri->or", weight, rows, preferred_element_type=sums).astype(x.dtype)
    transposed = jax.lax.optimization_barrier(transposed)
    return transposed.T.reshape(*x.shape[:-1], weight.shape[0])
