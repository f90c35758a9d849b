"""Processors that look at the logits alone: temperature, what cuts off unlikely tokens, and normalisation.

`keep` (static) is how many tokens a filter leaves at least: more than one only in beam sampling. All of them
remove by writing -inf. `rows` is part of every processor's signature; here nothing depends on it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgen.generation.processors.select import best_of, count, largest, ordered_keys, top_tokens
from jaxgen.generation.rows import Rows

Logits = Float[Array, "R V"]
Number = Float[Array | np.ndarray, ""]
Count = Int[Array | np.ndarray, ""]

TOP_H_TOKENS = 100  # all that top_h considers
USUAL_NUCLEUS = 256  # where top_p looks first, on CPU


def remove(logits: Logits, removed: Bool[Array, "R V"]) -> Logits:
    """Write -inf where `removed`."""
    return jnp.where(removed, -jnp.inf, logits)


def temperature(logits: Logits, rows: Rows, *, value: Number) -> Logits:
    """Divide by the temperature. Source: transformers `TemperatureLogitsWarper`."""
    return logits / value


def top_k(logits: Logits, rows: Rows, *, k: Count, bound: int) -> Logits:
    """Keep the k largest logits and every tie of the k-th; `bound` is a static upper limit of k, 0 for none.

    With a bound the largest few are sorted out, which is cheap while they are few; else they are counted.
    Source: Fan et al. 2018 (arXiv 1805.04833); transformers `TopKLogitsWarper`.
    """
    if bound:
        bound = min(bound, logits.shape[1])
        best, _ = best_of(logits, bound)
        kth = jnp.take(best, jnp.minimum(k, bound) - 1, axis=1)
        return remove(logits, logits < kth[:, None])
    keys, wanted = ordered_keys(logits), jnp.minimum(k, logits.shape[1])
    kth_key = largest(lambda key: count(keys >= key[:, None]) >= wanted, len(logits))
    return remove(logits, keys < kth_key[:, None])


def top_p(logits: Logits, rows: Rows, *, tail: Number, keep: int) -> Logits:
    """Keep the smallest set of most likely tokens whose probability reaches p = 1 - `tail`.

    In ascending order tokens go while the sum of probabilities, their own included, is at most `tail`; of equal
    logits the first ones go. This is what a stable sort gives, found without one.
    Source: Holtzman et al. 2019 (arXiv 1904.09751); transformers `TopPLogitsWarper`.
    """
    keys, probabilities = ordered_keys(logits), jax.nn.softmax(logits, axis=1)
    number, vocabulary = logits.shape

    def sum_below(key: Array) -> Float[Array, " R"]:
        return jnp.where(keys < key[:, None], probabilities, 0).sum(axis=1)

    def among_all() -> Array:
        return largest(lambda key: sum_below(key) <= tail, number)

    def among_the_best() -> Array:
        # A language model's nucleus is small: most rows need not go through the vocabulary once per bit.
        best, index = best_of(logits, USUAL_NUCLEUS)
        best_keys, shares = ordered_keys(best), jnp.take_along_axis(probabilities, index, axis=1)
        least = best_keys[:, -1]
        rest = sum_below(least + 1)
        shares = jnp.where(best_keys > least[:, None], shares, 0)  # equals of the last one may not be in the list
        near = largest(lambda key: rest + jnp.where(best_keys < key[:, None], shares, 0).sum(axis=1) <= tail, number)
        found = rest <= tail
        far = jax.lax.cond(found.all(), lambda: jnp.zeros(number, jnp.uint32), among_all)
        return jnp.where(found, near, far)  # each row by its own condition, whatever its neighbours need

    cut = jax.lax.platform_dependent(cpu=among_the_best, default=among_all)
    cut = jnp.minimum(cut, _kth_largest(logits, keep))
    below, tied = keys < cut[:, None], keys == cut[:, None]

    # How many of the tokens at the cut go: as many as the rest of the tail has room for, and `keep` allows.
    each = jnp.where(tied, probabilities, 0).max(axis=1)
    room = jnp.where(each > 0, jnp.floor((tail - sum_below(cut)) / each), vocabulary)
    gone = jnp.clip(room, 0, vocabulary).astype(jnp.int32)
    gone = jnp.minimum(gone, jnp.maximum(vocabulary - keep, 0) - count(below))

    index = jnp.arange(vocabulary, dtype=jnp.uint32)

    def end_of_gone() -> Array:
        bits = vocabulary.bit_length()
        return largest(lambda end: count(tied & (index < end[:, None])) <= gone, number, bits)

    # Usually one token is at the cut, and it stays. Not so with bfloat16 weights, whose logits are often equal.
    end = jax.lax.cond((gone > 0).any(), end_of_gone, lambda: jnp.zeros(number, jnp.uint32))
    return remove(logits, below | (tied & (index < end[:, None])))


def _kth_largest(logits: Logits, k: int) -> Array:
    kth = logits.max(axis=1) if k == 1 else best_of(logits, k)[0][:, -1]
    return ordered_keys(kth[:, None])[:, 0]


def min_p(logits: Logits, rows: Rows, *, log_p: Number, keep: int) -> Logits:
    """Remove tokens less likely than p times the most likely one; `log_p` is log(p).

    Source: Nguyen et al. 2024 (arXiv 2407.01082); transformers `MinPLogitsWarper`.
    """
    removed = logits - logits.max(axis=1, keepdims=True) < log_p
    return remove(logits, removed if keep == 1 else removed & ~top_tokens(logits, keep))


def top_h(logits: Logits, rows: Rows, *, share: Number) -> Logits:
    """Keep the most likely tokens while their part of the entropy is at most `share`, always at least one.

    Only the 100 most likely tokens, renormalised, are considered: all others go.
    Source: Potraghloo et al. 2025 (arXiv 2509.02510); transformers `TopHLogitsWarper`.
    """
    best, index = best_of(logits, TOP_H_TOKENS)
    log_probs = jax.nn.log_softmax(best, axis=1)
    parts = -_times_log(log_probs)
    kept = (jnp.cumsum(parts, axis=1) <= share * parts.sum(axis=1, keepdims=True)) & (jnp.exp(log_probs) > 0)
    kept = kept.at[:, 0].set(True)
    row = jnp.arange(len(logits))[:, None]
    return jnp.full_like(logits, -jnp.inf).at[row, index].set(jnp.where(kept, best, -jnp.inf))


def _times_log(log_probs: Logits) -> Logits:
    """p log p; 0 where p is 0."""
    probabilities = jnp.exp(log_probs)
    return jnp.where(probabilities > 0, probabilities * log_probs, 0)


def typical_p(logits: Logits, rows: Rows, *, mass: Number, keep: int) -> Logits:
    """Keep the tokens whose surprise is nearest to the entropy, until their probability reaches `mass`.

    All tokens as far from it as the last one are kept. Source: Meister et al. 2022 (arXiv 2202.00666);
    transformers `TypicalLogitsWarper`.
    """
    log_probs = jax.nn.log_softmax(logits, axis=1)
    probabilities, entropy = jnp.exp(log_probs), -_times_log(log_probs).sum(axis=1, keepdims=True)
    distance = jnp.abs(-log_probs - entropy)
    keys = ordered_keys(distance)

    def nearer(key: Array) -> Float[Array, " R"]:
        return jnp.where(keys < key[:, None], probabilities, 0).sum(axis=1)

    cut = largest(lambda key: nearer(key) < mass, len(logits))
    removed = keys > cut[:, None]
    return remove(logits, removed if keep == 1 else removed & ~top_tokens(-distance, keep))


def epsilon_cutoff(logits: Logits, rows: Rows, *, log_epsilon: Number, keep: int) -> Logits:
    """Remove tokens whose probability is below epsilon.

    Source: Hewitt et al. 2022 (arXiv 2210.15191); transformers `EpsilonLogitsWarper`.
    """
    removed = jax.nn.log_softmax(logits, axis=1) < log_epsilon
    return remove(logits, removed & _not_best(logits, keep))


def eta_cutoff(logits: Logits, rows: Rows, *, log_epsilon: Number, keep: int) -> Logits:
    """Remove tokens below `min(epsilon, sqrt(epsilon) * exp(-entropy))` in probability.

    Source: Hewitt et al. 2022 (arXiv 2210.15191); transformers `EtaLogitsWarper`.
    """
    log_probs = jax.nn.log_softmax(logits, axis=1)
    entropy = -_times_log(log_probs).sum(axis=1, keepdims=True)
    removed = log_probs < jnp.minimum(log_epsilon, log_epsilon / 2 - entropy)
    return remove(logits, removed & _not_best(logits, keep))


def _not_best(logits: Logits, keep: int) -> Bool[Array, "R V"]:
    """Smaller than the `keep`-th largest."""
    return ordered_keys(logits) < _kth_largest(logits, keep)[:, None]


def remove_invalid_values(logits: Logits, rows: Rows) -> Logits:
    """NaN becomes 0, infinities the largest numbers. Source: transformers `InfNanRemoveLogitsProcessor`."""
    finite = np.finfo(np.float32)
    return jnp.nan_to_num(logits, nan=0.0, posinf=finite.max, neginf=finite.min)


def renormalize(logits: Logits, rows: Rows) -> Logits:
    """Log-probabilities. Source: transformers `LogitNormalization`."""
    return jax.nn.log_softmax(logits, axis=1)
