"""The blocks of GGUF's tensors: rows of bytes `[out, bytes]` in, weights out. Knows nothing of files.

Source: ggml's `ggml-common.h` (block_q4_0 and its like) and `dequantize_row_*`.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8

from jaxgen.quant import Int4

from ..checkpoint import DTYPES

Rows = UInt8[np.ndarray, "O bytes"]
Floats = Float[np.ndarray, "O I"]

_HALF = "<f2"
_Q4_0 = np.dtype([("scale", _HALF), ("codes", "u1", 16)])
_Q4_1 = np.dtype([("scale", _HALF), ("least", _HALF), ("codes", "u1", 16)])
_Q4_K = np.dtype([("scale", _HALF), ("least", _HALF), ("sixes", "u1", 12), ("codes", "u1", 128)])
_Q6_K = np.dtype([("low", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("scale", _HALF)])
_Q8_0 = np.dtype([("scale", _HALF), ("codes", "i1", 32)])


def _q4_0(rows: Rows) -> Int4:
    blocks = rows.view(_Q4_0)
    return Int4(_packed(blocks["codes"]), np.ascontiguousarray(blocks["scale"]))


def _q4_1(rows: Rows) -> Int4:
    blocks = rows.view(_Q4_1)
    scale = np.ascontiguousarray(blocks["scale"])
    return Int4(_packed(blocks["codes"]), scale, blocks["least"].astype(np.float32) + 8 * scale.astype(np.float32))


def _q4_k(rows: Rows) -> Int4:
    """Eight groups to a block, whose scales and minima are six bits each, times a half of the block."""
    blocks = rows.view(_Q4_K)
    scales, minima, rest = np.split(blocks["sixes"], 3, axis=-1)
    scales = np.concatenate([scales & 63, (rest & 15) | (scales >> 6 << 4)], axis=-1)
    minima = np.concatenate([minima & 63, (rest >> 4) | (minima >> 6 << 4)], axis=-1)
    scale = (blocks["scale"][..., None].astype(np.float32) * scales).reshape(len(rows), -1)
    least = (blocks["least"][..., None].astype(np.float32) * minima).reshape(len(rows), -1)
    return Int4(_packed(blocks["codes"].reshape(*blocks.shape, 4, 32)), scale, 8 * scale - least)


def _packed(codes: UInt8[np.ndarray, "O *blocks chunk"]) -> UInt8[np.ndarray, "O half"]:
    """From ggml's nibbles, in which the low ones of some bytes come before all their high ones, to `Int4.packed`."""
    nibbles = np.concatenate([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    return (nibbles[:, ::2] | nibbles[:, 1::2] << 4) ^ 0x88  # turns codes 0 to 15 around 8 into -8 to 7


def _q6_k(rows: Rows) -> Floats:
    blocks = rows.view(_Q6_K)
    shape = blocks.shape
    low = blocks["low"].reshape(*shape, 2, 1, 64) >> np.array([[0], [4]], np.uint8) & 15
    high = blocks["high"].reshape(*shape, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & 3
    codes = low.reshape(*shape, 16, 16) | high.reshape(*shape, 16, 16) << 4
    scale = blocks["scale"][..., None].astype(np.float32) * blocks["scales"]
    return ((codes.astype(np.float32) - 32) * scale[..., None]).reshape(len(rows), -1)


def _q8_0(rows: Rows) -> Floats:
    blocks = rows.view(_Q8_0)
    return (blocks["codes"] * blocks["scale"][..., None].astype(np.float32)).reshape(len(rows), -1)


def _plain(dtype: np.dtype) -> Callable[[Rows], Floats]:
    return lambda rows: rows.view(dtype)


# By the names of ggml's types: what stays at four bits, and what becomes floats.
FOUR_BITS: dict[str, Callable[[Rows], Int4]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}
FLOATS: dict[str, Callable[[Rows], Floats]] = {
    **{name: _plain(dtype) for name, dtype in DTYPES.items()},
    "Q6_K": _q6_k,
    "Q8_0": _q8_0,
}
