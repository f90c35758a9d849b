"""What tells one checkpoint from another of the same shapes, sizes and times: a hash of all that tensors hold."""

import hashlib
from collections.abc import Iterable

from jaxgen.errors import CheckpointError

from .checkpoint import Checkpoint

_CHUNK = 1 << 20


def fingerprint(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """The sha256 of these tensors: their names, dtypes, shapes and bytes. Raises `CheckpointError` if reading fails."""
    hashed, room = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    for name in names:
        info = checkpoint.tensors[name]
        hashed.update(f"{name} {info.dtype} {info.shape}\n".encode())
        try:
            with (checkpoint.directory / info.shard).open("rb", buffering=0) as file:
                file.seek(info.begin)
                left = info.nbytes
                while left:
                    count = file.readinto(room[: min(left, _CHUNK)])
                    if not count:
                        raise OSError(f"the file ends {left} bytes early; did it change?")
                    hashed.update(room[:count])
                    left -= count
        except OSError as error:
            problem = f"{info.shard}: reading {name!r} failed: {error}"
            raise CheckpointError(str(checkpoint.directory), [problem]) from error
    return hashed.hexdigest()
