"""Directories that appear complete or not at all, also when the process is killed while writing."""

import contextlib
import itertools
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from safetensors import SafetensorError

from jaxgen.errors import JaxgenError


@contextlib.contextmanager
def new_directory(target: Path, *, replaceable: Collection[str] | None) -> Iterator[Path]:
    """A temporary directory beside `target`, to be filled by the caller, that becomes `target` at the end.

    If the body raises, the temporary is removed and `target` is as before; a killed process leaves the
    temporary, named `.NAME.tmp-PID`. An existing `target` must be an empty directory, unless `replaceable`
    is given (file name patterns): then it is replaced, and its files that match none of the patterns are kept.
    Raises `JaxgenError` for a target in the way, a full disk, and every other error of the file system.
    """
    target = target.expanduser().resolve()
    kept = _files_in_the_way(target, replaceable)
    with _as_jaxgen_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _make(target)
        try:
            yield temporary
            for path in kept:
                if not (temporary / path.name).exists():
                    shutil.copy2(path, temporary / path.name)
            for path in temporary.iterdir():
                _sync(path)
            _sync(temporary)
            _swap(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _files_in_the_way(target: Path, replaceable: Collection[str] | None) -> list[Path]:
    """Files of `target` to keep; raises if `target` must not be replaced."""
    if not target.exists():
        return []
    if not target.is_dir():
        raise JaxgenError(f"{target} exists and is not a directory")
    entries = sorted(target.iterdir())
    if entries and replaceable is None:
        raise JaxgenError(
            f"{target} is not empty ({', '.join(path.name for path in entries[:3])}, ...); save to a new "
            "directory, or give overwrite=True to replace the model in it"
        )
    for path in entries:
        if not path.is_file():
            raise JaxgenError(
                f"{target} holds {path.name!r}, which is no plain file; only flat directories are replaced"
            )
    return [path for path in entries if not any(path.match(pattern) for pattern in replaceable or ())]


def _make(target: Path) -> Path:
    for attempt in itertools.count():
        suffix = f"-{attempt}" if attempt else ""  # left by a killed process that had our id
        temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}{suffix}")
        with contextlib.suppress(FileExistsError):
            temporary.mkdir()
            return temporary
    raise JaxgenError(f"{target}: no name left for a temporary directory")


def _swap(temporary: Path, target: Path) -> None:
    """Rename over an absent or empty target; move any other aside first, and back if the rename fails."""
    if not target.exists() or not any(target.iterdir()):
        temporary.rename(target)
    else:
        aside = temporary.with_name(temporary.name.replace(".tmp-", ".old-"))
        target.rename(aside)
        try:
            temporary.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _as_jaxgen_error(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise JaxgenError(f"{target} was not written, and nothing of it is left behind: {error}") from error
