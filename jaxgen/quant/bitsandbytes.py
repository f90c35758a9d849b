"""BitsAndBytesConfig, as scripts for transformers have it, and the Int4Config that it becomes."""

import dataclasses
from collections.abc import Mapping
from typing import Any, no_type_check

from jaxgen.errors import JaxgenError, UnsupportedError, shown
from jaxgen.generation.options.unused import once
from jaxgen.quant.config import Int4Config

_READ = ("load_in_8bit", "load_in_4bit", "llm_int8_skip_modules")
_WRITTEN = {"bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8"}  # for None
_UNREAD = ("quant_method", "_load_in_4bit", "_load_in_8bit")  # which transformers writes beside the fields


@no_type_check  # as_int4 says what is wrong
@dataclasses.dataclass(frozen=True, kw_only=True)
class BitsAndBytesConfig:
    """transformers' way of saying `load_in_4bit`, by its fields; jaxgen quantises as `Int4Config()` does.

    How bitsandbytes rounds (`bnb_4bit_quant_type`, `bnb_4bit_use_double_quant`, `bnb_4bit_quant_storage`) has no
    meaning for int4 weights, and what is computed in (`bnb_4bit_compute_dtype`) is `from_pretrained`'s `dtype`: these
    change nothing, as do the numbers of eight bits; the logger `jaxgen` names once what was set. Raises
    `UnsupportedError` for `load_in_8bit`, and for modules to be left out other than the head, which is left out anyway.
    Source: transformers `BitsAndBytesConfig`.

    >>> BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").as_int4()
    Int4Config(group_size=128, lm_head=False, method='rtn', low_cpu_memory=False)
    """

    load_in_8bit: Any = False
    load_in_4bit: Any = False
    llm_int8_threshold: Any = 6.0
    llm_int8_skip_modules: Any = None
    llm_int8_enable_fp32_cpu_offload: Any = False
    llm_int8_has_fp16_weight: Any = False
    bnb_4bit_compute_dtype: Any = None
    bnb_4bit_quant_type: Any = "fp4"
    bnb_4bit_use_double_quant: Any = False
    bnb_4bit_quant_storage: Any = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "BitsAndBytesConfig":
        """Read a mapping of the fields; raises `JaxgenError` for any other."""
        method = fields.get("quant_method", "bitsandbytes")
        if getattr(method, "value", method) != "bitsandbytes":
            raise UnsupportedError(
                f"quantization_config: quant_method={shown(method)}: jaxgen makes int4 only: load_in_4bit=True"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        for name in fields.keys() - names - set(_UNREAD):
            raise JaxgenError(
                f"quantization_config: there is no field {name!r:.80}; jaxgen's own are in jaxgen.Int4Config"
            )
        return cls(**{name: value for name, value in fields.items() if name in names})

    def as_int4(self) -> Int4Config | None:
        """What jaxgen does for it; None if nothing is asked for."""
        for name in ("load_in_8bit", "load_in_4bit"):
            if not isinstance(getattr(self, name), bool):
                raise JaxgenError(f"BitsAndBytesConfig: {name}={getattr(self, name)!r:.80} must be True or False")
        if self.load_in_8bit:
            raise UnsupportedError("load_in_8bit=True is not supported by jaxgen, which has load_in_4bit=True")
        skipped = self.llm_int8_skip_modules
        if skipped not in (None, [], ["lm_head"], ()):
            raise UnsupportedError(
                f"llm_int8_skip_modules={shown(skipped)}: jaxgen quantises all linear layers but the head; leave it out"
            )
        if not self.load_in_4bit:
            return None
        self._say_inert()
        return Int4Config()

    def _say_inert(self) -> None:
        """Name, once, what was set and changes nothing."""
        inert = [
            f"{field.name}={shown(value)}"
            for field in dataclasses.fields(self)
            if field.name not in _READ
            and not _is_default(field.name, value := getattr(self, field.name), field.default)
        ]
        if inert:
            said = f"BitsAndBytesConfig: {', '.join(inert)}"
            once(
                said, f"{said}: changes nothing; Int4Config says how int4 is rounded, from_pretrained's dtype the rest"
            )


def _is_default(name: str, value: object, default: object) -> bool:
    """Whether a field holds its default, as it is here or as transformers writes it down."""
    return value is None or value == default or str(value).removeprefix("torch.") == _WRITTEN.get(name)
