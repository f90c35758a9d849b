"""What a call asked to record of every step: scores, logits, or the model's best tokens. Nothing by default."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgen.generation.processors.select import best_of
from jaxgen.generation.programs.inputs import StaticOptions
from jaxgen.pytree import pytree


@pytree
@dataclasses.dataclass
class StepOutputs:
    """One entry per row and new token; None where it was not asked for."""

    scores: Float[Array, "R N V"] | None  # after every processor
    logits: Float[Array, "R N V"] | None  # the model's own
    top_logprobs: Float[Array, "R N n"] | None  # the n largest log-probabilities under the model's own distribution
    top_ids: Int[Array, "R N n"] | None

    @classmethod
    def empty(cls, static: StaticOptions, rows: int, vocab_size: int) -> "StepOutputs":
        """Room for what the options ask."""

        def table(wanted: bool, size: int, dtype: type = jnp.float32) -> Array | None:
            return jnp.zeros((rows, static.recorded, size), dtype) if wanted else None

        best = min(static.top_logprobs, vocab_size)
        return cls(
            scores=table(static.record_scores, vocab_size),
            logits=table(static.record_logits, vocab_size),
            top_logprobs=table(best > 0, best),
            top_ids=table(best > 0, best, jnp.int32),
        )

    def put(
        self,
        step: Int[Array, " R"],
        runs: Bool[Array, " R"],
        scores: Float[Array, "R V"],
        logits: Float[Array, "R V"],
        ranked: Bool[Array | np.ndarray, " R"] | None = None,
    ) -> "StepOutputs":
        """Write down a step of the rows that run; `ranked` are those that want its best tokens, None: all."""

        def write(table: Array | None, value: Array) -> Array | None:
            if table is None:
                return None
            where = table.at[jnp.arange(len(step)), jnp.where(runs, step, table.shape[1])]
            return where.set(value, mode="drop", unique_indices=True, indices_are_sorted=True)

        best = best_ids = jnp.zeros(())
        if self.top_logprobs is not None:
            best, best_ids = _best(
                logits, self.top_logprobs.shape[2], None if ranked is None else (runs & ranked).any()
            )
        return StepOutputs(
            scores=write(self.scores, scores),
            logits=write(self.logits, logits),
            top_logprobs=write(self.top_logprobs, best),
            top_ids=write(self.top_ids, best_ids),
        )

    def on_host(self, rows: int, steps: int) -> dict[str, Any]:
        """What there is, by name, as HF lays it out."""
        found: dict[str, Any] = {name: np.asarray(x)[:rows, :steps] for name, x in vars(self).items() if x is not None}
        for name in {"scores", "logits"} & found.keys():
            found[name] = tuple(np.moveaxis(found[name], 1, 0))
        return found


def _best(
    logits: Float[Array, "R V"], number: int, wanted: Bool[Array, ""] | None
) -> tuple[Float[Array, "R n"], Int[Array, "R n"]]:
    """The best tokens of each row with their log-probabilities; anything where they are not wanted."""

    def best() -> tuple[Float[Array, "R n"], Int[Array, "R n"]]:
        return best_of(jax.nn.log_softmax(logits, axis=1), number)

    def nothing() -> tuple[Float[Array, "R n"], Int[Array, "R n"]]:
        shape = len(logits), number
        return jnp.zeros(shape, logits.dtype), jnp.zeros(shape, jnp.int32)

    return best() if wanted is None else jax.lax.cond(wanted, best, nothing)


@dataclasses.dataclass(frozen=True)
class Found:
    """The sequences of a search that has ended, on the host: N new tokens in the longest of R."""

    tokens: Int[np.ndarray, "R N"]  # anything behind a row's end
    lengths: Int[np.ndarray, " R"]  # new tokens per row
    status: Int[np.ndarray, " R"]  # why each ended (`stop`)
    logprobs: Float[np.ndarray, "R N"] | None = None
    model_logprobs: Float[np.ndarray, "R N"] | None = None
    details: dict[str, Any] = dataclasses.field(default_factory=dict)  # other fields of `GenerateOutput`
