"""GGUF: llama.cpp's one-file checkpoints, as tensors with HF's names and in HF's order of rows.

Source: llama.cpp's `convert_hf_to_gguf.py` (names, permutation) and gguf-py (the file).
"""

import re
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxgen.config import MistralConfig
from jaxgen.errors import CheckpointError, JaxgenError, UnsupportedError
from jaxgen.quant import Int4

from ..checkpoint import DTYPES, Checkpoint, TensorInfo, Wanted
from ..names import EMBEDDING, HEAD, Part
from .ggml_blocks import FLOATS, FOUR_BITS

_ARCHITECTURE = "llama"  # llama.cpp's name for Mistral as well
_NAMES = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": HEAD}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_REQUIRED = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL = {
    "context_length": "max_position_embeddings",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.sliding_window": "sliding_window",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
}
# Metadata that changes the mathematics unless it has this value, and some that never does.
_NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.type": "none",
    "rope.scale_linear": 1.0,
    "attention.causal": True,
}
_IGNORED = ("vocab_size", "tensor_data_layout")
_MAX_ENTRIES = 4_000_000  # several times those of the largest vocabularies
_CHUNK_BYTES = 4 << 20


def open_gguf(path: Path) -> "tuple[MistralConfig, GgufCheckpoint, Gguf]":
    """The config, the tensors and the format of a .gguf file; needs the extra `gguf`.

    Types of more than four bits (Q6_K and Q8_0) become floats. Sliding windows are not in the files that llama.cpp
    makes of Mistral: attention is full then, as in llama.cpp.
    Raises `JaxgenError` without gguf, `CheckpointError` for a damaged file, and `UnsupportedError` for other
    architectures, scaled rotary positions, experts, split files, and types of tensors that jaxgen does not read.
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
        self.config = _config(self.metadata, self.tensors)

    def _scan_shard(self, shard: str) -> bool:
        path = self.directory / shard
        try:
            self.metadata, found = _parse(path)
        except JaxgenError:
            raise
        except Exception as error:  # whatever the parser stumbles over
            problem = f"{shard} ({path.stat().st_size} bytes) is truncated, damaged or not GGUF: {error!r:.300}"
            self.problems.append(f"{problem}; download it again")
            return False
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
        if kind in DTYPES and not _is_rotated(name):
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
        if _is_rotated(name):  # llama.cpp rotates neighbours, and HF the two halves of a head
            rows = rows.reshape(-1, self.config.head_size // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        return rows


class Gguf:
    """A `Format`: the tensors of four bits."""

    def __init__(self, checkpoint: GgufCheckpoint):
        self._checkpoint = checkpoint

    @property
    def name(self) -> str:
        """For example "GGUF Q4_K_M (Q4_K, Q6_K)"."""
        tensors, kinds = self._checkpoint.tensors, self._checkpoint.kinds
        matrices = sorted({kinds[name] for name, info in tensors.items() if len(info.shape) == 2})
        return f"GGUF {self._checkpoint.metadata['file_type']} ({', '.join(matrices)})"

    def stored(self, part: Part) -> dict[str, Wanted] | None:
        """As `Format.stored`."""
        info = self._checkpoint.tensors.get(part.name)
        return {part.name: Wanted(part.shape, (info.dtype,))} if info and info.dtype in FOUR_BITS else None

    def read(self, part: Part) -> Int4:
        """As `Format.read`."""
        return FOUR_BITS[self._checkpoint.kinds[part.name]](self._checkpoint.rows(part.name))


class _Tensor(NamedTuple):
    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _parse(path: Path) -> tuple[dict[str, Any], list[_Tensor]]:
    """Metadata and tensors as the file names them; raises whatever gguf raises for a damaged file."""
    try:
        gguf: Any = import_module("gguf")  # not this module, which has the same name
    except ImportError as error:
        raise JaxgenError(f'{path.name}: reading GGUF needs a package: pip install "jaxgen[gguf]"') from error

    class Reader(gguf.GGUFReader):
        """Stops where the file ends, and gguf's would read an endless array of nothing."""

        entries = 0

        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            part = super()._get(offset, dtype, count, override_order)
            self.entries += 1
            if len(part) < count:
                raise ValueError(f"the file ends before {count} items at byte {offset}")
            if self.entries > _MAX_ENTRIES:
                raise ValueError(f"more than {_MAX_ENTRIES} entries of metadata")
            return part

    with np.errstate(all="raise"):
        reader = Reader(path)
    if reader.byte_order != "I":
        raise UnsupportedError(f"{path.name} is big-endian; jaxgen reads little-endian GGUF")
    metadata = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("tokenizer.") or name.endswith("_token_id")
    }
    if metadata.get("split.count", 1) > 1:
        raise UnsupportedError(f"{path.name} is split; join the parts with `llama-gguf-split --merge` first")
    named = {kind.value: kind.name.removeprefix("MOSTLY_") for kind in gguf.LlamaFileType}
    metadata["file_type"] = named.get(metadata.get("general.file_type"), "of mixed types")
    expected, tensors = int(reader.data_offset), []
    for tensor in reader.tensors:
        kind, shape = tensor.tensor_type.name, tuple(reversed(tensor.shape.tolist()))
        if kind not in (DTYPES if len(shape) == 1 else (*FOUR_BITS, *FLOATS)):
            known = ", ".join((*FOUR_BITS, *FLOATS))
            raise UnsupportedError(
                f"{path.name}: {tensor.name!r} is of type {kind}; jaxgen reads {known}, and vectors as floats. "
                "Take a Q4_K_M, Q4_0 or Q8_0 file of the model, or the original with load_in_4bit=True"
            )
        begin = int(tensor.data_offset)
        if begin != expected:
            raise ValueError(f"{tensor.name!r} begins at byte {begin} instead of {expected}")
        tensors.append(_Tensor(tensor.name, kind, shape, begin, begin + int(tensor.n_bytes)))
        expected = -(-tensors[-1].end // int(reader.alignment)) * int(reader.alignment)
    return metadata, tensors


def _config(metadata: dict[str, Any], tensors: dict[str, TensorInfo]) -> MistralConfig:
    """The model that metadata and tensors describe."""
    architecture = metadata.get("general.architecture")
    if architecture != _ARCHITECTURE:
        raise UnsupportedError(f"general.architecture={architecture!r} is not supported; jaxgen reads 'llama'")
    if "rope_freqs.weight" in tensors:
        raise UnsupportedError("tensor 'rope_freqs.weight': scaled rotary positions are not supported")
    prefix = f"{_ARCHITECTURE}."
    own = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    for name, value in own.items():
        known = name in _REQUIRED or name in _OPTIONAL or name in _IGNORED
        if not known and (name not in _NEUTRAL or value != _NEUTRAL[name]):
            raise UnsupportedError(f"{prefix}{name}={value!r:.80} is not supported; it would change the mathematics")
    if missing := sorted(_REQUIRED.keys() - own.keys()):
        raise CheckpointError("GGUF metadata", [f"{prefix}{name} is missing" for name in missing])
    fields = {"sliding_window": None, "num_key_value_heads": own["attention.head_count"]}
    for name, field in {**_REQUIRED, **_OPTIONAL}.items():
        if name in own:
            fields[field] = own[name]
    sizes = {name: own[name] for name, field in _OPTIONAL.items() if field == "head_dim" and name in own}
    if any(size != fields["head_dim"] for size in sizes.values()):
        raise UnsupportedError(f"{sizes}: jaxgen implements one size of heads, rotated as a whole")
    embedding = tensors[EMBEDDING].shape if EMBEDDING in tensors else ()
    return MistralConfig(
        **fields,
        vocab_size=embedding[0] if embedding else 1,  # no embedding is an error that is reported with the others
        tie_word_embeddings=HEAD not in tensors,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )


def _hf_name(name: str) -> str:
    """HF's name of a tensor; one that HF does not have stays as it is, for the check of all tensors to refuse."""
    if (match := _LAYER.fullmatch(name)) and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"
    return _NAMES.get(name, name)


def _is_rotated(name: str) -> bool:
    return name.endswith((".q_proj.weight", ".k_proj.weight"))
