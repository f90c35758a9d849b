"""The log-probabilities of a prompt's own tokens, which `echo` with `logprobs` asks for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgen.engine.handle import Tokens
from jaxgen.errors import NonFiniteLogitsError
from jaxgen.generation.processors.select import best_of
from jaxgen.generation.programs.structure import split
from jaxgen.generation.prompts.layout import SMALLEST_PROMPT, bucket, pad_to
from jaxgen.generation.results.logprobs import of_tokens
from jaxgen.lowering import own_rules


class PromptScores:
    """Scores prompts one at a time: the numbers of one depend on nothing but itself. Use it in one thread."""

    def __init__(self, model: Any, best: int):
        self._model, self._best = model, max(best, 1)

    @own_rules()
    def of(self, ids: list[int]) -> Tokens:
        """What a model thinks of a prompt's tokens, of which the first has nothing before it: its numbers are 0."""
        width = 1 + bucket(max(len(ids) - 1, 1), SMALLEST_PROMPT)
        tokens, lengths = pad_to(np.array([ids], np.int32), (1, width)), np.array([len(ids)], np.int32)
        tables = _scored(*split(self._model), tokens, lengths, self._best)
        own, top_ids, top = (np.asarray(x)[0, : len(ids)] for x in tables)
        if not np.isfinite(own).all():
            raise NonFiniteLogitsError([0], [int(np.flatnonzero(~np.isfinite(own))[0])])
        return Tokens(np.array(ids, np.int32), own, own, top_ids, top)


def _run(structure: Any, weights: Any, tokens: Any, lengths: Any, best: int) -> tuple[Array, ...]:
    """Of each token its log-probability, and the `best` ones in its place: by one computation, so they compare."""

    def found(logits: Float[Array, "n V"], chosen: Int[Array, " n"], start: Array, count: int) -> tuple[Array, ...]:
        logprobs = jax.nn.log_softmax(logits, axis=1)
        top, top_ids = best_of(logprobs, best)
        return jnp.take_along_axis(logprobs, chosen[:, None], axis=1)[:, 0], top_ids, top

    return of_tokens(structure.module(weights), jnp.asarray(tokens), jnp.asarray(lengths), found)


_scored = jax.jit(_run, static_argnums=(0, 4))
