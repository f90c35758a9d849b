"""A row of the input: a prompt or a chat, the id that its randomness comes from, and options of its own."""

import contextlib
import csv
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxgen.errors import JaxgenError, shown
from jaxgen.files import open_regular, parse_json
from jaxgen.generation.options.table import ARGUMENTS, OPTIONS
from jaxgen.text.inputs import Messages, checked_text

_OWN = {*OPTIONS, *ARGUMENTS, "seed"}  # what would be an option if it stood in `options`


@dataclasses.dataclass(frozen=True)
class Row:
    """What is to be continued. Its key comes from the seed and from `str(id)`."""

    line: int  # in the input, from 1
    id: int | str
    prompt: str | Messages
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Bad:
    """A row that nothing is generated for, and why."""

    line: int
    id: Any
    reason: str


def row_of(line: int, fields: Mapping[str, Any], place: int | None = None) -> Row:
    """The row that a line says. Without an `id` its `place` is the id. Raises `JaxgenError` for what is no row.

    `prompt` is a text, or `messages` a chat; `options` are options of `generate` for this row. Other fields are the
    user's own, unless they have the name of an option, which would be ignored there.

    >>> row_of(1, {"prompt": "1, 2, 3", "options": {"max_new_tokens": 5}, "source": "counting"}, place=0)
    Row(line=1, id=0, prompt='1, 2, 3', options={'max_new_tokens': 5})
    """
    if misplaced := sorted(_OWN & fields.keys()):
        raise JaxgenError(f"{misplaced[0]} stands beside the prompt; options of a row stand in its field 'options'")
    text, chat = fields.get("prompt"), fields.get("messages")
    if (text is None) == (chat is None):
        raise JaxgenError("a row has a prompt or messages" + (", and not both" if text is not None else ""))
    if text is not None and not isinstance(text, str):
        raise JaxgenError(f"prompt={shown(text)} is no text")
    if chat is not None and not isinstance(chat, list):
        raise JaxgenError(f"messages={shown(chat)} is no list of messages")
    prompt = checked_text(text if chat is None else chat)
    if not prompt:
        raise JaxgenError("the prompt is empty")
    options = fields.get("options")
    if options is not None and not isinstance(options, Mapping):
        raise JaxgenError(f"options={shown(options)} is no mapping of names to values")
    own = place if (given := fields.get("id")) is None else given
    if not isinstance(own, int | str) or isinstance(own, bool):
        raise JaxgenError(
            f"id={shown(own)} must be an int or a text" + ("" if own is not None else "; every row has one")
        )
    if isinstance(own, str):
        checked_text(own)
    return Row(line, own, prompt, _without_nulls(dict(options or {})))


def read(path: Path) -> tuple[list[Row], list[Bad]]:
    """The rows of a .jsonl, .csv or .parquet file, and what is none. Raises `JaxgenError` for a file that is none.

    Where not all ids are ints of 64 bits, all are texts. An id that comes again is bad.
    """
    kind = _KINDS.get(path.suffix)
    if kind is None:
        raise JaxgenError(f"{path!s:.200}: the name must end with {', '.join(_KINDS)}, which says what it holds")
    rows: list[Row] = []
    bad: list[Bad] = []
    try:
        for place, (line, fields) in enumerate(kind(path)):
            try:
                if isinstance(fields, str):
                    raise JaxgenError(fields)
                if fields is not None:
                    rows.append(row_of(line, fields, place))
            except JaxgenError as error:
                given = fields.get("id") if isinstance(fields, dict) else None
                bad.append(Bad(line, given if isinstance(given, int | str) else None, str(error)))
    except (OSError, UnicodeError, csv.Error) as error:
        raise JaxgenError(f"{path!s:.200}: it cannot be read: {error}") from error
    if not all(isinstance(row.id, int) and -(2**63) <= row.id < 2**63 for row in rows):
        rows = [dataclasses.replace(row, id=str(row.id)) for row in rows]
    known: dict[int | str, Row] = {}
    for row in rows:
        if (first := known.setdefault(row.id, row)) is not row:
            bad.append(Bad(row.line, row.id, f"line {first.line} has the same id"))
    return [*known.values()], bad


# What a line holds: fields, or why it has none, or None for a blank one.
Lines = Iterator[tuple[int, dict[str, Any] | str | None]]


def _jsonl(path: Path) -> Lines:
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                yield number, None
                continue
            try:
                fields = _json(line)
            except (ValueError, RecursionError) as error:
                yield number, f"it is no JSON: {error}"
            else:
                yield number, fields if isinstance(fields, dict) else "it is no JSON object"


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """Cells of any length, which else may have 131,072 characters, or the file is none."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv(path: Path) -> Lines:
    with (
        _long_cells(),
        open_regular(path) as binary,
        open(binary.fileno(), encoding="utf-8-sig", newline="", closefd=False) as file,
    ):
        reader = csv.DictReader(file, strict=True)
        for cells in reader:
            if None in cells or None in cells.values():
                yield reader.line_num, f"it has not the {len(reader.fieldnames or ())} cells of the first line"
                continue
            # An empty cell says nothing; but a row with neither a prompt nor messages has an empty prompt.
            fields: dict[str, Any] = {name: cell for name, cell in cells.items() if cell}
            try:
                fields |= {name: _json(fields[name]) for name in ("messages", "options") if name in fields}
            except (ValueError, RecursionError) as error:
                yield reader.line_num, f"messages and options are JSON: {error}"
                continue
            yield reader.line_num, fields if "messages" in fields else {"prompt": cells.get("prompt"), **fields}


def _json(data: bytes | str) -> Any:
    """What JSON says. Raises `ValueError` or `RecursionError` if it is none, or gives a name twice."""
    value, repeated = parse_json(data)
    if repeated:
        raise ValueError(f"{repeated[0]!r:.80} is given twice")
    return value


def _parquet(path: Path) -> Lines:
    arrow = pyarrow()
    number = 0
    try:
        with open_regular(path) as binary, arrow.parquet.ParquetFile(binary) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield number, _without_nulls(fields)
    except arrow.ArrowException as error:
        raise JaxgenError(f"{path!s:.200}: it cannot be read: {error!s:.500}") from error


def _without_nulls(value: Any) -> Any:
    """What a row says: null is nothing, as in a column of structs, where each has all names."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def pyarrow() -> Any:
    """pyarrow, with its module for Parquet. Raises `JaxgenError` where it is not."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise JaxgenError('Parquet needs pyarrow: pip install -e ".[batch]", which brings it') from error
    return pyarrow


_KINDS: dict[str, Callable[[Path], Lines]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
