"""What a killed save leaves beside its directory, found and finished or undone by whatever uses the name next.

A save fills `.NAME.tmp-PID`, and when that is complete, exchanges it with `NAME`, by way of `.NAME.old-PID`. Where that
cannot be done at once, it renames `NAME` to `.NAME.old-PID`, and the first to `NAME`. Then it moves to `NAME` what only
the old one has, and removes that. So where both are left, the new model is complete.
"""

import contextlib
import itertools
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from jaxgen.errors import JaxgenError

from .checkpoint import INDEX, WEIGHTS, absent_shards
from .files import is_ours

logger = logging.getLogger("jaxgen")

# What a saved model consists of: replaced by overwrite=True, while other files (the tokenizer's) stay.
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
_PATIENCE = 5.0  # seconds, for another process between two renames
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def settle(place: Path) -> None:
    """Finish or undo a save to `place` whose process is dead, and say so: to be called before the name is looked up.

    Nothing is removed but an old model that a complete new one has just taken the place of. Raises `JaxgenError` where
    the file system refuses and nothing has the name.
    """
    try:
        target = place.resolve()
    except (OSError, RuntimeError):  # links in a circle: whoever opens it says so
        return
    end = time.monotonic() + _PATIENCE
    try:
        while any([not _settle_old(old, target) for old in _of(target, "old")]):
            if os.path.lexists(target) or time.monotonic() > end:
                return
            time.sleep(0.02)
        if not os.path.lexists(target) and (others := _of(target, "old", ours=False)):
            logger.warning("%s: there is %s, of a killed save and not this user's: rename it", target, others[0].name)
    except OSError as error:
        problem = f"{target}: what a killed save left beside it cannot be put in order: {error}"
        if not os.path.lexists(target):
            raise JaxgenError(problem) from error
        logger.warning("%s", problem)


def sweep(target: Path) -> None:
    """Remove what killed saves to `target` have left, of which nothing is needed; only for who saves to it.

    Who only reads might be on another machine than a living save, where its mark does not show.
    """
    for old in _of(target, "old"):
        with _held_now(old) as ours:
            if ours and not os.path.lexists(renamed(old, "tmp")) and _is_whole(target):
                logger.warning("%s: removing %s, of a save that was killed at its end", target, old.name)
                take_over(old, target, MODEL_FILES)
    for temporary in _of(target, "tmp"):
        with _held_now(temporary) as ours:
            if ours and not os.path.lexists(renamed(temporary, "old")):
                logger.warning("%s: removed %s, an unfinished save of a process that ended", target, temporary.name)
                shutil.rmtree(temporary, ignore_errors=True)


def unused(target: Path, kind: str) -> Path:
    """A name beside `target` for what a save leaves, that no left-over has in any `kind`, "tmp" or "old"."""
    for attempt in itertools.count():
        suffix = f"-{attempt}" if attempt else ""  # left by a killed process that had our id
        paths = {name: target.with_name(f".{target.name}.{name}-{os.getpid()}{suffix}") for name in ("tmp", "old")}
        if not any(map(os.path.lexists, paths.values())):
            return paths[kind]
    raise AssertionError("there is always another number")


def _settle_old(old: Path, target: Path) -> bool:
    """Put one save in order, or leave it alone and say why; False if a living process is at it."""
    with _held_now(old) as ours:
        if not ours:
            return False
        temporary = renamed(old, "tmp")
        new = temporary if os.path.lexists(temporary) and is_ours(temporary, writable_by=0) else old
        if new is old and _is_whole(target):  # which may still lack what is moved at the end
            _moved(old, target, MODEL_FILES)
            return True
        left = [] if new is old else [old]
        if os.path.lexists(target):  # made by another program meanwhile
            if not is_ours(target, writable_by=0) or any(map(_is_of_model, target.iterdir())):
                logger.warning("%s was written after a save to it had been killed, whose model is %s, beside it: "
                               "rename or remove that", target, new.name)  # fmt: skip
                return True
            left.append(unused(target, "old"))
            target.rename(left[-1])
        new.rename(target)
        for directory in left:
            take_over(directory, target, MODEL_FILES)
        did = "undid a save that was killed; this is the model from before"
        logger.warning(
            "%s: %s", target, did if new is old else "finished a save that was killed; this is the new model"
        )
        return True


def _is_of_model(path: Path) -> bool:
    return any(path.match(pattern) for pattern in MODEL_FILES)


def _is_whole(target: Path) -> bool:
    """Whether a directory holds a model that lacks no file."""
    if not (target / "config.json").is_file():
        return False
    return (target / WEIGHTS).is_file() or ((target / INDEX).is_file() and not absent_shards(target))


def take_over(old: Path, new: Path, replaceable: Collection[str]) -> None:
    """Move to `new` what only `old` has, or came into it too late to be linked to `new`, and remove `old`."""
    if _moved(old, new, replaceable):
        shutil.rmtree(old, ignore_errors=True)


def _moved(old: Path, new: Path, replaceable: Collection[str]) -> bool:
    try:
        # What others can put into the one must not get into the other, unless they can write there, too.
        if old.lstat().st_mode & ~new.lstat().st_mode & _OTHERS:
            raise PermissionError("who can write there cannot write here")
        _move(old, new, replaceable)
    except OSError as error:
        logger.warning("%s is saved, but what else was in the directory is still in %s: %s", new, old.name, error)
        return False
    return True


def _move(old: Path, new: Path, replaceable: Collection[str] = ()) -> None:
    for path in old.iterdir():
        other = new / path.name
        if any(path.match(pattern) for pattern in replaceable):
            continue
        if not os.path.lexists(other):
            path.replace(other)
        elif _is_directory(path) and _is_directory(other):
            _move(path, other)
        elif _is_directory(path) or _is_directory(other):
            raise FileExistsError(f"{other} is in the way")
        elif path.lstat().st_mtime_ns > other.lstat().st_mtime_ns:  # a link or copy of the same file is no newer
            path.replace(other)


def _is_directory(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Mark a directory, under whatever name it gets, as in use by this process until it dies."""
    descriptor = _lock(directory, wait=True)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def _held_now(directory: Path) -> Iterator[bool]:
    """Whether no living process has marked the directory; then it is ours within."""
    try:
        descriptor = _lock(directory, wait=False)
    except (BlockingIOError, FileNotFoundError):  # in use, or just settled by another process
        yield False
        return
    try:
        yield descriptor is not None and directory.is_dir()
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(directory: Path, *, wait: bool) -> int | None:
    try:
        import fcntl
    except ImportError:  # Windows: nothing is marked, and nothing is settled
        return None
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def renamed(path: Path, kind: str) -> Path:
    """The other of the two directories of a save."""
    return path.with_name(re.sub(r"\.(?:tmp|old)-([0-9-]+)$", rf".{kind}-\1", path.name))


def _of(target: Path, kind: str, *, ours: bool = True) -> list[Path]:
    name = re.compile(rf"\.{re.escape(target.name)}\.{kind}-\d+(-\d+)?")
    try:
        found = [path for path in target.parent.iterdir() if name.fullmatch(path.name)]
        # Others may have prepared what has such a name, where they can write, but they cannot make it ours. Its mode
        # says nothing: a save has that of what it replaces.
        return sorted(path for path in found if is_ours(path, writable_by=0) == ours)
    except OSError:  # no such directory, or one that cannot be read; or just settled by another process
        return []
