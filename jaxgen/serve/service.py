"""What all routes share: the engine, the names and limits of a server, and the way from a prompt to its handles."""

import asyncio
import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jaxgen
from jaxgen.engine.engine import Engine
from jaxgen.engine.handle import Tokens
from jaxgen.errors import JaxgenError
from jaxgen.generation.choosing.seed import next_seed
from jaxgen.generation.prompts.contexts import context_of
from jaxgen.records.provenance import environment, facts_of, tokenizer_of
from jaxgen.serve.metrics import Metrics
from jaxgen.serve.records import Call, Records
from jaxgen.serve.refusal import Refusal, refusal_of
from jaxgen.serve.sampling import with_field
from jaxgen.serve.scoring import PromptScores
from jaxgen.serve.shapes import Shapes
from jaxgen.serve.token_texts import TokenTexts
from jaxgen.text.inputs import checked_text, encode

logger = logging.getLogger("jaxgen")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    body: int = 4_000_000  # bytes
    samples: int = 16  # `n`
    sequences: int = 256  # prompts times `n`
    seconds: float = 600.0  # of generating, after which a text ends
    connections: int = 512  # requests at a time
    body_seconds: float = 30.0  # in which a body must have come
    records: int = 1_000_000  # tokens of the last answers, which are kept so that they can be recorded


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is to be continued."""

    ids: list[int]
    text: str  # what `echo` repeats


class Service:
    """An engine with a tokenizer, as a server has it. `name` is what clients call the model."""

    def __init__(self, engine: Engine, name: str, limits: Limits | None = None):
        if engine.tokenizer is None:
            raise JaxgenError("a server needs a tokenizer: pass Engine(tokenizer=)")
        self.engine, self.name, self.limits = engine, name, limits or Limits()
        self.model, self.tokenizer = engine.model, engine.tokenizer
        self.texts, self.scores = TokenTexts(engine.tokenizer), PromptScores(engine.model, engine.top_logprobs)
        self.metrics, self.created = Metrics(), int(time.time())
        self.records = Records(engine, self.limits.records)
        self.facts: dict[str, Any] = {}
        self.fingerprint = ""
        self.hidden = {
            str(place): name
            for owner in (self.model, self.tokenizer)
            if (place := getattr(owner, "name_or_path", None))
        }
        # One at a time: tokenizers are no friends of threads, and a template runs in one process.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "jaxgen prompts")
        self._scoring = concurrent.futures.ThreadPoolExecutor(1, "jaxgen scores")
        self.shapes = Shapes(engine)
        self._state = "compiling"

    def prepare(self) -> None:
        """Wait until the engine is compiled, and read what there is to know of the model; once."""
        if self._state == "ready":
            return
        shape = dataclasses.asdict(self.engine.strict)
        self.facts = {"model": facts_of(self.model), "tokenizer": tokenizer_of(self.model, self.tokenizer)}
        self.facts |= {"engine": shape, "environment": environment(self.model)}
        said = json.dumps([self.name, self.facts], sort_keys=True, default=str)
        self.fingerprint = f"fp_{hashlib.sha256(said.encode()).hexdigest()[:16]}"
        self.texts.bytes_of(0)
        self.engine.wait_until_ready()
        self._state = "ready"

    @property
    def state(self) -> str:
        """ "compiling", "ready" (no request waits for compilations), "closing", or "failed"."""
        if self.engine.failed:
            return "failed"
        return "closing" if self.engine.closed else self._state

    async def prompts(self, work: Callable[..., Result], *args: Any) -> Result:
        """Run in the thread that may use the tokenizer."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    async def scored(self, prompts: Sequence[Prompt]) -> list[Tokens]:
        """The log-probabilities of prompts, each alone: the same whatever else is asked."""
        loop = asyncio.get_running_loop()
        return [await loop.run_in_executor(self._scoring, self.scores.of, prompt.ids) for prompt in prompts]

    def encoded(self, field: str, given: Any, **options: Any) -> list[int]:
        """The ids of a text or a chat. Raises `Refusal`."""
        try:
            return encode(self.tokenizer, checked_text(given), **options)["input_ids"]
        except JaxgenError as error:
            raise Refusal(str(error), param=field) from error

    def room(self, field: str, ids: Sequence[int]) -> int:
        """How many tokens fit after a prompt. Raises `Refusal` if that is none."""
        most = min(self.engine.strict.tokens, context_of(self.model.config, len(ids)))
        if not ids:
            raise Refusal(f"{field}: an empty prompt", param=field)
        if len(ids) >= most:
            raise Refusal(
                f"{field}: the prompt has {len(ids)} tokens, and with what follows it may have {most}",
                param=field,
                code="context_length_exceeded",
            )
        return most - len(ids)

    def submit(
        self,
        field: str,
        prompts: Sequence[Prompt],
        new: tuple[str, int | None, int | None],
        samples: int,
        **options: Any,
    ) -> list[Call]:
        """Submit each prompt so many times. `new` is the field of the most new tokens, its value, and its default.

        Without a default a text may fill its row. Raises `Refusal`, and as `Engine.submit`; then nothing is left
        in the engine.
        """
        calls: list[Call] = []
        asked, given, default = new
        try:
            for row, prompt in enumerate(prompts):
                room = self.room(field, prompt.ids)
                if given is not None and given > room:
                    raise Refusal(
                        f"{asked}={given}: after a prompt of {len(prompt.ids)} tokens at most {room} fit",
                        param=asked,
                        code="context_length_exceeded",
                    )
                count = given or min(room, default or room)
                own = {**options, "max_new_tokens": count, "max_time": self.limits.seconds}
                calls.append(Call(prompt.ids, row, own, []))
                for sample in range(samples):
                    told: dict[str, Any] = {"row_id": row, "sample": sample, "stops_begin_in_prompt": False}
                    calls[-1].handles.append(self.engine.submit(prompt.ids, **told, **own))
        except JaxgenError as error:
            for call in calls:
                for handle in call.handles:
                    handle.cancel()
            raise with_field(error, asked) from error
        return calls

    async def submitted(self, *given: Any, **options: Any) -> list[Call]:
        """As `submit`, in the thread of the prompts. Who goes away meanwhile leaves nothing in the engine either."""
        work = asyncio.ensure_future(self.prompts(lambda: self.submit(*given, **options)))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(_cancel)
            raise

    def failure(self, error: Exception) -> Refusal:
        """What to answer; nothing of an error that was not meant for clients, which is logged."""
        if (refusal := refusal_of(error)) is None:
            logger.error("a request failed", exc_info=error)
            refusal = Refusal("something went wrong in the server", status=500)
        self.metrics.refused(refusal.status)
        return refusal

    def failed(self, error: Exception) -> dict[str, Any]:
        """The body of a failure."""
        return self.failure(error).body(self.hidden)

    def close(self, seconds: float) -> None:
        """Finish what was taken, and after so many seconds cancel it."""
        self.engine.close(timeout=seconds)
        self.shapes.close()
        for pool in (self._thread, self._scoring):
            pool.shutdown(wait=False, cancel_futures=True)


def _cancel(work: "asyncio.Future[list[Call]]") -> None:
    if not work.cancelled() and work.exception() is None:
        for call in work.result():
            for handle in call.handles:
                handle.cancel()


def fresh_seed() -> int:
    """A seed for a request without one, which is told it: 32 bits, which every client can write as a number."""
    return next_seed()


def version() -> str:
    """Of jaxgen."""
    return jaxgen.__version__
