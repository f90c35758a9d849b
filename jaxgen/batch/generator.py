"""Completions of many rows, by one engine after the other: each is of the shape of a bucket of lengths."""

import dataclasses
import functools
import itertools
import math
import os
import queue
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Unpack

import numpy as np

from jaxgen.batch.plan import CONSTRAINTS, Planner, Task
from jaxgen.batch.rows import row_of
from jaxgen.engine.engine import Engine
from jaxgen.engine.handle import Handle
from jaxgen.errors import EngineClosedError, JaxgenError
from jaxgen.generation.options.checks import integer
from jaxgen.generation.options.typed import BatchArguments
from jaxgen.text.tokenizer import tokenizer_for

_AHEAD = 3  # times the rows of an engine are submitted, so that none of its rows waits for us


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a row. `logprobs` are under the distribution that each token was drawn from."""

    completion: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float] | None = None


class Generator:
    """Generates for batches of rows: a class for `ray.data.Dataset.map_batches`, and what `jaxgen batch` runs.

    `model` is a model, or a directory or hub id that is loaded with `dtype`, `load_in_4bit` and `revision`.
    `batch_size` rows run at a time; `seed` and the `id` of a row decide its draws; `options` are those of `generate`
    for all rows. Called with columns `id`, `prompt` or `messages`, and perhaps `options`, it returns them with
    `completion`, `token_ids`, `finish_reason`, if asked for `logprobs`, and `error`, which says why there are none.

    A row gets the same to the last bit wherever it stands, since its bucket of lengths depends on nothing but the row:
    what `model.generate` gives for it alone with `row_ids=[str(id)]`, the seed and
    `strict=jaxgen.Strict(rows=batch_size, tokens=bucket)`. Raises `JaxgenError` for bad options.

    >>> model, tokenizer = getfixture("demo")
    >>> generator = Generator(model, tokenizer, batch_size=2, max_new_tokens=4)
    >>> generator({"id": ["a", "b"], "prompt": ["1, 2, 3", ""]})["completion"].tolist()
    [', 4,', None]
    >>> generator.close()
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 32,
        logprobs: bool = False,
        dtype: str = "auto",
        load_in_4bit: bool = False,
        revision: str | None = None,
        **options: Unpack[BatchArguments],
    ):
        if isinstance(model, str | os.PathLike):
            from jaxgen.convert.load import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(
                model, dtype=dtype, load_in_4bit=load_in_4bit, revision=revision
            )
        self._model, self._tokenizer = model, tokenizer_for(model, tokenizer)
        self._options: dict[str, Any] = {"seed": seed, **options}
        self._rows, self._logprobs = integer(1)("batch_size", batch_size), logprobs
        self._engine: Engine | None = None
        self.planner = Planner(self._tokenizer, model.config, model.stored_generation_config, self._options)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of a batch, and what became of its rows."""
        count = len(next(iter(batch.values())))
        found: list[Result | JaxgenError] = [JaxgenError("")] * count
        tasks = []
        for place in range(count):
            try:
                fields = {k: _plain(column[place]) for k, column in batch.items()}
                if "options" in fields:
                    fields["options"] = _as_given(fields["options"])
                tasks.append(self.planner.plan(row_of(place, fields)))
            except JaxgenError as error:
                found[place] = error
        for task, result in self.run(sorted(tasks, key=lambda task: task.slots)):
            found[task.row.line] = result
        names = [field.name for field in dataclasses.fields(Result) if self._logprobs or field.name != "logprobs"]
        columns = {name: [getattr(result, name, None) for result in found] for name in names}
        columns["error"] = [str(result) if isinstance(result, JaxgenError) else None for result in found]
        return {**batch, **{name: _column(values) for name, values in columns.items()}}

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Result | JaxgenError]]:
        """Each task with its result, as they end. Those of one bucket stand together, or each change costs time.

        Raises what ends an engine.
        """
        for slots, together in itertools.groupby(tasks, key=lambda task: task.slots):
            yield from self._through(self._engine_of(slots), together)

    def close(self) -> None:
        """Give back the engine's memory."""
        if self._engine is not None:
            self._engine.close(0)
            self._engine = None

    def _engine_of(self, slots: int) -> Engine:
        if self._engine is None or self._engine.strict.tokens != slots:
            self.close()  # before the next one reserves as much
            self._engine = Engine(
                self._model,
                self._tokenizer,
                rows=self._rows,
                slots=slots,
                constraints=CONSTRAINTS,
                queue=_AHEAD * self._rows,
            )
        return self._engine

    def _through(self, engine: Engine, tasks: Iterator[Task]) -> Iterator[tuple[Task, Result | JaxgenError]]:
        ended: queue.SimpleQueue[Handle] = queue.SimpleQueue()
        running: dict[Handle, Task] = {}

        def look(handle: Handle) -> None:
            if handle.done:
                ended.put(handle)

        while True:
            taken = [*itertools.islice(tasks, _AHEAD * self._rows - len(running))]
            for task in taken:
                options = {**self._options, **task.options, "row_id": str(task.row.id)}
                try:
                    handle = engine.submit(task.ids, **options)
                except EngineClosedError:
                    raise
                except JaxgenError as error:  # which no plan sees: of a row, and not of the run
                    yield task, error
                else:
                    running[handle] = task
                    handle.listen(functools.partial(look, handle))
            if not taken and not running:
                return
            if running and (task := running.pop(handle := ended.get(), None)) is not None:
                yield task, self._told(handle)  # else it ended while we began to listen

    def _told(self, handle: Handle) -> Result | JaxgenError:
        try:
            done = handle.result()
        except EngineClosedError:
            raise
        except JaxgenError as error:
            return error
        told = done.tokens.logprobs.tolist() if self._logprobs else None
        return Result(done.text or "", done.token_ids, done.finish_reason, told)


def _plain(value: Any) -> Any:
    """Python's own values for numpy's, which is what columns are made of; and of structs what is not null."""
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _as_given(value: Any) -> Any:
    """Options whose ints became floats, as those of a column do where some rows have none: NaN is none, 5.0 is 5.

    Options that are no ints take 1 for 1.0.
    """
    if isinstance(value, dict):
        there = {name: item for name, item in value.items() if not (isinstance(item, float) and math.isnan(item))}
        return {name: _as_given(item) for name, item in there.items()}
    if isinstance(value, list):
        return [_as_given(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _column(values: list[Any]) -> np.ndarray:
    column = np.empty(len(values), object)
    for place, value in enumerate(values):  # at once, lists of one length would become a table
        column[place] = value
    return column
