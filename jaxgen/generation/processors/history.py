"""Processors that look back at the row's own tokens: biases, penalties, repeated n-grams.

Nothing here is as large as slots times vocabulary: tokens are compared with tokens, and what comes of it is
scattered into `[R, V]`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgen.generation.rows import Rows

Logits = Float[Array, "R V"]
Number = Float[Array | np.ndarray, ""]
Count = Int[Array | np.ndarray, ""]


def sequence_bias(
    logits: Logits,
    rows: Rows,
    *,
    prefixes: Int[Array | np.ndarray, "N P"],
    last: Int[Array | np.ndarray, " N"],
    bias: Float[Array | np.ndarray, " N"],
) -> Logits:
    """Add `bias` to the last token of each sequence that the row's newest tokens are the beginning of.

    `prefixes` are right-aligned; -1 matches anything, so a sequence of one token always gets its bias; fillers have a
    bias of 0. Biases of one token add up. Source: transformers `SequenceBiasLogitsProcessor`, and with a bias
    of -inf `NoBadWordsLogitsProcessor`.
    """
    newest = newest_tokens(rows, prefixes.shape[1])
    matches = ((prefixes == -1) | (newest[:, None, :] == prefixes)).all(axis=2)
    added = jnp.where(matches, bias, 0.0)
    return logits + jnp.zeros_like(logits).at[:, last].add(added)


def newest_tokens(rows: Rows, number: int) -> Int[Array, "R P"]:
    """The last `number` tokens of each row, right-aligned; -2 where the row has not got so many."""
    slot = rows.lengths[:, None] - number + jnp.arange(number)
    return jnp.where(slot < 0, -2, jnp.take_along_axis(rows.tokens, jnp.maximum(slot, 0), axis=1))


def repetition_penalty(logits: Logits, rows: Rows, *, penalty: Number) -> Logits:
    """Divide positive and multiply negative logits of the tokens that the row holds.

    Source: Keskar et al. 2019 (arXiv 1909.05858); transformers `RepetitionPenaltyLogitsProcessor`.
    """
    return _penalise(logits, held(rows, rows.lengths, logits.shape[1]), penalty)


def encoder_repetition_penalty(logits: Logits, rows: Rows, *, inverse: Number) -> Logits:
    """Favour the tokens of the prompt: the repetition penalty `inverse`, one over the option's value, on them.

    Source: transformers `EncoderRepetitionPenaltyLogitsProcessor`, whose encoder is here the prompt.
    """
    return _penalise(logits, held(rows, rows.prompt_lengths, logits.shape[1]), inverse)


def _penalise(logits: Logits, tokens: Bool[Array, "R V"], penalty: Number) -> Logits:
    return jnp.where(tokens, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def held(rows: Rows, end: Int[Array, " R"], vocab_size: int) -> Bool[Array, "R V"]:
    """Which tokens stand in the slots before `end`."""
    number, slots = rows.tokens.shape
    column = jnp.where(jnp.arange(slots) < end[:, None], rows.tokens, vocab_size)  # past the end: dropped
    return jnp.zeros((number, vocab_size), bool).at[jnp.arange(number)[:, None], column].set(True, mode="drop")


def no_repeat_ngram(logits: Logits, rows: Rows, *, size: Count) -> Logits:
    """Remove every token that would complete an n-gram of `size` tokens that the row already holds.

    Source: Paulus et al. 2017 (arXiv 1705.04304); transformers `NoRepeatNGramLogitsProcessor`.
    """
    return _ban_repeats(logits, rows, rows.lengths, size)


def encoder_no_repeat_ngram(logits: Logits, rows: Rows, *, size: Count) -> Logits:
    """The same for the n-grams of the prompt only.

    Source: transformers `EncoderNoRepeatNGramLogitsProcessor`, whose encoder is here the prompt.
    """
    return _ban_repeats(logits, rows, rows.prompt_lengths, size)


def _ban_repeats(logits: Logits, rows: Rows, end: Int[Array, " R"], size: Count) -> Logits:
    """Remove the tokens before `end` that `size - 1` tokens precede which are now the row's newest."""
    number, slots = rows.tokens.shape

    def same_so_far(back: Int[Array, ""], same: Bool[Array, "R S"]) -> Bool[Array, "R S"]:
        newest = jnp.take_along_axis(rows.tokens, jnp.maximum(rows.lengths - back, 0)[:, None], axis=1)
        return same & (jnp.roll(rows.tokens, back, axis=1) == newest)

    slot = jnp.arange(slots)
    complete = (slot >= size - 1) & (slot < end[:, None])
    compared = jnp.where(size > end.max(), 1, size)  # a longer n-gram has nowhere to stand
    repeated = jax.lax.fori_loop(1, compared, same_so_far, complete)
    column = jnp.where(repeated, rows.tokens, logits.shape[1])  # past the end: dropped
    return logits.at[jnp.arange(number)[:, None], column].set(-jnp.inf, mode="drop")
