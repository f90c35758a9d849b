"""Processors that look at how long the row is: what may not come yet, what must come now.

`ids` are token ids filled up with -1. Lengths are those of the row without padding.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgen.generation.rows import Rows

Logits = Float[Array, "R V"]
Number = Float[Array | np.ndarray, ""]
Count = Int[Array | np.ndarray, ""]
TokenIds = Int[Array | np.ndarray, " E"]


def min_length(logits: Logits, rows: Rows, *, length: Count, ids: TokenIds) -> Logits:
    """Remove `ids` (end-of-sequence) while the row, prompt included, is shorter than `length`.

    Source: transformers `MinLengthLogitsProcessor`.
    """
    return _suppress(logits, ids, rows.lengths < length)


def min_new_tokens(logits: Logits, rows: Rows, *, number: Count, ids: TokenIds) -> Logits:
    """Remove `ids` (end-of-sequence) while the row has fewer than `number` new tokens.

    Source: transformers `MinNewTokensLengthLogitsProcessor`.
    """
    return _suppress(logits, ids, rows.new_tokens < number)


def suppress_tokens(logits: Logits, rows: Rows, *, ids: TokenIds) -> Logits:
    """Remove `ids` always. Source: transformers `SuppressTokensLogitsProcessor`."""
    return _suppress(logits, ids, jnp.ones(len(logits), bool))


def begin_suppress_tokens(logits: Logits, rows: Rows, *, ids: TokenIds, after_bos: Count) -> Logits:
    """Remove `ids` where the text begins: right after the prompt, or `after_bos` (0 or 1) later behind a lone token.

    It begins later where a prompt of one token is followed by a forced BOS.
    Source: transformers `SuppressTokensAtBeginLogitsProcessor`.
    """
    begin = rows.prompt_lengths + jnp.where(rows.prompt_lengths == 1, after_bos, 0)
    return _suppress(logits, ids, rows.lengths == begin)


def forced_bos(logits: Logits, rows: Rows, *, ids: TokenIds) -> Logits:
    """Allow nothing but `ids` for a row's second token. Source: transformers `ForcedBOSTokenLogitsProcessor`."""
    return _force(logits, ids, rows.lengths == 1)


def forced_eos(logits: Logits, rows: Rows, *, ids: TokenIds) -> Logits:
    """Allow nothing but `ids` for the last token of the row. Source: transformers `ForcedEOSTokenLogitsProcessor`."""
    return _force(logits, ids, rows.lengths == rows.limits - 1)


def exponential_decay(logits: Logits, rows: Rows, *, start: Count, log_factor: Number, ids: TokenIds) -> Logits:
    """Raise `ids` (end-of-sequence) by |logit| * (factor ** tokens past `start` - 1); `start` counts new tokens.

    -inf stays. A sum beyond float32 becomes its largest number, where transformers gets +inf, so that the token is
    certain instead of invalid. Source: transformers `ExponentialDecayLengthPenalty`.
    """
    most = np.finfo(np.float32).max
    past = jnp.maximum(rows.new_tokens - start, 0)
    growth = jnp.minimum(jnp.expm1(past * log_factor), most)[:, None]  # exact where the factor is close to 1
    raised = jnp.minimum(logits + jnp.abs(logits) * growth, most)
    changes = (past > 0)[:, None] & members(ids, logits.shape[1]) & jnp.isfinite(logits)
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
