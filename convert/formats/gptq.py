"""GPTQ, as AutoGPTQ, GPTQModel and AutoRound write it: codes packed along the input, zero points along the output."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgen.models.tensors import Part
from jaxgen.quant import Int4
from jaxgen.quant.config import WHOLE_ROWS

from ..checkpoint import Checkpoint, Wanted
from ..patterns import Patterns
from .modules import PackedModules, Scheme, Settings, check_bits, group_size, setting, unsupported
from .packing import from_words, int4, nibbles

logger = logging.getLogger("jaxgen")

_WORD = 8  # codes to a word


class Gptq(PackedModules):
    """`w[o, i] = (code[i, o] - zero[g, o]) * scale[g, o]` with `g = g_idx[i]`; version 1 stores `zero - 1`.

    Source: GPTQModel `TorchLinear`.
    """

    packed = "qweight"

    def __init__(self, label: str, version: int, checkpoint: Checkpoint, settings: Settings, defaults: Mapping):
        super().__init__(f"{label} v{version}, {self._scheme('the checkpoint', defaults)}", checkpoint, settings)
        self._version = version

    def _scheme(self, module: str, settings: Mapping[str, Any]) -> Scheme:
        check_bits("GPTQ", module, setting(settings, "bits", 4, module))
        size = group_size(settings, 128, module)
        reordered = setting(settings, "desc_act", False, module) and not setting(settings, "static_groups", False)
        return Scheme(size, setting(settings, "sym", True, module), reordered and size != WHOLE_ROWS)

    def _tensors(self, part: Part, scheme: Scheme) -> dict[str, Wanted]:
        height, width = part.shape
        groups = scheme.groups(part)
        wanted = {
            "qweight": Wanted((-(-width // _WORD), height), ("I32",)),
            "qzeros": Wanted((groups, -(-height // _WORD)), ("I32",)),
            "scales": Wanted((groups, height)),
        }
        if scheme.permuted or self._has(part.name.removesuffix("weight") + "g_idx"):
            wanted["g_idx"] = Wanted((width,), ("I32", "I64"))
        return wanted

    def _int4(self, module: str, shape: tuple[int, ...], scheme: Scheme) -> Int4:
        read, (height, width) = self.checkpoint.read, shape
        scale = np.ascontiguousarray(read(f"{module}.scales").T)
        zeros = nibbles(read(f"{module}.qzeros"))[:, :height]
        zeros = self._check_symmetric(module, zeros) if scheme.symmetric else self._zeros(module, zeros)
        permutation, g_idx = None, self._optional(name := f"{module}.g_idx")
        if g_idx is not None:
            permutation = self._permutation(name, g_idx, scale.shape[1])
        packed = from_words(read(f"{module}.qweight").T)[:, : width // 2]
        return int4(np.ascontiguousarray(packed), scale, zeros, permutation)

    def _zeros(self, module: str, stored: np.ndarray) -> np.ndarray:
        if self._version == 2:
            return stored.T
        if (stored == 15).any():
            logger.warning(
                "%s.qzeros has zero points stored as 15, read as 0; some programs that wrote these damaged their "
                "neighbours", module,
            )  # fmt: skip
        return ((stored + 1) & 15).T

    def _check_symmetric(self, module: str, stored: np.ndarray) -> None:
        """Symmetric zero points are 8, stored as 7 or 8: labels of the version are often wrong, and not needed."""
        if not (stored == 7).all() and not (stored == 8).all():
            problem = "has zero points other than 8, but config.json says sym=true; asymmetric weights need sym=false"
            raise self._damaged(f"{module}.qzeros", problem)


def open_gptq(fields: Mapping[str, Any], checkpoint: Checkpoint) -> Gptq:
    """The format of a checkpoint whose quantisation config says "gptq"; raises `JaxgenError`."""
    layout = str(fields.get("checkpoint_format") or fields.get("format") or "gptq").lower()
    if layout not in ("gptq", "gptq_v2") or fields.get("is_marlin_format"):
        raise unsupported(f"GPTQ in the layout {'marlin' if fields.get('is_marlin_format') else layout!r}")
    if setting(fields, "pack_dtype", "int32") != "int32":
        raise unsupported(f"GPTQ packed into {fields['pack_dtype']}")
    if fields.get("adapter"):
        raise unsupported("GPTQ with an adapter of low rank")
    head, dynamic, patterns = fields.get("lm_head"), setting(fields, "dynamic", {}), Patterns("config.json")

    def settings(module: str) -> Mapping[str, Any] | None:
        if module == "lm_head" and head is False:
            return None
        for pattern in dynamic:
            if patterns.match(pattern.removeprefix("-:").removeprefix("+:"), module):
                return None if pattern.startswith("-:") else {**fields, **setting(dynamic, pattern, {})}
        return fields

    return Gptq("GPTQ", 2 if layout == "gptq_v2" else 1, checkpoint, settings, fields)
