"""Directories that appear complete or not at all, also when the process is killed while writing."""

import contextlib
import itertools
import json
import logging
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from jaxgen.errors import JaxgenError

from .leftovers import held, settle, take_over

logger = logging.getLogger("jaxgen")


@contextlib.contextmanager
def new_directory(target: Path, *, replaceable: Collection[str] | None) -> Iterator[Path]:
    """A temporary directory beside `target`, to be filled by the caller, that becomes `target` at the end.

    If the body raises, the temporary is removed and `target` is as before; what a killed process leaves, the next
    save or load of `target` finds (see `leftovers.settle`). An existing `target` must be an empty directory, unless
    `replaceable` is given (file name patterns): then it is replaced, with its mode, and its files that match none of
    the patterns are kept, also those that somebody writes into it meanwhile. Raises `JaxgenError` for a target in
    the way, a full disk, and every other error of the file system.
    """
    target = target.expanduser().resolve()
    instead = "save to a new directory, or give overwrite=True to replace the model in it"
    settle(target)
    _files_in_the_way(target, replaceable, instead)
    with _as_jaxgen_error(f"{target} was not written, and nothing of it is left behind"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _make(target)
        try:
            with held(temporary):
                yield temporary
                if target.exists():
                    for path in _files_in_the_way(target, replaceable, instead):
                        _link(path, temporary / path.name)
                    temporary.chmod(stat.S_IMODE(target.stat().st_mode))
                _sync_all(temporary)
                _swap(temporary, target, replaceable or ())
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextlib.contextmanager
def resumable_directory(target: Path, made_from: Mapping[str, Any]) -> Iterator[Path]:
    """A directory beside `target`, filled by the caller in one run or several, that becomes `target` at the end.

    If the body raises, or the process is killed, its files stay in `.NAME.converting/files` and are there again in
    the next run with an equal `made_from` (a JSON object); for another `made_from` they are removed. `target` must
    be absent or empty. Raises `JaxgenError` for a target in the way, another process that is writing it, a full
    disk, and every other error of the file system.
    """
    target = target.expanduser().resolve()
    place = target.with_name(f".{target.name}.converting")
    files, note = place / "files", place / "made_from.json"
    with (
        _as_jaxgen_error(f"{target} was not written; finished files, if any, wait in {place} for the next attempt"),
        _lock(place),
    ):
        try:
            _files_in_the_way(target, None, "choose a new directory")
            if not _holds(note, made_from):
                if files.exists():
                    logger.warning("%s is of another source or other options: starting afresh", place)
                    shutil.rmtree(files)
                note.write_text(json.dumps(made_from))
            files.mkdir(exist_ok=True)
            yield files
            _sync_all(files)
            files.rename(target)  # refused by the system if somebody has filled it meanwhile
            _sync(target.parent)
        finally:
            if not files.exists() or not any(files.iterdir()):
                shutil.rmtree(place, ignore_errors=True)


def _lock(place: Path) -> TextIO:
    """Make the directory `place`, and hold it for this process until the result is closed or the process dies."""
    import fcntl  # POSIX only: at the top it would keep all of jaxgen.convert from Windows

    while True:
        place.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as opened:
            lock = opened.enter_context((place / "lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise JaxgenError(f"{place} is in use: another process is writing the same target") from error
            # Its last owner may have removed it after we opened it: then it would keep nobody else out.
            if os.path.samestat(os.fstat(lock.fileno()), (place / "lock").stat()):
                opened.pop_all()
                return lock


def _holds(note: Path, made_from: Mapping[str, Any]) -> bool:
    try:
        return json.loads(note.read_text()) == json.loads(json.dumps(made_from))
    except (OSError, ValueError):  # killed before or while it was written
        return False


def _files_in_the_way(target: Path, replaceable: Collection[str] | None, instead: str) -> list[Path]:
    """Files of `target` to keep; raises if `target` must not be replaced."""
    if not target.exists():
        return []
    if not target.is_dir():
        raise JaxgenError(f"{target} exists and is not a directory")
    entries = sorted(target.iterdir())
    if entries and replaceable is None:
        raise JaxgenError(f"{target} is not empty ({', '.join(path.name for path in entries[:3])}, ...); {instead}")
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


def _sync_all(directory: Path) -> None:
    for path in directory.iterdir():
        _sync(path)
    _sync(directory)


def _link(path: Path, copy: Path) -> None:
    """The same file under another name, so that what is still being written to it is kept; else a copy."""
    if os.path.lexists(copy):
        return
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
        try:
            os.link(path, copy, follow_symlinks=False)
        except FileNotFoundError:
            raise
        except (OSError, NotImplementedError):  # a file system without links
            shutil.copy2(path, copy, follow_symlinks=False)


def _swap(temporary: Path, target: Path, replaceable: Collection[str]) -> None:
    """Rename over an absent or empty target; move any other aside first, and back if the rename fails."""
    if not target.exists() or not any(target.iterdir()):
        temporary.rename(target)
    else:
        aside = temporary.with_name(temporary.name.replace(".tmp-", ".old-"))
        with held(target):
            target.rename(aside)
            try:
                temporary.rename(target)
            except BaseException:
                aside.rename(target)
                raise
            take_over(aside, target, replaceable)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _as_jaxgen_error(message: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JaxgenError(f"{message}: {error}") from error
