"""What plots show of a model's distributions: entropies, divergences, and probabilities under options."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgen.errors import JaxgenError, NonFiniteLogitsError, UnsupportedError
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.options.table import OPTIONS
from jaxgen.generation.processors.chain import chain_of
from jaxgen.generation.programs.structure import split
from jaxgen.generation.prompts.layout import SMALLEST_PROMPT, bucket, pad_to
from jaxgen.generation.prompts.rows import Rows
from jaxgen.lowering import own_rules

_BLOCK = 64  # positions whose logits are held at a time


def entropy_of(logits: Float[Array, "t V"]) -> Float[Array, " t"]:
    """The entropy of each distribution, in nats."""
    logs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.where(jnp.isneginf(logs), 0, jnp.exp(logs) * logs).sum(axis=-1)


def divergence_of(logits: Float[Array, "t V"], others: Float[Array, "t V"]) -> Float[Array, " t"]:
    """KL(softmax(logits) || softmax(others)), in nats."""
    ours, theirs = (jax.nn.log_softmax(x, axis=-1) for x in (logits, others))
    return (jnp.exp(ours) * (ours - theirs)).sum(axis=-1)


@own_rules()
def along(measure: Callable[..., Any], models: tuple[Any, ...], ids: Int[np.ndarray, " T"]) -> Float[np.ndarray, " t"]:
    """A measure of the distributions from which models predict all ids of a text but the first: T - 1 values."""
    length = bucket(len(ids), SMALLEST_PROMPT)
    structures, weights = zip(*map(split, models), strict=True)
    tokens, real = pad_to(ids, (length,))[None], (np.arange(length) < len(ids))[None]
    values = np.asarray(_by_position(measure, structures, weights, tokens, real))[: len(ids) - 1]
    if not np.isfinite(values).all():
        raise NonFiniteLogitsError([0], [int(np.flatnonzero(~np.isfinite(values))[0])])
    return values


@functools.partial(jax.jit, static_argnums=(0, 1))
def _by_position(measure: Any, structures: Any, weights: Any, tokens: Any, real: Any) -> Any:
    """The measure at every position, from a few logits at a time: V of them for all positions would not fit."""
    models = [structure.module(arrays) for structure, arrays in zip(structures, weights, strict=True)]
    spare = -tokens.shape[1] % _BLOCK
    states = [jnp.pad(model.hidden(tokens, real), ((0, 0), (0, spare), (0, 0))) for model in models]

    def block(start: Any) -> Any:
        parts = [jax.lax.dynamic_slice_in_dim(hidden, start, _BLOCK, axis=1) for hidden in states]
        return measure(*(model.logits(part)[0] for model, part in zip(models, parts, strict=True)))

    return jax.lax.map(block, jnp.arange(0, tokens.shape[1], _BLOCK)).reshape(-1)


def probabilities_under(logits: Float[np.ndarray, " V"], label: Any, options: Any) -> Float[np.ndarray, " V"]:
    """What `generate` would draw from under the options, by its own processors."""
    if not isinstance(options, Mapping):
        raise JaxgenError(f"settings[{label!r}]={options!r} must be a dict of options")
    sampling = [name for name, option in OPTIONS.items() if option.only_sampling]
    for name in options:
        if name not in sampling:
            raise UnsupportedError(f"settings[{label!r}]: {name!r} is none of {', '.join(sampling)}")
    config = GenerationConfig(**{"do_sample": True, "top_k": 0, **options})
    one = jnp.ones(1, jnp.int32)
    rows = Rows(jnp.zeros((1, 1), jnp.int32), one, one, one + 1, one - 1, jnp.ones(1, bool))
    scores = jnp.asarray(logits)[None]
    for processor in chain_of(config, len(logits)):
        scores = processor(scores, rows)
    return np.asarray(jax.nn.softmax(scores[0]))
