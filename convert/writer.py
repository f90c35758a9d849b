"""Sharded safetensors that are planned before any tensor exists, and written piece by piece."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxgen.errors import JaxgenError

from .checkpoint import DTYPES, WEIGHTS

Item = TypeVar("Item")

_DTYPES = {**DTYPES, "I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
_UNITS = {
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


class Planned(NamedTuple):
    """A tensor to be written: safetensors' code of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


class Layout:
    """One safetensors file before it is written: its header, where each tensor begins and ends, and the file's size."""

    def __init__(self, tensors: Mapping[str, Planned]):
        self.tensors = dict(tensors)
        # Readers map tensors in place, which wants them aligned: wide elements first, as the library has it.
        ordered = sorted(tensors.items(), key=lambda item: -_DTYPES[item[1].dtype].itemsize)
        begin, entries = 0, {}
        for name, (dtype, shape) in ordered:
            end = begin + tensors[name].nbytes
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            begin = end
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.begin = {name: len(self.header) + entry["data_offsets"][0] for name, entry in entries.items()}
        self.end = {name: len(self.header) + entry["data_offsets"][1] for name, entry in entries.items()}
        self.nbytes = len(self.header) + begin


class ShardWriter:
    """Writes one file of the given layout; tensors come in any order, each by pieces in its own order.

    The file gets its name when the block ends, all of it on disk: what has the name is whole, also after a kill.
    """

    def __init__(self, path: Path, layout: Layout):
        self._path, self._layout = path, layout
        self._partial = path.with_name(path.name + ".partial")
        self._next = dict(layout.begin)

    def __enter__(self) -> "ShardWriter":
        self._file = self._partial.open("wb", buffering=0)
        self._write(self._layout.header, 0)
        return self

    def append(self, name: str, piece: np.ndarray) -> None:
        """Write the next elements of a tensor."""
        planned = _DTYPES[self._layout.tensors[name].dtype]
        if piece.dtype != planned:
            raise TypeError(f"{name!r} was planned as {planned}, and comes as {piece.dtype}")
        self._write(np.ascontiguousarray(piece).view(np.uint8).data.cast("B"), self._next[name])
        self._next[name] += piece.nbytes

    def __exit__(self, kind: Any, *error: Any) -> None:
        try:
            if kind is None:
                assert self._next == self._layout.end, "a tensor is not the size that was planned"
                os.fsync(self._file.fileno())
                self._partial.rename(self._path)
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def _write(self, data: bytes | memoryview, position: int) -> None:
        rest = memoryview(data)
        while rest:
            count = os.pwrite(self._file.fileno(), rest, position)
            rest, position = rest[count:], position + count


def plan_shards(items: Sequence[Item], nbytes: Callable[[Item], int], limit: int) -> dict[str, list[Item]]:
    """File names and their items: consecutive, each file at most `limit` bytes of tensors or a single item."""
    groups: list[list[Item]] = [[]]
    room = limit
    for item in items:
        size = nbytes(item)
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(item)
        room -= size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def index_of(weight_map: Mapping[str, str], total_size: int, total_parameters: int) -> dict[str, Any]:
    """model.safetensors.index.json."""
    metadata = {"total_parameters": total_parameters, "total_size": total_size}
    return {"metadata": metadata, "weight_map": dict(weight_map)}


def json_bytes(fields: Mapping[str, Any]) -> bytes:
    """A JSON file as Hugging Face formats it."""
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def shard_bytes(value: Any) -> int:
    """The bytes that a max_shard_size means, an int or HF's "5GB"; raises `JaxgenError` for anything else."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,9})\s*([KMGT]I?B)", value.strip().upper())
        size = int(match[1]) * _UNITS[match[2]] if match else 0
    else:
        size = value
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
        raise JaxgenError(f"max_shard_size={value!r} must be a positive number of bytes, or a text such as '5GB'")
    return size
