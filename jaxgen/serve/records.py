"""Records of what was answered, for `jaxgen replay`: the last answers are kept, and written down when somebody asks."""

import collections
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgen.engine.engine import Engine
from jaxgen.engine.handle import CANCELLED, Completion, Handle
from jaxgen.engine.stops import StopWatch
from jaxgen.errors import JaxgenError
from jaxgen.generation.choosing.sample import FreshSeed
from jaxgen.generation.choosing.stop_strings import StopStrings
from jaxgen.generation.options.config import resolve
from jaxgen.generation.options.table import Extras
from jaxgen.generation.prepare import Request, prepare
from jaxgen.generation.programs.structure import references, split
from jaxgen.generation.prompts.layout import pad_to
from jaxgen.generation.results.output import GenerateOutput, Origin
from jaxgen.records.record import Record, Recording
from jaxgen.serve.refusal import Refusal

# Options of a request that decide no token: they say how the text is shown, and what is told besides.
_SHOWN = ("include_stop_str_in_output", "skip_special_tokens", "top_logprobs")


@dataclasses.dataclass(frozen=True)
class Call:
    """A prompt of a request with its samples: what one call of `generate` gives, with these options."""

    ids: list[int]
    row: int  # which of the request's prompts it is
    options: dict[str, Any]
    handles: list[Handle]


@dataclasses.dataclass(frozen=True)
class _Answered:
    """A call and what came of it, without what no record needs."""

    call: Call
    done: list[Completion]
    started: float  # seconds since 1970

    @property
    def size(self) -> int:
        """What keeping it costs: tokens, and characters of options, which may be long."""
        return len(self.call.ids) + len(repr(self.call.options)) + sum(len(done.tokens.ids) for done in self.done)


class Records:
    """The last answers of an engine by their ids, of at most `most` tokens and characters of options together."""

    def __init__(self, engine: Engine, most: int):
        self._engine, self._most, self._size = engine, most, 0
        self._kept: collections.OrderedDict[str, list[_Answered]] = collections.OrderedDict()
        self._weights = references(split(engine.model)[1])

    def keep(self, name: str, calls: Sequence[Call], done: Sequence[Completion]) -> None:
        """Remember an answer, and forget the oldest where there are too many. What was stopped has no record."""
        if any(each.finish_reason == CANCELLED for each in done):
            return
        left, now, answer = iter(done), time.time(), []
        for call in calls:
            own = [_slim(next(left)) for _ in call.handles]
            started = now - max(each.total_s for each in own)
            answer.append(_Answered(dataclasses.replace(call, handles=[]), own, started))
        self._kept[name] = answer
        self._size += sum(each.size for each in answer)
        while self._size > self._most:
            _, oldest = self._kept.popitem(last=False)
            self._size -= sum(each.size for each in oldest)

    def outputs(self, name: str) -> list[GenerateOutput]:
        """What `generate` would have returned, for each prompt of an answer. Raises `Refusal` for an unknown one."""
        if (answer := self._kept.get(name)) is None:
            raise Refusal(
                f"no record of {name[:80]!r}: no such answer, or it was stopped, or newer ones took its place",
                param="id",
                status=404,
                code="record_not_found",
            )
        try:
            return [self._output(each) for each in answer]
        except JaxgenError as error:
            raise Refusal(f"this answer cannot be written as calls of generate: {error}", param="id") from error

    def record(self, outputs: Sequence[GenerateOutput]) -> Record:
        """The record of an answer. The first one reads the checkpoint's files, whose sha256 are in it."""
        recording = Recording(self._engine.tokenizer)
        for output in outputs:
            recording.add(output)
        return recording.record()

    def _output(self, answered: _Answered) -> GenerateOutput:
        request, done = self._request(answered.call, len(answered.done)), answered.done
        self._check_stops(answered, request.config.stop_strings)
        lengths = np.array([len(each.tokens.ids) for each in done], np.int32)

        def table(rows: list[np.ndarray], fill: int = 0) -> np.ndarray:
            return np.stack([pad_to(row, (int(lengths.max()),), fill=fill) for row in rows])

        new = table([each.tokens.ids for each in done], request.config.filler_id)
        prompts = np.repeat(request.input_ids, len(done) // len(request.input_ids), axis=0)
        return GenerateOutput(
            sequences=np.concatenate([prompts, new], axis=1),
            logprobs=table([each.tokens.logprobs for each in done]),
            model_logprobs=table([each.tokens.model_logprobs for each in done]),
            lengths=lengths,
            finish_reason=[each.finish_reason for each in done],
            generation_config=request.config,
            seed=request.seed,
            origin=Origin(self._engine.model, request, answered.started, self._weights),
            seconds=max(each.total_s for each in done),
        )

    def _check_stops(self, answered: _Answered, strings: Sequence[str] | None) -> None:
        """Raise `JaxgenError` where `generate` ends earlier: by a stop string that begins in the prompt."""
        if strings is None:
            return
        stops = StopStrings.of(self._engine.tokenizer, strings, self._engine.model.config.vocab_size)
        ids = answered.call.ids
        for done in answered.done:
            first, there = (StopWatch(stops, prompt).first(done.tokens.ids) for prompt in (ids[:0], ids))
            if first != there:
                raise JaxgenError("a stop string begins in its prompt; generate ends there, and a server does not")

    def _request(self, call: Call, samples: int) -> Request:
        """The call as `generate` prepares it. Greedy samples are rows of the same prompt: there is nothing to draw."""
        options = {name: value for name, value in call.options.items() if name not in _SHOWN}
        seed = FreshSeed(options.pop("seed"))  # where nothing is drawn, it goes without saying
        rows = 1 if options["do_sample"] else samples
        options |= {"num_return_sequences": samples // rows, "return_dict_in_generate": True}
        model, tokenizer = self._engine.model, self._engine.tokenizer
        extras, fields = Extras.take({"tokenizer": tokenizer, "strict": self._engine.strict, **options})
        config = resolve(fields, None, model.stored_generation_config)
        ids = np.array([call.ids] * rows, np.int32)
        return prepare(model, ids, None, config, None, seed, [call.row] * rows, extras, runs=False)


def _slim(done: Completion) -> Completion:
    tokens = dataclasses.replace(done.tokens, top_ids=None, top_logprobs=None)
    return dataclasses.replace(done, tokens=tokens, text=None)
