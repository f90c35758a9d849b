"""Which families there are, and which one a config.json belongs to. A new family is one file, and one line here."""

import importlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.models.config import DecoderConfig, config_of, read_config

if TYPE_CHECKING:
    from jaxgen.models.causal_lm import DecoderForCausalLM

# `model_type` of config.json: the module of jaxgen.models, and its class.
_FAMILIES = {
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3_text": ("gemma3", "Gemma3ForCausalLM"),
    "granite": ("granite", "GraniteForCausalLM"),
    "llama": ("llama", "LlamaForCausalLM"),
    "ministral": ("ministral", "MinistralForCausalLM"),
    "ministral3": ("ministral3", "Ministral3ForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "mixtral": ("mixtral", "MixtralForCausalLM"),
    "olmo2": ("olmo2", "Olmo2ForCausalLM"),
    "olmo3": ("olmo3", "Olmo3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM"),
}

# `model_type` of models that see too: that of the text model in their `text_config`, where it does not say.
_COMPOSITE = {"gemma3": "gemma3_text", "mistral3": "mistral"}


def is_composite(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model that has a text model inside."""
    kind = fields.get("model_type")
    return isinstance(kind, str) and kind in _COMPOSITE


def text_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the text model: all, or those that a model that sees has in its `text_config`."""
    found = dict(fields)
    if is_composite(fields):
        text = fields.get("text_config")
        if not isinstance(text, Mapping):
            raise JaxgenError(f"config: text_config={text!r:.80} must be an object, which describes the text model")
        tied = fields.get("tie_word_embeddings")  # as in transformers, where the outer one counts, and is true
        found = {"model_type": _COMPOSITE[fields["model_type"]], **text, "tie_word_embeddings": tied is not False}
    if found.get("model_type") == "mistral" and found.get("layer_types") is not None:  # as transformers' AutoConfig
        found["model_type"] = "ministral"
    return found


# Those that people look for here, and what of them there is not.
_REFUSED = {
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"),
        "most of its layers are gated linear attention, with a recurrent state in the place of a cache",
    ),
    **dict.fromkeys(
        ("gemma4", "gemma4_text", "gemma3n", "gemma3n_text"),
        "its layers have embeddings of their own and share keys and values",
    ),
    **dict.fromkeys(
        ("lfm2", "lfm2_moe", "lfm2_vl"), "most of its layers are short convolutions, with a state of their own"
    ),
    **dict.fromkeys(
        ("granitemoehybrid", "bamba", "jamba", "falcon_h1", "nemotron_h", "mamba", "mamba2"),
        "it has Mamba layers, with a recurrent state in the place of a cache",
    ),
    **dict.fromkeys(
        ("mistral4", "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe_lite"),
        "its attention keeps latent vectors in the cache (MLA), beside experts that are shared or grouped",
    ),
    "gpt_oss": "its attention has sinks, its experts biases and clamped activations, and its weights are in MXFP4",
    "granitemoe": "its experts are stacked in the files, and its multipliers come beside them",
    "qwen2_moe": "one of its experts reads every token, behind a gate",
}


def family(model_type: Any) -> "type[DecoderForCausalLM]":
    """The class of the models of a `model_type`; raises `UnsupportedError` for one that jaxgen does not have."""
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        known = " or ".join(f"{name!r} ({of})" for name, (_, of) in _FAMILIES.items())
        what = "is missing" if model_type is None else f"={model_type!r:.80} is not supported"
        why = f": {why}" if (why := known_refusal(model_type)) else ""
        space = "" if what[0] == "=" else " "
        raise UnsupportedError(f"config: model_type{space}{what}{why}; jaxgen implements {known}")
    module, name = _FAMILIES[model_type]
    return getattr(importlib.import_module(f"jaxgen.models.{module}"), name)


def known_refusal(name: Any) -> str:
    """What jaxgen lacks for a kind of model that people look for, by HF's name or llama.cpp's; or nothing."""
    plain = str(name).replace("-", "").replace("_", "")
    return next((why for known, why in _REFUSED.items() if known.replace("_", "") == plain), "")


def families() -> "list[type[DecoderForCausalLM]]":
    """All of them."""
    return [family(model_type) for model_type in _FAMILIES]


def family_of(config: DecoderConfig) -> "type[DecoderForCausalLM]":
    """The class of the models of a config."""
    return family(config.model_type)


def config_from_hf(source: "str | os.PathLike[str] | Mapping[str, Any]") -> DecoderConfig:
    """`from_hf` of the family that the config belongs to; raises as that, and `UnsupportedError` for other families."""
    fields = text_fields(read_config(source))
    return family(fields.get("model_type")).config_class.from_hf(fields)


class AutoConfig:
    """Reads configs, under the name that Hugging Face users know; never instantiated."""

    def __init__(self):
        raise JaxgenError("AutoConfig is not instantiated: call AutoConfig.from_pretrained(...)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: "str | os.PathLike[str]", **options: Any) -> DecoderConfig:
        """As the `from_pretrained` of the family that the config.json names; raises as `config_from_hf`.

        >>> from jaxgen import AutoConfig, demo
        >>> type(AutoConfig.from_pretrained(demo.path(), num_hidden_layers=2)).__name__
        'MistralConfig'
        """
        read, fields = config_of(pretrained_model_name_or_path, **options)
        read = text_fields(read)
        kind = family(read.get("model_type")).config_class
        return kind.from_hf(kind.replaced(read, fields))
