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
