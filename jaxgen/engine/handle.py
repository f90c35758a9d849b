"""What a caller holds of a request that an engine carries out: its tokens as they come, and the result."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxgen.errors import JaxgenError
from jaxgen.text.detokenize import Detokenizer, Words
from jaxgen.text.tokenizer import continuation

CANCELLED = "cancelled"  # a `finish_reason`, beside those of `generate`


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Some new tokens of a row: N of them, and what else was asked for."""

    ids: Int[np.ndarray, " N"]
    logprobs: Float[np.ndarray, " N"]  # under the distribution that each was drawn from
    model_logprobs: Float[np.ndarray, " N"]  # under the model's own
    top_ids: Int[np.ndarray, "N n"] | None = None
    top_logprobs: Float[np.ndarray, "N n"] | None = None

    @classmethod
    def joined(cls, parts: "Sequence[Tokens]") -> "Tokens":
        """All of them, one after the other."""
        if not parts:
            return cls(np.zeros(0, np.int32), *np.zeros((2, 0), np.float32))
        columns = zip(*(part.columns for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))

    @property
    def columns(self) -> tuple[np.ndarray, ...]:
        """What there is, in the order of the fields."""
        return tuple(column for column in vars(self).values() if column is not None)

    def __getitem__(self, which: slice) -> "Tokens":
        return Tokens(*(column[which] for column in self.columns))


@dataclasses.dataclass(frozen=True)
class Completion:
    """What became of a request. Times are seconds since it was submitted."""

    prompt_ids: Int[np.ndarray, " T"]
    tokens: Tokens
    text: str | None  # what they say; None without a tokenizer
    finish_reason: str  # as in `GenerateOutput`; or "cancelled"
    seed: int | None
    first_token_s: float | None
    total_s: float

    @property
    def token_ids(self) -> list[int]:
        """The new tokens."""
        return self.tokens.ids.tolist()


class Handle:
    """A request on its way. Iterating gives its text piece by piece; `result` waits for the end.

    Any thread may use it. Read the pieces once.
    """

    def __init__(
        self,
        prompt_ids: Int[np.ndarray, " T"],
        seed: int | None,
        tokenizer: Any,
        stops: Sequence[str],
        include_stop_str_in_output: bool,
        skip_special_tokens: bool,
    ):
        self.prompt_ids, self.seed, self.submitted = prompt_ids, seed, time.monotonic()
        self.first_token: float | None = None  # by time.monotonic, as `submitted` and `finished`
        self.finished: float | None = None
        self.finish_reason: str | None = None
        self.cancelled = False
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._stops = () if include_stop_str_in_output else tuple(stops)
        self._parts: list[Tokens] = []
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []

    def cancel(self) -> None:
        """Stop generating: the row is free for others within two looks. What there is stays."""
        self.cancelled = True

    @property
    def done(self) -> bool:
        """Whether nothing comes any more."""
        return self.finished is not None

    def listen(self, call: Callable[[], None]) -> None:
        """Call something whenever there is more to read, in the engine's thread: it must not wait."""
        with self._changed:
            self._listeners.append(call)
        call()

    def read(self, start: int) -> tuple[list[Tokens], bool]:
        """The parts that have come from number `start` on, without waiting, and whether it is the end.

        Raises what ended the request.
        """
        with self._changed:
            if self._error is not None and start >= len(self._parts):
                raise self._error
            return self._parts[start:], self.done

    def parts(self, timeout: float | None = None) -> Iterator[Tokens]:
        """The tokens as they come; `timeout` seconds for each part. Raises `TimeoutError`, and what ended it."""
        start = 0
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self.done or len(self._parts) > start, timeout):  # noqa: B023
                    raise TimeoutError(f"no token within {timeout} s; the request goes on: cancel() ends it")
            parts, done = self.read(start)
            start += len(parts)
            yield from parts
            if done and not parts:
                return

    def __iter__(self) -> Iterator[str]:
        """Pieces of text: whole words, never half a character; joined they are the result's text."""
        pieces = self.pieces()
        for tokens in self.parts():
            if piece := pieces.push(tokens):
                yield piece
        if piece := pieces.finish():
            yield piece

    def pieces(self) -> "Pieces":
        """What turns parts into text as they come. Raises `JaxgenError` without a tokenizer."""
        if self._tokenizer is None:
            raise JaxgenError("this engine has no tokenizer, and so no text: read .parts(), or pass Engine(tokenizer=)")
        return Pieces(Detokenizer(self._tokenizer, self.prompt_ids.tolist(), self._skip), Words(self._stops))

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing comes any more; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self.done, timeout)

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end. Raises `TimeoutError` after `timeout` seconds, and what ended the request."""
        if not self.wait(timeout):
            raise TimeoutError(f"not done within {timeout} s; the request goes on: cancel() ends it")
        if self._error is not None:
            raise self._error
        tokens, text = Tokens.joined(self._parts), None
        if self._tokenizer is not None:
            text = continuation(
                self._tokenizer, self.prompt_ids.tolist(), tokens.ids.tolist(), skip_special_tokens=self._skip
            )
            text = text[: min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=len(text))]
        assert self.finished is not None and self.finish_reason is not None
        first = None if self.first_token is None else self.first_token - self.submitted
        total = self.finished - self.submitted
        return Completion(self.prompt_ids, tokens, text, self.finish_reason, self.seed, first, total)

    def give(self, tokens: Tokens) -> None:
        """For the engine: there is more."""
        with self._changed:
            self.first_token = self.first_token or time.monotonic()
            self._parts.append(tokens)
            self._tell()

    def end(self, reason: str, error: Exception | None = None) -> None:
        """For the engine: nothing comes any more."""
        with self._changed:
            if not self.done:
                self.finish_reason, self._error, self.finished = reason, error, time.monotonic()
                self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        for call in self._listeners:
            call()


class Pieces:
    """The text of a row's parts as they come."""

    def __init__(self, detokenizer: Detokenizer, words: Words):
        self._detokenizer, self._words = detokenizer, words

    def push(self, tokens: Tokens) -> str:
        """The text that is certain with these tokens."""
        return self._words.push(self._detokenizer.push(tokens.ids.tolist()))

    def finish(self) -> str:
        """The rest."""
        return self._words.finish(self._detokenizer.finish())
