"""Small configs of the families beside Mistral, three of each or more, as their config.json would say them."""

from typing import Any

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama, as Llama 2": {"model_type": "llama", **_SMALL, "num_key_value_heads": 4, "pretraining_tp": 1},
    "llama, as Llama 3.2": {
        "model_type": "llama", **_SMALL, "rope_theta": 500000.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True,
    },
    "llama, all biases, linear": {
        "model_type": "llama", **_SMALL, "attention_bias": True, "mlp_bias": True, "head_dim": 12,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    },
    "llama, yarn": {
        "model_type": "llama", **_SMALL, "rope_parameters": {
            **YARN, "rope_theta": 20000.0, "beta_fast": 16, "mscale": 0.8, "mscale_all_dim": 0.5, "truncate": False,
        },
    },
    "qwen2": {
        "model_type": "qwen2", **_SMALL, "rope_theta": 1000000.0, "sliding_window": 64, "use_sliding_window": False,
        "max_window_layers": 1, "layer_types": ["full_attention"] * 2,
    },
    "qwen2, tied": {"model_type": "qwen2", **_SMALL, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen2, yarn": {
        "model_type": "qwen2", **_SMALL, "rope_theta": 1000000.0, "rope_scaling": {"type": "yarn", **YARN},
    },
    "qwen2, windows": {
        "model_type": "qwen2", **_SMALL, "num_hidden_layers": 3, "rope_theta": 1000000.0, "sliding_window": 12,
        "use_sliding_window": True, "max_window_layers": 1,
    },
    "qwen3, windows": {
        "model_type": "qwen3", **_SMALL, "num_hidden_layers": 3, "head_dim": 32, "sliding_window": 9,
        "use_sliding_window": True, "max_window_layers": 3, "rope_scaling": {"rope_type": "yarn", **YARN},
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3": {
        "model_type": "qwen3", **_SMALL, "head_dim": 32, "rope_theta": 1000000, "use_sliding_window": False,
        "max_window_layers": 2, "sliding_window": None, "layer_types": ["full_attention"] * 2,
    },
    "qwen3, tied": {"model_type": "qwen3", **_SMALL, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3, biases, yarn": {
        "model_type": "qwen3", **_SMALL, "attention_bias": True, "rope_theta": 1000000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
}  # fmt: skip
SCALED = [name for name in CONFIGS if name not in ("llama, as Llama 2", "qwen3", "qwen3, tied")]
ORIGINAL_CONTEXT = 32  # of those that say one


# What the hub's config.json files hold, in transformers 4's spelling; without what is the same everywhere.
_PLAIN = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
}  # fmt: skip
_LLAMA_2 = _PLAIN | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "vocab_size": 32000,
}  # fmt: skip
_LLAMA_31 = _LLAMA_2 | {
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": False, "num_key_value_heads": 8, "rope_theta": 500000.0,
    "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}, "vocab_size": 128256,
}  # fmt: skip
_QWEN3 = _PLAIN | {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "bos_token_id": 151643, "eos_token_id": 151645,
    "head_dim": 128, "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 40960,
    "max_window_layers": 36, "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
HUB: dict[str, dict[str, Any]] = {
    "Llama-2-7b": _LLAMA_2,
    "Llama-3.1-8B": _LLAMA_31,
    "Llama-3.2-1B": _LLAMA_31
    | {"head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"rope_scaling": _LLAMA_31["rope_scaling"] | {"factor": 32.0}, "tie_word_embeddings": True},
    "SmolLM2-135M": _LLAMA_2
    | {"bos_token_id": 0, "eos_token_id": 0, "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True}
    | {"max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3}
    | {"rope_interleaved": False, "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152},
    "TinyLlama-1.1B": _LLAMA_2
    | {"hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048, "num_hidden_layers": 22}
    | {"num_key_value_heads": 4},
    "DeepSeek-R1-Distill-Llama-8B": _LLAMA_31 | {"eos_token_id": 128001},
    "Qwen3-0.6B": _QWEN3
    | {"hidden_size": 1024, "intermediate_size": 3072, "max_window_layers": 28, "num_attention_heads": 16}
    | {"num_hidden_layers": 28, "tie_word_embeddings": True},
    "Qwen3-8B": _QWEN3,
    "Qwen3-4B-Instruct-2507": _QWEN3
    | {"hidden_size": 2560, "intermediate_size": 9728, "max_position_embeddings": 262144, "rope_theta": 5000000}
    | {"tie_word_embeddings": True},
    "DeepSeek-R1-0528-Qwen3-8B": _QWEN3
    | {"max_position_embeddings": 131072}
    | {"rope_scaling": YARN | {"attn_factor": 0.8782488562869419, "original_max_position_embeddings": 32768}},
}
