"""Logits processors: pure functions on float32 logits `[B, V]`; what they remove becomes -inf.

`process` applies the ones that are switched on, in HF's order. Which ones run is static; their numbers are
traced, so changing a temperature never recompiles. (top_k has a static bound besides: 64, 128, 256, ...)
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgen.generation.config import GenerationConfig

Logits = Float[Array, "B V"]
Scalar = Float[Array | np.ndarray, ""]
Count = Int[Array | np.ndarray, ""]
TokenIds = Int[Array | np.ndarray, " E"]


def repetition_penalty(logits: Logits, seen: Bool[Array, "B V"], penalty: Scalar) -> Logits:
    """Divide positive and multiply negative logits of seen tokens by `penalty`.

    Source: Keskar et al. 2019 (arXiv 1909.05858); transformers `RepetitionPenaltyLogitsProcessor`.
    """
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def suppress_eos(logits: Logits, eos_ids: TokenIds, active: Bool[Array, " B"]) -> Logits:
    """Remove the end-of-sequence tokens in `active` rows; -1 in `eos_ids` is a filler.

    Source: transformers `MinNewTokensLengthLogitsProcessor`.
    """
    vocabulary = jnp.arange(logits.shape[1])
    is_eos = (vocabulary[:, None] == eos_ids).any(axis=1)
    return jnp.where(active[:, None] & is_eos, -jnp.inf, logits)


def temperature(logits: Logits, value: Scalar) -> Logits:
    """Divide by the temperature. Source: transformers `TemperatureLogitsWarper`."""
    return logits / value


def top_k(logits: Logits, k: Count, bound: int) -> Logits:
    """Keep the k largest logits and every tie of the k-th; `bound` is a static upper limit of k.

    Source: Fan et al. 2018 (arXiv 1805.04833); transformers `TopKLogitsWarper`.
    """
    bound = min(bound, logits.shape[1])
    largest, _ = jax.lax.top_k(logits, bound)
    kth = jnp.take(largest, jnp.minimum(k, bound) - 1, axis=1)
    return jnp.where(logits < kth[:, None], -jnp.inf, logits)


def top_p(logits: Logits, p: Scalar) -> Logits:
    """Keep the smallest set of most likely tokens whose probability reaches p, always at least one.

    Source: Holtzman et al. 2019 (arXiv 1904.09751); transformers `TopPLogitsWarper`, including its ascending
    cumulative sum and its treatment of ties.
    """
    order = jnp.argsort(logits, axis=1, stable=True)
    cumulative = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=1), axis=1), axis=1)
    removed = (cumulative <= 1 - p).at[:, -1].set(False)
    rank = jnp.argsort(order, axis=1)
    return jnp.where(jnp.take_along_axis(removed, rank, axis=1), -jnp.inf, logits)


def min_p(logits: Logits, p: Scalar) -> Logits:
    """Remove tokens less likely than p times the most likely one.

    Source: Nguyen et al. 2024 (arXiv 2407.01082); transformers `MinPLogitsWarper`.
    """
    probabilities = jax.nn.softmax(logits, axis=1)
    return jnp.where(probabilities < p * probabilities.max(axis=1, keepdims=True), -jnp.inf, logits)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Which processors run: the static half of a GenerationConfig. Two configs with one recipe share executables."""

    do_sample: bool
    repetition_penalty: bool
    min_new_tokens: bool
    top_k_bound: int  # 0: off
    top_p: bool
    min_p: bool

    @classmethod
    def of(cls, config: GenerationConfig) -> "Recipe":
        """The recipe of an effective configuration. Warpers only run when sampling, as in HF."""
        sample = bool(config.do_sample)
        k = config.top_k or 0
        return cls(
            do_sample=sample,
            repetition_penalty=config.repetition_penalty not in (None, 1.0),
            min_new_tokens=bool(config.min_new_tokens) and bool(config.eos_token_ids),
            top_k_bound=max(64, 1 << (k - 1).bit_length()) if sample and k else 0,
            top_p=sample and config.top_p not in (None, 1.0),
            min_p=sample and bool(config.min_p),
        )


@jax.tree_util.register_dataclass
@no_type_check  # JAX rebuilds it around placeholders
@dataclasses.dataclass
class Controls:
    """The numbers of a GenerationConfig: traced, so that changing one compiles nothing."""

    temperature: Scalar
    top_k: Count
    top_p: Scalar
    min_p: Scalar
    repetition_penalty: Scalar
    min_new_tokens: Count
    max_new_tokens: Count
    eos_ids: TokenIds  # filled up with -1


def process(
    logits: Logits,
    seen: Bool[Array, "B V"] | None,
    new_tokens: Int[Array, " B"],
    controls: Controls,
    recipe: Recipe,
) -> Logits:
    """The logits to draw from, given what each row has seen and how many new tokens it has."""
    if seen is not None:
        logits = repetition_penalty(logits, seen, controls.repetition_penalty)
    if recipe.min_new_tokens:
        logits = suppress_eos(logits, controls.eos_ids, new_tokens < controls.min_new_tokens)
    if recipe.do_sample:
        logits = temperature(logits, controls.temperature)
    if recipe.top_k_bound:
        logits = top_k(logits, controls.top_k, recipe.top_k_bound)
    if recipe.top_p:
        logits = top_p(logits, controls.top_p)
    if recipe.min_p:
        logits = min_p(logits, controls.min_p)
    return logits
