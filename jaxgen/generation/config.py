"""GenerationConfig: HF's fields, HF's defaults and HF's order of precedence, as a frozen dataclass."""

import dataclasses
import difflib
import json
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.config import MistralConfig
from jaxgen.errors import JaxgenError, UnsupportedError

# transformers' defaults of last resort (GenerationConfig._get_default_generation_params). max_length is not
# here: when nobody sets a length, it is the prompt's width plus DEFAULT_NEW_TOKENS.
DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
}
DEFAULT_NEW_TOKENS = 20
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_INT32_MAX = np.iinfo(np.int32).max

# Fields of transformers 5.23 that jaxgen does not act on yet, with the values at which they do nothing.
_INERT: dict[str, tuple[Any, ...]] = {
    "assistant_confidence_threshold": (0.4,),
    "assistant_early_exit": (),
    "assistant_ensemble_weight": (),
    "assistant_lookbehind": (10,),
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "cache_config": ({},),
    "cache_implementation": ("static",),
    "compile_config": (),
    "constraints": ([],),
    "continuous_batching_config": (),
    "decoder_start_token_id": (),
    "disable_compile": (False,),
    "diversity_penalty": (0.0,),
    "dola_layers": (),
    "early_stopping": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "is_assistant": (False,),
    "length_penalty": (1.0,),
    "low_memory": (False,),
    "max_cache_len": (),
    "max_matching_ngram_size": (),
    "max_time": (),
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "num_assistant_tokens": (20,),
    "num_assistant_tokens_schedule": ("constant",),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_logits": (False,),
    "output_scores": (False,),
    "penalty_alpha": (),
    "prefill_chunk_size": (),
    "prompt_lookup_num_tokens": (),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "sequence_bias": ({}, []),
    "speculation_type": (),
    "stop_strings": ([],),
    "suppress_tokens": ([],),
    "target_lookbehind": (10,),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1.0,),
    "use_cache": (True,),
    "use_mtp": (False,),
    "watermarking_config": (),
    # Arguments of HF's generate() that are not fields of its GenerationConfig.
    "assistant_model": (),
    "assistant_tokenizer": (),
    "custom_generate": (),
    "inputs_embeds": (),
    "logits_processor": (),
    "negative_prompt_attention_mask": (),
    "negative_prompt_ids": (),
    "past_key_values": (),
    "position_ids": (),
    "prefix_allowed_tokens_fn": (),
    "stopping_criteria": (),
    "streamer": (),
    "synced_gpus": (False,),
    "tokenizer": (),
    "trust_remote_code": (False,),
}
_METADATA = frozenset({"transformers_version", "_from_model_config"})


@dataclasses.dataclass(frozen=True, init=False)
class GenerationConfig:
    """How to generate: HF's field names; `None` means that a less specific source decides.

    Values are checked here: counts are positive, `temperature` > 0, `top_p` in (0, 1], `min_p` in [0, 1],
    `repetition_penalty` > 0. Raises `JaxgenError` for a bad value or a misspelt name, and `UnsupportedError` for a
    field of transformers that jaxgen does not act on yet. Source: transformers `GenerationConfig`.

    >>> GenerationConfig(max_new_tokens=5, do_sample=True, top_p=0.9).top_p
    0.9
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    num_return_sequences: int | None = None
    return_dict_in_generate: bool | None = None

    def __init__(self, **options: Any):
        """Take options by HF's names; written by hand so that a wrong name says what it should have been."""
        check_names(options)
        for field in dataclasses.fields(self):
            value = options.get(field.name)
            checked = None if value is None else _CHECKS[field.name](field.name, _plain(value))
            object.__setattr__(self, field.name, checked)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a row."""
        eos = self.eos_token_id
        return () if eos is None else eos if isinstance(eos, tuple) else (eos,)

    @property
    def filler_id(self) -> int:
        """What follows the end of a row: pad, or else the first end-of-sequence id, as in HF."""
        return self.pad_token_id if self.pad_token_id is not None else next(iter(self.eos_token_ids), 0)

    @classmethod
    def from_hf(cls, source: "str | os.PathLike[str] | Mapping[str, Any] | object") -> "GenerationConfig":
        """Read transformers' form: a generation_config.json, its directory, a dict, or a GenerationConfig object."""
        if isinstance(source, str | os.PathLike):
            fields = _read_file(Path(source))
        elif isinstance(source, Mapping):
            fields = dict(source)
        elif callable(to_dict := getattr(source, "to_dict", None)):
            fields: Any = to_dict()
        else:
            raise JaxgenError(f"generation_config: cannot read {type(source).__name__}; pass a GenerationConfig")
        check_names(fields)
        supported = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in fields.items() if name in supported})

    @classmethod
    def from_model_config(cls, config: MistralConfig) -> "GenerationConfig":
        """What a model without a generation_config.json starts from, as in transformers: its special tokens."""
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return cls(**{name: value for name, value in ids.items() if value != -1})  # old configs' "none"

    def to_hf(self) -> dict[str, Any]:
        """The generation_config.json that transformers reads back: the fields that are set."""
        set_fields = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in set_fields.items()}


def resolve(
    options: Mapping[str, Any],
    generation_config: "GenerationConfig | object | None",
    checkpoint: GenerationConfig,
) -> GenerationConfig:
    """The effective configuration: option > generation_config > the checkpoint's own > HF's defaults.

    An option given as None switches the field off; None inside a configuration lets the next source decide.
    Source: transformers `GenerationMixin._prepare_generation_config`.
    """
    check_names(options)
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        generation_config = GenerationConfig.from_hf(generation_config)
    fields = dict(DEFAULTS)
    for source in (checkpoint, generation_config):
        if source is not None:
            fields |= {k: v for k, v in vars(source).items() if v is not None}
    supported = {field.name for field in dataclasses.fields(GenerationConfig)}
    fields |= {k: v for k, v in options.items() if k in supported}
    config = GenerationConfig(**fields)
    if not config.do_sample and (config.num_return_sequences or 1) > 1:
        raise JaxgenError(
            f"num_return_sequences={config.num_return_sequences} needs do_sample=True: "
            "greedy search would return the same sequence every time"
        )
    return config


def check_names(fields: Mapping[str, Any]) -> None:
    """Raise for a name that HF does not have (with the nearest one) or that jaxgen does not act on yet."""
    supported = {field.name for field in dataclasses.fields(GenerationConfig)}
    for name, value in fields.items():
        if name in supported or name in _METADATA:
            continue
        if name not in _INERT:
            nearest = difflib.get_close_matches(name, [*supported, *_INERT], n=1, cutoff=0.6)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise JaxgenError(f"{name!r} is not a generation option{hint}")
        if value is not None and not any(_same(value, inert) for inert in _INERT[name]):
            raise UnsupportedError(f"{name}={value!r} is not supported yet by jaxgen")


def _same(value: object, inert: object) -> bool:
    return type(value) in (bool, int, float, str, list, dict) and value == inert


def _plain(value: Any) -> Any:
    """Python's own numbers for numpy and jax scalars and lists."""
    if getattr(value, "ndim", None) is not None and not isinstance(value, list | tuple):
        value = value.tolist()
    return tuple(_plain(item) for item in value) if isinstance(value, list | tuple) else value


def _integer(minimum: int):
    def check(name: str, value: Any) -> int:
        if isinstance(value, int | np.integer) and value > _INT32_MAX:
            raise JaxgenError(f"{name}={value!r} must be an int of at most {_INT32_MAX}")
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < minimum:
            raise JaxgenError(f"{name}={value!r} must be an int of at least {minimum}")
        return int(value)

    return check


def _number(low: float, high: float, interval: str):
    """A finite number inside an interval written as in mathematics, such as '(0, 1]'."""

    def check(name: str, value: Any) -> float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        fits = fits and (value == 0 or _SMALLEST <= abs(value) <= _LARGEST)
        if not fits or not low <= value <= high or (value == low and interval.startswith("(")):
            hint = "; use do_sample=False for greedy search" if name == "temperature" and value == 0 else ""
            raise JaxgenError(f"{name}={value!r} must be a number in {interval}{hint}")
        return float(value)

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise JaxgenError(f"{name}={value!r} must be True or False")
    return value


def _token_ids(name: str, value: Any) -> int | tuple[int, ...]:
    one = _integer(0)
    return tuple(one(name, item) for item in value) if isinstance(value, tuple) else one(name, value)


_CHECKS = {
    "max_length": _integer(1),
    "max_new_tokens": _integer(1),
    "min_new_tokens": _integer(0),
    "do_sample": _flag,
    "temperature": _number(0.0, math.inf, "(0, inf)"),
    "top_k": _integer(0),
    "top_p": _number(0.0, 1.0, "(0, 1]"),
    "min_p": _number(0.0, 1.0, "[0, 1]"),
    "repetition_penalty": _number(0.0, math.inf, "(0, inf)"),
    "eos_token_id": _token_ids,
    "pad_token_id": _integer(0),
    "bos_token_id": _integer(0),
    "num_return_sequences": _integer(1),
    "return_dict_in_generate": _flag,
}


def _read_file(path: Path) -> dict[str, Any]:
    path = path / "generation_config.json" if path.is_dir() else path
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JaxgenError(f"{path}: cannot be read as a JSON generation config: {error}") from error
    if not isinstance(fields, dict):
        raise JaxgenError(f"{path}: holds {type(fields).__name__}, not a JSON object")
    return fields
