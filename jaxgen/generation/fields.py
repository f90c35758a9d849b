"""What a generation option may hold: one check per field, and the fields of transformers that jaxgen refuses.

A check takes the field's name and the user's value, and returns it as plain, hashable Python, or raises.
"""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxgen.errors import JaxgenError, UnsupportedError, shown

_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_INT32_MAX = np.iinfo(np.int32).max
Check = Callable[[str, Any], Any]


def plain(value: Any) -> Any:
    """Python's own numbers for numpy and jax scalars and lists."""
    if getattr(value, "ndim", None) is not None and not isinstance(value, list | tuple):
        value = value.tolist()
    return tuple(plain(item) for item in value) if isinstance(value, list | tuple) else value


def integer(minimum: int) -> Check:
    """An int of at least `minimum` that fits 32 bits."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, int | np.integer) and value > _INT32_MAX:
            raise JaxgenError(f"{name}={shown(value)} must be an int of at most {_INT32_MAX}")
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < minimum:
            raise JaxgenError(f"{name}={shown(value)} must be an int of at least {minimum}")
        return int(value)

    return check


def number(low: float, high: float, interval: str) -> Check:
    """A finite number inside an interval written as in mathematics, such as '(0, 1]'."""

    def check(name: str, value: Any) -> float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        fits = fits and (value == 0 or _SMALLEST <= abs(value) <= _LARGEST)  # not NaN, nor an int past all floats
        at_open_end = (value == low and interval.startswith("(")) or (value == high and interval.endswith(")"))
        if not fits or not low <= value <= high or at_open_end:
            hint = "; use do_sample=False for greedy search" if name == "temperature" and value == 0 else ""
            raise JaxgenError(f"{name}={shown(value)} must be a number in {interval}{hint}")
        return float(value)

    return check


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise JaxgenError(f"{name}={shown(value)} must be True or False")
    return value


def token_ids(name: str, value: Any) -> int | tuple[int, ...]:
    """One token id, or several."""
    return id_list(name, value) if isinstance(value, tuple) else integer(0)(name, value)


def id_list(name: str, value: Any) -> tuple[int, ...]:
    """Token ids."""
    if not isinstance(value, tuple):
        raise JaxgenError(f"{name}={shown(value)} must be a list of token ids")
    return tuple(integer(0)(name, item) for item in value)


def id_lists(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    """Non-empty sequences of token ids."""
    if not isinstance(value, tuple) or not all(isinstance(item, tuple) and item for item in value):
        raise JaxgenError(f"{name}={shown(value)} must be a list of non-empty lists of token ids")
    return tuple(id_list(name, item) for item in value)


def biases(name: str, value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    """HF's two forms of `sequence_bias`: `{(id, ...): bias}`, or `[[[id, ...], bias], ...]`."""
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise JaxgenError(f"{name}={shown(value)} must be {{(id, ...): bias}} or [[[id, ...], bias], ...]")
    ids = id_lists(name, tuple(plain(pair[0]) for pair in pairs))
    bias = number(-math.inf, math.inf, "(-inf, inf)")
    return tuple((sequence, bias(name, pair[1])) for sequence, pair in zip(ids, pairs, strict=True))


def decay(name: str, value: Any) -> tuple[int, float]:
    """HF's `(start, factor)`."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise JaxgenError(f"{name}={shown(value)} must be (start, factor)")
    return integer(0)(name, value[0]), number(0.0, math.inf, "(0, inf)")(name, value[1])


def strings(name: str, value: Any) -> tuple[str, ...]:
    """A string or several, none of them empty."""
    from jaxgen.generation.stop_strings import read_strings

    return read_strings(value)


def choice(*values: Any) -> Check:
    """One of a few values."""

    def check(name: str, value: Any) -> Any:
        if not any(type(value) is type(known) and value == known for known in values):
            raise UnsupportedError(
                f"{name}={shown(value)} is not supported; choose from {', '.join(map(repr, values))}"
            )
        return value

    return check


def watermark(name: str, value: Any) -> Any:
    """HF's WatermarkingConfig, as an object or a dict."""
    from jaxgen.generation.processors.watermark import WatermarkingConfig

    return WatermarkingConfig.from_hf(value)


_probability, _positive = number(0.0, 1.0, "[0, 1]"), number(0.0, math.inf, "(0, inf)")
_half_open = number(0.0, 1.0, "(0, 1]")
_cutoff = number(0.0, 1.0, "[0, 1)")
CHECKS: dict[str, Check] = {
    "max_length": integer(1),
    "max_new_tokens": integer(1),
    "min_length": integer(0),
    "min_new_tokens": integer(0),
    "early_stopping": choice(False, True, "never"),
    "max_time": _positive,
    "stop_strings": strings,
    "do_sample": flag,
    "num_beams": integer(1),
    "cache_implementation": choice("static", "quantized"),
    "max_cache_len": integer(1),
    "prefill_chunk_size": integer(1),
    "temperature": _positive,
    "top_k": integer(0),
    "top_p": _half_open,
    "min_p": _probability,
    "top_h": _half_open,
    "typical_p": _half_open,
    "epsilon_cutoff": _cutoff,
    "eta_cutoff": _cutoff,
    "repetition_penalty": _positive,
    "encoder_repetition_penalty": _positive,
    "length_penalty": number(-math.inf, math.inf, "(-inf, inf)"),
    "no_repeat_ngram_size": integer(0),
    "encoder_no_repeat_ngram_size": integer(0),
    "bad_words_ids": id_lists,
    "sequence_bias": biases,
    "renormalize_logits": flag,
    "remove_invalid_values": flag,
    "forced_bos_token_id": integer(0),
    "forced_eos_token_id": token_ids,
    "exponential_decay_length_penalty": decay,
    "suppress_tokens": id_list,
    "begin_suppress_tokens": id_list,
    "guidance_scale": number(-math.inf, math.inf, "(-inf, inf)"),
    "watermarking_config": watermark,
    "num_return_sequences": integer(1),
    "return_dict_in_generate": flag,
    "output_scores": flag,
    "output_logits": flag,
    "output_attentions": flag,
    "output_hidden_states": flag,
    "top_logprobs": integer(0),
    "eos_token_id": token_ids,
    "pad_token_id": integer(0),
    "bos_token_id": integer(0),
    "num_assistant_tokens": integer(1),
    "assistant_confidence_threshold": _probability,
    "prompt_lookup_num_tokens": integer(1),
    "max_matching_ngram_size": integer(1),
}

# What only sampling uses: as in transformers, its range matters where something samples, and greedy search takes
# `temperature=0`.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def out_of_range(name: str, value: Any) -> str | None:
    """Why sampling cannot use this number; None if it can, or if it is no number at all."""
    value, kind = plain(value), (int if name == "top_k" else int | float)
    if name not in SAMPLING or not isinstance(value, kind) or isinstance(value, bool) or not abs(value) <= _LARGEST:
        return None
    try:
        CHECKS[name](name, value)
    except JaxgenError as error:
        return str(error)
    return None


# Fields of transformers 5.24 that jaxgen refuses: the values at which they do nothing, and why.
_HUB = "transformers moved it to the hub"
_LAYOUT = "jaxgen always decodes from a static cache, compiled"
_DRAFTS = "drafts come from an assistant_model or from the prompt"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "assistant_early_exit": ((), _DRAFTS),
    "assistant_ensemble_weight": ((), "it changes the distribution"),
    "assistant_lookbehind": ((10,), "it needs two tokenizers"),
    "cache_config": (({},), _LAYOUT),
    "compile_config": ((), _LAYOUT),
    "constraints": (([],), _HUB),
    "continuous_batching_config": ((), "it belongs to a server"),
    "decoder_start_token_id": ((), "it is for encoder-decoder models"),
    "disable_compile": ((False,), _LAYOUT),
    "diversity_penalty": ((0.0,), _HUB),
    "dola_layers": ((), _HUB),
    "force_words_ids": (([],), _HUB),
    "is_assistant": ((False,), "pass the drafting model as assistant_model"),
    "low_memory": ((False,), "transformers refuses it too"),
    "num_assistant_tokens_schedule": (("constant",), "the number of drafts is part of the compiled program"),
    "num_beam_groups": ((1,), _HUB),
    "penalty_alpha": ((), _HUB),
    "speculation_type": ((), _DRAFTS),
    "target_lookbehind": ((10,), "it needs two tokenizers"),
    "token_healing": ((False,), "it needs the tokenizer of every call"),
    "use_cache": ((True,), _LAYOUT),
    "use_mtp": ((False,), "Mistral has no such heads"),
    # Arguments of HF's generate() that are not fields of its GenerationConfig.
    "assistant_tokenizer": ((), "the assistant must share the model's vocabulary"),
    "custom_generate": ((), "it runs code from the hub"),
    "inputs_embeds": ((), "prompts are token ids"),
    "position_ids": ((), "positions count the real tokens of attention_mask"),
    "synced_gpus": ((False,), "a model lives on one device"),
    "trust_remote_code": ((False,), "jaxgen runs no code from the hub"),
}
# Those of them that change no token: in a stored file they are passed over.
INERT_IN_FILES = frozenset({
    "assistant_early_exit", "assistant_lookbehind", "cache_config", "compile_config", "continuous_batching_config",
    "decoder_start_token_id", "disable_compile", "is_assistant", "low_memory", "num_assistant_tokens_schedule",
    "speculation_type", "target_lookbehind", "use_cache", "use_mtp",
})  # fmt: skip
METADATA = frozenset({"transformers_version", "_from_model_config", "_commit_hash"})
