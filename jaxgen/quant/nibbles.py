"""Two codes of four bits in a byte."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, UInt8


def pack(codes: Int8[Array | np.ndarray, "*rows I"]) -> UInt8[Array | np.ndarray, "*rows I/2"]:
    """Codes from -8 to 7 as bytes, the even column in the low nibble; numpy in, numpy out.

    >>> [hex(byte) for byte in pack(np.array([1, -1, -8, 7], np.int8)).tolist()]
    ['0xf1', '0x78']
    """
    nibbles = codes.view(np.uint8) & np.uint8(15) if isinstance(codes, np.ndarray) else codes.astype(jnp.uint8) & 15
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def unpack(packed: UInt8[Array | np.ndarray, "*rows bytes"]) -> Int8[Array | np.ndarray, "*rows 2*bytes"]:
    """The codes of `pack`, from -8 to 7; numpy in, numpy out.

    >>> unpack(np.array([0xF1, 0x78], np.uint8)).tolist()
    [1, -1, -8, 7]
    """
    xp = np if isinstance(packed, np.ndarray) else jnp
    # Through int32: XLA:CPU returns wrong sums for some fusions of an unpacking through int8.
    wide = packed.astype(xp.int32)
    nibbles = xp.stack([wide & 15, wide >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return ((nibbles ^ 8) - 8).astype(xp.int8)


def scaled(
    packed: UInt8[Array | np.ndarray, "O bytes"], scale: Float[Array | np.ndarray, "O groups"]
) -> Float[Array | np.ndarray, "O groups group"]:
    """The codes of `pack`, each times the scale of its group, in float32; numpy in, numpy out."""
    return unpack(packed).reshape(*scale.shape, -1).astype(jnp.float32) * scale[..., None].astype(jnp.float32)
