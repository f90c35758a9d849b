"""What the fields of a config.json may hold: those that the families share, each with its check."""

from typing import Any

from jaxgen.models import rope

# Fields with one value that jaxgen implements, unless a family has them; any other value would change the mathematics.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_decoder": (False, True),
    "pretraining_tp": (1,),
    "layer_types": (None,),
    "auto_map": (None,),
    "quantization_config": (None,),
    "adapters": (None,),
    "chunk_size_feed_forward": (0,),
}

# Fields that say nothing about the mathematics of inference. The generation settings that transformers 4 kept
# in config.json are here too: transformers 5 ignores them in favour of generation_config.json.
IGNORED = frozenset(
    """
    _name_or_path architectures attention_dropout cross_attention_hidden_size decoder_start_token_id dtype
    finetuning_task id2label initializer_range label2id max_sequence_length name_or_path output_attentions
    output_hidden_states prefix problem_type pruned_heads return_dict sep_token_id suppress_tokens
    task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript
    transformers_version unk_token_id use_bfloat16 use_cache _attn_implementation_autoset attn_implementation
    _attn_implementation _flash_attn_2_enabled use_flash_attention_2 gradient_checkpointing model_max_length
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate temperature top_k top_p typical_p
    """.split()
)

# What int32 and float32 hold, in which the model is computed; the least is the least that is not rounded to nothing.
_MOST, _LEAST_FLOAT, _MOST_FLOAT = 2**31 - 1, 1.1754944e-38, 3.4028235e38
MOST_LAYERS = 10_000  # of which a pattern is spelled out


def is_int(value: object, minimum: int) -> bool:
    """From `minimum` to what int32 holds."""
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= _MOST


def is_positive_int(value: object) -> bool:
    """From 1 to what int32 holds."""
    return is_int(value, 1)


def is_positive_number(value: object) -> bool:
    """Between the least and the largest number that float32 holds; one that passes becomes a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and _LEAST_FLOAT <= value <= _MOST_FLOAT


def _is_token_id(value: object) -> bool:
    return is_int(value, -1)  # old configs write -1 for "none"


def all_full(layer_types: Any) -> bool:
    """Whether layers are named, none of which has a window."""
    return isinstance(layer_types, list | tuple) and all(kind == "full_attention" for kind in layer_types)


POSITIVE_INT = is_positive_int, "a positive int below 2**31"
POSITIVE_NUMBER = is_positive_number, "a positive number that float32 holds"
TRUE_OR_FALSE = (lambda value: isinstance(value, bool)), "true or false"
CHECKS = {
    **dict.fromkeys(
        (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window",
        ),
        POSITIVE_INT,
    ),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), POSITIVE_NUMBER),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), (_is_token_id, "a token id, below 2**31")),
    "eos_token_id": (
        lambda value: all(map(_is_token_id, value if isinstance(value, tuple) else (value,))),
        "a token id below 2**31, or several",
    ),
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache", "use_sliding_window"),
        TRUE_OR_FALSE,
    ),
    "max_window_layers": (lambda value: is_int(value, 0), "an int from 0 on, below 2**31"),
    "layer_types": (
        lambda value: isinstance(value, tuple) and len(value) > 0 and all(kind in _LAYERS for kind in value),
        "one of 'full_attention' and 'sliding_attention' for each layer",
    ),
    "rope_scaling": (
        lambda value: value is None or isinstance(value, tuple(rope.SCALINGS.values())),
        "a scaling of jaxgen.models.rope, or None",
    ),
}  # fmt: skip
_LAYERS = ("full_attention", "sliding_attention")
NULLABLE = ("sliding_window", "layer_types", "head_dim", "bos_token_id", "eos_token_id", "pad_token_id")
SETTABLE = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
