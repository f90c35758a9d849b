"""How long a row may become; of some models, which have a `short_context`, that depends on its prompt.

Phi's rotary positions are others in rows beyond its original context, from the first token on: what a cache holds of a
shorter row is worth nothing there.
"""

from typing import Any

import numpy as np
from jaxtyping import Int

from jaxgen.errors import UnsupportedError


def short_context(config: Any) -> int | None:
    """The length beyond which a row that begins within it may not grow, if there is one."""
    return getattr(config, "short_context", None)


def contexts(config: Any, lengths: Int[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
    """How long each row may become, prompt and new tokens, by the length of its prompt."""
    return contexts_in(np, config, lengths).astype(np.int64)


def contexts_in(xp: Any, config: Any, lengths: Any) -> Any:
    """The same in numpy, or in jax.numpy inside jit."""
    most = config.max_position_embeddings
    short = min(most if (given := short_context(config)) is None else given, most)
    return xp.where(lengths <= short, short, most)


def context_of(config: Any, length: int) -> int:
    """The same of one row."""
    return int(contexts(config, np.array([length]))[0])


def note(config: Any) -> str:
    """What an error says besides, about a context that is not the model's longest."""
    short = short_context(config)
    if short is None or short >= config.max_position_embeddings:
        return ""
    return f" (of rows whose prompt has at most {short}: longer ones rotate otherwise from their first token on)"


def check_pieces(config: Any, lengths: Int[np.ndarray, " B"]) -> None:
    """Raise `UnsupportedError` for a prompt beyond the short context that is to be read in pieces."""
    short = short_context(config)
    if short is not None and (lengths > short).any():
        row = int(lengths.argmax())
        raise UnsupportedError(
            f"prefill_chunk_size or strict: row {row} has {lengths[row]} tokens, and beyond {short} this model rotates "
            "otherwise from the first token on, so that such a prompt is read at once; leave the option out"
        )
