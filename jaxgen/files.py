"""Files that anybody may have made: only regular files are opened, and read up to a limit; and files that we write."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

from jaxgen.errors import CheckpointError, JaxgenError

JsonObject: TypeAlias = dict[str, Any]  # what most JSON files hold, and records

MOST_JSON = 20_000_000  # bytes; an index takes about 100 a tensor
MOST_TOKENIZER = 100_000_000  # the largest vocabularies take 40 million
_MOST_NAMED = 5  # in one message
_CHUNK = 1 << 20


def open_regular(path: Path) -> IO[bytes]:
    """A regular file (or a link to one: the hub's cache is made of them), opened for reading.

    Raises `OSError` for everything else: pipes and devices may have no end.
    """
    # Opening a pipe waits until somebody writes into it, unless told not to.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_chunks(path: Path, limit: int) -> Iterator[bytes]:
    """What a regular file holds; raises `OSError` if that is more than `limit` bytes, whatever its status says."""
    done = 0
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            done += len(chunk)
            if done > limit:
                raise OSError(f"it is longer than the limit of {limit} bytes")
            yield chunk


def read_bytes(path: Path, limit: int = MOST_JSON) -> bytes:
    """All that a regular file holds; raises as `read_chunks`."""
    return b"".join(read_chunks(path, limit))


def parse_json(data: bytes | str) -> tuple[Any, list[str]]:
    """What JSON says, and the names that it gives twice. Raises `ValueError` or `RecursionError` if it is none."""
    repeated: list[str] = []

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                repeated.append(name)
            fields[name] = value
        return fields

    return json.loads(data, object_pairs_hook=build), repeated


def read_json(path: Path, *, limit: int = MOST_JSON, any_names: bool = False) -> dict[str, Any]:
    """The object in a JSON file; raises `CheckpointError` if there is none.

    Refuses what is no regular file, files of more than `limit` bytes, and unless `any_names` (those of tokens) names
    given twice, which JSON readers otherwise resolve silently, or that nobody can read.
    """
    try:
        fields, repeated = parse_json(read_bytes(path, limit))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(str(path), [f"cannot be read as JSON: {error!s:.200}"]) from error
    if not isinstance(fields, dict):
        raise CheckpointError(str(path), [f"holds {type(fields).__name__}, not a JSON object"])
    if any_names:
        return fields
    if repeated:
        raise CheckpointError(str(path), [f"{name!r:.80} is given twice" for name in repeated[:_MOST_NAMED]])
    if strange := [name for name in fields if not name.isprintable()]:
        raise CheckpointError(str(path), [f"{name!r:.80} is not a name, but damage" for name in strange[:_MOST_NAMED]])
    return fields


def write_text(path: Path, text: str, what: str) -> None:
    """Write a file in UTF-8; as `write_bytes`."""
    write_bytes(path, text.encode(), what)


def write_bytes(path: Path, data: bytes, what: str) -> None:
    """Write a file, which appears complete or not at all. Raises `JaxgenError`, which names it, if it cannot be."""
    path = Path(os.path.realpath(path))  # a link stays one
    if os.path.lexists(path) and not os.path.isfile(path):
        raise JaxgenError(f"{path}: {what} was not written: it is there, and no plain file")
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        if not isinstance(error, OSError):
            raise
        raise JaxgenError(f"{path}: {what} was not written: {error.strerror or error}") from error
