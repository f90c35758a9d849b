"""GGUF: llama.cpp's one-file checkpoints, as tensors with HF's names and in HF's order of rows.

Source: llama.cpp's `convert_hf_to_gguf.py` (names, permutation, norms) and gguf-py's `constants.py` (names).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxgen.errors import UnsupportedError
from jaxgen.models.config import NORMS, DecoderConfig
from jaxgen.models.tensors import EMBEDDING, HEAD, Part
from jaxgen.quant import Int4

from ..checkpoint import DTYPES, Checkpoint, TensorInfo, Wanted, chunks
from .ggml_blocks import FLOATS, FOUR_BITS
from .gguf_config import VECTORS, config_of, family_of
from .gguf_header import GgufTensor, read_header

_NAMES = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": HEAD}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_EXPERT = re.compile(r"blk\.(\d+)\.(ffn_gate|ffn_up|ffn_down)\.(\d+)\.weight")  # as files had them before 2024's April
_EXPERTS = re.compile(r"blk\.(\d+)\.(ffn_gate|ffn_up|ffn_down)_exps\.weight")
_MOST_EXPERTS = 10_000  # whose names are spelt out
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
}
_NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")  # at the places of `NORMS`
_STACKED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 14: "Q4_K_S", 15: "Q4_K_M", 18: "Q6_K", 32: "BF16"
}  # fmt: skip
_ROTATED = tuple(f".{name}_proj.{kind}" for name in "qk" for kind in ("weight", "bias"))


def open_gguf(path: Path) -> "tuple[DecoderConfig, GgufCheckpoint, Gguf]":
    """The config, the tensors and the format of a .gguf file.

    Types of more than four bits (Q6_K and Q8_0) become floats. Sliding windows are not in the files that llama.cpp
    makes of Mistral and Ministral 8B: attention is full then, as in llama.cpp.
    Raises `CheckpointError` for a damaged file, `JaxgenError` for sizes that do not fit together, and
    `UnsupportedError` for other architectures, metadata that nobody knows, split files, and types of tensors that
    jaxgen does not read.
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
        self.config = self._config()

    def _scan_shard(self, shard: str) -> bool:
        self.metadata, found = read_header(self.directory / shard)
        self.family = family_of(self.metadata)
        self.norm_offset = self.family.config_class.norm_offset
        names = _Names(self.family)
        for tensor in (one for several in found for one in names.apart(several)):
            if tensor.name in self.tensors:
                self.problems.append(f"{shard} holds {tensor.name!r} twice")
            self.kinds[tensor.name] = tensor.kind
            code = tensor.kind if tensor.kind in FOUR_BITS or tensor.kind in DTYPES else "F32"
            self.tensors[tensor.name] = TensorInfo(shard, code, tensor.shape, tensor.begin, tensor.end)
        return True

    def read_into(self, name: str, *targets: np.ndarray) -> None:
        """As `Checkpoint.read_into`, also from blocks of more than four bits."""
        kind = self.kinds[name]
        if self.norm_offset and name.endswith("norm.weight"):  # llama.cpp stores what they are scaled by
            [target] = targets
            scale = np.empty(target.shape, np.float32)
            super().read_into(name, scale)
            target[...] = scale - np.float32(self.norm_offset)
            return None
        if kind in DTYPES and not self._is_rotated(name):
            return super().read_into(name, *targets)
        rows, first = self.rows(name), 0
        elements = sum(target.size for target in targets) // len(rows)  # of a row
        for piece in chunks(targets, rows.nbytes):
            last = first + piece.size // elements
            piece[...] = FLOATS[kind](rows[first:last]).reshape(piece.shape)
            first = last
        return None

    def rows(self, name: str) -> UInt8[np.ndarray, "O bytes"]:
        """The bytes of a matrix, row by row, in HF's order."""
        rows = self.read_bytes(name).reshape(self.tensors[name].shape[0], -1)
        if self._is_rotated(name):  # llama.cpp rotates neighbours, and HF the two halves of a head
            rows = rows.reshape(-1, self.config.head_size // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        return rows

    def _is_rotated(self, name: str) -> bool:
        return self.family.gguf.rotates_neighbours and name.endswith(_ROTATED)

    def _config(self) -> DecoderConfig:
        vectors = {}
        for name, scaling in VECTORS.items():  # which the config says
            if name in self.tensors and scaling in self.family.config_class.rope_types:
                if self.kinds[name] != "F32":
                    raise UnsupportedError(f"tensor {name!r} is of type {self.kinds[name]}, not F32")
                vectors[name] = np.empty(self.tensors[name].shape, np.float32)
                self.read_into(name, vectors[name])
                del self.tensors[name]
        return config_of(self.family, self.metadata, self.tensors, vectors)


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


class _Names:
    """HF's names of a family's tensors; one that HF does not have stays as it is, for the check of all to refuse."""

    def __init__(self, family: Any):
        default = family.config_class()
        self.routing = default.routing(0)
        self.layer = dict(_LAYER_NAMES)
        self.layer |= {name: norm for name, norm in zip(_NORMS, NORMS[default.norms], strict=True) if norm is not None}
        if default.stacks_projections:
            self.layer |= _STACKED
        if self.routing is not None:
            self.layer["ffn_gate_inp"] = self.routing.router

    def apart(self, tensor: GgufTensor) -> Iterator[GgufTensor]:
        """A tensor under HF's name; of one that holds all experts, each expert's."""
        match = _EXPERTS.fullmatch(tensor.name)
        if match is None or self.routing is None or len(tensor.shape) != 3 or tensor.shape[0] > _MOST_EXPERTS:
            yield tensor._replace(name=self._hf_name(tensor.name))
            return
        each = (tensor.end - tensor.begin) // tensor.shape[0]
        for expert in range(tensor.shape[0]):
            begin, name = tensor.begin + expert * each, self._expert_name(match[1], match[2], expert)
            yield GgufTensor(name, tensor.kind, tensor.shape[1:], begin, begin + each)

    def _hf_name(self, name: str) -> str:
        if (match := _LAYER.fullmatch(name)) and match[2] in self.layer:
            return f"model.layers.{match[1]}.{self.layer[match[2]]}.{match[3]}"
        if (match := _EXPERT.fullmatch(name)) and self.routing is not None:
            return self._expert_name(match[1], match[2], match[3])
        return _NAMES.get(name, name)

    def _expert_name(self, layer: str, matrix: str, expert: int | str) -> str:
        names = self.routing.tensors[("ffn_gate", "ffn_up", "ffn_down").index(matrix)]
        return f"model.layers.{layer}.{names.format(expert)}.weight"
