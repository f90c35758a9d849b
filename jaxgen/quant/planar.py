"""The order of columns that GPU kernels read: codes of neighbouring columns in neighbouring words.

Eight codes of four bits share a 32-bit word. As files have them, these are eight neighbouring columns. In planar order
a block of columns (a group, at most 128) is dealt out to its words like cards: column `j * words + t` of the block is
code j of word t. A program that reads the words as they lie then also reads x as it lies. It is a permutation of
columns within each group, so that group scales, offsets and sums over groups stay what they are.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

_BLOCKS = (32, 64, 128)  # columns; a row of a tile is then 16 to 64 bytes


def block_size(group_size: int) -> int:
    """The columns of a block for a group size, or 0 where kernels cannot read such groups."""
    size = math.gcd(group_size, _BLOCKS[-1])
    return size if size in _BLOCKS else 0


def to_planar(x: Any, block: int) -> Any:
    """The last axis in the order in which planar blocks store their columns; as it is for a block of 0.

    Numpy in, numpy out.

    >>> to_planar(jnp.arange(32), 32)[:9].tolist()
    [0, 4, 8, 12, 16, 20, 24, 28, 1]
    """
    return _swapped(x, block, 8)


def from_planar(x: Any, block: int) -> Any:
    """The inverse of `to_planar`."""
    return _swapped(x, block, block // 8)


def _swapped(x: Any, block: int, first: int) -> Any:
    if not block:
        return x
    return x.reshape(*x.shape[:-1], -1, first, block // first).swapaxes(-1, -2).reshape(x.shape)


def planar(weight: Any) -> Any:
    """An `Int4`, or one below an adapter, with its columns in planar order; anything else as it is."""
    if hasattr(weight, "base"):
        return dataclasses.replace(weight, base=planar(weight.base))
    if getattr(weight, "planar", None) != 0 or not block_size(weight.group_size):
        return weight
    block = block_size(weight.group_size)
    return dataclasses.replace(weight, packed=_repacked(weight.packed, block, 8), planar=block)


def as_stored(weight: Any) -> Any:
    """The inverse of `planar`: with the bytes that files have."""
    if hasattr(weight, "base"):
        return dataclasses.replace(weight, base=as_stored(weight.base))
    if not getattr(weight, "planar", 0):
        return weight
    packed = _repacked(weight.packed, weight.planar, weight.planar // 8)
    return dataclasses.replace(weight, packed=packed, planar=0)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _repacked(packed: Array, block: int, first: int) -> Array:
    nibbles = jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    nibbles = _swapped(nibbles, block, first)
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
