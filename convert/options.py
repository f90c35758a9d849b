"""The options of transformers' `from_pretrained`: those that jaxgen has not, and those that change nothing here."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxgen.errors import NO_REMOTE_CODE, JaxgenError, UnsupportedError, shown
from jaxgen.quant.bitsandbytes import BitsAndBytesConfig
from jaxgen.quant.config import Int4Config, Quantization

# Options of transformers' from_pretrained that jaxgen does not have.
_UNSUPPORTED = (
    "adapter_kwargs", "code_revision", "config", "device_mesh",
    "experts_implementation", "force_download", "from_flax", "from_tf",
    "ignore_mismatched_sizes", "key_mapping", "load_in_8bit",
    "mirror", "offload_buffers", "offload_folder", "offload_state_dict",
    "output_loading_info", "proxies", "resume_download", "state_dict", "subfolder",
    "tp_plan", "tp_size", "use_auth_token", "use_flash_attention_2", "use_kernels",
    "variant", "weights_only",
)  # fmt: skip

# What changes nothing here: which kernels attend is jaxgen's to choose, and weights are always streamed.
_INERT = ("attn_implementation", "low_cpu_mem_usage")
_REASONS = {
    "max_memory": "a model is loaded whole to the one device that device_map names; leave it out",
    "trust_remote_code": NO_REMOTE_CODE.partition(": ")[2],
    "use_safetensors": "weights are read from safetensors and GGUF files only, as pickles can hold code",
}


def refuse(options: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Raise for the options that `function` does not have, unless they ask for nothing, or for what is done anyway."""
    known = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    options = {name: value for name, value in options.items() if not _asks_for_nothing(name, value)}
    for name in options.keys() & _REASONS.keys():
        raise UnsupportedError(f"{name}={shown(options[name])}: {_REASONS[name]}")
    foreign = sorted(options.keys() & set(_UNSUPPORTED))
    if foreign:
        values = ", ".join(f"{name}={options[name]!r:.60}" for name in foreign)
        raise UnsupportedError(f"{function.__name__}: {values}: not supported yet; jaxgen has {', '.join(known)}")
    for name in options:
        near = difflib.get_close_matches(name, [*known, *_UNSUPPORTED], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"jaxgen has {', '.join(known)}"
        raise JaxgenError(f"{function.__name__}: there is no option {name!r}; {hint}")


def _asks_for_nothing(name: str, value: Any) -> bool:
    if name == "use_safetensors":
        return value is None or value is True
    return name in _INERT or (name in (*_REASONS, *_UNSUPPORTED) and (value is None or value is False))


def as_quantization(load_in_4bit: Any, config: Any) -> Quantization | None:
    """What to quantise while loading, from HF's two options for it."""
    if not isinstance(load_in_4bit, bool):
        raise JaxgenError(f"load_in_4bit={load_in_4bit!r} must be True or False")
    if config is None:
        return Int4Config() if load_in_4bit else None
    if isinstance(config, Quantization):
        return config
    if type(config).__name__ == "BitsAndBytesConfig" and not isinstance(config, BitsAndBytesConfig):
        config = config.to_dict()  # of transformers
    if isinstance(config, Mapping):
        config = BitsAndBytesConfig.from_dict(config)
    if not isinstance(config, BitsAndBytesConfig):
        raise JaxgenError(
            f"quantization_config={config!r:.80} must be a jaxgen.Int4Config, or a BitsAndBytesConfig with "
            "load_in_4bit=True; load_in_4bit=True alone is Int4Config()"
        )
    return config.as_int4()
