"""A request being carried out on the device: prefilled, then decoded as far as the caller wants."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.generation import compiled
from jaxgen.generation.processors.constraint import host_errors
from jaxgen.generation.request import Request
from jaxgen.generation.stop import RUNNING, TIME, raise_if_broken
from jaxgen.generation.weights import split

_MOST_BETWEEN_LOOKS = 64


class Run:
    """A generation in progress: prefilled when made, then advanced as far as the caller wants.

    `state` is what there is so far. How often and how far `advance` is called changes nothing in the tokens.
    """

    def __init__(self, model: Any, request: Request):
        self._started = time.monotonic()
        self._request = request
        assistant = request.extras.assistant_model
        drafter, drafter_weights = (None, None) if assistant is None else split(assistant)
        structure, weights = split(model)
        self._models = (structure, weights, drafter, drafter_weights)
        self._prefill, self._decode = compiled.stages_for(model, weights, strict=request.strict is not None)
        self.state: Any = self._run(self._prefill, request.prompts, request.key, request.controls, request.plan)

    def advance(self, until: int | None = None) -> Any:
        """Decode until every row has ended, or has `until` new tokens."""
        controls, recipe = self._request.controls, self._request.plan.recipe
        stop = np.array(np.iinfo(np.int32).max if until is None else until, np.int32)
        self.state = self._run(self._decode, self.state, stop, controls, recipe)
        return self.state

    def _run(self, stage: compiled.Stage, *args: Any) -> Any:
        """Start a stage. If the user's Python is asked on the way, wait: what it raises is raised here."""
        if not self._request.asks_host:
            return stage(*self._models, *args)
        with host_errors():
            return jax.block_until_ready(stage(*self._models, *args))

    def finish(self) -> Any:
        """Decode to the end, which with `max_time` may be a matter of time: then look at the clock now and then."""
        limit = self._request.config.max_time
        if limit is None:
            return self.advance()
        until = step = 1
        while True:
            before = time.monotonic()
            if not bool(jax.device_get(self.advance(until).running.any())):
                return self.state
            now = time.monotonic()
            left = self._started + limit - now
            if left <= 0:
                return self.out_of_time()
            # As many steps as surely fit, judged by the last ones; the first ones may have been compiled.
            step = int(min(max(1, step * left / max(now - before, 1e-6) / 2), 2 * step, _MOST_BETWEEN_LOOKS))
            until += step

    def out_of_time(self) -> Any:
        """End every row that is still running."""
        status = self.state.status
        self.state = dataclasses.replace(self.state, status=jnp.where(status == RUNNING, jnp.int8(TIME), status))
        return self.state

    def chunks(self, chunk_size: int) -> Iterator["Chunk"]:
        """Decode to the end, looking at what there is every `chunk_size` tokens.

        Raises `NonFiniteLogitsError` as soon as a row meets them.
        """
        rows, limit = len(self._request.input_ids) * self._request.plan.samples, self._request.config.max_time
        shown, until, ended = None, 1, False
        while not ended:
            state = self.advance(until)
            if limit is not None and time.monotonic() - self._started >= limit:
                state = self.out_of_time()
            names = ("tokens", "lengths", "prompt_lengths", "status")
            tokens, lengths, prompts, status = (x[:rows] for x in jax.device_get([getattr(state, n) for n in names]))
            raise_if_broken(status, lengths - prompts)
            shown = prompts if shown is None else shown
            new = [tokens[row, shown[row] : lengths[row]] for row in range(rows)]
            shown, done = lengths, status != RUNNING
            ended, until = bool(done.all()), until + chunk_size
            yield Chunk(new, done)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What has come since the last look."""

    new: list[np.ndarray]  # token ids per row
    done: np.ndarray  # bool [R]: the row has ended
