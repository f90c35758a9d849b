"""GGUF: llama.cpp's one-file checkpoints, as tensors with HF's names and in HF's order of rows.

Source: llama.cpp's `convert_hf_to_gguf.py` (names, permutation) and gguf-py's `constants.py` (names of metadata).
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxgen.errors import CheckpointError, UnsupportedError
from jaxgen.models.config import DecoderConfig
from jaxgen.models.families import families
from jaxgen.models.gguf import Gguf as Layout
from jaxgen.models.rope import Llama3, plain_frequencies
from jaxgen.models.tensors import EMBEDDING, HEAD, Part
from jaxgen.quant import Int4

from ..checkpoint import DTYPES, Checkpoint, TensorInfo, Wanted
from .ggml_blocks import FLOATS, FOUR_BITS
from .gguf_header import GgufArray, read_header
from .modules import almost

_NAMES = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": HEAD}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3.1's scaled frequencies are divided by
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
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
# Metadata that changes the mathematics unless it has this value, and some that never does.
_NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.type": "none",
    "rope.scale_linear": 1.0,
    "attention.causal": True,
}
_IGNORED = ("vocab_size", "tensor_data_layout")
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
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 14: "Q4_K_S", 15: "Q4_K_M", 18: "Q6_K", 32: "BF16"
}  # fmt: skip
_ROTATED = tuple(f".{name}_proj.{kind}" for name in "qk" for kind in ("weight", "bias"))
_CHUNK_BYTES = 4 << 20


def open_gguf(path: Path) -> "tuple[DecoderConfig, GgufCheckpoint, Gguf]":
    """The config, the tensors and the format of a .gguf file.

    Types of more than four bits (Q6_K and Q8_0) become floats. Sliding windows are not in the files that llama.cpp
    makes of Mistral: attention is full then, as in llama.cpp.
    Raises `CheckpointError` for a damaged file, `JaxgenError` for sizes that do not fit together, and
    `UnsupportedError` for other architectures, metadata that nobody knows, scaled rotary positions, experts, split
    files, and types of tensors that jaxgen does not read.
    """
    checkpoint = GgufCheckpoint(path)
    return checkpoint.config, checkpoint, Gguf(checkpoint)


class GgufCheckpoint(Checkpoint):
    """The tensors of a .gguf file, under HF's names.

    A tensor's dtype is ggml's if that has four bits, and otherwise what `read_into` reads it as.
    """

    def __init__(self, path: Path):
        self.metadata: dict[str, Any] = {}
        self.kinds: dict[str, str] = {}  # ggml's type of each tensor
        self.described_by = path.name
        super().__init__(path.parent, path.name)
        self.family = _family(self.metadata)
        self.config = self._config()

    def _scan_shard(self, shard: str) -> bool:
        self.metadata, found = read_header(self.directory / shard)
        for tensor in found:
            name = _hf_name(tensor.name)
            if name in self.tensors:
                self.problems.append(f"{shard} holds {name!r} twice")
            self.kinds[name] = tensor.kind
            code = tensor.kind if tensor.kind in FOUR_BITS or tensor.kind in DTYPES else "F32"
            self.tensors[name] = TensorInfo(shard, code, tensor.shape, tensor.begin, tensor.end)
        return True

    def read_into(self, name: str, target: np.ndarray) -> None:
        """As `Checkpoint.read_into`, also from blocks of more than four bits."""
        kind = self.kinds[name]
        if kind in DTYPES and not self._is_rotated(name):
            return super().read_into(name, target)
        rows = self.rows(name)
        each = len(rows) // len(target)
        step = max(1, _CHUNK_BYTES // (each * rows.shape[1]))
        for start in range(0, len(target), step):
            piece = target[start : start + step]
            piece[...] = FLOATS[kind](rows[start * each : (start + step) * each]).reshape(piece.shape)
        return None

    def rows(self, name: str) -> UInt8[np.ndarray, "O bytes"]:
        """The bytes of a matrix, row by row, in HF's order."""
        rows = self.read_bytes(name).reshape(self.tensors[name].shape[0], -1)
        if self._is_rotated(name):  # llama.cpp rotates neighbours, and HF the two halves of a head
            rows = rows.reshape(-1, self.config.head_size // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        return rows

    def _is_rotated(self, name: str) -> bool:
        layout = self.family.gguf
        return layout is not None and layout.rotates_neighbours and name.endswith(_ROTATED)

    def _config(self) -> DecoderConfig:
        kind, divisors = self.family.config_class, None
        if _ROPE_FACTORS in self.tensors and "llama3" in kind.rope_types:
            if self.kinds[_ROPE_FACTORS] != "F32":
                raise UnsupportedError(f"tensor {_ROPE_FACTORS!r} is of type {self.kinds[_ROPE_FACTORS]}, not F32")
            divisors = np.empty(self.tensors[_ROPE_FACTORS].shape, np.float32)
            self.read_into(_ROPE_FACTORS, divisors)
            del self.tensors[_ROPE_FACTORS]  # the config says it
        fields = _fields(self.family.gguf, self.metadata, self.tensors)
        if _has_window(self.family):
            fields.setdefault("sliding_window", None)
        if fields.get("sliding_window") is not None and _has(self.family, "layer_types"):
            raise UnsupportedError(
                f"attention.sliding_window={fields['sliding_window']!r:.80} is not supported with "
                f"{kind.architecture}: the file does not say which layers have it"
            )
        config = kind(**fields)
        return config if divisors is None else dataclasses.replace(config, rope_scaling=_llama3_of(divisors, config))


class Gguf:
    """A `Format`: the tensors of four bits."""

    def __init__(self, checkpoint: GgufCheckpoint):
        self._checkpoint = checkpoint

    @property
    def name(self) -> str:
        """For example "GGUF Q4_K_M (Q4_K, Q6_K)"."""
        tensors, kinds = self._checkpoint.tensors, self._checkpoint.kinds
        matrices = sorted({kinds[name] for name, info in tensors.items() if len(info.shape) == 2})
        file_type = _FILE_TYPES.get(self._checkpoint.metadata.get("general.file_type", -1), "of mixed types")
        return f"GGUF {file_type} ({', '.join(matrices)})"

    def stored(self, part: Part) -> dict[str, Wanted] | None:
        """As `Format.stored`."""
        info = self._checkpoint.tensors.get(part.name)
        return {part.name: Wanted(part.shape, (info.dtype,))} if info and info.dtype in FOUR_BITS else None

    def weight(self, part: Part) -> Int4:
        """As `Format.weight`."""
        return FOUR_BITS[self._checkpoint.kinds[part.name]](self._checkpoint.rows(part.name))


def _family(metadata: dict[str, Any]) -> Any:
    """The class of the model; families that share an architecture are told apart by its name, as in transformers."""
    architecture = metadata.get("general.architecture")
    known = {kind.gguf.architecture for kind in families() if kind.gguf is not None}
    if not isinstance(architecture, str) or architecture not in known:
        readable = " or ".join(repr(name) for name in sorted(known))
        raise UnsupportedError(f"general.architecture={architecture!r:.80} is not supported; jaxgen reads {readable}")
    name, window = str(metadata.get("general.name", "")).lower(), f"{architecture}.attention.sliding_window"
    fitting: list[Any] = [
        kind
        for kind in families()
        if kind.gguf is not None and kind.gguf.architecture == architecture
        if kind.gguf.named in name or (window in metadata and _has_window(kind))
    ]
    return max(fitting, key=lambda kind: len(kind.gguf.named))  # the one that the file tells most of


def _has_window(kind: Any) -> bool:
    return _has(kind, "sliding_window")


def _has(kind: Any, name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(kind.config_class))


def _fields(layout: Layout, metadata: dict[str, Any], tensors: dict[str, TensorInfo]) -> dict[str, Any]:
    """The config that metadata and tensors describe."""
    own = _own_metadata(layout, metadata, tensors)
    # As llama.cpp has it where the file does not say; a family's own defaults are not in question.
    fields: dict[str, Any] = {"num_key_value_heads": own["attention.head_count"], "head_dim": None}
    for name, field in {**_REQUIRED, **_OPTIONAL, **layout.fields}.items():
        if name in own:
            fields[field] = own[name]
    sizes = {name: own[name] for name, field in _OPTIONAL.items() if field == "head_dim" and name in own}
    if any(size != fields["head_dim"] for size in sizes.values()):
        raise UnsupportedError(f"{sizes}: jaxgen implements one size of heads, rotated as a whole")
    fields |= {field: metadata.get(name) for field, name in _TOKEN_IDS.items()}
    rows = tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else None
    tokens = metadata.get("tokenizer.ggml.tokens", own.get("vocab_size"))
    tokens = tokens.count if isinstance(tokens, GgufArray) else tokens
    if rows is not None and tokens is not None and rows != tokens:
        raise CheckpointError("GGUF metadata", [f"the vocabulary has {tokens!r:.80} tokens, but {rows} embeddings"])
    return fields | {
        "vocab_size": rows or 1,  # no embedding is an error that is reported with the others
        "tie_word_embeddings": HEAD not in tensors,
    }


def _llama3_of(divisors: np.ndarray, config: DecoderConfig) -> Llama3:
    """The scaling of which llama.cpp keeps only what it divides the frequencies by; all released models share this one.

    Source: llama.cpp's `convert_hf_to_gguf.py`, `LlamaModel.generate_extra_tensors`.
    """
    if divisors.shape != (config.head_size // 2,) or not (divisors >= 1).all():
        raise UnsupportedError(f"tensor {_ROPE_FACTORS!r}: not a number of at least 1 for each pair of head_dim")
    theta, factor = config.rope_theta, float(divisors.max())
    scaling = Llama3(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    plain = plain_frequencies(2 * len(divisors), theta)
    if not np.allclose(plain / divisors, scaling.frequencies(plain, theta), rtol=1e-4, atol=0):
        raise UnsupportedError(f"tensor {_ROPE_FACTORS!r}: rotary positions scaled otherwise than Llama 3.1's")
    return scaling


def _own_metadata(layout: Layout, metadata: dict[str, Any], tensors: dict[str, TensorInfo]) -> dict[str, Any]:
    """The architecture's metadata, without its prefix; raises for all that the file says and jaxgen does not know."""
    if _ROPE_FACTORS in tensors:
        raise UnsupportedError(f"tensor {_ROPE_FACTORS!r}: scaled rotary positions are not supported here")
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedError("the file is split; join the parts with `llama-gguf-split --merge` first")
    prefix = f"{layout.architecture}."
    own = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    for name, value in own.items():
        known = name in _REQUIRED or name in _OPTIONAL or name in layout.fields or name in _IGNORED
        if not known and (name not in _NEUTRAL or value != _NEUTRAL[name]):
            raise UnsupportedError(
                f"{prefix}{name:.80}={value!r:.80} is not supported; it would change the mathematics"
            )
        if name in _FLOATS and not isinstance(value, float):
            raise CheckpointError("GGUF metadata", [f"{prefix}{name}={value!r:.80} must be a floating-point number"])
    needed = _REQUIRED.keys() | layout.fields.keys()
    problems = [f"{prefix}{name} is missing" for name in sorted(needed - own.keys())]
    problems += _foreign(layout.architecture, metadata)
    if problems:
        raise CheckpointError("GGUF metadata", problems)
    return own


def _foreign(architecture: str, metadata: dict[str, Any]) -> list[str]:
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


def _hf_name(name: str) -> str:
    """HF's name of a tensor; one that HF does not have stays as it is, for the check of all tensors to refuse."""
    if (match := _LAYER.fullmatch(name)) and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    return _NAMES.get(name, name)
