"""AutoRound's own exports: tensors of GPTQ or AWQ, under a config that names the layout and each layer's exceptions."""

from collections.abc import Mapping
from typing import Any

from ..checkpoint import Checkpoint
from ..patterns import Patterns
from .awq import Awq
from .gptq import Gptq
from .modules import PackedModules, setting, unsupported

# Their names for GPTQ that stores zero points minus one, and as they are.
_GPTQ = {
    **dict.fromkeys(("auto", "auto_round:auto_gptq", "auto_round:gptq"), 1),
    **dict.fromkeys(("auto_round", "auto_round:gptqmodel"), 2),
}
_AWQ = ("auto_round:auto_awq", "auto_round:awq")
# What came before `packing_format`: `backend`, a layout and the kernel that was to run it. Source: auto-round 0.4
# `export_to_autoround/export.py` (kernels of its own keep zero points as they are) and `auto_round/backend.py`.
_BACKENDS = {
    **dict.fromkeys(("auto_round:exllamav2", "auto_round:triton", "auto_round:tritonv2"), "auto_round"),
    **dict.fromkeys(
        (f"{layout}:{kernel}" for layout in ("gptq", "auto_gptq")
         for kernel in ("exllamav2", "exllama", "triton", "tritonv2", "cuda")),
        "auto_round:gptq",
    ),
}  # fmt: skip


def open_autoround(fields: Mapping[str, Any], checkpoint: Checkpoint) -> PackedModules:
    """The format of a checkpoint whose quantisation config says "auto-round"; raises `JaxgenError`.

    Scales may be negative. Source: auto-round `inference/convert_model.py`.
    """
    exceptions, patterns = setting(fields, "extra_config", {}), Patterns("config.json")

    def settings(module: str) -> Mapping[str, Any] | None:
        found = [module] if module in exceptions else [key for key in exceptions if patterns.search(key, module)]
        effective = {**fields, **setting(exceptions, found[0], {})} if found else fields
        _check(effective, module)
        return None if setting(effective, "bits", 4, module) > 8 else effective

    layout = setting(fields, "packing_format", "") or _layout_of(setting(fields, "backend", "auto"))
    _check(fields, "the checkpoint")
    if layout in _GPTQ:
        return Gptq("AutoRound in the layout of GPTQ", _GPTQ[layout], checkpoint, settings, fields)
    if layout in _AWQ:
        return Awq("AutoRound in the layout of AWQ GEMM", checkpoint, settings, fields)
    raise unsupported(f"AutoRound in the layout {layout!r}")


def _layout_of(backend: str) -> str:
    """The packing format that a `backend` stands for; an unknown one is its own, and refused by that name."""
    return _BACKENDS.get(backend) or backend


def _check(fields: Mapping[str, Any], where: str) -> None:
    """Raises `UnsupportedError` for what is more than uniform codes and scales of weights."""
    if setting(fields, "act_bits", 16, where) <= 8:
        raise unsupported(f"AutoRound with activations of {fields['act_bits']} bits ({where})")
    for name in ("super_bits", "rotation_config"):
        if fields.get(name):
            raise unsupported(f"AutoRound with {name}={fields[name]!r:.60} ({where})")
    if setting(fields, "bits", 4, where) <= 8 and not setting(fields, "data_type", "int", where).startswith("int"):
        raise unsupported(f"AutoRound with data_type={fields['data_type']!r} ({where})")
