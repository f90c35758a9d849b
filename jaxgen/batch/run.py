"""A run: rows of a file into parts of a directory, each of which appears whole; what is there is not done again.

Which rows a part holds follows from the input and the options alone. So a run that was killed goes on with the parts
that are not there, and every row is done once; and the files are the same to the last byte, however often it was.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxgen.batch.generator import Result
from jaxgen.batch.plan import Planner, Task
from jaxgen.batch.rows import Bad, Row, pyarrow
from jaxgen.errors import JaxgenError, shown
from jaxgen.files import read_bytes, read_json, write_bytes

_MOST_ERRORS = 1 << 40  # bytes of a file that we wrote
_DECIDE = {".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt"}  # suffixes of what is read of a checkpoint

Outcome = tuple[Task, Result | JaxgenError]


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of the tasks, in their order, and the file of their results."""

    path: Path
    tasks: Sequence[Task]

    @property
    def done(self) -> bool:
        """Whether it is there."""
        return self.path.exists()


class Run:
    """A directory that is filled: `parts`, and the rows that are `bad` so far, by their lines.

    `made_from` is what decides the output (a JSON object). Raises `JaxgenError` for a directory in which another
    process runs, or that holds the output of something else.
    """

    def __init__(self, directory: Path, made_from: dict[str, Any], suffix: str, part_rows: int):
        self.directory, self.parts, self.bad = directory, list[Part](), dict[int, Bad]()
        self._made_from, self._suffix, self._part_rows = made_from, suffix, part_rows

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For this process, until it ends."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JaxgenError(f"--output {self.directory}: it cannot be made: {error.strerror or error}") from error
        try:
            with _locked(self.directory / ".lock"):
                self._check()
                for aside in self.directory.glob(".*.tmp-*"):  # of a process that was killed
                    aside.unlink()
                yield
        except OSError as error:
            raise JaxgenError(f"{self.directory}: {error.strerror or error}; start again to go on") from error

    def _check(self) -> None:
        note = self.directory / "run.json"
        others = (path for path in self.directory.iterdir() if path.name != ".lock" and ".tmp-" not in path.name)
        if not note.exists() and any(others):
            raise JaxgenError(f"{self.directory} is not empty, and holds no run; choose a new --output")
        if not any(self.directory.glob("part-*")):  # a run that has done nothing yet is not to stand in the way
            self._write(note, json.dumps(self._made_from, indent=1).encode())
        before, now = read_json(note), json.loads(json.dumps(self._made_from))
        for name in sorted({*before, *now}):
            if (was := before.get(name)) != (is_now := now.get(name)):
                raise JaxgenError(
                    f"{self.directory} holds the output of another run: its {name} was {shown(was)}, and not "
                    f"{shown(is_now)}; choose a new --output"
                )

    def plan(self, planner: Planner, rows: Iterable[Row], bad: Iterable[Bad]) -> list[Part]:
        """Divide the rows that can be done into parts; the parts that are left."""
        planned: list[Task] = []
        self.bad = {entry.line: entry for entry in bad}
        for row in rows:
            try:
                planned.append(planner.plan(row))
            except JaxgenError as error:
                self.bad[row.line] = Bad(row.line, row.id, str(error))
        planned.sort(key=lambda task: (-task.slots, task.row.line))  # what takes most memory comes first
        places = range(0, len(planned), self._part_rows)
        names = (self.directory / f"part-{number:05}{self._suffix}" for number in range(len(places)))
        self.parts = [
            Part(path, planned[place : place + self._part_rows]) for path, place in zip(names, places, strict=True)
        ]
        done = {task.row.line for part in self.parts if part.done for task in part.tasks}
        before = self._known_errors()
        self.bad |= {line: entry for line, entry in before.items() if line in done}
        self._write_errors()
        return [part for part in self.parts if not part.done]

    def collect(self, parts: Sequence[Part], outcomes: Iterable[Outcome]) -> Iterator[Result | JaxgenError]:
        """Write each part when its rows have come; gives the results on."""
        of = {task.row.line: part for part in parts for task in part.tasks}
        found: dict[Path, dict[int, Result | JaxgenError]] = {part.path: {} for part in parts}
        for task, result in outcomes:
            part = of[task.row.line]
            found[part.path][task.row.line] = result
            if len(found[part.path]) == len(part.tasks):
                self._finish(part, found.pop(part.path))
            yield result

    def _finish(self, part: Part, results: dict[int, Result | JaxgenError]) -> None:
        rows: list[dict[str, Any]] = []
        failed: dict[int, Bad] = {}
        for task in part.tasks:
            result = results[task.row.line]
            if isinstance(result, JaxgenError):
                failed[task.row.line] = Bad(task.row.line, task.row.id, str(result))
            else:
                rows.append({"id": task.row.id, **{k: v for k, v in vars(result).items() if v is not None}})
        if failed:  # first: of what a part lacks, the reason is known
            self.bad |= failed
            self._write_errors()
        ints = all(isinstance(task.row.id, int) for task in part.tasks)
        self._write(part.path, parquet(rows, ints) if self._suffix == ".parquet" else jsonl(rows))

    def _known_errors(self) -> dict[int, Bad]:
        path = self.directory / "errors.jsonl"
        lines = read_bytes(path, _MOST_ERRORS).splitlines() if path.exists() else ()
        return {entry.line: entry for entry in (Bad(**json.loads(line)) for line in lines)}

    def _write_errors(self) -> None:
        path = self.directory / "errors.jsonl"
        if self.bad:
            self._write(path, jsonl([dataclasses.asdict(self.bad[line]) for line in sorted(self.bad)]))
        else:
            path.unlink(missing_ok=True)

    def _write(self, path: Path, data: bytes) -> None:
        write_bytes(path, data, "this part of the output")


def jsonl(rows: Iterable[dict[str, Any]]) -> bytes:
    """A line for each."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def parquet(rows: list[dict[str, Any]], ints: bool) -> bytes:
    """A table, whose columns are those of the rows; of no rows all columns there may be. `ints`: what the ids are."""
    arrow = pyarrow()
    types = {
        "id": arrow.int64() if ints else arrow.string(),
        "completion": arrow.string(),
        "token_ids": arrow.list_(arrow.int32()),
        "finish_reason": arrow.string(),
        "logprobs": arrow.list_(arrow.float32()),
    }
    names = [name for name in types if not rows or name in rows[0]]
    table = arrow.table({name: arrow.array([row[name] for row in rows], types[name]) for name in names})
    sink = arrow.BufferOutputStream()
    arrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file for this process, also against its death. Raises `JaxgenError` if another one holds it."""
    with path.open("w") as lock:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise JaxgenError(f"{path.parent} is in use: another process is writing it") from error
        yield


def digest(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_model(place: Path) -> str:
    """What tells a checkpoint from others: its files' names, the bytes of those that decide, and the others' sizes."""
    files = sorted(path for path in place.iterdir() if path.is_file()) if place.is_dir() else [place]
    told = [(path.name, _contents(path) if path.suffix in _DECIDE else path.stat().st_size) for path in files]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _contents(path: Path) -> str:
    # Weights of gigabytes need not be read in the hub's cache, whose links lead to files named after their sha256.
    target = path.resolve().name
    return target if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", target) else digest(path)
