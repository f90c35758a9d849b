"""Reading a directory of safetensors files: all headers are checked first, then one tensor is read at a time."""

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open

from jaxgen.errors import CheckpointError
from jaxgen.files import MOST_JSON, open_regular, parse_json, read_json
from jaxgen.models.tensors import is_legacy_buffer

from .files import is_there

logger = logging.getLogger("jaxgen")

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OLD_GPTQ = "quantize_config.json"  # where AutoGPTQ wrote its settings before transformers had a field for them
DTYPES = {"BF16": jnp.dtype("bfloat16"), "F16": jnp.dtype("float16"), "F32": jnp.dtype("float32")}
# What quantised checkpoints hold besides: packed weights, zero points, permutations, shapes.
_INTEGERS = {
    code: np.dtype(name) for code, name in (("U8", "u1"), ("I8", "i1"), ("I32", "<i4"), ("U32", "<u4"), ("I64", "<i8"))
}

_SHARD_NAME = re.compile(r"[A-Za-z0-9_+=@ -][A-Za-z0-9._+=@ -]{0,200}\.safetensors")
_CHUNK_BYTES = 4 << 20  # small enough to stay in a CPU's cache between reading and converting
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a header says about a tensor: its file, dtype code and shape, and the bytes of the file it takes."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin


class Wanted(NamedTuple):
    """What a tensor of the file has to be."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = tuple(DTYPES)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How a tensor that a format stores in its own way becomes float32, some rows at a time."""

    code: str  # the dtype in the file
    rows: Callable[
        [UInt8[np.ndarray, "O I"], int], Float[np.ndarray, "O I"]
    ]  # of one byte each, and the first's number


class Checkpoint:
    """The tensors of a checkpoint directory, in one file named `weights` or in the shards of an index.

    `tensors` maps names to headers. `problems` lists what contradicts the format or the index; nothing may be
    read while it is not empty. `unreadable` names tensors that the index lists and no readable shard holds.
    Raises `CheckpointError` when there are no weights, or no readable list of them.
    """

    described_by = "config.json"  # for messages: what the tensors are compared with

    def __init__(self, directory: Path, weights: str = WEIGHTS):
        self.directory = directory
        self.tensors: dict[str, TensorInfo] = {}
        self.problems: list[str] = []
        self.unreadable: set[str] = set()
        self.decoders: dict[str, Decoder] = {}  # of tensors whose dtype is "F32": what `read_into` reads them as
        self._scratch = bytearray()
        # Also what is not needed beside the weights must be no other thing than a file.
        names = (WEIGHTS, INDEX, OLD_GPTQ) if weights == WEIGHTS else (weights,)
        there = [name for name in names if is_there(directory / name)]
        if weights in there:
            if not self._scan_shard(weights):
                raise CheckpointError(str(directory), self.problems)
        elif INDEX in there:
            self._scan_index()
        else:
            raise CheckpointError(str(directory), [_no_weights(directory)])

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(info.nbytes for info in self.tensors.values())

    def read_into(self, name: str, *targets: np.ndarray) -> None:
        """Copy a tensor into `targets`, one after the other, which have its elements but any shape, strides and dtype.

        Reads by chunks through one small buffer: into fresh memory of a tensor's size it takes several times as
        long, most of it spent by the kernel on clearing pages. Not mapped: a file cut short meanwhile would kill
        the process. Raises `CheckpointError` if reading fails.
        """
        info, decoder, first = self.tensors[name], self.decoders.get(name), 0
        try:
            with (self.directory / info.shard).open("rb", buffering=0) as file:
                file.seek(info.begin)
                for rows in chunks(targets, info.nbytes):
                    if decoder is not None:
                        stored = self._read_chunk(file, rows.size).reshape(-1, info.shape[-1])
                        rows[...] = decoder.rows(stored, first).reshape(rows.shape)
                        first += len(stored)
                        continue
                    chunk = self._read_chunk(file, rows.size * DTYPES[info.dtype].itemsize)
                    rows[...] = chunk.view(DTYPES[info.dtype]).reshape(rows.shape)
        except OSError as error:
            raise CheckpointError(str(self.directory), [f"{info.shard}: reading {name!r} failed: {error}"]) from error

    def _read_chunk(self, file: FileIO, nbytes: int) -> np.ndarray:
        if len(self._scratch) < nbytes:
            self._scratch = bytearray(nbytes)
        room = memoryview(self._scratch)[:nbytes]
        _fill(file, room)
        return np.frombuffer(room, np.uint8)

    def read(self, name: str, info: TensorInfo | None = None) -> np.ndarray:
        """A whole tensor in its own dtype; `info` for one beside `tensors`. Raises `CheckpointError` if that fails."""
        info = info or self.tensors[name]
        return self.read_bytes(name, info).view((DTYPES | _INTEGERS)[info.dtype]).reshape(info.shape)

    def read_bytes(self, name: str, info: TensorInfo | None = None) -> np.ndarray:
        """The bytes of a tensor. Raises `CheckpointError` if reading fails."""
        info = info or self.tensors[name]
        tensor = np.empty(info.nbytes, np.uint8)
        try:
            with (self.directory / info.shard).open("rb", buffering=0) as file:
                file.seek(info.begin)
                _fill(file, tensor.data)
        except OSError as error:
            raise CheckpointError(str(self.directory), [f"{info.shard}: reading {name!r} failed: {error}"]) from error
        return tensor

    def compare(self, wanted: Mapping[str, Wanted], optional: frozenset[str] = frozenset()) -> list[str]:
        """Problems of the tensors against the `wanted` ones: missing, unexpected, wrong shape or dtype.

        `optional` names may be absent. Reads headers only.
        """
        problems = []
        for name, (shape, dtypes) in wanted.items():
            info = self.tensors.get(name)
            if info is None:
                if name not in optional and name not in self.unreadable:
                    problems.append(f"tensor {name!r} is missing")
                continue
            if info.shape != shape:
                problems.append(f"{name!r} has shape {list(info.shape)}, but {self.described_by} implies {list(shape)}")
            if info.dtype not in dtypes:
                problems.append(f"{name!r} has dtype {info.dtype}; jaxgen reads {', '.join(dtypes)}")
        unexpected = sorted(self.tensors.keys() - wanted.keys())
        return problems + [
            f"tensor {name!r} is not part of the model that {self.described_by} describes" for name in unexpected
        ]

    def _scan_index(self) -> None:
        index = read_json(self.directory / INDEX)
        weight_map, problems = _weight_map(index)
        self.problems += problems
        unreadable = set()
        for shard in dict.fromkeys(weight_map.values()):
            if not _SHARD_NAME.fullmatch(shard):
                unreadable.add(shard)
                self.problems.append(f"{INDEX}: shard name {shard!r} is not a .safetensors file of this directory")
            elif not self._scan_shard(shard):
                unreadable.add(shard)
        absent = []
        for name, shard in weight_map.items():
            info = self.tensors.get(name)
            if info is None and is_legacy_buffer(name) and shard not in unreadable:
                absent.append(name)
                continue
            if info is None:
                self.unreadable.add(name)
            if shard not in unreadable and (info is None or info.shard != shard):
                found = f"{info.shard} holds it" if info else "no shard holds it"
                self.problems.append(f"{INDEX} places {name!r} in {shard}, but {found}")
        self.problems += [
            f"{info.shard} holds {name!r}, which {INDEX} does not list"
            for name, info in self.tensors.items()
            if name not in weight_map
        ]
        if absent:
            logger.warning("%s lists %r (%d of this kind), which no shard holds and no model reads",
                           INDEX, absent[0], len(absent))  # fmt: skip
        if not self.problems:
            self.problems += _note_total_size(index, self.total_bytes)

    def _scan_shard(self, shard: str) -> bool:
        """Open one file and note its tensors; False, with a problem noted, if it cannot be opened."""
        path = self.directory / shard
        try:
            if not is_there(path):
                self.problems.append(f"shard {shard} is missing; download the checkpoint again")
                return False
        except CheckpointError as error:
            self.problems += [f"shard {shard} {problem}" for problem in error.problems]
            return False
        try:
            header, repeated, data = _header(path)
        except (OSError, SafetensorError) as error:
            self.problems.append(
                f"{shard} ({path.stat().st_size} bytes) is truncated or not a safetensors file: {error}; "
                "download it again"
            )
            return False
        self.problems += [f"{shard} holds {name!r} twice" for name in repeated]
        for name, entry in header.items():
            if name in self.tensors:
                self.problems.append(f"{name!r} is in both {self.tensors[name].shard} and {shard}")
                continue
            begin, end = entry["data_offsets"]
            self.tensors[name] = TensorInfo(shard, entry["dtype"], tuple(entry["shape"]), data + begin, data + end)
        return True


def absent_shards(directory: Path) -> list[str]:
    """Shards that the index of a directory names and that are not there; none where there is no readable index."""
    if os.path.lexists(directory / WEIGHTS):
        return []
    try:
        weight_map, _ = _weight_map(read_json(directory / INDEX))
    except CheckpointError:  # whoever loads it says what is wrong
        return []
    shards = sorted(set(weight_map.values()))
    return [name for name in shards if _SHARD_NAME.fullmatch(name) and not os.path.lexists(directory / name)]


def chunks(targets: Sequence[np.ndarray], nbytes: int) -> Iterator[np.ndarray]:
    """Rows of the targets, about `_CHUNK_BYTES` of the `nbytes` that all of them take in the file at a time."""
    size = sum(target.size for target in targets)
    for target in targets:
        step = max(1, _CHUNK_BYTES * size * len(target) // (nbytes * target.size))
        yield from (target[start : start + step] for start in range(0, len(target), step))


def _fill(file: FileIO, room: memoryview) -> None:
    done = 0
    while done < len(room):
        count = file.readinto(room[done:])
        if not count:
            raise OSError(f"the file ends {len(room) - done} bytes early; did it change?")
        done += count


def _header(path: Path) -> tuple[dict[str, Any], list[str], int]:
    """The header of a safetensors file, names given twice in it, and where the data begins.

    Raises `SafetensorError` or `OSError` for anything that the library refuses: it checks the length of the file,
    and that the tensors' sizes follow from dtype and shape and cover the data without gap or overlap.
    """
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MOST_JSON:
            raise OSError(f"its header of {length} bytes is longer than the limit of {MOST_JSON} bytes")
        text = file.read(length)
    with safe_open(str(path), framework="numpy"):
        pass
    header, repeated = parse_json(text)
    header.pop("__metadata__", None)
    return header, repeated, 8 + length


def _weight_map(index: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(INDEX, [f"weight_map={weight_map!r:.80} must be an object from tensors to shards"])
    good = {name: shard for name, shard in weight_map.items() if isinstance(shard, str)}
    bad = weight_map.keys() - good.keys()
    return good, [f"{INDEX}: shard of {name!r} is {weight_map[name]!r:.80}, not a file name" for name in sorted(bad)]


def _note_total_size(index: dict[str, Any], total: int) -> list[str]:
    """What is wrong with the index's metadata; another total than that of the tensors is only noted."""
    metadata = index.get("metadata")
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict):
        return [f"{INDEX}: metadata={metadata!r:.80} must be an object"]
    claimed = metadata.get("total_size")
    if claimed is not None and (claimed != total or isinstance(claimed, bool)):
        # Programs that merge and prune leave it behind; every tensor is checked against its header and the config.
        logger.warning("%s: metadata.total_size=%.80r, but the shards hold %d bytes of tensors", INDEX, claimed, total)
    return []


def _no_weights(directory: Path) -> str:
    if not directory.is_dir():
        return "no such directory"
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        return (
            f"only pickled weights ({', '.join(pickles[:3])}), which can run code when read. Convert them: "
            "load with transformers' AutoModelForCausalLM.from_pretrained(path), and write with "
            "save_pretrained(new_path, safe_serialization=True)"
        )
    return f"no weights: neither {WEIGHTS} nor {INDEX} is there"
