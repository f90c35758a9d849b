"""Hugging Face checkpoints built by hand with numpy and json: what the loader is tested against."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
CONFIG = {
    "model_type": "mistral",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


def hf_tensors(config: dict[str, Any], code: str = "F32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors under HF's names, in HF's order."""
    vocab, width, ffn = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(config["num_hidden_layers"]):
        block = {
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (ffn, width),
            "mlp.up_proj": (ffn, width),
            "mlp.down_proj": (width, ffn),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape, np.float32).astype(DTYPES[code]) for name, shape in shapes.items()}


def safetensors_bytes(tensors: dict[str, np.ndarray], header: dict[str, Any] | None = None) -> bytes:
    """The file format written out: length, JSON header, data; `header` replaces entries of the true one."""
    codes = {np.dtype(dtype): code for code, dtype in {**DTYPES, "F8_E4M3": ml_dtypes.float8_e4m3fn}.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        code = codes.get(tensor.dtype, "I32")
        offsets = [position, position + tensor.nbytes]
        entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    text = json.dumps(entries | (header or {})).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(tensor.tobytes() for tensor in tensors.values())


def write_hf(
    directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1
) -> dict[str, str]:
    """Write a checkpoint; returns the weight map when there are several shards."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "pad_token_id": 0}))
    if shards == 1:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return {}
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        mine = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        (directory / file).write_bytes(safetensors_bytes({name: tensors[name] for name in mine}))
        weight_map |= dict.fromkeys(mine, file)
    write_index(directory, weight_map, sum(tensor.nbytes for tensor in tensors.values()))
    return weight_map


def write_index(directory: Path, weight_map: dict[str, Any], total_size: Any) -> None:
    """Write model.safetensors.index.json."""
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def parameters(model: Any) -> dict[str, np.ndarray]:
    """A module's parameters by dotted name."""
    from flax import nnx

    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


def same_bits(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    """Whether two sets of arrays agree in names, dtypes, shapes and every bit."""
    return left.keys() == right.keys() and all(
        (a := left[name]).dtype == (b := right[name]).dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for name in left
    )


# What the hub's config.json files hold, first as published in transformers 4's spelling.
_V01 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
_LATER = _V01 | {"attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None}
HUB: dict[str, dict[str, Any]] = {
    "7B-v0.1": _V01,
    "Zephyr-7B": _V01 | {"pad_token_id": 2, "attention_dropout": 0.0, "use_cache": False},
    "7B-Instruct-v0.2": _LATER,
    "7B-v0.3": _LATER | {"vocab_size": 32768, "head_dim": 128},
    "Mathstral-7B": _LATER | {"vocab_size": 32768, "sliding_window": 4096},
    "Nemo-2407": _LATER
    | {"hidden_size": 5120, "num_hidden_layers": 40, "head_dim": 128, "vocab_size": 131072}
    | {"max_position_embeddings": 1024000},
    "Small-2409": _LATER
    | {"hidden_size": 6144, "intermediate_size": 16384, "num_attention_heads": 48, "num_hidden_layers": 56}
    | {"vocab_size": 32768},
    "Small-24B-2501": _LATER
    | {"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "head_dim": 128}
    | {"vocab_size": 131072, "rope_theta": 100000000.0},
    "TinyMistral": _V01
    | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "sliding_window": 32}
    | {"rms_norm_eps": 1e-06},
}


def in_v5_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """The same config.json as transformers 5 saves it."""
    theta = config["rope_theta"]
    rest = {k: v for k, v in config.items() if k not in ("rope_theta", "torch_dtype")}
    return rest | {"dtype": "bfloat16", "rope_parameters": {"rope_theta": theta, "rope_type": "default"}}
