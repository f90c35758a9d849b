"""Four-bit codes in 32-bit words, and from them to `Int4`: what GPTQ, AWQ and compressed-tensors have in common."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int32, Integer, Shaped, UInt8

from jaxgen.quant import Int4

_SIGNED = np.uint8(0x88)  # turns codes 0 to 15 around 8 into -8 to 7, two at a time


def nibbles(words: Shaped[np.ndarray, "R W"], order: Sequence[int] = range(8)) -> UInt8[np.ndarray, "R C"]:
    """The eight codes 0 to 15 of each word, in its row: the i-th from the lowest bits comes to place `order[i]`."""
    words = words.view(np.uint32)
    codes = np.empty((*words.shape, 8), np.uint8)
    for index, place in enumerate(order):
        codes[..., place] = (words >> np.uint32(4 * index)) & np.uint32(15)
    return codes.reshape(len(words), -1)


def from_words(words: Int32[np.ndarray, "O W"]) -> UInt8[np.ndarray, "O B"]:
    """`Int4.packed` from words that hold the codes 0 to 15 of a row in its order, from the lowest bits on."""
    return np.ascontiguousarray(words).view(np.uint8) ^ _SIGNED


def from_columns(codes: UInt8[np.ndarray, "I O"]) -> UInt8[np.ndarray, "O B"]:
    """`Int4.packed` from the codes 0 to 15 of the transposed weight, one to a byte."""
    return np.ascontiguousarray((codes[::2] | codes[1::2] << np.uint8(4)).T) ^ _SIGNED


def int4(
    packed: UInt8[np.ndarray, "O B"],
    scale: Float[np.ndarray, "O G"],
    zeros: UInt8[np.ndarray, "O G"] | None = None,
    permutation: Int32[np.ndarray, " I"] | None = None,
) -> Int4:
    """The weight `(code - zero) * scale` of codes 0 to 15, where no zero points mean 8.

    `packed` has the columns in HF's order, whose groups are contiguous in the order `permutation`.
    """
    offset = None
    if zeros is not None and (zeros != 8).any():
        offset = (8 - zeros.astype(np.float32)) * scale.astype(np.float32)
    if permutation is not None:
        packed = _columns(packed, permutation[::2]) | _columns(packed, permutation[1::2]) << np.uint8(4)
    return Int4(packed, scale, offset, permutation)


def column_order(group_of_column: Integer[np.ndarray, " I"], groups: int) -> Int32[np.ndarray, " I"] | None:
    """The permutation in which columns of a group are neighbours; None if they are already, in the groups' order.

    Raises `ValueError`, which says what is wrong, unless each of the `groups` has its share of the columns.
    """
    outside = (group_of_column < 0) | (group_of_column >= groups)
    if outside.any():
        raise ValueError(f"has group {group_of_column[outside][0]}, outside 0 to {groups - 1}")
    counts, share = np.bincount(group_of_column, minlength=groups), len(group_of_column) // groups
    if (wrong := np.flatnonzero(counts != share)).size:
        raise ValueError(f"gives {counts[wrong[0]]} columns to group {wrong[0]}, which must have {share}")
    order = np.argsort(group_of_column, kind="stable").astype(np.int32)
    return None if np.array_equal(order, np.arange(len(order))) else order


def _columns(packed: UInt8[np.ndarray, "O B"], columns: Int32[np.ndarray, " C"]) -> UInt8[np.ndarray, "O C"]:
    """The nibbles of some columns, one to a byte."""
    return (packed[:, columns // 2] >> (columns % 2 * 4).astype(np.uint8)) & np.uint8(15)
