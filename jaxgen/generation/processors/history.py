"""Processors that look back at the row's own tokens: biases, penalties, repeated n-grams.

Nothing here is as large as slots times vocabulary: tokens are compared with tokens, and what comes of it is
scattered into `[R, V]`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgen.errors import JaxgenError
from jaxgen.generation.processors.processor import Call, Count, Logits, Number, Processor, as_count, as_number
from jaxgen.generation.prompts.layout import bucket, pad_to
from jaxgen.generation.prompts.rows import Rows

Sequences = tuple[tuple[int, ...], ...]


class SequenceBias(Processor):
    """Add `bias` to the last token of each sequence that the row's newest tokens are the beginning of.

    `prefixes` are right-aligned; -1 matches anything, so a sequence of one token always gets its bias; fillers have a
    bias of 0. Biases of one token add up. Source: transformers `SequenceBiasLogitsProcessor`.
    """

    prefixes: Int[Array | np.ndarray, "N P"]
    last: Int[Array | np.ndarray, " N"]
    bias: Float[Array | np.ndarray, " N"]

    @classmethod
    def of(cls, value: tuple[tuple[tuple[int, ...], float], ...], call: Call) -> "SequenceBias":
        return cls(*_table(dict(value)))

    @staticmethod
    def tokens_in(value: Any) -> Iterable[int]:
        return [token for sequence, _ in value for token in sequence]

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        newest = newest_tokens(rows, self.prefixes.shape[1])
        matches = ((self.prefixes == -1) | (newest[:, None, :] == self.prefixes)).all(axis=2)
        added = jnp.where(matches, self.bias, 0.0)
        return logits + jnp.zeros_like(logits).at[:, self.last].add(added)


class BadWords(SequenceBias):
    """Remove the last token of each sequence that the row's newest tokens are the beginning of.

    Sequences that are an end-of-sequence token do not count. Source: transformers `NoBadWordsLogitsProcessor`.
    """

    @classmethod
    def of(cls, value: Sequences, call: Call) -> "BadWords":
        ends = {(token,) for token in call.eos}
        bad = dict.fromkeys((words for words in value if words not in ends), -math.inf)
        if not bad:
            raise JaxgenError(
                f"bad_words_ids={value} holds end-of-sequence tokens only, which it does not ban; "
                "use suppress_tokens or min_new_tokens"
            )
        return cls(*_table(bad))

    @staticmethod
    def tokens_in(value: Any) -> Iterable[int]:
        return [token for sequence in value for token in sequence]


def _table(bias_of: Mapping[tuple[int, ...], float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences without their last tokens, these, and the biases, in buckets."""
    number, longest = bucket(len(bias_of), 4), bucket(max(map(len, bias_of)) - 1)
    prefixes = np.full((number, longest), -1, np.int32)
    for row, sequence in enumerate(bias_of):
        prefixes[row, longest - len(sequence) + 1 :] = sequence[:-1]
    last = pad_to(np.array([sequence[-1] for sequence in bias_of], np.int32), (number,))
    bias = pad_to(np.array([*bias_of.values()], np.float32), (number,))
    return prefixes, last, bias


def newest_tokens(rows: Rows, number: int) -> Int[Array, "R P"]:
    """The last `number` tokens of each row, right-aligned; -2 where the row has not got so many."""
    slot = rows.lengths[:, None] - number + jnp.arange(number)
    return jnp.where(slot < 0, -2, jnp.take_along_axis(rows.tokens, jnp.maximum(slot, 0), axis=1))


class RepetitionPenalty(Processor):
    """Divide positive and multiply negative logits of the tokens that the row holds.

    Source: Keskar et al. 2019 (arXiv 1909.05858); transformers `RepetitionPenaltyLogitsProcessor`.
    """

    penalty: Number

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        return _penalise(logits, held(rows, rows.lengths, logits.shape[1]), self.penalty)


class EncoderRepetitionPenalty(Processor):
    """Favour the tokens of the prompt: the repetition penalty `inverse`, one over the option's value, on them.

    Source: transformers `EncoderRepetitionPenaltyLogitsProcessor`, whose encoder is here the prompt.
    """

    inverse: Number

    @classmethod
    def of(cls, value: float, call: Call) -> "EncoderRepetitionPenalty":
        return cls(as_number(1 / value))

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        return _penalise(logits, held(rows, rows.prompt_lengths, logits.shape[1]), self.inverse)


def _penalise(logits: Logits, tokens: Bool[Array, "R V"], penalty: Number) -> Logits:
    inverse = 1 / penalty  # as for a temperature
    return jnp.where(tokens, jnp.where(logits < 0, logits * penalty, logits * inverse), logits)


def held(rows: Rows, end: Int[Array, " R"], vocab_size: int) -> Bool[Array, "R V"]:
    """Which tokens stand in the slots before `end`."""
    number, slots = rows.tokens.shape
    column = jnp.where(jnp.arange(slots) < end[:, None], rows.tokens, vocab_size)  # past the end: dropped
    return jnp.zeros((number, vocab_size), bool).at[jnp.arange(number)[:, None], column].set(True, mode="drop")


class FrequencyPenalty(Processor):
    """Subtract the penalty from a token's logit for every time that the row has been given it.

    The prompt does not count. Source: OpenAI's API, and vLLM's, which have it beside the repetition penalty.
    """

    penalty: Number

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        given = _given(rows, logits.shape[1])
        # Sums, not products, which may be rounded together with the subtraction, or not: bits would differ.
        index = jnp.arange(len(given))[:, None]
        return logits - jnp.zeros_like(logits).at[index, given].add(self.penalty, mode="drop")


class PresencePenalty(Processor):
    """Subtract the penalty once from the logits of the tokens that the row has been given.

    The prompt does not count. Source: OpenAI's API, and vLLM's.
    """

    penalty: Number

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        given = _given(rows, logits.shape[1])
        index = jnp.arange(len(given))[:, None]
        return logits - jnp.zeros_like(logits).at[index, given].set(self.penalty, mode="drop")


def _given(rows: Rows, vocab_size: int) -> Int[Array, "R S"]:
    """The new tokens of each row, in their slots; elsewhere an id past the end."""
    slots = jnp.arange(rows.tokens.shape[1])
    new = (slots >= rows.prompt_lengths[:, None]) & (slots < rows.lengths[:, None])
    return jnp.where(new, rows.tokens, vocab_size)


class NoRepeatNgram(Processor):
    """Remove every token that would complete an n-gram of `size` tokens that the row already holds.

    Source: Paulus et al. 2017 (arXiv 1705.04304); transformers `NoRepeatNGramLogitsProcessor`.
    """

    size: Count

    @classmethod
    def of(cls, value: int, call: Call) -> "NoRepeatNgram":
        return cls(as_count(value))

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        return _ban_repeats(logits, rows, rows.lengths, self.size)


class EncoderNoRepeatNgram(NoRepeatNgram):
    """The same for the n-grams of the prompt only.

    Source: transformers `EncoderNoRepeatNGramLogitsProcessor`, whose encoder is here the prompt.
    """

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        return _ban_repeats(logits, rows, rows.prompt_lengths, self.size)


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
