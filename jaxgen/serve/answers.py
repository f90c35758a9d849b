"""What OpenAI's two interfaces have in common: the frame of an answer, its usage, and how it is sent."""

import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxgen.engine.handle import Completion, Handle, Tokens
from jaxgen.serve.checks import text
from jaxgen.serve.fields import Fields
from jaxgen.serve.follow import finished, follow, held
from jaxgen.serve.records import Call
from jaxgen.serve.refusal import Refusal, as_json
from jaxgen.serve.service import Service
from jaxgen.serve.sse import Events

_GRACE = 60.0  # seconds in which an answer that is complete must have been read

FINISH = {"eos": "stop", "stop_string": "stop", "complete": "stop", "criterion": "stop"}


@runtime_checkable
class Form(Protocol):
    """How one of the interfaces writes what handles give."""

    @property
    def kind(self) -> str:
        """The `object` of an answer."""
        ...

    def whole(self, place: int, done: Completion) -> dict[str, Any]:
        """A choice of an answer that is sent at once."""
        ...

    def begin(self, place: int) -> dict[str, Any] | None:
        """The first piece of a streamed choice, before there is a token."""
        ...

    def piece(self, place: int, said: str, tokens: Tokens) -> dict[str, Any]:
        """A further piece."""
        ...

    def says(self, choice: dict[str, Any]) -> bool:
        """Whether a piece has any text."""
        ...

    def end(self, place: int, reason: str) -> dict[str, Any]:
        """The last piece, without text."""
        ...


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request under way."""

    service: Service
    calls: Sequence[Call]
    form: Form
    prompt_tokens: int
    seed: int
    stream: tuple[bool, bool, bool]  # whether to stream, with usage at the end, and in every event
    chunks: str  # the `object` of an event

    @property
    def handles(self) -> list[Handle]:
        """Those of all calls, in the order of the choices."""
        return [handle for call in self.calls for handle in call.handles]

    async def answer(self) -> Any:
        """The answer: at once, or as events."""
        if self.stream[0]:
            seconds = self.service.limits.seconds + _GRACE
            return Events(self._events(), self.handles, self.service.failed, seconds, last="[DONE]")
        handles = self.handles
        with held(handles):
            await finished(handles)
            done = [self._completion(handle) for handle in handles]
        choices = [self.form.whole(place, each) for place, each in enumerate(done)]
        body = self.body(choices, sum(len(each.tokens.ids) for each in done))
        self.service.records.keep(body["id"], self.calls, done)
        return as_json(body)

    def body(self, choices: list[dict[str, Any]], new: int) -> dict[str, Any]:
        """An answer that is sent at once, of so many new tokens."""
        frame = {**self._frame(), "object": self.form.kind, "choices": choices}
        return {**frame, "usage": self._usage(new), "seed": self.seed}

    def _completion(self, handle: Handle) -> Completion:
        done = handle.result(0)
        self.service.metrics.observe(handle, len(done.tokens.ids))
        if done.finish_reason == "cancelled":
            raise Refusal("the server is closing", status=503, code="closing")
        if done.finish_reason == "time" and not done.token_ids:
            seconds = self.service.limits.seconds
            raise Refusal(f"no token within {seconds:g} s: too much is being asked", status=503, code="timeout")
        return done

    async def _events(self) -> AsyncGenerator[Any, None]:
        frame = {**self._frame(), "object": self.chunks}
        with_usage, every = self.stream[1:]
        handles = self.handles
        counts, pieces = [0] * len(handles), [handle.pieces() for handle in handles]
        ended: dict[int, Completion] = {}

        def event(choice: dict[str, Any]) -> dict[str, Any]:
            usage = {"usage": self._usage(sum(counts)) if every else None} if with_usage or every else {}
            return {**frame, "choices": [choice], **usage}

        for place in range(len(handles)):
            if (first := self.form.begin(place)) is not None:
                yield {**event(first), "seed": self.seed}
        async for place, tokens in follow(handles):
            if tokens is None:
                done = ended[place] = self._completion(handles[place])
                if len(ended) == len(handles):  # before its last event: who has that may ask for the record
                    self.service.records.keep(frame["id"], self.calls, [ended[each] for each in range(len(handles))])
                if rest := pieces[place].finish():
                    yield event(self.form.piece(place, rest, Tokens.joined([])))
                yield event(self.form.end(place, FINISH.get(done.finish_reason, "length")))
                continue
            counts[place] += len(tokens.ids)
            choice = self.form.piece(place, pieces[place].push(tokens), tokens)
            if every or choice["logprobs"] or self.form.says(choice):
                yield event(choice)
        if with_usage:
            yield {**frame, "choices": [], "usage": self._usage(sum(counts))}

    def _frame(self) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.form.kind.startswith('chat') else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.service.name,
            "system_fingerprint": self.service.fingerprint,
        }

    def _usage(self, new: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
        }


def model_of(fields: Fields, service: Service) -> None:
    """Check the model's name, which may be missing: there is one. Raises `Refusal`."""
    if (name := fields.take("model", text, "The model's name; there is one.")) is not None:
        check_name(name, service)


def check_name(name: str, service: Service) -> None:
    """Raise `Refusal` for a model that is not here."""
    if name != service.name:
        raise Refusal(
            f"the model {name[:100]!r} is not here; {service.name!r} is",
            param="model",
            status=404,
            code="model_not_found",
        )
