"""How likely given tokens are: of texts, and of what `generate` chose."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgen.errors import JaxgenError, NonFiniteLogitsError
from jaxgen.generation.options.checks import integer
from jaxgen.generation.programs.structure import split
from jaxgen.generation.prompts.layout import SMALLEST_PROMPT, bucket, checked_prompt, pack, pad_to
from jaxgen.lowering import own_rules

# Logits are computed for this many columns at a time: B*BLOCK*V floats, and not B*T*V.
_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class TextScore:
    """What a model thinks of a text: of all its tokens but the first, which nothing precedes."""

    token_ids: Int[np.ndarray, " T"]
    logprobs: Float[np.ndarray, " T"]  # natural logarithms


def score(model: Any, texts: Any, tokenizer: Any, batch_size: int) -> list[TextScore]:
    """As `GenerationMixin.score`."""
    from jaxgen.text.tokenizer import tokenizer_for

    texts = [texts] if isinstance(texts, str) else list(texts)
    tokenizer = tokenizer_for(model, tokenizer)
    batch_size = integer(1)("batch_size", batch_size)
    scores: list[TextScore] = []
    for start in range(0, len(texts), batch_size):
        ids = [np.array(tokenizer(text)["input_ids"], np.int32) for text in texts[start : start + batch_size]]
        for row, tokens in enumerate(ids):
            _check(tokens, start + row, model.config.max_position_embeddings)
        width = max(map(len, ids))
        table, mask = (np.stack([pad_to(x, (width,)) for x in rows]) for rows in (ids, [np.ones_like(x) for x in ids]))
        logprobs = token_logprobs(model, table, mask)
        scores += [TextScore(x[1:], row[1 : len(x)]) for x, row in zip(ids, logprobs, strict=True)]
    return scores


def _check(tokens: np.ndarray, row: int, context: int) -> None:
    if len(tokens) < 2:
        raise JaxgenError(f"texts[{row}] has {len(tokens)} token; a score needs a token and one before it")
    if len(tokens) > context:
        raise JaxgenError(f"texts[{row}] has {len(tokens)} tokens, more than the model's context of {context}")


@own_rules()
def token_logprobs(model: Any, input_ids: Any, attention_mask: Any = None) -> Float[np.ndarray, "B T"]:
    """The log-probability of each id given the real ones before it; 0 for a row's first id and masked ones.

    Ids and mask are as in `generate`, in any arrangement.
    """
    ids, mask = checked_prompt(input_ids, attention_mask, model.config.vocab_size)
    tokens, lengths = pack(ids, mask)
    rows, length = bucket(len(ids)), bucket(tokens.shape[1], SMALLEST_PROMPT)
    packed = _packed_logprobs(
        *split(model), pad_to(tokens, (rows, length)), np.arange(length) < pad_to(lengths, (rows,), fill=1)[:, None]
    )
    result = np.zeros(ids.shape, np.float32)
    broken = np.argwhere(~np.isfinite(np.asarray(packed)[: len(ids)]))
    if len(broken):
        raise NonFiniteLogitsError(broken[:1, 0].tolist(), broken[:1, 1].tolist())
    result[mask] = np.asarray(packed)[: len(ids)][np.arange(length) < lengths[:, None]]
    return result


def _logprobs(structure: Any, weights: Any, tokens: Int[Array, "B T"], real: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    model = structure.module(weights)
    hidden, following = model.hidden(tokens, real), jnp.roll(tokens, -1, axis=1)
    spare = -tokens.shape[1] % _BLOCK
    hidden, following = jnp.pad(hidden, ((0, 0), (0, spare), (0, 0))), jnp.pad(following, ((0, 0), (0, spare)))

    def block(start: Array) -> Float[Array, "B t"]:
        logits = model.logits(jax.lax.dynamic_slice_in_dim(hidden, start, _BLOCK, axis=1))
        chosen = jax.lax.dynamic_slice_in_dim(following, start, _BLOCK, axis=1)
        picked = jnp.take_along_axis(logits, chosen[..., None], axis=2)[..., 0]
        return picked - jax.nn.logsumexp(logits, axis=2)

    blocks = jax.lax.map(block, jnp.arange(0, hidden.shape[1], _BLOCK))
    logprobs = jnp.moveaxis(blocks, 0, 1).reshape(len(tokens), -1)[:, : tokens.shape[1]]
    return jnp.where(real, jnp.roll(logprobs, 1, axis=1), 0).at[:, 0].set(0)


_packed_logprobs = jax.jit(_logprobs, static_argnums=0)


def transition_scores(
    sequences: object, scores: Any, beam_indices: object, normalize_logits: bool
) -> Float[np.ndarray, "R N"]:
    """As `GenerationMixin.compute_transition_scores`. Source: transformers, the method of this name."""
    table = np.stack([np.asarray(step, np.float32) for step in scores], axis=1)
    if normalize_logits:
        with np.errstate(invalid="ignore"):
            shifted = table - table.max(axis=2, keepdims=True)
            table = shifted - np.log(np.exp(shifted).sum(axis=2, keepdims=True))
    if beam_indices is None:
        beam_indices = np.broadcast_to(np.arange(table.shape[0])[:, None], table.shape[:2])
    beam_indices = np.asarray(beam_indices)
    longest = int((beam_indices >= 0).sum(axis=1).max())
    rows, new = beam_indices[:, :longest], np.asarray(sequences)[:, -longest:]
    steps = np.broadcast_to(np.arange(longest), new.shape)
    return np.where(rows < 0, np.float32(0), table[np.maximum(rows, 0), steps, new])
