"""Processors that look at the logits alone: temperature, what cuts off unlikely tokens, and normalisation.

`keep` is how many tokens a filter leaves at least: more than one only in beam sampling.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxgen.generation.processors.processor import (
    Call,
    Count,
    Filter,
    Logits,
    Number,
    Processor,
    as_count,
    as_number,
    static,
)
from jaxgen.generation.processors.select import best_of, count, largest, ordered_keys, top_tokens
from jaxgen.generation.prompts.rows import Rows
from jaxgen.rounding import rounded

TOP_H_TOKENS = 100  # all that top_h considers
USUAL_NUCLEUS = 256  # where top_p looks first, on CPU
# A larger top_k is counted out instead of sorted out: from here on that is faster.
LARGEST_TOP_K_BOUND = 1024


def remove(logits: Logits, removed: Bool[Array, "R V"]) -> Logits:
    """Write -inf where `removed`."""
    return jnp.where(removed, -jnp.inf, logits)


class Temperature(Filter):
    """Divide by the temperature. Source: transformers `TemperatureLogitsWarper`."""

    always = True  # at 1.0, where it changes nothing, a sweep over it would compile twice

    value: Number

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        # What XLA makes of a division by one number, and not of one by many.
        return rounded(logits * (1 / self.value))


class TopH(Filter):
    """Keep the most likely tokens while their part of the entropy is at most `share`, always at least one.

    Only the 100 most likely tokens, renormalised, are considered: all others go, at a share of 1 too.
    Source: Potraghloo et al. 2025 (arXiv 2509.02510); transformers `TopHLogitsWarper`.
    """

    always = True

    share: Number

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        best, index = best_of(logits, TOP_H_TOKENS)
        log_probs = jax.nn.log_softmax(best, axis=1)
        parts = -_times_log(log_probs)
        kept = jnp.cumsum(parts, axis=1) <= self.share * parts.sum(axis=1, keepdims=True)
        kept = (kept & (jnp.exp(log_probs) > 0)).at[:, 0].set(True)
        row = jnp.arange(len(logits))[:, None]
        return jnp.full_like(logits, -jnp.inf).at[row, index].set(jnp.where(kept, best, -jnp.inf))


class TopK(Filter):
    """Keep the k largest logits and every tie of the k-th; `bound` is an upper limit of k, 0 for none.

    With a bound the largest few are sorted out, which is cheap while they are few; else they are counted.
    Source: Fan et al. 2018 (arXiv 1805.04833); transformers `TopKLogitsWarper`.
    """

    k: Count
    bound: int = static()

    @classmethod
    def of(cls, value: int, call: Call) -> "TopK":
        k = max(value, call.keep)
        bound = max(64, 1 << (k - 1).bit_length())  # few programs
        return cls(as_count(k), bound if bound <= LARGEST_TOP_K_BOUND else 0)

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        if self.bound:
            bound = min(self.bound, logits.shape[1])
            best, _ = best_of(logits, bound)
            place = jnp.broadcast_to(jnp.minimum(self.k, bound) - 1, len(logits))  # of all rows, or of each
            return remove(logits, logits < jnp.take_along_axis(best, place[:, None], axis=1))
        keys, wanted = ordered_keys(logits), jnp.minimum(self.k, logits.shape[1])
        kth_key = largest(lambda key: count(keys >= key[:, None]) >= wanted, len(logits))
        return remove(logits, keys < kth_key[:, None])


class TopP(Filter):
    """Keep the smallest set of most likely tokens whose probability reaches p = 1 - `tail`.

    In ascending order tokens go while the sum of probabilities, their own included, is at most `tail`; of equal
    logits the first ones go. This is what a stable sort gives, found without one.
    Source: Holtzman et al. 2019 (arXiv 1904.09751); transformers `TopPLogitsWarper`.
    """

    tail: Number
    keep: int = static()

    @classmethod
    def of(cls, value: float, call: Call) -> "TopP":
        return cls(as_number(1 - value), call.keep)

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        keys, probabilities = ordered_keys(logits), jax.nn.softmax(logits, axis=1)
        number, vocabulary = logits.shape
        cut = jnp.minimum(self._cut(logits, keys, probabilities), _kth_largest(logits, self.keep))
        below, tied = keys < cut[:, None], keys == cut[:, None]

        # How many of the tokens at the cut go: as many as the rest of the tail has room for, and `keep` allows.
        each = jnp.where(tied, probabilities, 0).max(axis=1)
        room = jnp.where(each > 0, jnp.floor((self.tail - _sum_below(cut, keys, probabilities)) / each), vocabulary)
        gone = jnp.clip(room, 0, vocabulary).astype(jnp.int32)
        gone = jnp.minimum(gone, jnp.maximum(vocabulary - self.keep, 0) - count(below))

        index = jnp.arange(vocabulary, dtype=jnp.uint32)

        def end_of_gone() -> Array:
            bits = vocabulary.bit_length()
            return largest(lambda end: count(tied & (index < end[:, None])) <= gone, number, bits)

        # Usually one token is at the cut, and it stays. Not so with bfloat16 weights, whose logits are often equal.
        end = jax.lax.cond((gone > 0).any(), end_of_gone, lambda: jnp.zeros(number, jnp.uint32))
        return remove(logits, below | (tied & (index < end[:, None])))

    def _cut(self, logits: Logits, keys: Array, probabilities: Logits) -> Array:
        """The key of the least likely token that stays: the largest below which at most `tail` lies."""
        number, tail = len(logits), self.tail

        def among_all() -> Array:
            return largest(lambda key: _sum_below(key, keys, probabilities) <= tail, number)

        def among_the_best() -> Array:
            # A language model's nucleus is small: most rows need not go through the vocabulary once per bit.
            best, index = best_of(logits, USUAL_NUCLEUS)
            best_keys, shares = ordered_keys(best), jnp.take_along_axis(probabilities, index, axis=1)
            least = best_keys[:, -1]
            rest = _sum_below(least + 1, keys, probabilities)
            shares = jnp.where(best_keys > least[:, None], shares, 0)  # equals of the last one may not be in the list
            near = largest(lambda key: rest + _sum_below(key, best_keys, shares) <= tail, number)
            found = rest <= tail
            far = jax.lax.cond(found.all(), lambda: jnp.zeros(number, jnp.uint32), among_all)
            return jnp.where(found, near, far)  # each row by its own condition, whatever its neighbours need

        return jax.lax.platform_dependent(cpu=among_the_best, default=among_all)


def _sum_below(key: Array, keys: Array, probabilities: Array) -> Float[Array, " R"]:
    return jnp.where(keys < key[:, None], probabilities, 0).sum(axis=1)


def _kth_largest(logits: Logits, k: int) -> Array:
    kth = logits.max(axis=1) if k == 1 else best_of(logits, k)[0][:, -1]
    return ordered_keys(kth[:, None])[:, 0]


class MinP(Filter):
    """Remove tokens less likely than p times the most likely one; `log_p` is log(p).

    Source: Nguyen et al. 2024 (arXiv 2407.01082); transformers `MinPLogitsWarper`.
    """

    log_p: Number
    keep: int = static()

    @classmethod
    def of(cls, value: float, call: Call) -> "MinP":
        return cls(as_number(math.log(value)), call.keep)

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        removed = logits - logits.max(axis=1, keepdims=True) < self.log_p
        return remove(logits, removed if self.keep == 1 else removed & ~top_tokens(logits, self.keep))


class TypicalP(Filter):
    """Keep the tokens whose surprise is nearest to the entropy, until their probability reaches `mass`.

    All tokens as far from it as the last one are kept. Source: Meister et al. 2022 (arXiv 2202.00666);
    transformers `TypicalLogitsWarper`.
    """

    mass: Number
    keep: int = static()

    @classmethod
    def of(cls, value: float, call: Call) -> "TypicalP":
        return cls(as_number(value), call.keep)

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        log_probs = jax.nn.log_softmax(logits, axis=1)
        probabilities, entropy = jnp.exp(log_probs), -_times_log(log_probs).sum(axis=1, keepdims=True)
        distance = jnp.abs(-log_probs - entropy)
        keys = ordered_keys(distance)
        cut = largest(lambda key: _sum_below(key, keys, probabilities) < self.mass, len(logits))
        removed = keys > cut[:, None]
        return remove(logits, removed if self.keep == 1 else removed & ~top_tokens(-distance, self.keep))


class EpsilonCutoff(Filter):
    """Remove tokens whose probability is below epsilon.

    Source: Hewitt et al. 2022 (arXiv 2210.15191); transformers `EpsilonLogitsWarper`.
    """

    log_epsilon: Number
    keep: int = static()

    @classmethod
    def of(cls, value: float, call: Call) -> "EpsilonCutoff":
        return cls(as_number(math.log(value)), call.keep)

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        removed = jax.nn.log_softmax(logits, axis=1) < self.log_epsilon
        return remove(logits, removed & _not_best(logits, self.keep))


class EtaCutoff(Filter):
    """Remove tokens below `min(epsilon, sqrt(epsilon) * exp(-entropy))` in probability.

    Source: Hewitt et al. 2022 (arXiv 2210.15191); transformers `EtaLogitsWarper`.
    """

    log_epsilon: Number
    keep: int = static()

    @classmethod
    def of(cls, value: float, call: Call) -> "EtaCutoff":
        return cls(as_number(math.log(value)), call.keep)

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        log_probs = jax.nn.log_softmax(logits, axis=1)
        entropy = -_times_log(log_probs).sum(axis=1, keepdims=True)
        removed = log_probs < jnp.minimum(self.log_epsilon, self.log_epsilon / 2 - entropy)
        return remove(logits, removed & _not_best(logits, self.keep))


def _times_log(log_probs: Logits) -> Logits:
    """p log p; 0 where p is 0."""
    probabilities = jnp.exp(log_probs)
    return jnp.where(probabilities > 0, probabilities * log_probs, 0)


def _not_best(logits: Logits, keep: int) -> Bool[Array, "R V"]:
    """Smaller than the `keep`-th largest."""
    return ordered_keys(logits) < _kth_largest(logits, keep)[:, None]


class RemoveInvalidValues(Processor):
    """NaN becomes 0, infinities the largest numbers. Source: transformers `InfNanRemoveLogitsProcessor`."""

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        finite = np.finfo(np.float32)
        return jnp.nan_to_num(logits, nan=0.0, posinf=finite.max, neginf=finite.min)


class Renormalize(Processor):
    """Log-probabilities. Source: transformers `LogitNormalization`."""

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        return jax.nn.log_softmax(logits, axis=1)
