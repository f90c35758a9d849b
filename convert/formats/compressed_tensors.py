"""compressed-tensors' pack-quantized, as llm-compressor and `jaxgen convert` write it: rows packed in their order."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgen.errors import JaxgenError
from jaxgen.models.tensors import Part
from jaxgen.quant import Int4
from jaxgen.quant.config import WHOLE_ROWS

from ..checkpoint import Checkpoint, Wanted
from ..patterns import Patterns
from .modules import PackedModules, Scheme, check_bits, group_size, setting, texts, unsupported
from .packing import from_words, int4, nibbles

_LAYOUT = "pack-quantized"
_WORD = 8  # codes to a word


class CompressedTensors(PackedModules):
    """`w[o, i] = (code[o, i] - zero[o, g]) * scale[o, g]` with `g = i // group`, or `g = g_idx[i]` in old files.

    Source: compressed-tensors `PackedQuantizationCompressor`.
    """

    packed = "weight_packed"

    def _scheme(self, module: str, settings: Mapping[str, Any]) -> Scheme:
        return _scheme(settings, module)

    def _tensors(self, part: Part, scheme: Scheme) -> dict[str, Wanted]:
        height, width = part.shape
        groups = scheme.groups(part)
        wanted = {
            "weight_packed": Wanted((height, -(-width // _WORD)), ("I32",)),
            "weight_scale": Wanted((height, groups)),
            "weight_shape": Wanted((2,), ("I32", "I64")),
        }
        if not scheme.symmetric:
            wanted["weight_zero_point"] = Wanted((-(-height // _WORD), groups), ("I32",))
        if self._has(part.name + "_g_idx"):
            wanted["weight_g_idx"] = Wanted((width,), ("I32", "I64"))
        return wanted

    def _int4(self, module: str, shape: tuple[int, ...], scheme: Scheme) -> Int4:
        read = self.checkpoint.read
        if (said := read(f"{module}.weight_shape").tolist()) != list(shape):
            raise self._damaged(f"{module}.weight_shape", f"says {said}, but config.json implies {list(shape)}")
        height, width = shape
        packed, scale = from_words(read(f"{module}.weight_packed")), read(f"{module}.weight_scale")
        zeros = None
        if not scheme.symmetric:
            zeros = nibbles(read(f"{module}.weight_zero_point").T)[:, :height].T
        permutation, g_idx = None, self._optional(name := f"{module}.weight_g_idx")
        if g_idx is not None and (g_idx != -1).any():  # -1 throughout: never set
            permutation = self._permutation(name, g_idx, scale.shape[1])
        return int4(np.ascontiguousarray(packed[:, : width // 2]), scale, zeros, permutation)


def open_compressed_tensors(fields: Mapping[str, Any], checkpoint: Checkpoint) -> CompressedTensors:
    """The format of a checkpoint whose quantisation config says "compressed-tensors"; raises `JaxgenError`."""
    layout = setting(fields, "format", _LAYOUT)
    if fields.get("kv_cache_scheme"):
        raise unsupported("compressed-tensors with a kv_cache_scheme")
    if setting(setting(fields, "transform_config", {}), "config_groups", {}):
        raise unsupported("compressed-tensors with a transform_config")
    sparsity = setting(setting(fields, "sparsity_config", {}), "format", "dense")
    if sparsity != "dense":
        raise unsupported(f"compressed-tensors with sparsity in the layout {sparsity!r}")
    targets: dict[str, Mapping[str, Any]] = {}
    groups = setting(fields, "config_groups", {})
    for name in groups:
        group = setting(groups, name, {})
        weights = _weights(name, group, layout)
        targets |= dict.fromkeys(texts(group, "targets"), weights)
    if not targets:
        raise JaxgenError("config.json: the quantisation has no config_groups with targets, so it quantises nothing")
    ignored, patterns = texts(fields, "ignore"), Patterns("config.json")

    def names(entry: str, module: str) -> bool:
        """Whether an entry of targets or ignore means this linear layer: by class, name, or regular expression."""
        if entry.startswith("re:"):
            return patterns.match(entry.removeprefix("re:"), module)
        return entry in ("Linear", module)

    def settings(module: str) -> Mapping[str, Any] | None:
        if any(names(entry, module) for entry in ignored):
            return None
        named = sorted((entry for entry in targets if names(entry, module)), key=_generality)
        return targets[named[0]] if named else None

    schemes = dict.fromkeys(str(_scheme(weights, "config_groups")) for weights in targets.values())
    name = f"compressed-tensors {_LAYOUT}, {' and '.join(schemes)}"
    return CompressedTensors(name, checkpoint, settings)


def _weights(name: str, group: Mapping[str, Any], layout: str) -> Mapping[str, Any]:
    """How a config group stores weights; raises `UnsupportedError` for what `PackedQuantizationCompressor` cannot."""
    if setting(group, "format", layout) != _LAYOUT:
        raise unsupported(f"compressed-tensors in the layout {group.get('format') or layout!r}")
    for activations in ("input_activations", "output_activations"):
        if group.get(activations):
            raise unsupported(f"compressed-tensors with quantised {activations} ({name})")
    weights = setting(group, "weights", {})
    if not weights or setting(weights, "type", "int") != "int":
        raise unsupported(f"compressed-tensors with weights of type {weights.get('type')!r} ({name})")
    return weights


def _scheme(weights: Mapping[str, Any], where: str) -> Scheme:
    check_bits("compressed-tensors", where, setting(weights, "num_bits", 4, where))
    strategy = setting(weights, "strategy", "group" if weights.get("group_size") else "tensor", where)
    if strategy not in ("group", "channel"):
        raise unsupported(f"compressed-tensors with the strategy {strategy!r} ({where})")
    size = group_size(weights, WHOLE_ROWS, where) if strategy == "group" else WHOLE_ROWS
    return Scheme(size, setting(weights, "symmetric", True, where))


def _generality(entry: str) -> tuple[bool, bool, str]:
    return entry == "Linear", entry.startswith("re:"), entry
