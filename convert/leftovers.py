"""What a killed save leaves beside its directory, found and finished or undone by the next save or load."""

import contextlib
import logging
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from jaxgen.errors import JaxgenError

from .files import is_ours

logger = logging.getLogger("jaxgen")

# What a saved model consists of: replaced by overwrite=True, while other files (the tokenizer's) stay.
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


def settle(target: Path) -> None:
    """Finish or undo saves to `target` whose process is dead, and say so.

    A save fills `.NAME.tmp-PID`, renames `NAME` to `.NAME.old-PID` when that is complete, and the first to `NAME`.
    So with both there and no `NAME`, the new one is complete and takes its place; with the old one alone, that goes
    back. Raises `JaxgenError` where the file system refuses.
    """
    if not target.parent.is_dir():
        return
    try:
        for old in _of(target, "old"):
            _settle_old(old, old.with_name(old.name.replace(".old-", ".tmp-", 1)), target)
        for temporary in _of(target, "tmp"):
            with _held_now(temporary) as ours:
                if ours:
                    logger.warning("%s: removed %s, an unfinished save of a process that ended", target, temporary.name)
                    shutil.rmtree(temporary)
    except OSError as error:
        raise JaxgenError(f"{target}: what a killed save left beside it cannot be put in order: {error}") from error


def _settle_old(old: Path, temporary: Path, target: Path) -> None:
    with _held_now(old) as ours:
        if not ours:
            return
        if target.exists():
            take_over(old, target, MODEL_FILES)
            logger.warning("%s: finished a save that was killed at its end", target)
        elif temporary.is_dir():
            temporary.rename(target)
            take_over(old, target, MODEL_FILES)
            logger.warning("%s: finished a save that was killed; this is the new model", target)
        else:
            old.rename(target)
            logger.warning("%s: undid a save that was killed; this is the model from before", target)


def take_over(old: Path, new: Path, replaceable: Collection[str]) -> None:
    """Move to `new` what came into `old` too late to be linked there, and remove `old`."""
    try:
        for path in old.iterdir():
            if not any(path.match(pattern) for pattern in replaceable) and _is_news(path, new / path.name):
                path.replace(new / path.name)
    except OSError as error:
        logger.warning("%s is saved, but files that came into it meanwhile are still in %s: %s", new, old, error)
    else:
        shutil.rmtree(old, ignore_errors=True)


def _is_news(path: Path, other: Path) -> bool:
    """Whether `other` is absent or older; a link or copy of the same file is neither."""
    return not os.path.lexists(other) or path.lstat().st_mtime_ns > other.lstat().st_mtime_ns


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


def _of(target: Path, kind: str) -> list[Path]:
    name = re.compile(rf"\.{re.escape(target.name)}\.{kind}-\d+(-\d+)?")
    try:
        found = [path for path in target.parent.iterdir() if name.fullmatch(path.name)]
        # Others may have prepared what has such a name, where they can write: it is none of a save of ours. A save has
        # the mode of what it replaces, and where each user has a group of one, directories are made for it to write.
        return sorted(path for path in found if is_ours(path, writable_by=stat.S_IWOTH))
    except (PermissionError, FileNotFoundError):  # the latter: just settled by another process
        return []
