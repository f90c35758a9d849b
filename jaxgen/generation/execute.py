"""The middle steps of a call, on the device: `prefill` starts it, `decode` goes on to the end or as far as asked.

Both hand the state on as a value: nothing happens but what is called. How often and how far a state is decoded
changes nothing in its tokens.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.generation.choosing.grammars import Grammars
from jaxgen.generation.choosing.stop import COMPLETE, RUNNING, TIME, raise_if_broken
from jaxgen.generation.loop import DecodeState
from jaxgen.generation.prepare import Request
from jaxgen.generation.processors.constraint import host_errors
from jaxgen.generation.programs.stages import stages_for
from jaxgen.generation.programs.structure import split

_MOST_BETWEEN_LOOKS = 64
_NEVER = np.iinfo(np.int32).max


class Program(NamedTuple):
    """The executables of a call, and what each is given first."""

    prefill: Callable[..., DecodeState]
    decode: Callable[..., DecodeState]
    models: tuple[Any, ...]  # the search, then structure and weights of the model and of its assistant


class Chunk(NamedTuple):
    """What has come since the last look."""

    new: list[np.ndarray]  # token ids per row
    done: np.ndarray  # bool [R]: the row has ended
    state: DecodeState  # until the next one is asked for


def program_for(model: Any, request: Request) -> Program:
    """What carries a request out, with the weights as they are now."""
    assistant = request.extras.assistant_model
    drafter, drafter_weights = (None, None) if assistant is None else split(assistant)
    structure, weights = split(model)
    on_prompts, in_loop = stages_for(model, weights, strict=request.strict is not None)
    if request.extras.prefix_allowed_tokens_fn is not None:
        on_prompts, in_loop = _waiting(on_prompts), _waiting(in_loop)
    if request.grammars is not None:
        steps = _Steps(on_prompts, in_loop, request.grammars)
        on_prompts, in_loop = steps.prefill, steps.decode
    return Program(on_prompts, in_loop, (request.search, structure, weights, drafter, drafter_weights))


def _waiting(stage: Callable[..., DecodeState]) -> Callable[..., DecodeState]:
    """A stage that asks the user's Python on the way: what that raises is raised here, when the end is waited for."""

    def run(*args: Any) -> DecodeState:
        with host_errors():
            return jax.block_until_ready(stage(*args))

    return run


class _Steps:
    """The stages of a call with grammars: token by token, and before each the host says what may come next.

    A step is the very executable that runs on where nothing is asked of the host.
    """

    def __init__(self, on_prompts: Callable[..., DecodeState], in_loop: Callable[..., DecodeState], grammars: Grammars):
        self._on_prompts, self._in_loop, self._grammars = on_prompts, in_loop, grammars

    def prefill(self, *args: Any) -> DecodeState:
        *models, prompts, key, traced, layout = args
        rows = np.arange(len(prompts.tokens) * layout.samples) // layout.samples
        self._walk = self._grammars.walk(rows.tolist())
        return self._looked_at(self._on_prompts(*models, prompts, key, traced.where(self._walk.bits), layout))

    def decode(self, *args: Any) -> DecodeState:
        *models, state, until, traced, static = args
        while True:
            step = np.array(min(self._new + 1, int(until)), np.int32)
            state = self._in_loop(*models, state, step, traced.where(self._walk.bits), static)
            state = self._looked_at(state)
            if self._new >= until:
                return state

    def _looked_at(self, state: DecodeState) -> DecodeState:
        """The state, with rows ended that are complete."""
        tokens, lengths, starts, status = jax.device_get(
            (state.tokens, state.lengths, state.prompt_lengths, state.status)
        )
        complete = self._walk.take(tokens, lengths, status, lengths - starts)
        if complete.any():
            state = dataclasses.replace(state, status=jnp.where(complete, jnp.int8(COMPLETE), state.status))
        running = (status == RUNNING) & ~complete
        self._new = int((lengths - starts)[running].min(initial=_NEVER))
        return state


def prefill(program: Program, request: Request) -> DecodeState:
    """Run the prompts through the model, and draw every row's first token."""
    return program.prefill(*program.models, request.prompts, request.key, request.traced, request.layout)


def advance(program: Program, request: Request, state: DecodeState, until: int | None = None) -> DecodeState:
    """Decode until every row has ended, or has `until` new tokens; the state that was given is used up."""
    stop = np.array(_NEVER if until is None else until, np.int32)
    return program.decode(*program.models, state, stop, request.traced, request.layout.static)


def decode(program: Program, request: Request, state: DecodeState, started: float) -> DecodeState:
    """Decode to the end, which with `max_time` may be a matter of time: then look at the clock now and then.

    `started` is when that began, by `time.monotonic`.
    """
    limit = request.config.max_time
    if limit is None:
        return advance(program, request, state)
    until = step = 1
    while True:
        before = time.monotonic()
        state = advance(program, request, state, until)
        if not bool(jax.device_get(state.running.any())):
            return state
        now = time.monotonic()
        left = started + limit - now
        if left <= 0:
            return out_of_time(state)
        # As many steps as surely fit, judged by the last ones; the first ones may have been compiled.
        step = int(min(max(1, step * left / max(now - before, 1e-6) / 2), 2 * step, _MOST_BETWEEN_LOOKS))
        until += step


def out_of_time(state: DecodeState) -> DecodeState:
    """End every row that is still running."""
    return dataclasses.replace(state, status=jnp.where(state.status == RUNNING, jnp.int8(TIME), state.status))


def decode_in_chunks(
    program: Program, request: Request, state: DecodeState, started: float, size: int
) -> Iterator[Chunk]:
    """As `decode`, looking at what there is every `size` tokens.

    Raises `NonFiniteLogitsError` as soon as a row meets them.
    """
    rows, limit = len(request.input_ids) * request.layout.samples, request.config.max_time
    shown, until, ended = None, 1, False
    while not ended:
        state = advance(program, request, state, until)
        if limit is not None and time.monotonic() - started >= limit:
            state = out_of_time(state)
        arrays = jax.device_get((state.tokens, state.lengths, state.prompt_lengths, state.status))
        tokens, lengths, prompts, status = (x[:rows] for x in arrays)
        raise_if_broken(status, lengths - prompts)
        shown = prompts if shown is None else shown
        new = [tokens[row, shown[row] : lengths[row]] for row in range(rows)]
        shown, done = lengths, status != RUNNING
        ended, until = bool(done.all()), until + size
        yield Chunk(new, done, state)
