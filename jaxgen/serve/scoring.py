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
from jaxgen.lowering import own_rules

_BLOCK = 64  # columns whose logits are there at a time


class PromptScores:
    """Scores prompts one at a time: the numbers of one depend on nothing but itself. Use it in one thread."""

    def __init__(self, model: Any, best: int):
        self._model, self._best = model, max(best, 1)

    @own_rules()
    def of(self, ids: list[int]) -> Tokens:
        """What a model thinks of a prompt's tokens, of which the first has nothing before it: its numbers are 0."""
        width = bucket(len(ids), SMALLEST_PROMPT)
        tokens = pad_to(np.array([ids], np.int32), (1, width))
        tables = _scored(*split(self._model), tokens, np.array([len(ids)], np.int32), self._best)
        own, top_ids, top = (np.asarray(x)[: len(ids) - 1] for x in tables)
        if not np.isfinite(own).all():
            raise NonFiniteLogitsError([0], [int(np.flatnonzero(~np.isfinite(own))[0])])
        own, top_ids, top = (np.pad(x, [(1, 0)] + [(0, 0)] * (x.ndim - 1)) for x in (own, top_ids, top))
        return Tokens(np.array(ids, np.int32), own, own, top_ids, top)


Scores = tuple[Float[Array, " T"], Int[Array, "T n"], Float[Array, "T n"]]


def _run(structure: Any, weights: Any, tokens: Any, lengths: Any, best: int) -> Scores:
    """Of each token but the first: its log-probability, and the `best` ones in its place."""
    model = structure.module(weights)
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    size = min(_BLOCK, tokens.shape[1])
    spare = -tokens.shape[1] % size
    hidden = jnp.pad(model.hidden(tokens, real), ((0, 0), (0, spare), (0, 0)))
    following = jnp.pad(jnp.roll(tokens, -1, axis=1), ((0, 0), (0, spare)))[0]

    def block(start: Array) -> Scores:
        logits = model.logits(jax.lax.dynamic_slice_in_dim(hidden, start, size, axis=1))[0]
        logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=1)
        chosen = jax.lax.dynamic_slice_in_dim(following, start, size)
        top, top_ids = best_of(logprobs, min(best, logprobs.shape[1]))
        return jnp.take_along_axis(logprobs, chosen[:, None], axis=1)[:, 0], top_ids, top

    tables = jax.lax.map(block, jnp.arange(0, hidden.shape[1], size))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tables)


_scored = jax.jit(_run, static_argnums=(0, 4))
