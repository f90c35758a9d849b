"""MLX's affine 4-bit weights: `scale * code + bias` per group; usually of the embeddings and the head as well.

Source: MLX `mx.quantize`, `mx.dequantize`; which paths are quantised, and how: mlx-lm's config.json.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgen.errors import UnsupportedError
from jaxgen.models.tensors import Part
from jaxgen.quant import Int4

from ..checkpoint import DTYPES, Checkpoint, Wanted
from .modules import unsupported
from .packing import from_words

_DEFAULTS = {"group_size": 64, "bits": 4, "mode": "affine"}
_GROUPS = (32, 64, 128)


def open_mlx(fields: Mapping[str, Any], checkpoint: Checkpoint) -> "Mlx":
    """The format of a checkpoint whose "quantization" is `fields`: settings for all, and those of single paths.

    Raises `UnsupportedError` for modes other than affine, and for other than four bits.
    """
    paths = {name: value for name, value in fields.items() if name not in _DEFAULTS and value is not None}
    group = _group({name: fields[name] for name in _DEFAULTS if fields.get(name) is not None})
    groups = {}
    for path, value in paths.items():
        if isinstance(value, Mapping):
            groups[path] = _group(value, f"{path}.")
        elif not isinstance(value, bool):
            raise unsupported(f"MLX quantisation with {path}={value!r:.80}")
    return Mlx(checkpoint, group, groups)


def _group(settings: Mapping[str, Any], where: str = "") -> int:
    """The group size of affine 4-bit settings; a path's own settings inherit nothing but MLX's defaults."""
    for name, value in settings.items():
        known = _GROUPS if name == "group_size" else (_DEFAULTS.get(name),)
        if value not in known or isinstance(value, bool) or name not in _DEFAULTS:
            raise unsupported(f"MLX quantisation with {where}{name}={value!r:.80}")
    return settings.get("group_size", _DEFAULTS["group_size"])


class Mlx:
    """A `Format`: a weight is quantised if it is stored as words, or has scales."""

    def __init__(self, checkpoint: Checkpoint, group: int, groups: Mapping[str, int]):
        self._checkpoint, self._group, self._groups = checkpoint, group, groups

    @property
    def name(self) -> str:
        """For example "MLX 4-bit affine, group 64"."""
        return f"MLX 4-bit affine, group {'/'.join(map(str, sorted({self._group, *self._groups.values()})))}"

    def stored(self, part: Part) -> dict[str, Wanted] | None:
        """As `Format.stored`."""
        path = part.name.removesuffix(".weight")
        tensors = self._checkpoint.tensors
        weight = tensors.get(part.name)
        if len(part.shape) != 2 or (f"{path}.scales" not in tensors and (weight is None or weight.dtype != "U32")):
            return None
        rows, width = part.shape
        group = self._groups.get(path, self._group)
        if width % group:
            raise UnsupportedError(
                f"{part.name!r} has rows of {width} weights, which MLX's groups of {group} do not fit"
            )
        groups = Wanted((rows, width // group), tuple(DTYPES))
        return {part.name: Wanted((rows, width // 8), ("U32",)), f"{path}.scales": groups, f"{path}.biases": groups}

    def weight(self, part: Part) -> Int4:
        """As `Format.weight`."""
        path = part.name.removesuffix(".weight")
        scale, bias = self._checkpoint.read(f"{path}.scales"), self._checkpoint.read(f"{path}.biases")
        packed = from_words(self._checkpoint.read(part.name).view(np.int32))
        return Int4(packed, scale, bias.astype(np.float32) + 8 * scale.astype(np.float32))
