"""fp8 as DeepSeek's, Qwen's and Mistral's files have it: 8-bit floats with a scale per block, or one for all.

Read once, while loading, into the model's dtype: nothing computes with 8 bits, and neither are activations rounded to
them as the programs do that such files were made for.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from jaxgen.errors import CheckpointError, JaxgenError
from jaxgen.models.tensors import Part
from jaxgen.quant import Weight

from ..checkpoint import DTYPES, Checkpoint, Decoder, Wanted
from .modules import setting, unsupported

CODE = "F8_E4M3"
_VALUES = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
_SCALE, _ACTIVATIONS = "weight_scale_inv", ("activation_scale", "input_scale")


class Fp8:
    """A `Format` that leaves nothing packed: the checkpoint reads floats where it has 8 bits."""

    def __init__(self, block: tuple[int, int] | None):
        self._block = block

    @property
    def name(self) -> str:
        """For example "fp8, blocks of 128 x 128"."""
        return f"fp8, {'one scale a matrix' if self._block is None else 'blocks of {} x {}'.format(*self._block)}"

    def stored(self, part: Part) -> dict[str, Wanted] | None:
        """As `Format.stored`: every weight is an ordinary tensor."""
        return None

    def weight(self, part: Part) -> Weight:
        """As `Format.weight`, of which there is nothing here."""
        raise JaxgenError(f"{part.name!r} is no packed weight")


def open_fp8(fields: Mapping[str, Any], checkpoint: Checkpoint) -> Fp8:
    """The format of a checkpoint whose quantisation config says "fp8"; its 8-bit tensors are then read as float32.

    What is wrong with scales is among the checkpoint's problems. Raises `JaxgenError` for settings. Source:
    transformers `FineGrainedFP8Config` and `Fp8Dequantize`.
    """
    for name, known in {"fmt": ("e4m3",), "scale_fmt": ("float",), "activation_scheme": ("dynamic", "static")}.items():
        value = setting(fields, name, "")
        if value and value not in known:
            raise unsupported(f"fp8 with {name}={value!r:.60}")
    block = _block(fields)
    tensors = checkpoint.tensors
    for name in [name for name, info in tensors.items() if info.dtype == CODE]:
        module, info = name.removesuffix(".weight"), tensors[name]
        scale = tensors.pop(f"{module}.{_SCALE}", None)
        for kind in _ACTIVATIONS:
            tensors.pop(f"{module}.{kind}", None)
        if scale is None or not name.endswith(".weight") or len(info.shape) != 2:
            checkpoint.problems.append(f"{name!r} has 8 bits, and there is no '{module}.{_SCALE}' beside it")
            continue
        shapes = (
            [(), (1,), (1, 1)] if block is None else [tuple(-(-n // b) for n, b in zip(info.shape, block, strict=True))]
        )
        if scale.shape not in shapes or scale.dtype not in DTYPES:
            checkpoint.problems.append(
                f"'{module}.{_SCALE}' is {scale.dtype} {list(scale.shape)}, but {name!r} of {list(info.shape)} needs "
                f"floats {list(shapes[0])}"
            )
            continue
        tensors[name] = dataclasses.replace(info, dtype="F32")
        read = partial(_scaled, checkpoint, f"{module}.{_SCALE}", scale, block or info.shape)
        checkpoint.decoders[name] = Decoder(CODE, read)
    return Fp8(block)


def _block(fields: Mapping[str, Any]) -> tuple[int, int] | None:
    sizes = fields.get("weight_block_size", (128, 128))
    if sizes is None:
        return None
    sound = (
        isinstance(sizes, list | tuple) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)
    )
    if not sound:
        raise JaxgenError(f"config.json: weight_block_size={sizes!r:.80} of the quantisation must be two positive ints")
    return sizes[0], sizes[1]


def _scaled(
    checkpoint: Checkpoint, name: str, info: Any, block: tuple[int, int], stored: UInt8[np.ndarray, "O I"], first: int
) -> Float[np.ndarray, "O I"]:
    """Rows from number `first` on, each weight times the scale of its block."""
    height, width = block
    scale = checkpoint.read(name, info).astype(np.float32).reshape(-1, -(-stored.shape[1] // width))
    if not np.isfinite(scale).all():
        raise CheckpointError(str(checkpoint.directory), [f"{name!r} has scales that are not finite"])
    rows = scale[(first + np.arange(len(stored))) // height]
    return _VALUES[stored] * np.repeat(rows, width, axis=1)[:, : stored.shape[1]]
