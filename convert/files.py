"""Which files of a checkpoint are there: what stands under a file's name and is none is an error, never absent."""

import os
import stat
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from jaxgen.errors import CheckpointError

_NAMED_AS_FILES = (".json", ".jinja", ".model", ".txt", ".safetensors")


def is_there(path: Path) -> bool:
    """Whether an optional file is there; links are followed, as the Hugging Face cache consists of them.

    Raises `CheckpointError` for a link that leads nowhere, a directory, a pipe, and what else cannot be read as a
    file: taken for absent, it would silently mean other defaults.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CheckpointError(str(path), [f"cannot be looked up: {error.strerror}"]) from error
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        link = f"is a link to {os.readlink(path)!r:.200}, which is not there; download the checkpoint again"
        raise CheckpointError(str(path), [link]) from error
    except OSError as error:
        raise CheckpointError(str(path), [f"cannot be looked up: {error.strerror}"]) from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(str(path), ["is a directory" if stat.S_ISDIR(mode) else "is not a regular file"])
    return True


def leads_out(path: Path, directory: Path) -> bool:
    """Whether a file of a checkpoint's directory is a link to a place outside of it.

    What the Hugging Face hub put into its cache is inside: there, snapshots/REVISION/NAME is a link to blobs/HASH.
    """
    place, found = directory.resolve(), path.resolve()  # whatever chain of links leads there
    if place.parent.name == "snapshots" and found.parent == place.parent.parent / "blobs":
        return False
    return not found.is_relative_to(place)


def is_ours(place: Path, *, writable_by: int = stat.S_IWGRP | stat.S_IWOTH) -> bool:
    """Whether this is a directory, no link to one, that belongs to this user, and none of these others can write to."""
    status = os.lstat(place)
    ours = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return stat.S_ISDIR(status.st_mode) and ours and not status.st_mode & writable_by


def require(path: Path, what: str) -> Path:
    """`path`, a file that a directory of kind `what` must have; raises `CheckpointError` if it is not there."""
    if is_there(path):
        return path
    if not path.parent.is_dir():
        raise CheckpointError(str(path.parent), ["no such directory"])
    empty = "the directory is empty" if not any(path.parent.iterdir()) else f"there is no {path.name}"
    raise CheckpointError(str(path.parent), [f"{empty}; give the directory of {what}, which holds {path.name}"])


def files_matching(directory: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of a directory whose names match one of the patterns, sorted; raises as `is_there`.

    A pattern may begin with the name of a folder ("templates/*.jinja"). Directories are passed over, unless they stand
    where a file is looked for ("tokenizer.json").
    """
    found: list[Path] = []
    patterns = tuple(patterns)
    for folder in sorted({os.path.dirname(pattern) for pattern in patterns}):
        place = directory / folder
        # Not `glob`, which before Python 3.13 takes a link that leads nowhere for absent.
        for path in (place / name for name in _listed(place, optional=not folder)):
            matches = any(fnmatchcase(os.path.join(folder, path.name), pattern) for pattern in patterns)
            if matches and (path.suffix in _NAMED_AS_FILES or not path.is_dir()) and is_there(path):
                found.append(path)
    return found


def _listed(place: Path, *, optional: bool) -> list[str]:
    try:
        return sorted(os.listdir(place))
    except (FileNotFoundError, NotADirectoryError) as error:
        if optional or not os.path.lexists(place):
            return []
        raise CheckpointError(str(place), ["is no directory"]) from error
    except OSError as error:
        raise CheckpointError(str(place), [f"cannot be read: {error.strerror}"]) from error
