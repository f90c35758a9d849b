"""Arrays that took long to work out, on disk for the next process: numbers only, in a private directory."""

import contextlib
import io
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.files import read_bytes

logger = logging.getLogger("jaxgen")

Arrays = Mapping[str, np.ndarray]
MOST_FILES = 1000  # the oldest go
_MOST_BYTES = 200_000_000  # of one
_KEY = "key"

_place: list[Path] = []  # at most one


def keep_in(directory: Path | None) -> None:
    """Keep what is worked out from now on in a directory of files that nobody else can write to; None: nowhere."""
    _place[:] = [] if directory is None else [directory]


def kept(key: str, build: Callable[[], Arrays], fits: Callable[[Arrays], bool]) -> Arrays:
    """The arrays of a key: those of an earlier call, in this process or another, or else as they are built now.

    A file that is damaged, or whose arrays do not `fit`, is built anew. Where nothing can be written, nothing is kept.
    """
    if not _place:
        return build()
    path = _place[0] / f"{key}.npz"
    arrays = _read(path, key)
    if arrays is not None and fits(arrays):
        return arrays
    built = build()
    try:
        _write(path, {**built, _KEY: np.frombuffer(key.encode(), np.uint8)})
    except OSError as error:
        logger.warning("a constraint was not kept for the next process: %s", error)
    return built


def _read(path: Path, key: str) -> dict[str, np.ndarray] | None:
    try:
        with np.load(io.BytesIO(read_bytes(path, _MOST_BYTES)), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        known = arrays.pop(_KEY).tobytes() == key.encode()
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is wrong with it: it is written anew
        logger.warning("%s is damaged, and built anew: %.200s", path, error)
        return None
    return arrays if known else None


def _write(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write a file, which appears complete or not at all."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez_compressed(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
    files = sorted(path.parent.glob("*.npz"), key=_age)
    for old in files[: max(0, len(files) - MOST_FILES)]:
        old.unlink(missing_ok=True)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # somebody else has removed it
        return 0.0
