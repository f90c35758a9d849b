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
        "model_type": "qwen2", **_SMALL, "rope_theta": 1000000.0, "sliding_window": 12,
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
    "mixtral": {
        "model_type": "mixtral", **_SMALL, "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 4,
        "num_experts_per_tok": 2, "output_router_logits": False, "router_aux_loss_coef": 0.02,
    },
    "mixtral, window": {
        "model_type": "mixtral", **_SMALL, "sliding_window": 24, "num_local_experts": 8, "num_experts_per_tok": 3,
    },
    "mixtral, one of many, tied": {
        "model_type": "mixtral", **_SMALL, "num_key_value_heads": 1, "tie_word_embeddings": True,
        "num_local_experts": 40, "num_experts_per_tok": 1,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", **_SMALL, "rope_theta": 1000000.0, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "moe_intermediate_size": 20, "norm_topk_prob": True, "num_experts": 16, "num_experts_per_tok": 4,
        "use_sliding_window": False, "sliding_window": None, "max_window_layers": 2,
    },
    "qwen3_moe, some layers, tied": {
        "model_type": "qwen3_moe", **_SMALL, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3],
        "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "tie_word_embeddings": True,
    },
    "qwen3_moe, biases, yarn": {
        "model_type": "qwen3_moe", **_SMALL, "attention_bias": True, "rope_theta": 1000000.0, "num_experts": 5,
        "num_experts_per_tok": 5, "moe_intermediate_size": 16, "norm_topk_prob": False, "mlp_only_layers": [0],
        "rope_scaling": {"type": "yarn", **YARN},
    },
    "smollm3": {
        "model_type": "smollm3", **_SMALL, "rope_theta": 5000000.0, "no_rope_layers": [1, 0],
        "use_sliding_window": False, "no_rope_layer_interval": 4, "layer_types": ["full_attention"] * 2,
        "pretraining_tp": 2,
    },
    "smollm3, by interval": {
        "model_type": "smollm3", **_SMALL, "num_hidden_layers": 3, "no_rope_layer_interval": 2, "attention_bias": True,
        "mlp_bias": True, "tie_word_embeddings": False,
    },
    "smollm3, yarn": {
        "model_type": "smollm3", **_SMALL, "no_rope_layers": [0, 1], "rope_theta": 50000.0,
        "rope_scaling": {"type": "yarn", **YARN},
    },
    "granite": {
        "model_type": "granite", **_SMALL, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
        "attention_multiplier": 0.0625, "logits_scaling": 8.0, "tie_word_embeddings": True, "rope_theta": 10000000.0,
    },
    "granite, biases": {
        "model_type": "granite", **_SMALL, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True,
        "attention_multiplier": 0.5, "logits_scaling": 0.7, "residual_multiplier": 1,
    },
    "granite, llama3": {
        "model_type": "granite", **_SMALL, "head_dim": 12, "embedding_multiplier": 3, "rope_scaling": LLAMA3,
        "residual_multiplier": 1.5,
    },
    "gemma3": {
        "model_type": "gemma3_text", **_SMALL, "num_hidden_layers": 3, "sliding_window": 8, "query_pre_attn_scalar": 16,
        "sliding_window_pattern": 2, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rope_scaling": None,
        "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "cache_implementation": "hybrid",
    },
    "gemma3, linear": {
        "model_type": "gemma3_text", **_SMALL, "num_key_value_heads": 1, "sliding_window": 20,
        "query_pre_attn_scalar": 24, "layer_types": ["full_attention", "sliding_attention"], "rope_theta": 50000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "tie_word_embeddings": False,
    },
    "gemma3, as transformers 5 writes it": {
        "model_type": "gemma3_text", **_SMALL, "head_dim": 12, "sliding_window": 5, "final_logit_softcapping": 20.0,
        "layer_types": ["sliding_attention", "full_attention"], "attention_bias": True, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 70000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    },
    "gemma2": {
        "model_type": "gemma2", **_SMALL, "sliding_window": 8, "query_pre_attn_scalar": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0,
    },
    "gemma2, no limits": {
        "model_type": "gemma2", **_SMALL, "sliding_window": 30, "query_pre_attn_scalar": 40, "num_key_value_heads": 4,
        "final_logit_softcapping": None, "attn_logit_softcapping": None, "tie_word_embeddings": False,
    },
    "gemma2, three layers": {
        "model_type": "gemma2", **_SMALL, "num_hidden_layers": 3, "sliding_window": 4, "attention_bias": True,
        "rope_theta": 500.0, "head_dim": 8,
    },
    "olmo2": {"model_type": "olmo2", **_SMALL, "rope_theta": 500000.0},
    "olmo2, biases": {
        "model_type": "olmo2", **_SMALL, "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True,
    },
    "olmo2, yarn": {"model_type": "olmo2", **_SMALL, "head_dim": 12, "rope_scaling": {"rope_type": "yarn", **YARN}},
    "olmo3": {
        "model_type": "olmo3", **_SMALL, "num_hidden_layers": 4, "sliding_window": 8, "rope_theta": 500000.0,
    },
    "olmo3, yarn": {
        "model_type": "olmo3", **_SMALL, "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"],
        "rope_theta": 500000.0, "rope_scaling": {"rope_type": "yarn", **YARN},
    },
    "olmo3, as transformers 5 writes it": {
        "model_type": "olmo3", **_SMALL, "num_key_value_heads": 4, "sliding_window": 5, "attention_bias": True,
        "layer_types": ["full_attention", "sliding_attention"], "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 70000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    },
    "phi3": {
        "model_type": "phi3", **_SMALL, "num_key_value_heads": 4, "sliding_window": 20, "rope_scaling": None,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "original_max_position_embeddings": 128,
    },
    "phi3, longrope": {
        "model_type": "phi3", **_SMALL, "hidden_size": 64, "tie_word_embeddings": True, "partial_rotary_factor": 0.75,
        "rope_theta": 5000.0, "max_position_embeddings": 512, "original_max_position_embeddings": 128, "rope_scaling": {
            "type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0], "long_factor": [1.5] * 6,
        },
    },
    "phi3, long rows": {
        "model_type": "phi3", **_SMALL, "hidden_size": 64, "original_max_position_embeddings": 24, "sliding_window": 20,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.5, 2, 3, 4, 5, 6, 7, 8]},
    },
    "phi3, as transformers 5 writes it": {
        "model_type": "phi3", **_SMALL, "hidden_size": 64, "num_key_value_heads": 1,
        "original_max_position_embeddings": 128, "max_position_embeddings": 256, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 9000.0, "partial_rotary_factor": 0.5, "short_factor": [1, 1.5, 2, 3],
            "long_factor": [2.0] * 4, "attention_factor": 1.25, "original_max_position_embeddings": 128,
        },
    },
}  # fmt: skip
LLAMA_4 = YARN | {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
CONFIGS |= {
    "ministral": {
        "model_type": "ministral", **_SMALL, "num_hidden_layers": 3, "sliding_window": 11, "rope_theta": 1000000.0,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "ministral, all sliding": {"model_type": "ministral", **_SMALL, "sliding_window": 7, "tie_word_embeddings": True},
    "ministral, alternating": {
        "model_type": "ministral", **_SMALL, "num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 12,
        "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "ministral3": {
        "model_type": "ministral3", **_SMALL, "rope_parameters": {**LLAMA_4, "rope_theta": 1000000.0, "type": "yarn"},
    },
    "ministral3, tied, steep": {
        "model_type": "ministral3", **_SMALL, "tie_word_embeddings": True, "num_key_value_heads": 4,
        "rope_parameters": {**LLAMA_4, "rope_theta": 10000.0, "llama_4_scaling_beta": 0.7, "factor": 8.0},
    },
    "ministral3, window": {
        "model_type": "ministral3", **_SMALL, "head_dim": 32, "sliding_window": 13,
        "rope_parameters": {
            **LLAMA_4, "rope_theta": 1000000.0, "original_max_position_embeddings": 8, "max_position_embeddings": 128,
        },
    },
}  # fmt: skip
SCALED = [name for name in CONFIGS if "scal" in str(CONFIGS[name]) or "factor" in str(CONFIGS[name])]
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
_MIXTRAL = _PLAIN | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
    "sliding_window": None, "vocab_size": 32000,
}  # fmt: skip
_QWEN3_MOE = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1, "hidden_size": 2048,
    "intermediate_size": 6144, "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
}  # fmt: skip
_GRANITE = _PLAIN | {
    "architectures": ["GraniteForCausalLM"], "model_type": "granite", "attention_dropout": 0.0,
    "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
    "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0, "max_position_embeddings": 131072,
    "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0,
    "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000000.0,
    "tie_word_embeddings": True, "vocab_size": 49159,
}  # fmt: skip
_GEMMA_3 = _PLAIN | {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attn_logit_softcapping": None,
    "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None,
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
    "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    "tie_word_embeddings": True, "vocab_size": 262144,
}  # fmt: skip
del _GEMMA_3["hidden_act"]
_GEMMA_2 = _PLAIN | {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attn_logit_softcapping": 50.0,
    "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 107], "final_logit_softcapping": 30.0,
    "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
    "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": True, "vocab_size": 256000,
}  # fmt: skip
_OLMO_2 = _PLAIN | {
    "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "bos_token_id": None, "eos_token_id": 100257,
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 500000, "vocab_size": 100352,
}  # fmt: skip
_PHI_3 = _PLAIN | {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "bos_token_id": 1, "embd_pdrop": 0.0,
    "eos_token_id": 32000, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047, "vocab_size": 32064,
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
    "SmolLM3-3B": _PLAIN
    | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "bos_token_id": None, "eos_token_id": 128012}
    | {"pad_token_id": 128004, "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 65536}
    | {"layer_types": ["full_attention"] * 36, "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4}
    | {"no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36}
    | {"num_key_value_heads": 4, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None}
    | {"rope_theta": 5000000.0, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False}
    | {"vocab_size": 128256},
    "granite-3.3-2b-instruct": _GRANITE,
    "granite-3.3-8b-instruct": _GRANITE
    | {"attention_multiplier": 0.0078125, "hidden_size": 4096, "intermediate_size": 12800, "logits_scaling": 16.0},
    "gemma-3-1b-it": _GEMMA_3,
    "gemma-3-270m": {name: value for name, value in _GEMMA_3.items() if name != "sliding_window_pattern"}
    | {"_sliding_window_pattern": 6, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18}
    | {"layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "use_bidirectional_attention": False},
    "gemma-2-2b-it": _GEMMA_2,
    "gemma-2-27b-it": _GEMMA_2
    | {"head_dim": 128, "hidden_size": 4608, "intermediate_size": 36864, "num_attention_heads": 32}
    | {
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144,
        "_attn_implementation": "eager",
    },
    "OLMo-2-1124-7B": _OLMO_2,
    "Olmo-3-1025-7B": _OLMO_2
    | {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "max_position_embeddings": 65536}
    | {
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
        "sliding_window": 4096,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "attention_factor": 1.2079441541679836,
        },
        "vocab_size": 100278,
    },
    "Phi-3-mini-4k-instruct": _PHI_3,
    "phi-4": _PHI_3
    | {"bos_token_id": 100257, "eos_token_id": 100265, "hidden_size": 5120, "intermediate_size": 17920}
    | {"max_position_embeddings": 16384, "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10}
    | {"original_max_position_embeddings": 16384, "pad_token_id": 100349, "rope_theta": 250000, "sliding_window": None}
    | {"vocab_size": 100352},
    "Phi-4-mini-instruct": _PHI_3
    | {
        "bos_token_id": 199999,
        "eos_token_id": 199999,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
    }
    | {
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
    }
    | {"original_max_position_embeddings": 4096, "pad_token_id": 199999, "partial_rotary_factor": 0.75}
    | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 24 + [32.0] * 24}}
    | {"sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064},
    "Qwen3-0.6B": _QWEN3
    | {"hidden_size": 1024, "intermediate_size": 3072, "max_window_layers": 28, "num_attention_heads": 16}
    | {"num_hidden_layers": 28, "tie_word_embeddings": True},
    "Qwen3-8B": _QWEN3,
    "Qwen3-4B-Instruct-2507": _QWEN3
    | {"hidden_size": 2560, "intermediate_size": 9728, "max_position_embeddings": 262144, "rope_theta": 5000000}
    | {"tie_word_embeddings": True},
    "Mixtral-8x7B-v0.1": _MIXTRAL,
    "Mixtral-8x22B-Instruct-v0.1": _MIXTRAL
    | {"hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 65536, "num_attention_heads": 48}
    | {"num_hidden_layers": 56, "vocab_size": 32768},
    "Qwen3-30B-A3B": _QWEN3_MOE,
    "Qwen3-Coder-30B-A3B-Instruct": _QWEN3_MOE
    | {"intermediate_size": 5472, "max_position_embeddings": 262144, "rope_theta": 10000000},
    "DeepSeek-R1-0528-Qwen3-8B": _QWEN3
    | {"max_position_embeddings": 131072}
    | {"rope_scaling": YARN | {"attn_factor": 0.8782488562869419, "original_max_position_embeddings": 32768}},
}

# Of Mistral's later models, from memory of the hub's config.json files; those of Mistral 7B and Nemo are in
# tests/hf_files.py. Ministral 8B's has no layer_types in its first form: with them, transformers reads `ministral`.
_MISTRAL = {
    name: value for name, value in _PLAIN.items() if name not in ("attention_bias", "tie_word_embeddings")
} | {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 128, "hidden_size": 5120, "intermediate_size": 32768, "max_position_embeddings": 32768,
    "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 100000000.0, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 131072,
}  # fmt: skip
_MINISTRAL_3 = {
    "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 262144, "model_type": "ministral3",
    "num_attention_heads": 32, "num_hidden_layers": 34, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "rope_theta": 1000000.0, "rope_type": "yarn",
        "type": "yarn",
    },
    "sliding_window": None, "use_cache": True, "vocab_size": 131072,
}  # fmt: skip
HUB |= {
    "Mistral-Small-24B-Instruct-2501": _MISTRAL,
    "Ministral-8B-Instruct-2410": _MISTRAL
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "sliding_window": 32768}
    | {"architectures": ["MinistralForCausalLM"], "layer_types": [
        kind for _ in range(9) for kind in ("full_attention", *("sliding_attention",) * 3)]},
    "Ministral-3-8B, text": _MINISTRAL_3 | {"architectures": ["Ministral3ForCausalLM"], "tie_word_embeddings": False},
}  # fmt: skip
# Of models that see, whose text model is read.
SEEING: dict[str, dict[str, Any]] = {
    "Mistral-Small-3.1-24B-Instruct-2503": {
        "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "image_token_index": 10,
        "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2,
        "text_config": {
            name: _MISTRAL[name] for name in _MISTRAL
            if name not in ("architectures", "bos_token_id", "eos_token_id", "tie_word_embeddings", "torch_dtype")
        } | {"max_position_embeddings": 131072, "rope_theta": 1000000000.0},
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "vision_feature_layer": -1,
        "vision_config": {"head_dim": 64, "hidden_size": 1024, "model_type": "pixtral", "num_hidden_layers": 24},
    },
    "Ministral-3-8B-Instruct-2512": {
        "architectures": ["Mistral3ForConditionalGeneration"], "dtype": "bfloat16", "image_token_index": 10,
        "model_type": "mistral3", "multimodal_projector_bias": False, "projector_hidden_act": "gelu",
        "quantization_config": {
            "activation_scheme": "static", "dequantize": False, "quant_method": "fp8", "weight_block_size": None,
            "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        },
        "spatial_merge_size": 2, "text_config": _MINISTRAL_3, "transformers_version": "5.0.0.dev0",
        "vision_config": {"head_dim": 64, "hidden_size": 1024, "model_type": "pixtral"}, "vision_feature_layer": -1,
    },
}  # fmt: skip
