"""The order of columns that GPU kernels read: codes of neighbouring columns in neighbouring words.

Eight codes of four bits share a 32-bit word. As files have them, these are eight neighbouring columns. In planar order
a block of columns (a group, at most 128) is dealt out to its words like cards: column `j * words + t` of the block is
code j of word t. A program that reads the words as they lie then also reads x as it lies. It is a permutation of
columns within each group, so that group scales, offsets and sums over groups stay what they are.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

_BLOCKS = (32, 64, 128)  # columns; a row of a tile is then 16 to 64 bytes


def block_size(group_size: int) -> int:
    """The columns of a block for a group size, or 0 where kernels cannot read such groups."""
    size = math.gcd(group_size, _BLOCKS[-1])
    return size if size in _BLOCKS else 0


def to_planar(x: object, block: int) -> Any:
    """The last axis in the order in which planar blocks store their columns; as it is for a block of 0.

    Numpy in, numpy out.

    >>> to_planar(jnp.arange(32), 32)[:9].tolist()
    [0, 4, 8, 12, 16, 20, 24, 28, 1]
    """
    return _swapped(x, block, 8)


def codes_in_order(packed: Any, block: int) -> UInt32[Array, "O I"]:
    """The codes, 0 to 15, of packed bytes with planar blocks, in HF's order of columns."""
    packed = jnp.asarray(packed)
    if block:
        words = jax.lax.bitcast_convert_type(packed.reshape(len(packed), -1, 1, block // 8, 4), jnp.uint32)
        codes = jnp.right_shift(words, jnp.arange(0, 32, 4, dtype=jnp.uint32)[:, None]) & 15
    else:
        codes = jax.lax.platform_dependent(packed.astype(jnp.uint32), cpu=_stacked, default=_shifted)
    return codes.reshape(len(packed), -1)


def _stacked(packed: UInt32[Array, "O bytes"]) -> UInt32[Array, "O bytes 2"]:
    return jnp.stack([packed & 15, packed >> 4], axis=-1)


def _shifted(packed: UInt32[Array, "O bytes"]) -> UInt32[Array, "O bytes 2"]:
    """As `_stacked`: XLA:GPU makes wider loads and stores of it, and XLA:CPU takes longer."""
    return jnp.right_shift(packed[..., None], jnp.arange(0, 8, 4, dtype=jnp.uint32)) & 15


def _swapped(x: Any, block: int, first: int) -> Any:
    if not block:
        return x
    return x.reshape(*x.shape[:-1], -1, first, block // first).swapaxes(-1, -2).reshape(x.shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def swap_order(packed: Array, block: int, first: int) -> Array:
    """Packed codes into planar order (`first` = 8), or back (`first` = block // 8)."""
    nibbles = jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    nibbles = _swapped(nibbles, block, first)
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
