"""Paths that users give."""

import os
from pathlib import Path
from typing import Any

from jaxgen.errors import JaxgenError

_LONGEST = 4095  # what Linux takes, which takes most


def as_path(value: Any, name: str, kind: str = "a path") -> Path:
    """The path that the argument `name` is, with "~" filled in; raises `JaxgenError` if it is none."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise JaxgenError(f"{name}={value!r:.80} must be {kind}")
    text = os.fspath(value)
    if "\0" in text:
        raise JaxgenError(f"{name}={text!r:.80} must be {kind}; it holds a NUL character")
    try:
        length = len(os.fsencode(text))
    except UnicodeEncodeError as error:
        raise JaxgenError(
            f"{name}={text!r:.80} must be {kind}; no file has {error.object[error.start]!r} in its name"
        ) from error
    if length > _LONGEST:
        raise JaxgenError(f"{name}={text!r:.80} must be {kind}; it has {length} bytes, more than {_LONGEST}")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise JaxgenError(f"{name}={text!r:.80}: there is no such user's home") from error
