"""Processors that look at how long the row is: what may not come yet, what must come now.

Lengths are those of the row without padding.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxgen.errors import JaxgenError
from jaxgen.generation.processors.processor import (
    Call,
    Count,
    Logits,
    Number,
    Processor,
    TokenIds,
    as_count,
    as_ids,
    as_number,
    several,
)
from jaxgen.generation.prompts.rows import Rows


class MinLength(Processor):
    """Remove `ids` (end-of-sequence) while the row, prompt included, is shorter than `length`.

    Source: transformers `MinLengthLogitsProcessor`.
    """

    length: Count
    ids: TokenIds

    @classmethod
    def of(cls, value: int, call: Call) -> "MinLength | None":
        if not call.eos or call.options["min_new_tokens"] is not None:  # which wins, as in HF, even at 0
            return None
        return cls(as_count(value), as_ids(call.eos))

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        return _suppress(logits, self.ids, rows.lengths < self.length)


class MinNewTokens(Processor):
    """Remove `ids` (end-of-sequence) while the row has fewer than `number` new tokens.

    Source: transformers `MinNewTokensLengthLogitsProcessor`.
    """

    number: Count
    ids: TokenIds

    @classmethod
    def of(cls, value: int, call: Call) -> "MinNewTokens | None":
        return cls(as_count(value), as_ids(call.eos)) if call.eos else None

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        return _suppress(logits, self.ids, rows.new_tokens < self.number)


class _OfTokens(Processor):
    """A processor whose option is one token id or several."""

    ids: TokenIds

    @classmethod
    def of(cls, value: Any, call: Call) -> "_OfTokens":
        return cls(as_ids(several(value)))

    @staticmethod
    def tokens_in(value: Any) -> Iterable[int]:
        return several(value)


class SuppressTokens(_OfTokens):
    """Remove `ids` always. Source: transformers `SuppressTokensLogitsProcessor`."""

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        return _suppress(logits, self.ids, jnp.ones(len(logits), bool))


class BeginSuppressTokens(_OfTokens):
    """Remove `ids` where the text begins: right after the prompt, or `after_bos` (0 or 1) later behind a lone token.

    It begins later where a prompt of one token is followed by a forced BOS.
    Source: transformers `SuppressTokensAtBeginLogitsProcessor`.
    """

    after_bos: Count

    @classmethod
    def of(cls, value: tuple[int, ...], call: Call) -> "BeginSuppressTokens":
        return cls(as_ids(value), as_count(call.options["forced_bos_token_id"] is not None))

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        begin = rows.prompt_lengths + jnp.where(rows.prompt_lengths == 1, self.after_bos, 0)
        return _suppress(logits, self.ids, rows.lengths == begin)


class ForcedBos(_OfTokens):
    """Allow nothing but `ids` for a row's second token. Source: transformers `ForcedBOSTokenLogitsProcessor`."""

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        return _force(logits, self.ids, rows.lengths == 1)


class ForcedEos(_OfTokens):
    """Allow nothing but `ids` for the last token of the row. Source: transformers `ForcedEOSTokenLogitsProcessor`."""

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        return _force(logits, self.ids, rows.lengths == rows.max_lengths - 1)


class ExponentialDecay(Processor):
    """Raise `ids` (end-of-sequence) by |logit| * (factor ** tokens past `start` - 1); `start` counts new tokens.

    -inf stays. A sum beyond float32 becomes its largest number, where transformers gets +inf, so that the token is
    certain instead of invalid. Source: transformers `ExponentialDecayLengthPenalty`.
    """

    start: Count
    log_factor: Number
    ids: TokenIds

    @classmethod
    def of(cls, value: tuple[int, float], call: Call) -> "ExponentialDecay":
        if not call.eos:
            name = "exponential_decay_length_penalty"
            raise JaxgenError(f"{name}={value} raises the end-of-sequence token, but eos_token_id is not set")
        return cls(as_count(value[0]), as_number(math.log(value[1])), as_ids(call.eos))

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        most = np.finfo(np.float32).max
        past = jnp.maximum(rows.new_tokens - self.start, 0)
        growth = jnp.minimum(jnp.expm1(past * self.log_factor), most)[:, None]  # exact where the factor is close to 1
        raised = jnp.minimum(logits + jnp.abs(logits) * growth, most)
        changes = (past > 0)[:, None] & members(self.ids, logits.shape[1]) & jnp.isfinite(logits)
        return jnp.where(changes, raised, logits)


def members(ids: TokenIds, vocab_size: int) -> Bool[Array, " V"]:
    """Which tokens are among `ids`."""
    column = jnp.where(ids < 0, vocab_size, ids)  # past the end: dropped
    return jnp.zeros(vocab_size, bool).at[column].set(True, mode="drop")


def _suppress(logits: Logits, ids: TokenIds, where: Bool[Array, " R"]) -> Logits:
    return jnp.where(where[:, None] & members(ids, logits.shape[1]), -jnp.inf, logits)


def _force(logits: Logits, ids: TokenIds, where: Bool[Array, " R"]) -> Logits:
    only = jnp.where(members(ids, logits.shape[1]), 0.0, -jnp.inf)
    return jnp.where(where[:, None], only, logits)
