"""GGUF files written out by hand, from the format's description: what the reader is tested against and damaged."""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from tests.hf_files import CONFIG, hf_tensors

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
# Matrices large enough that another type is another number of bytes, in spite of the padding to 32.
SHAPE = CONFIG | {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "Tiny Mistral",
    "general.file_type": 2,
    "llama.context_length": 64,
    "llama.embedding_length": SHAPE["hidden_size"],
    "llama.block_count": SHAPE["num_hidden_layers"],
    "llama.feed_forward_length": SHAPE["intermediate_size"],
    "llama.attention.head_count": SHAPE["num_attention_heads"],
    "llama.attention.head_count_kv": SHAPE["num_key_value_heads"],
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": SHAPE["head_dim"],
    "llama.rope.freq_base": 1e6,
    "llama.vocab_size": SHAPE["vocab_size"],
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [f"w{index}" for index in range(SHAPE["vocab_size"])],
    "tokenizer.ggml.scores": [0.0] * SHAPE["vocab_size"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
}
_CODES = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}
_KINDS = {"F32": 0, "Q4_0": 2}


def gguf_bytes(metadata: dict[str, Any] | None = None, *, kind: str = "Q4_0", tied: bool = False) -> bytes:
    """The file of a tiny model; `metadata` replaces fields of METADATA, None leaves one out."""
    return gguf_file(METADATA | (metadata or {}), hf_tensors(SHAPE | {"tie_word_embeddings": tied}), kind)


def gguf_file(metadata: dict[str, Any], tensors: dict[str, np.ndarray], kind: str = "F32") -> bytes:
    """The file of `tensors` under HF's names; matrices are of a `kind`."""
    fields = {name: value for name, value in metadata.items() if value is not None}
    listed, data = b"", b""
    for name, weight in tensors.items():
        code = kind if weight.ndim == 2 else "F32"
        payload = weight.tobytes() if code == "F32" else _q4_0(weight)
        shape = b"".join(struct.pack("<Q", size) for size in reversed(weight.shape))
        listed += _text(gguf_name(name)) + struct.pack("<I", weight.ndim) + shape
        listed += struct.pack("<IQ", _KINDS[code], len(data))
        data += payload + bytes(-len(payload) % 32)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    header += b"".join(_text(name) + _value(value) for name, value in fields.items()) + listed
    return header + bytes(-len(header) % 32) + data


def write_gguf(path: Path, metadata: dict[str, Any] | None = None, **options: Any) -> Path:
    """A file of `gguf_bytes`."""
    path.write_bytes(gguf_bytes(metadata, **options))
    return path


def gguf_name(name: str) -> str:
    """llama.cpp's name of an HF tensor."""
    path, _, kind = name.rpartition(".")
    layer, _, inner = path.removeprefix("model.layers.").partition(".")
    if path.startswith("model.layers."):
        return f"blk.{layer}.{NAMES[inner]}.{kind}"
    return f"{NAMES.get(path, path)}.{kind}"


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        code = 8 if isinstance(value[0], str) else _CODES[type(value[0])][0]
        items = [_text(item) if code == 8 else struct.pack(_CODES[type(item)][1], item) for item in value]
        return struct.pack("<IIQ", 9, code, len(value)) + b"".join(items)
    code, layout = _CODES[type(value)]
    return struct.pack("<I", code) + struct.pack(layout, value)


def _q4_0(weight: np.ndarray) -> bytes:
    """Blocks of 32 weights: a scale, and codes of which the first sixteen are the low nibbles."""
    blocks = weight.reshape(-1, 32)
    scale = (abs(blocks).max(axis=1, keepdims=True) / 8).astype(np.float16)
    codes = (np.clip(np.rint(blocks / scale.astype(np.float32)), -8, 7) + 8).astype(np.uint8)
    packed = codes[:, :16] | codes[:, 16:] << 4
    return np.concatenate([scale.view(np.uint8), packed], axis=1).tobytes()
