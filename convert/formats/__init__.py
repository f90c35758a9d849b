"""The formats of the hub, one file each: tensors of 4 bits are read as a `Weight`, and never requantised."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from jaxgen.errors import CheckpointError, JaxgenError
from jaxgen.files import read_json
from jaxgen.models.tensors import Part
from jaxgen.quant import Weight

from ..checkpoint import OLD_GPTQ, Checkpoint, Wanted
from ..files import is_there
from .modules import almost, setting, unsupported


@runtime_checkable
class Format(Protocol):
    """How a checkpoint stores its quantised weights; made for one checkpoint by `detect`."""

    @property
    def name(self) -> str:
        """Format, variant and group size, for people to read: "GPTQ v1, symmetric, group 128"."""
        ...

    def stored(self, part: Part) -> dict[str, Wanted] | None:
        """The tensors that hold the HF weight `part.name`, by name; None if it is stored as an ordinary tensor.

        Looks at headers only. Names tensors that must be there, and optional ones if they are.
        """
        ...

    def weight(self, part: Part) -> Weight:
        """The weight, in HF's order of rows, as numpy arrays; only for parts that `stored` describes.

        Scales keep the precision of the file. Raises `CheckpointError` for contents that the format does not allow.
        """
        ...


# Where config.json says how it is quantised: MLX's field (which it repeats in HF's), HF's, compressed-tensors' old one.
FIELDS = ("quantization", "quantization_config", "compression_config")

# HF's quant_method (for MLX, which has none, our name) to the module here, and the function in it, that make its
# `Format` from the quantisation config and the checkpoint.
_OPENERS = {
    "compressed-tensors": ("compressed_tensors", "open_compressed_tensors"),
    "gptq": ("gptq", "open_gptq"),
    "awq": ("awq", "open_awq"),
    "auto-round": ("autoround", "open_autoround"),
    "intel/auto-round": ("autoround", "open_autoround"),  # until April 2025
    "bitsandbytes": ("bitsandbytes", "open_bitsandbytes"),
    "mlx": ("mlx", "open_mlx"),
    "fp8": ("fp8", "open_fp8"),
}

# What readers look for, and do without where it is absent: a damaged name must not pass for an absent one.
_NAMES = frozenset(
    """
    quant_method bits group_size sym desc_act static_groups checkpoint_format format is_marlin_format pack_dtype adapter
    lm_head dynamic zero_point version backend modules_to_not_convert packing_format extra_config act_bits super_bits
    rotation_config data_type config_groups ignore kv_cache_scheme transform_config sparsity_config load_in_4bit
    load_in_8bit _load_in_4bit _load_in_8bit mode activation_scheme weight_block_size scale_fmt
    """.split()
)

_PACKED = (
    ".qweight",
    ".weight_packed",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
    ".W_q",
    ".weight_scale_inv",
)


def detect(fields: dict[str, Any], checkpoint: Checkpoint) -> tuple[dict[str, Any], Format | None]:
    """The fields of config.json without those about quantisation, and the checkpoint's format if it has one.

    Raises `UnsupportedError`, which names the format and says what to do, for one that jaxgen does not read, and
    `CheckpointError` for packed tensors of which no config says how to read them.
    """
    plain = {name: value for name, value in fields.items() if name not in FIELDS}
    name = next((name for name in FIELDS if fields.get(name)), None)
    if name is not None:
        quantization = setting(fields, name, {})
        return plain, _open(_method(name, quantization), quantization, checkpoint)
    packed = next((name for name in sorted(checkpoint.tensors) if name.endswith(_PACKED)), None)
    if packed is None:
        return plain, None
    path = checkpoint.directory / OLD_GPTQ
    if packed.endswith(".qweight") and is_there(path):
        quantization = read_json(path)
        return plain, _open(_method(OLD_GPTQ, quantization), quantization, checkpoint)
    problem = (
        f"{packed!r} is quantised, but config.json has no quantization_config"
        f"{f', nor is there a {OLD_GPTQ},' if packed.endswith('.qweight') else ''} to say how; "
        "restore it from where the checkpoint came from"
    )
    raise CheckpointError(str(checkpoint.directory), [problem])


def _method(name: str, quantization: Mapping[str, Any]) -> str:
    """HF's quant_method, or what stands for it in configs that have none."""
    if method := setting(quantization, "quant_method", ""):
        return method
    if name == OLD_GPTQ:
        return "gptq"
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        return "bitsandbytes"
    if name == "compression_config" or "config_groups" in quantization:
        return "compressed-tensors"
    if name == "quantization":
        return "mlx"
    raise JaxgenError(f"config.json: {name} has no quant_method, and its fields {sorted(quantization)} fit none")


def _open(method: str, quantization: Mapping[str, Any], checkpoint: Checkpoint) -> Format:
    absent = [name for name in _NAMES if quantization.get(name) is None]
    for name in quantization:
        if name not in _NAMES and (meant := almost(name, absent)):
            raise JaxgenError(f"config.json: {name!r:.80} of the quantisation is no field of it; was it {meant!r}?")
    if method not in _OPENERS:
        raise unsupported(f"the quantisation {method!r}")
    module, function = _OPENERS[method]
    return getattr(import_module(f".{module}", __name__), function)(quantization, checkpoint)
