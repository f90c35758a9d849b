"""AWQ in its GEMM layout, as AutoAWQ, GPTQModel and AutoRound write it: packed along the output, shuffled."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgen.models.tensors import Part
from jaxgen.quant import Int4

from ..checkpoint import Checkpoint, Wanted
from .modules import PackedModules, Scheme, Settings, check_bits, group_size, setting, texts, unsupported
from .packing import from_columns, int4, nibbles

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, among eight, of the i-th lowest code of a word


class Awq(PackedModules):
    """`w[o, i] = (code[i, o] - zero[g, o]) * scale[g, o]` with `g = i // group`. Source: AutoAWQ `WQLinear_GEMM`."""

    packed = "qweight"

    def __init__(self, label: str, checkpoint: Checkpoint, settings: Settings, defaults: Mapping[str, Any]):
        super().__init__(f"{label}, {self._scheme('the checkpoint', defaults)}", checkpoint, settings)

    def _scheme(self, module: str, settings: Mapping[str, Any]) -> Scheme:
        check_bits("AWQ", module, setting(settings, "bits", 4, module))
        symmetric = not setting(settings, "zero_point", not settings.get("sym", False), module)
        return Scheme(group_size(settings, 128, module), symmetric)

    def _tensors(self, part: Part, scheme: Scheme) -> dict[str, Wanted]:
        height, width = part.shape
        if height % len(_ORDER):
            raise unsupported(f"AWQ of {part.name!r} with {height} rows, not a multiple of {len(_ORDER)},")
        groups = scheme.groups(part)
        return {
            "qweight": Wanted((width, height // len(_ORDER)), ("I32",)),
            "qzeros": Wanted((groups, height // len(_ORDER)), ("I32",)),
            "scales": Wanted((groups, height)),
        }

    def _int4(self, module: str, shape: tuple[int, ...], scheme: Scheme) -> Int4:
        read = self.checkpoint.read
        zeros = nibbles(read(f"{module}.qzeros"), _ORDER)
        codes = nibbles(read(f"{module}.qweight"), _ORDER)
        return int4(from_columns(codes), np.ascontiguousarray(read(f"{module}.scales").T), zeros.T)


def open_awq(fields: Mapping[str, Any], checkpoint: Checkpoint) -> Awq:
    """The format of a checkpoint whose quantisation config says "awq"; raises `JaxgenError`."""
    layout = str(fields.get("version") or fields.get("format") or "gemm").lower()
    if layout != "gemm" or fields.get("backend") == "llm-awq":
        raise unsupported(f"AWQ in the layout {layout if layout != 'gemm' else 'llm-awq'!r}")
    skipped = texts(fields, "modules_to_not_convert")

    def settings(module: str) -> Mapping[str, Any] | None:
        return None if any(_covers(entry, module) for entry in skipped) else fields

    return Awq("AWQ GEMM", checkpoint, settings, fields)


def _covers(entry: str, module: str) -> bool:
    """Whether an entry of modules_to_not_convert names the module, its end, or a module that it is part of."""
    return module == entry or module.startswith(f"{entry}.") or module.endswith(f".{entry}")
