"""Where to cut logits without sorting them.

A sort of the vocabulary is the most expensive thing a sampling step could do, by far. Floats compare like the
integers that their bits spell once the sign is seen to, so a cut can be found by bisection over those bits: as
many passes over the row as there are bits, each one a compare and a sum.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

Numbers = UInt32[Array, " R"]
Fits = Callable[[Numbers], Bool[Array, " R"]]


def ordered_keys(values: Float[Array, "R V"]) -> UInt32[Array, "R V"]:
    """Integers in the order of float32 `values`; -0 and 0 get the same one. NaN has no place in the order."""
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def largest(fits: Fits, rows: int, bits: int = 32) -> Numbers:
    """Each row's largest number of `bits` bits that fits, where 0 fits, and all below a number that fits.

    One bit per pass where passes are what costs (CPU), four where it is the number of passes (a GPU waits for each).
    """

    def search(width: int) -> Numbers:
        passes = -(-bits // width)

        def settle(step: Int[Array, ""], found: Numbers) -> Numbers:
            shift = ((passes - 1 - step) * width).astype(jnp.uint32)
            steps = [fits(found + (jnp.uint32(digit) << shift)) for digit in range(1, 1 << width)]
            return found + (sum(step.astype(jnp.uint32) for step in steps) << shift)

        return jax.lax.fori_loop(0, passes, settle, jnp.zeros(rows, jnp.uint32))

    return jax.lax.platform_dependent(cpu=lambda: search(1), default=lambda: search(4))


def count(mask: Bool[Array, "R V"]) -> Int[Array, " R"]:
    """How many entries of a row are set."""
    return mask.sum(axis=1, dtype=jnp.int32)


def best_of(values: Float[Array, "R V"], number: int) -> tuple[Float[Array, "R N"], Int[Array, "R N"]]:
    """The `number` largest entries of each row, or all, in descending order, and where they are.

    XLA:CPU has a quick way for it, which it no longer sees once it has merged the result with a constant slice of
    it; then it sorts the whole vocabulary. The barrier keeps them apart.
    """
    best, index = map(jax.lax.optimization_barrier, jax.lax.top_k(values, min(number, values.shape[1])))
    return best, index


def top_tokens(values: Float[Array, "R V"], number: int) -> Bool[Array, "R V"]:
    """The `number` largest entries of each row, the first ones of equals; all of them if there are no more."""
    _, index = best_of(values, number)
    rows = jnp.arange(values.shape[0])[:, None]
    return jnp.zeros(values.shape, bool).at[rows, index].set(True)
