"""What tells one checkpoint from another of the same shapes, sizes and times: hashes of headers and samples of data."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from jaxgen.errors import CheckpointError

from .checkpoint import TensorInfo

_SAMPLES = 4  # a tensor, the first at its beginning and the last at its end
_SAMPLE_BYTES = 4096


def fingerprints(directory: Path, tensors: Iterable[TensorInfo]) -> dict[str, str]:
    """For every file that holds some of `tensors` (all of a checkpoint), one hash.

    Takes a few reads a tensor, whatever its size: training and merging change numbers all over it. Raises
    `CheckpointError` if a file cannot be read.
    """
    homes: dict[str, list[TensorInfo]] = {}
    for info in tensors:
        homes.setdefault(info.shard, []).append(info)
    try:
        return {shard: _of_file(directory / shard, infos) for shard, infos in homes.items()}
    except OSError as error:
        raise CheckpointError(str(directory), [f"cannot be read: {error}"]) from error


def _of_file(path: Path, tensors: list[TensorInfo]) -> str:
    hashed = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        hashed.update(file.read(min(info.begin for info in tensors)))  # the header: data begins where it ends
        for info in sorted(tensors, key=lambda info: info.begin):
            for begin in _places(info):
                file.seek(begin)
                hashed.update(file.read(min(_SAMPLE_BYTES, info.end - begin)))
    return hashed.hexdigest()


def _places(info: TensorInfo) -> list[int]:
    last = max(info.begin, info.end - _SAMPLE_BYTES)
    return sorted({info.begin + (last - info.begin) * i // (_SAMPLES - 1) for i in range(_SAMPLES)})
