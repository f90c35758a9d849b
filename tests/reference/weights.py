"""Random Hugging Face checkpoints that are bit for bit the same on every machine and numpy version.

Only the raw 64-bit stream of PCG64 is used, which numpy promises never to change (the streams of its
`Generator` methods may change), and integer sums, which round nowhere.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def normals(stream: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    """Nearly normal float64 numbers: the sum of the four 16-bit parts of each raw draw, standardised."""
    raw = stream.random_raw(int(np.prod(shape)))
    shifts = np.array([0, 16, 32, 48], np.uint64)
    total = ((raw[:, None] >> shifts) & np.uint64(0xFFFF)).sum(axis=1)
    return ((total.astype(np.float64) - 2 * 65535) / (65536 * (1 / 3) ** 0.5)).reshape(shape)


def integers(stream: np.random.PCG64, below: int, size: int) -> np.ndarray:
    """`size` int64 numbers in [0, below)."""
    return ((stream.random_raw(size) >> np.uint64(16)) % np.uint64(below)).astype(np.int64)


def hf_weights(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Float32 tensors of a `MistralForCausalLM` under HF's names.

    Matrices are N(0, 1) / sqrt(fan_in) and norms 1 + 0.1 N. Queries, keys and the head are larger, so that
    attention is far from uniform (a wrong position shows) and the best logit leads clearly.
    """
    stream = np.random.PCG64(seed)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    tied = config.get("tie_word_embeddings", False)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return (scale * columns**-0.5 * normals(stream, (rows, columns))).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.1 * normals(stream, (hidden,))).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden, 3.0 if tied else 1.0)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": matrix(heads * head_dim, hidden, 2.0),
            f"{prefix}.self_attn.k_proj.weight": matrix(kv_heads * head_dim, hidden, 2.0),
            f"{prefix}.self_attn.v_proj.weight": matrix(kv_heads * head_dim, hidden, 2.0),
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, heads * head_dim, 2.0),
            f"{prefix}.mlp.gate_proj.weight": matrix(ffn, hidden),
            f"{prefix}.mlp.up_proj.weight": matrix(ffn, hidden),
            f"{prefix}.mlp.down_proj.weight": matrix(hidden, ffn),
            f"{prefix}.input_layernorm.weight": norm(),
            f"{prefix}.post_attention_layernorm.weight": norm(),
        }
    tensors["model.norm.weight"] = norm()
    if not tied:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden, 3.0)
    return tensors


def write_checkpoint(directory: Path, config: Mapping[str, Any], seed: int) -> Path:
    """Write config.json and model.safetensors as a Hugging Face checkpoint; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(hf_weights(config, seed), directory / "model.safetensors", metadata={"format": "pt"})
    return directory
