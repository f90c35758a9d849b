"""Directories that appear complete or not at all, also when the process is killed while writing."""

import contextlib
import ctypes
import json
import logging
import os
import shutil
import stat
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from jaxgen.errors import JaxgenError
from jaxgen.paths import as_path

from .files import is_ours
from .leftovers import held, renamed, settle, sweep, take_over, unused

logger = logging.getLogger("jaxgen")


@contextlib.contextmanager
def new_directory(target: Path, *, owned: Collection[str], overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `target`, to be filled by the caller, that becomes `target` at the end.

    If the body raises, the temporary is removed and `target` is as before; what a killed process leaves, the next
    use of `target` finds (see `leftovers`). An existing `target` must be a directory
    without any file that belongs to what is written (`owned`, name patterns), unless `overwrite`: then those are
    replaced. All else in it is kept, also what somebody writes into it meanwhile, and so is its mode.
    Raises `JaxgenError` for a target in the way, a full disk, and every other error of the file system.
    """
    target = _resolved(target)
    settle(target)
    _others(target, owned, overwrite)
    with _as_jaxgen_error(f"{target} was not written, and nothing of it is left behind"):
        sweep(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _make(target)
        try:
            with held(temporary):
                yield temporary
                for path in _others(target, owned, overwrite):
                    _link(path, temporary / path.name)
                _take_mode(temporary, target)
                _sync_all(temporary)
                _swap(temporary, target, owned)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextlib.contextmanager
def resumable_directory(target: Path, made_from: Mapping[str, Any]) -> Iterator[Path]:
    """A directory beside `target`, filled by the caller in one run or several, that becomes `target` at the end.

    If the body raises, or the process is killed, its files stay in `.NAME.converting/files` and are there again in
    the next run with an equal `made_from` (a JSON object); for another `made_from` they are removed. `target` must
    be absent or empty. Raises `JaxgenError` for a target in the way, another process that is writing it, a
    `.NAME.converting` that others can write to, a full disk, and every other error of the file system.
    """
    target = _resolved(target)
    settle(target)
    place = target.with_name(f".{target.name}.converting")
    files, note = place / "files", place / "made_from.json"
    with (
        _as_jaxgen_error(f"{target} was not written; finished files, if any, wait in {place} for the next attempt"),
        _lock(place),
    ):
        try:
            if entries := _entries(target):
                raise JaxgenError(f"{target} is not empty ({_first(entries)}); choose a new directory")
            if not _holds(note, made_from):
                if files.exists():
                    logger.warning("%s is of another source or other options: starting afresh", place)
                    shutil.rmtree(files)
                note.unlink(missing_ok=True)
                note.write_text(json.dumps(made_from))
            files.mkdir(exist_ok=True)
            yield files
            _sync_all(files)
            _take_mode(files, target)
            files.rename(target)  # refused by the system if somebody has filled it meanwhile
            _sync(target.parent)
        finally:
            if not files.exists() or not any(files.iterdir()):
                shutil.rmtree(place, ignore_errors=True)


def _lock(place: Path) -> TextIO:
    """Make the directory `place`, and hold it for this process until the result is closed or the process dies."""
    import fcntl  # POSIX only: at the top it would keep all of jaxgen.convert from Windows

    while True:
        place.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            place.mkdir(0o700)
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as opened:
            # Where others can write, they may have put links, for us to write through.
            if not is_ours(place) or (place / "files").is_symlink():
                raise JaxgenError(f"{place} is in the way: no directory of yours that only you can write to; remove it")
            descriptor = os.open(place / "lock", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            lock = opened.enter_context(open(descriptor, "w"))
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


def _resolved(target: Path) -> Path:
    """Without links, so that what is written lies beside what it becomes; raises `JaxgenError` if that cannot be."""
    target = as_path(target, "target")
    try:
        target = target.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise JaxgenError(f"{str(target)!r:.200} cannot be looked up: {error}") from error
    if not target.name:
        raise JaxgenError(f"{target} cannot be replaced; give a new directory in it")
    return target


def _entries(target: Path) -> list[Path]:
    with _as_jaxgen_error(f"{target!s:.200} was not written"):
        if not target.exists():
            return []
        if not target.is_dir():
            raise JaxgenError(f"{target} exists and is not a directory")
        return sorted(target.iterdir())


def _first(entries: list[Path]) -> str:
    return f"{', '.join(path.name for path in entries[:3])}, ..."


def _others(target: Path, owned: Collection[str], overwrite: bool) -> list[Path]:
    """What `target` holds beside the files that are replaced; raises if it must not be replaced."""
    entries = _entries(target)
    mine = [path for path in entries if any(path.match(pattern) for pattern in owned)]
    if mine and not overwrite:
        raise JaxgenError(
            f"{target} is not empty ({_first(mine)}); save to a new directory, or give overwrite=True to replace the "
            "model in it"
        )
    for path in mine:
        if not path.is_file():
            raise JaxgenError(f"{target} holds {path.name!r}, which is no file; only files are replaced: remove it")
    return [path for path in entries if path not in mine]


def _make(target: Path) -> Path:
    while True:
        temporary = unused(target, "tmp")
        with contextlib.suppress(FileExistsError):  # made by another thread just now
            temporary.mkdir()
            return temporary


def _take_mode(directory: Path, target: Path) -> None:
    if target.exists():
        directory.chmod(stat.S_IMODE(target.stat().st_mode))


def _sync_all(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        if not path.is_symlink():
            _sync(path)


def _link(path: Path, copy: Path) -> None:
    """The same file under another name, so that what is still being written to it is kept; else a copy.

    Directories and what else is no file are moved at the end.
    """
    if os.path.lexists(copy) or not (path.is_symlink() or path.is_file()):
        return
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
        try:
            os.link(path, copy, follow_symlinks=False)
        except FileNotFoundError:
            raise
        except (OSError, NotImplementedError):  # a file system without links
            shutil.copy2(path, copy, follow_symlinks=False)


def _swap(temporary: Path, target: Path, replaceable: Collection[str]) -> None:
    """Rename over an absent or empty target; exchange any other, or move it aside first, and back if that fails."""
    if not target.exists() or not any(target.iterdir()):
        temporary.rename(target)
    else:
        aside = renamed(temporary, "old")
        with held(target):
            temporary.rename(aside)  # where settling takes it for what has no use, while `target` is whole
            if not _exchange(aside, target):
                aside.rename(temporary)
                target.rename(aside)
                try:
                    temporary.rename(target)
                except BaseException:
                    aside.rename(target)
                    raise
            _sync(target.parent)
            take_over(aside, target, replaceable)
    _sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Give two directories each other's name at once; False where system or file system cannot (not on Linux)."""
    if sys.platform != "linux":
        return False
    function = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return function is not None and not function(here, os.fsencode(one), here, os.fsencode(other), exchange)


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
        raise JaxgenError(f"{message}: {error.strerror or error}") from error
