"""The engine: requests come at any time, each gets a row, and one batch of fixed shape goes on and on.

    submit -> queue -> a free row -> its prompt is read in pieces -> it runs with the others -> the row is free again

One thread owns the device. A row's tokens depend on nothing but its prompt, its key and the parameters; in the one
shape of the engine they do so to the last bit, whoever else is there.
"""

import atexit
import collections
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np
from jaxtyping import Int

from jaxgen.engine.batch import Batch, Request
from jaxgen.engine.constraints import Room
from jaxgen.engine.handle import CANCELLED, Handle
from jaxgen.engine.options import NEUTRAL, RowOptions
from jaxgen.engine.outputs import GenerationOutput, outputs_of
from jaxgen.engine.programs import Weights
from jaxgen.engine.stops import StopWatch
from jaxgen.errors import EngineClosedError, EngineFullError, JaxgenError
from jaxgen.generation.choosing.constrained import Automaton, too_long
from jaxgen.generation.choosing.sample import key_words, row_id_words
from jaxgen.generation.options.checks import integer
from jaxgen.generation.options.config import GenerationConfig, resolve
from jaxgen.generation.options.table import Extras
from jaxgen.generation.options.typed import ConfigSource, GenerateOptions
from jaxgen.generation.programs.inputs import BatchLayout, StaticOptions
from jaxgen.generation.programs.strict import Strict
from jaxgen.generation.prompts.contexts import check_pieces, contexts, note
from jaxgen.generation.prompts.layout import checked_prompt
from jaxgen.generation.prompts.memory import check_memory
from jaxgen.generation.prompts.row_limits import row_limits
from jaxgen.text.inputs import checked_texts, encode
from jaxgen.text.tokenizer import tokenizer_for

logger = logging.getLogger("jaxgen")
USUAL_SLOTS = 4096


class Engine:
    """Continuous batching: `rows` requests at a time, of at most `slots` tokens each, prompt and new ones.

    By default `slots` are 4096, or the model's context where that is less. `submit` takes a prompt and the options of
    `generate`, from any thread, and gives a `Handle`. Prompts are read `chunk` tokens at a time between chunks of
    `steps` decode steps. `queue` requests may wait; `top_logprobs` is how many of the best tokens of each step are
    kept; `processors` are the names of the options of the logits that requests may use; `constraints` is the room that
    each row has for a constraint, in states and classes of tokens, or None. Sizes are rounded up to 2**k or 3 * 2**k. A
    request gets the tokens and the log-probabilities, to the last bit, of `model.generate(prompt, strict=engine.strict,
    ...)`, whatever else the engine does. Its weights are those that the model has when it is submitted: after an update
    of the model, rows finish with those that they began with, and then others begin with the new ones, and nothing is
    compiled. Close it, or use it in a `with`.

    Raises `JaxgenError` for bad sizes, and for more memory than the device has.

    >>> model, tokenizer = getfixture("demo")
    >>> with Engine(model, tokenizer, rows=4, slots=64) as engine:
    ...     handle = engine.submit("A list of colors: red, blue", max_new_tokens=5)
    ...     other = engine.submit("1, 2, 3", max_new_tokens=4, do_sample=True, seed=1)
    ...     handle.result().text
    ', green,'
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        rows: int = 32,
        slots: int | None = None,
        chunk: int = 64,
        steps: int = 8,
        queue: int = 1024,
        top_logprobs: int = 0,
        processors: tuple[str, ...] = tuple(NEUTRAL),
        constraints: tuple[int, int] | None = (1024, 384),
    ):
        slots = min(USUAL_SLOTS, model.config.max_position_embeddings) if slots is None else slots
        self.model, self.strict = model, Strict(rows=rows, tokens=slots, chunk=chunk)
        self.tokenizer, self._no_tokenizer = _tokenizer(model, tokenizer)
        self._queue = integer(1)("queue", queue)
        for name in processors:
            if name not in NEUTRAL:
                raise JaxgenError(f"processors: {name!r} is none that an engine has; choose from {[*NEUTRAL]}")
        total = self.strict.tokens
        best = integer(0)("top_logprobs", top_logprobs)
        static = StaticOptions(do_sample=True, top_logprobs=best, recorded=total if best else 0)
        held = model.config.cache_slots(total, ahead=self.strict.chunk)
        layout = BatchLayout(static, 1, total, held, chunk=self.strict.chunk, one_by_one=True)
        self.top_logprobs = best
        sizes, place = (self.strict.rows, model.config.vocab_size), getattr(model, "everywhere", model.device)
        room = None if constraints is None else Room(*sizes, constraints, place)
        reserved = 0 if room is None else room.bytes
        check_memory(model, (self.strict.rows, self.strict.chunk), layout, reserved=reserved)
        self._options = RowOptions(*sizes, processors, room, place)
        self._batch = Batch(model, self.strict.rows, layout, integer(1)("steps", steps), self._options)
        self._waiting: collections.deque[Request] = collections.deque()
        self._wake, self._closing, self._deadline = threading.Condition(), False, float("inf")
        self._dead: Exception | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jaxgen engine", daemon=True)
        self._thread.start()
        atexit.register(self.close, 0)  # or the interpreter would take down what the thread computes with

    def submit(
        self,
        prompt: Any,
        *,
        generation_config: ConfigSource | None = None,
        key: Any = None,
        seed: Any = None,
        row_id: int | str = 0,
        sample: int = 0,
        include_stop_str_in_output: bool = True,
        skip_special_tokens: bool = True,
        stops_begin_in_prompt: bool = True,
        **options: Unpack[GenerateOptions],
    ) -> Handle:
        """Queue a prompt: a text, a chat, or ids. Options are those of `generate`, as far as rows can have their own.

        `row_id` names the row, as in `generate`, where a single prompt is row 0; `sample` is which of
        `num_return_sequences` samples this is: of one seed each is another text. A stop string may begin in the prompt,
        as in `generate`, unless `stops_begin_in_prompt` is False, as servers have it. Raises `JaxgenError` for bad
        options and for what can never fit, `EngineFullError` where as many wait as may, and `EngineClosedError` after
        the end.
        """
        extras, fields = Extras.take({"tokenizer": self.tokenizer, **options})
        config = resolve(
            {"return_dict_in_generate": True, **fields}, generation_config, self.model.stored_generation_config
        )
        ids = self._ids(prompt)
        asked = self._options.check(config, extras)
        if config.sequences_per_prompt > 1:
            raise JaxgenError("num_return_sequences: a request is one row; submit it once for each sample=")
        if (config.top_logprobs or 0) > self.top_logprobs:
            raise JaxgenError(
                f"top_logprobs={config.top_logprobs} is more than the {self.top_logprobs} that this engine keeps; "
                "Engine(top_logprobs=) says how many"
            )
        key, seed = key_words(key, seed)
        if key.ndim > 1:
            raise JaxgenError("seed or key: a request is one row, with one of them")
        plain = (include_stop_str_in_output, skip_special_tokens)
        handle = Handle(ids, None if seed is None else int(seed), self.tokenizer, config.stop_strings or (), *plain)
        request = Request(
            handle,
            ids,
            config,
            asked,
            key,
            row_id=row_id_words([row_id], 1)[0],
            sample=integer(0)("sample", sample),
            max_length=self._max_length(len(ids), config, asked.automaton),
            watch=None if asked.stops is None else StopWatch(asked.stops, ids if stops_begin_in_prompt else ids[:0]),
            weights=Weights.of(self.model),
            until=float("inf") if config.max_time is None else handle.submitted + config.max_time,
        )
        self._put(request)
        return handle

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: ConfigSource | None = None,
        *,
        key: Any = None,
        seed: Any = None,
        **options: Unpack[GenerateOptions],
    ) -> dict[str, GenerationOutput]:
        """Generate for prompts of any lengths, and wait for all: transformers' method, on an engine that is kept.

        `inputs` are lists of ids. The result has `req_0`, `req_1`, ... in their order, and with `num_return_sequences`
        so many of each, one behind the other, which read their prompt once. Row i draws with the seed or key and the
        row id i, as in `generate`. Raises `JaxgenError` for bad options and prompts; what goes wrong with one request
        later is in its output. Source: transformers `ContinuousMixin.generate_batch`.

        >>> model, _ = getfixture("demo")
        >>> with Engine(model, rows=2, slots=64) as engine:
        ...     [out.generated_tokens for out in engine.generate_batch([[1, 5], [1, 7, 9]], max_new_tokens=2).values()]
        [[14, 337], [14, 351]]
        """
        return outputs_of(self, inputs, generation_config, key, seed, options)

    def wait_until_ready(self, timeout: float | None = None) -> bool:
        """Wait until everything is compiled; False after `timeout` seconds. Raises `EngineClosedError` if it failed."""
        ready = self._ready.wait(timeout)
        if self._dead is not None:
            raise EngineClosedError(f"the engine failed: {self._dead}") from self._dead
        return ready

    @property
    def room(self) -> Room | None:
        """What each row may be constrained by, if by anything."""
        return self._options.room

    @property
    def failed(self) -> bool:
        """Whether it ended by an error, which `wait_until_ready` raises."""
        return self._dead is not None

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closing or self._dead is not None

    def stats(self) -> dict[str, int]:
        """What there is now, and has been: requests, tokens and steps.

        `row_steps` counts a decode step of every row, `tokens` those that gave a token: the rest was idle.
        """
        return {**self._batch.now(), "queue": len(self._waiting), **self._batch.counts}

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, finish those that were taken, and end; after `timeout` seconds cancel what is left."""
        with self._wake:
            self._closing = True
            self._deadline = float("inf") if timeout is None else time.monotonic() + timeout
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            atexit.unregister(self.close)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.close(None if kind is None else 0)

    def _put(self, request: Request) -> None:
        """Let a request wait, or refuse it."""
        with self._wake:
            if self.closed:
                raise EngineClosedError(
                    f"the engine is closed{f', since it failed: {self._dead}' if self._dead else ''}"
                )
            if len(self._waiting) >= self._queue:
                raise EngineFullError(f"{len(self._waiting)} requests wait already, as many as may; come again later")
            self._waiting.append(request)
            self._batch.counts["requests"] += 1
            self._wake.notify()

    def _max_length(self, prompt: int, config: GenerationConfig, automaton: Automaton | None) -> int:
        """The length at which a row ends that begins with so many tokens; raises `JaxgenError` if it can never fit."""
        lengths, own = np.array([prompt], np.int32), self.model.config
        check_pieces(own, lengths)
        limit = int(row_limits(config, lengths, contexts(own, lengths), note(own))[0])
        if limit > self.strict.tokens:
            raise JaxgenError(
                f"a prompt of {prompt} tokens and {limit - prompt} new ones are more than the {self.strict.tokens} "
                f"slots of a row; at most {max(self.strict.tokens - prompt, 0)} new tokens fit, or Engine(slots=)"
            )
        if automaton is not None and automaton.distance[0] > limit - prompt:
            raise too_long("", int(automaton.distance[0]), limit - prompt)
        return limit

    def _ids(self, prompt: Any) -> Int[np.ndarray, " T"]:
        """The ids of a text, a chat, or a list of ids."""
        listed = isinstance(prompt, np.ndarray) or (isinstance(prompt, list | tuple) and not _is_text(prompt))
        if not listed:
            if self.tokenizer is None:
                raise JaxgenError(f"this engine has no tokenizer ({self._no_tokenizer}); submit ids")
            [text], _ = checked_texts(prompt)
            prompt = encode(self.tokenizer, text)["input_ids"]
        ids = np.asarray(prompt)
        return checked_prompt(ids[None] if ids.ndim == 1 else ids, None, self.model.config.vocab_size)[0][0]

    def _run(self) -> None:
        """The engine's thread: rounds, until it is closed or fails twice without a token in between."""
        failed_at = -1
        try:
            self._batch.warmup()
            self._ready.set()
            while (requests := self._next()) is not None:
                try:
                    for request in requests:
                        self._batch.admit(request)
                    self._batch.round()
                except Exception as error:  # what a device raises; its state is lost, and with it every row
                    logger.exception("the engine failed; its %d requests end", self._batch.now()["busy"])
                    self._batch.fail(error)
                    for request in requests:
                        request.handle.end("error", error)
                    if failed_at == self._batch.counts["tokens"]:
                        raise
                    failed_at = self._batch.counts["tokens"]
        except BaseException as error:
            self._dead = error if isinstance(error, Exception) else EngineClosedError(str(error))
            logger.error("the engine ended: %s", error)
        finally:
            self._end_all()
            self._ready.set()

    def _next(self) -> list[Request] | None:
        """Requests for the rows that are free, once there is anything to do; None at the end."""
        with self._wake:
            while True:
                self._drop()
                if self._closing and time.monotonic() >= self._deadline:
                    return None
                if self._batch.busy or self._waiting:
                    return self._batch.takes(self._waiting)
                if self._closing:
                    return None
                self._wake.wait()

    def _drop(self) -> None:
        """End the requests that are cancelled, or whose time is over, before they get a row."""
        now = time.monotonic()
        for request in [request for request in self._waiting if request.over(now)]:
            self._waiting.remove(request)
            request.handle.end(request.why_over())

    def _end_all(self) -> None:
        with self._wake:
            self._closing, left = True, [*self._waiting]
            self._waiting.clear()
        error = None if self._dead is None else EngineClosedError(f"the engine failed: {self._dead}")
        self._batch.fail(error)
        for request in left:
            request.handle.end(CANCELLED if error is None else "error", error)


def _tokenizer(model: Any, given: Any) -> tuple[Any, str]:
    """The tokenizer that was given, or that the model's checkpoint has; or why there is none."""
    try:
        return tokenizer_for(model, given), ""
    except JaxgenError as error:
        if given is not None:
            raise
        return None, str(error)


def _is_text(prompt: Any) -> bool:
    """Whether a list is a chat, and not one of ids."""
    return len(prompt) > 0 and isinstance(prompt[0], Mapping)
