"""The family and the config that a GGUF file's metadata describes; whatever they say and jaxgen does not know raises.

Source: llama.cpp's `convert_hf_to_gguf.py`, and gguf-py's `constants.py` (names of metadata).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgen.errors import CheckpointError, UnsupportedError
from jaxgen.models.config import DecoderConfig
from jaxgen.models.families import families, known_refusal
from jaxgen.models.fields import POSITIVE_INT, POSITIVE_NUMBER
from jaxgen.models.rope import Llama3, plain_frequencies
from jaxgen.models.tensors import EMBEDDING, HEAD
from jaxgen.models.two_ropes import FULL, SLIDING, pattern

from ..checkpoint import TensorInfo
from .gguf_header import GgufArray
from .modules import almost

# What Llama 3.1's frequencies are divided by, and Phi's for rows within the original context and for longer ones.
VECTORS = {
    "rope_freqs.weight": "llama3",
    "rope_factors_short.weight": "longrope",
    "rope_factors_long.weight": "longrope",
}
_FREQUENCIES, _SHORT, _LONG = VECTORS
_REQUIRED = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.sliding_window": "sliding_window",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
}
_FLOATS = ("attention.layer_norm_rms_epsilon", "rope.freq_base")
_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
# Metadata that changes the mathematics unless it has this value, and some that never does.
_NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.type": "none",
    "rope.scale_linear": 1.0,
    "attention.causal": True,
}
_IGNORED = ("vocab_size", "tensor_data_layout")
# Of scaled positions: what HF calls it, by kind. llama.cpp takes the amplitude that follows from YaRN's factor.
_SCALING = {
    "linear": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    },
}
_AMPLITUDE = "rope.scaling.yarn_attn_factor"
# Whose metadata says nothing of the mathematics: the format's own, and what programs that quantise leave behind.
_OTHERS = ("general", "tokenizer", "split", "quantize", "imatrix", "mradermacher", "unsloth")
_SPLIT = ("split.no", "split.count", "split.tensors.count")
_TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_OTHER_TOKEN_IDS = tuple(
    f"tokenizer.ggml.{name}_token_id"
    for name in "eot eom unknown unk seperator sep cls mask prefix suffix middle".split()
)


def family_of(metadata: Mapping[str, Any]) -> Any:
    """The class of the model; families that share an architecture are told apart by metadata or the model's name."""
    architecture = metadata.get("general.architecture")
    kinds: list[Any] = [kind for kind in families() if kind.gguf is not None]
    known = {name for kind in kinds for name in kind.gguf.architectures}
    if not isinstance(architecture, str) or architecture not in known:
        readable = " or ".join(repr(name) for name in sorted(known))
        why = known_refusal(architecture)
        raise UnsupportedError(
            f"general.architecture={architecture!r:.80} is not supported{why and f': {why}'}; jaxgen reads {readable}"
        )
    name, fitting = str(metadata.get("general.name", "")).lower(), []
    for kind in kinds:
        layout = kind.gguf
        told = bool(layout.told_by and metadata.get(f"{architecture}.{layout.told_by}"))
        if architecture not in layout.architectures or (layout.told_by and not told):
            continue
        has_window = f"{architecture}.{_WINDOW}" in metadata and _has(kind, "sliding_window")
        if told or has_window or layout.named in name or architecture == layout.also:
            fitting.append((told, len(layout.named), kind))
    return max(fitting, key=lambda one: one[:2])[-1]  # the one that the file tells most of


def config_of(
    kind: Any, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], vectors: Mapping[str, np.ndarray]
) -> DecoderConfig:
    """The config that metadata and tensors describe; `vectors` are the tensors of `VECTORS` that belong to it."""
    own = _own_metadata(kind, metadata, tensors)
    layout, architecture = kind.gguf, metadata["general.architecture"]
    # As llama.cpp has it where the file does not say; a family's own defaults are not in question.
    fields: dict[str, Any] = {"num_key_value_heads": own["attention.head_count"], "head_dim": None}
    names = {**_REQUIRED, **_OPTIONAL, **layout.fields, **layout.optional}
    fields |= {field: own[name] for name, field in names.items() if name in own}
    sizes = {name: own[name] for name, field in names.items() if field == "head_dim" and name in own}
    if any(size != fields["head_dim"] for size in sizes.values()):
        raise UnsupportedError(f"{sizes}: jaxgen implements one size of heads, rotated as a whole")
    fields |= {field: metadata.get(name) for field, name in _TOKEN_IDS.items()}
    fields |= {"vocab_size": _vocabulary(metadata, own, tensors), "tie_word_embeddings": HEAD not in tensors}
    if _has(kind, "sliding_window"):
        fields |= _windows(kind, own, fields)
    scaling = str(own.get("rope.scaling.type"))
    if scaling in _SCALING:
        given = {field: own.get(f"rope.scaling.{name}") for name, field in _SCALING[scaling].items()}
        fields["rope_scaling"] = {"rope_type": scaling, **given}
        _check_amplitude(architecture, own)
    for name, field in ((_SHORT, "short_factor"), (_LONG, "long_factor")):
        if name in vectors:
            fields[field] = [float(factor) for factor in vectors[name].reshape(-1)]
    config = kind.config_class(**layout.derived(fields))
    if _FREQUENCIES not in vectors:
        return config
    if config.rope_scaling is not None:
        raise UnsupportedError(f"tensor {_FREQUENCIES!r}, beside {architecture}.rope.scaling.type={scaling!r:.80}")
    return dataclasses.replace(config, rope_scaling=_llama3_of(vectors[_FREQUENCIES], config))


def _has(kind: Any, name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(kind.config_class))


def _vocabulary(metadata: Mapping[str, Any], own: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> int:
    rows = tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else None
    tokens = metadata.get("tokenizer.ggml.tokens", own.get("vocab_size"))
    tokens = tokens.count if isinstance(tokens, GgufArray) else tokens
    if rows is not None and tokens is not None and rows != tokens:
        raise CheckpointError("GGUF metadata", [f"the vocabulary has {tokens!r:.80} tokens, but {rows} embeddings"])
    return rows or 1  # no embedding is an error that is reported with the others


def _windows(kind: Any, own: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The window, and the layers that have it where the file names them."""
    window = fields.get("sliding_window")
    if window is not None and _has(kind, "layer_types") and not kind.gguf.windows_by_layer:
        raise UnsupportedError(
            f"{_WINDOW}={window!r:.80} is not supported with {kind.config_class.architecture}: the file does not say "
            "which layers have it"
        )
    named = own.get(_PATTERN)
    flags = named.flags if isinstance(named, GgufArray) else ()
    if flags:
        return {"sliding_window": window, "layer_types": tuple(SLIDING if flag else FULL for flag in flags)}
    layers = fields["num_hidden_layers"]
    if isinstance(named, int) and POSITIVE_INT[0](named) and POSITIVE_INT[0](layers):
        return {"sliding_window": window, "layer_types": pattern(named, layers)}
    if named is not None:
        raise CheckpointError("GGUF metadata", [f"{_PATTERN}={named!r:.80} names no layers"])
    return {"sliding_window": window}


def _check_amplitude(architecture: str, own: Mapping[str, Any]) -> None:
    """Raise for an amplitude other than that which follows from YaRN's factor: programs do not agree on its meaning."""
    given: Any = own.get(_AMPLITUDE)
    factor: Any = own.get("rope.scaling.factor")
    if given is None or not POSITIVE_NUMBER[0](factor):  # the config says what is wrong with the factor
        return
    if not isinstance(given, float) or abs(given - (1 + 0.1 * math.log(max(factor, 1)))) > 1e-4:
        raise UnsupportedError(
            f"{architecture}.{_AMPLITUDE}={given!r:.80} is not supported; jaxgen implements 1 + 0.1 * log(factor)"
        )


def _llama3_of(divisors: np.ndarray, config: DecoderConfig) -> Llama3:
    """The scaling of which llama.cpp keeps only what it divides the frequencies by; all released models share this one.

    Source: llama.cpp's `convert_hf_to_gguf.py`, `LlamaModel.generate_extra_tensors`.
    """
    if divisors.shape != (config.head_size // 2,) or not (divisors >= 1).all():
        raise UnsupportedError(f"tensor {_FREQUENCIES!r}: not a number of at least 1 for each pair of head_dim")
    theta, factor = config.rope_theta, float(divisors.max())
    scaling = Llama3(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    plain = plain_frequencies(2 * len(divisors), theta)
    if not np.allclose(plain / divisors, scaling.frequencies(plain, theta), rtol=1e-4, atol=0):
        raise UnsupportedError(f"tensor {_FREQUENCIES!r}: rotary positions scaled otherwise than Llama 3.1's")
    return scaling


def _own_metadata(kind: Any, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The architecture's metadata, without its prefix; raises for all that the file says and jaxgen does not know."""
    if _FREQUENCIES in tensors:
        raise UnsupportedError(f"tensor {_FREQUENCIES!r}: scaled rotary positions are not supported here")
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedError("the file is split; join the parts with `llama-gguf-split --merge` first")
    architecture, layout = metadata["general.architecture"], kind.gguf
    prefix = f"{architecture}."
    own = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    known, scaling = _known(kind, own)
    for name, value in own.items():
        if name not in known and not (name in _NEUTRAL and value == _NEUTRAL[name]):
            raise UnsupportedError(
                f"{prefix}{name:.80}={value!r:.80} is not supported; it would change the mathematics"
            )
        if name in _FLOATS and not isinstance(value, float):
            raise CheckpointError("GGUF metadata", [f"{prefix}{name}={value!r:.80} must be a floating-point number"])
    own = {**layout.defaults, **own}
    needed = _REQUIRED.keys() | layout.fields.keys() | ({"rope.scaling.factor"} if scaling else set())
    problems = [f"{prefix}{name} is missing" for name in sorted(needed - own.keys())]
    problems += _foreign(architecture, metadata)
    if problems:
        raise CheckpointError("GGUF metadata", problems)
    return own


def _known(kind: Any, own: Mapping[str, Any]) -> tuple[set[str], bool]:
    """The metadata that jaxgen understands, and whether positions are scaled."""
    layout, scaling = kind.gguf, str(own.get("rope.scaling.type"))
    known = {*_REQUIRED, *_OPTIONAL, *layout.fields, *layout.optional, *_IGNORED}
    if not _has(kind, "sliding_window"):
        known.discard(_WINDOW)
    if layout.windows_by_layer:
        known.add(_PATTERN)
    scaled = scaling in _SCALING and scaling in kind.config_class.rope_types
    if scaled:
        known |= {f"rope.scaling.{name}" for name in ("type", "finetuned", *_SCALING[scaling])}
        known |= {_AMPLITUDE} if scaling == "yarn" else set()
    return known, scaled


def _foreign(architecture: str, metadata: Mapping[str, Any]) -> list[str]:
    """Fields that may be damaged ones of the architecture or of the special tokens, and special tokens missed."""
    known = (*_OTHERS, architecture)
    problems = [
        f"{name!r:.80} is of no known kind; jaxgen knows {', '.join(known)}: it may be a damaged name"
        for name in metadata
        if name.split(".")[0] not in known or (name.startswith("split.") and name not in _SPLIT)
    ]
    absent = [name for name in _TOKEN_IDS.values() if name not in metadata]
    for name in metadata:
        if name in _OTHER_TOKEN_IDS or name in _TOKEN_IDS.values():
            continue
        if near := almost(name, absent):
            problems.append(f"{near} is missing, and {name!r:.80} may be that, damaged")
    has_tokens = metadata.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")
    if has_tokens and _TOKEN_IDS["eos_token_id"] in absent:
        problems.append(f"{_TOKEN_IDS['eos_token_id']} is missing")
    return problems
