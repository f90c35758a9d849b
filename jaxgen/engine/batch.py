"""The rows of an engine and what happens to them in a round: some prompt is read, then all rows decode a few steps."""

import collections
import dataclasses
import time
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt32

from jaxgen.engine.handle import CANCELLED, Handle, Tokens
from jaxgen.engine.options import Asked, RowOptions
from jaxgen.engine.prefixes import Held, Prefixes
from jaxgen.engine.programs import Entry, News, Piece, Weights, programs_for
from jaxgen.engine.stops import StopWatch
from jaxgen.errors import NonFiniteLogitsError
from jaxgen.generation.choosing.stop import BROKEN, EOS, FINISH_REASON, RUNNING, STOP_STRING, TIME
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.processors.processor import as_count
from jaxgen.generation.programs.inputs import BatchLayout
from jaxgen.generation.programs.structure import same_arrays
from jaxgen.generation.prompts.layout import pad_to


@dataclasses.dataclass(eq=False)
class Request:
    """A request, checked, and how much of it has been given out."""

    handle: Handle
    prompt: Int[np.ndarray, " T"]
    config: GenerationConfig
    asked: Asked
    key: UInt32[np.ndarray, " 2"]  # its words
    row_id: UInt32[np.ndarray, " 2"]
    sample: int
    max_length: int
    watch: StopWatch | None
    weights: Weights  # that it runs with
    until: float  # by time.monotonic: when it ends, wherever it is
    shown: int = 0  # new tokens that were given out

    def over(self, now: float) -> bool:
        """Whether nobody waits for more of it."""
        return self.handle.cancelled or now >= self.until

    def why_over(self) -> str:
        """The reason to end it."""
        return CANCELLED if self.handle.cancelled else FINISH_REASON[TIME]


class Batch:
    """Rows with requests, in one decode state."""

    def __init__(self, model: Any, rows: int, layout: BatchLayout, steps: int, options: RowOptions):
        self.counts = collections.Counter[str]()  # of tokens and steps, for `Engine.stats`
        room = options.room
        self._programs = programs_for(model, rows, layout, steps, None if room is None else room.free)
        self._weights: Weights | None = Weights.of(model)  # of the rows that are busy: nobody keeps them longer
        self._state: Any = None  # until there is a request
        self._chunk, self._steps, self._total, self._options = layout.chunk, steps, layout.total, options
        self._rows: list[Request | None] = [None] * rows
        self._reading: list[int] = []  # rows whose prompts are being read; who came first is first
        self._last_used = [0] * rows
        counts = layout.slots if isinstance(layout.slots, tuple) else (layout.slots,)
        # A ring has the slots of its window, and as many more as are read at a time.
        self._prefixes = Prefixes(rows, self._chunk, self._chunk if min(counts) < self._total else None)
        self._read_with = self._weights.references()

    @property
    def free(self) -> int:
        """How many rows have no request."""
        return self._rows.count(None)

    @property
    def busy(self) -> bool:
        """Whether any has one."""
        return self.free < len(self._rows)

    @property
    def _running(self) -> list[int]:
        return [row for row, request in enumerate(self._rows) if request is not None and row not in self._reading]

    def now(self) -> dict[str, int]:
        """How many rows there are, and how many have a request."""
        return {"rows": len(self._rows), "busy": len(self._rows) - self.free}

    def warmup(self) -> None:
        """Compile all programs: none is compiled later, whatever comes."""
        row, none = as_count(0), as_count(0)
        piece = Piece(0, 0, 0, np.zeros(self._chunk, np.int32)).packed()
        room = self._options.room
        tokens, words = np.zeros(self._total, np.int32), np.zeros(2, np.uint32)
        entry = Entry(0, 1, 2, 0, 0, 0 if room is None else room.free, words, words, tokens).packed()
        if room is not None:
            room.warmup()
        programs, numbers, weights = self._programs, self._options.traced(), self._weights
        idle = np.zeros(len(self._rows), np.int32)
        state = programs.insert(programs.opened(weights), entry)
        state = programs.copy(programs.read(weights, state, piece), row, row, none)
        state = programs.decode(weights, programs.evict(state, idle == 0), idle, numbers)
        jax.block_until_ready(programs.look(state, idle))
        self._weights = None

    def takes(self, waiting: collections.deque[Request]) -> list[Request]:
        """Take those off the queue that get a row now: all rows have the same weights, and nobody overtakes."""
        taken: list[Request] = []
        weights = self._weights if self.busy or not waiting else waiting[0].weights
        while waiting and len(taken) < self.free and waiting[0].weights.same(weights):
            taken.append(waiting.popleft())
        return taken

    def admit(self, request: Request) -> None:
        """Give a request a free row: one that holds the beginning of its prompt, or else who was free the longest."""
        self._weights = request.weights
        if not same_arrays(self._read_with, request.weights.arrays):
            self._read_with = request.weights.references()
            self._prefixes.forget()
        free = [row for row, taken in enumerate(self._rows) if taken is None]
        held = self._prefixes.rows
        row = min(free, key=lambda row: (-self._prefixes.usable(request.prompt, held[row]), self._last_used[row]))
        count = self._prefixes.usable(request.prompt, held[row])
        held[row] = Held(request.prompt, count, count + 1)
        self._rows[row] = request
        self.counts["prefix_tokens"] += count
        self._insert(row, request, count)

    def _insert(self, row: int, request: Request, count: int) -> None:
        begin = self._options.set(row, request.config, request.asked)
        entry = Entry(
            row=row,
            length=len(request.prompt),
            max_length=request.max_length,
            held=count,
            sample=request.sample,
            constrained=begin or 0,
            key=request.key,
            row_id=request.row_id,
            tokens=pad_to(request.prompt, (self._total,)),
        )
        self._state = self._programs.opened(self._weights) if self._state is None else self._state
        self._state = self._programs.insert(self._state, entry.packed())
        if count < len(request.prompt) - 1:
            self._reading.append(row)

    def round(self) -> None:
        """Read some pieces of prompts, then decode a few steps; hand out what there is, and free rows that ended."""
        self._evict()
        # A piece of each prompt, so that a long one stops nobody; or as many tokens as the decode steps, if more.
        pieces = max(len(self._reading), len(self._rows) * self._steps // self._chunk)
        while self._reading and pieces > 0:
            pieces -= max(1, self._read(pieces))
        if self._running:
            self._decode(self._running)
        if not self.busy:
            self._weights = None

    def fail(self, error: Exception | None) -> None:
        """End every request, with an error or as cancelled, and forget the state, which may be lost."""
        for row, request in enumerate(self._rows):
            if request is not None:
                request.handle.end(CANCELLED if error is None else "error", error)
                self._rows[row] = None
        self._reading.clear()
        self._state = self._weights = None
        self._options.forget()
        self._prefixes.forget()

    def _evict(self) -> None:
        """End rows that nobody waits for any more."""
        now = time.monotonic()
        gone = np.array([request is not None and request.over(now) for request in self._rows])
        if gone.any():
            self._state = self._programs.evict(self._state, gone)
            for row, request in enumerate([*self._rows]):
                if request is not None and gone[row]:
                    self._free(row, request.why_over())

    def _free(self, row: int, reason: str, error: Exception | None = None) -> None:
        request = self._rows[row]
        assert request is not None
        request.handle.end(reason, error)
        self.counts[f"ended_{reason}"] += 1
        self._rows[row] = None
        self.counts["uses"] += 1
        self._last_used[row] = self.counts["uses"]
        if row in self._reading:
            self._reading.remove(row)

    def _read(self, pieces: int) -> int:
        """Read at most so many pieces, one of each row, and return how many; what another row holds already is copied.

        A row that shares more with one before it than that one has read yet waits, and copies it all at once.
        """
        before: list[int] = []
        read = 0
        for row in [*self._reading]:
            if not any(self._waits(row, other) for other in before):
                self._copy(row)
                if row in self._reading and read < pieces:
                    read += 1
                    self._read_piece(row)
            before.append(row)
        return read

    def _waits(self, row: int, other: int) -> bool:
        """Whether a row will have more of another one, which is read first, than there is now."""
        one, two = self._prefixes.rows[row], self._prefixes.rows[other]
        shared = self._prefixes.shared(one.prompt, two.prompt, len(two.prompt) - 1)
        return shared > max(one.count, two.count)

    def _copy(self, row: int) -> None:
        held = self._prefixes.rows[row]
        count, source = self._prefixes.longest(held.prompt, but=row)
        if count > held.count:
            self.counts["prefix_tokens"] += count - held.count
            self._state = self._programs.copy(self._state, as_count(source), as_count(row), as_count(count))
            self._hold(row, count)

    def _read_piece(self, row: int) -> None:
        held = self._prefixes.rows[row]
        count = min(self._chunk, len(held.prompt) - 1 - held.count)
        piece = pad_to(held.prompt[held.count : held.count + count], (self._chunk,))
        self.counts["read_tokens"] += count
        self._state = self._programs.read(self._weights, self._state, Piece(row, held.count, count, piece).packed())
        self._hold(row, held.count + count)

    def _hold(self, row: int, count: int) -> None:
        held = self._prefixes.rows[row]
        held.count, held.length = count, count + 1
        if count >= len(held.prompt) - 1:
            self._reading.remove(row)

    def _decode(self, runs: list[int]) -> None:
        """Decode a few steps, and give each row's request what it has got."""
        since = np.array([0 if request is None else request.shown for request in self._rows], np.int32)
        until = since + self._steps
        self._state = self._programs.decode(self._weights, self._state, until, self._options.traced())
        news: News = jax.device_get(self._programs.look(self._state, since))
        steps, stopped = 0, np.zeros(len(self._rows), bool)
        for row in runs:
            request = self._rows[row]
            assert request is not None
            count = int(news.lengths[row]) - request.shown
            steps = max(steps, count)
            stopped[row] = self._give(row, request, news, count)
            self._prefixes.rows[row].length = len(request.prompt) + int(news.lengths[row])
        if stopped.any():
            self._state = self._programs.evict(self._state, stopped)
        self.counts["steps"] += steps
        self.counts["row_steps"] += steps * len(self._rows)

    def _give(self, row: int, request: Request, news: News, count: int) -> bool:
        """Hand out new tokens; whether a stop string ended the row, of which the device knows nothing."""
        status = int(news.status[row])
        ids, after, own = (np.asarray(x[row, :count]) for x in (news.tokens, news.logprobs, news.model_logprobs))
        tokens = Tokens(ids, after, own)
        if best := request.config.top_logprobs or 0:
            assert news.top_ids is not None and news.top_logprobs is not None
            top_ids, top = (np.asarray(x[row, :count, :best]) for x in (news.top_ids, news.top_logprobs))
            tokens = Tokens(ids, after, own, top_ids, top)
        stop = None if request.watch is None else request.watch.first(ids)
        stopped = stop is not None and (stop + 1 < count or status != EOS)
        if stop is not None and stopped:
            status, tokens = STOP_STRING, tokens[: stop + 1]
        request.shown += len(tokens.ids)
        self.counts["tokens"] += len(tokens.ids)
        if len(tokens.ids):
            request.handle.give(tokens)
        if status == BROKEN:
            self._free(row, "error", NonFiniteLogitsError([0], [request.shown]))
        elif status != RUNNING:
            self._free(row, FINISH_REASON[status])
        return stopped
