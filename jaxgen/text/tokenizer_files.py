"""A tokenizer's files, before transformers reads them: no code, no pipes, nothing that would fill the memory."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.files import MOST_TOKENIZER, read_json

_FILES = (
    "config.json", "tokenizer*", "chat_template*", "additional_chat_templates/*.jinja", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.*", "tekken.json",
)  # fmt: skip
_MOST_GROWTH = 10_000  # how much longer a text may become

# Where transformers looks for the names of a repository's own classes, and how it writes them.
_CONFIGS, _NAMES_CODE = ("tokenizer_config.json", "config.json"), "auto_map"


def check_files(directory: Path) -> None:
    """Raise for files that must not be read: `UnsupportedError` for code, `JaxgenError` for the rest."""
    from jaxgen.convert.leftovers import settle

    settle(directory)
    _check_kinds(directory)
    _refuse_code(directory)
    _check_growth(directory / "tokenizer.json")


def _check_kinds(directory: Path) -> None:
    from jaxgen.convert.files import files_matching

    for path in files_matching(directory, _FILES):
        if (size := path.stat().st_size) > MOST_TOKENIZER:
            raise JaxgenError(f"{path}: {size} bytes are more than a tokenizer's file has, {MOST_TOKENIZER}")


def _refuse_code(directory: Path) -> None:
    for name in _CONFIGS:
        path = directory / name
        if os.path.lexists(path) and (code := read_json(path).get(_NAMES_CODE)):
            raise UnsupportedError(
                f"{path}: {_NAMES_CODE}={code!r:.80} names code in the repository, which jaxgen never runs. If one of "
                "transformers' own classes reads these files, remove the field"
            )


def _check_growth(path: Path) -> None:
    """Raise where each step of a normalizer or decoder makes text longer, so that a letter would fill the memory."""
    if not path.exists():
        return
    fields = read_json(path, limit=MOST_TOKENIZER, any_names=True)
    for name in ("normalizer", "decoder"):
        steps = _steps(fields.get(name))
        if (growth := math.prod(map(_growth, steps))) > _MOST_GROWTH:
            raise JaxgenError(f"{path}: {name}: makes a text more than {_MOST_GROWTH} times longer ({growth:.3g})")


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    if isinstance(step, dict):
        yield step
        for inner in (step.get("normalizers"), step.get("decoders")):
            for one in inner if isinstance(inner, list) else ():
                yield from _steps(one)


def _growth(step: dict[str, Any]) -> float:
    """How many times longer a step may make a text, at most."""
    kind, pattern, content = (step.get(name) for name in ("type", "pattern", "content"))
    if kind == "Replace" and isinstance(content, str):
        found = pattern.get("String") if isinstance(pattern, dict) else pattern
        # An expression may find nothing, before every letter.
        return max(1.0, len(content) / len(found)) if isinstance(found, str) and found else 1.0 + len(content)
    # Two bytes for one; what a table of replacements holds is not known.
    return {"ByteLevel": 2.0, "Precompiled": 50.0}.get(kind, 1.0) if isinstance(kind, str) else 1.0
