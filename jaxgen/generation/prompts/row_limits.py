"""How long each row may become: what was asked for, and what the model was made for."""

import numpy as np
from jaxtyping import Int

from jaxgen.errors import JaxgenError
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.options.table import DEFAULT_NEW_TOKENS


def row_limits(
    config: GenerationConfig, lengths: Int[np.ndarray, " B"], contexts: Int[np.ndarray, " B"], note: str = ""
) -> Int[np.ndarray, " B"]:
    """The length, prompt and new tokens, at which each row ends.

    `max_new_tokens` wins over `max_length`, as in HF; with neither, DEFAULT_NEW_TOKENS within the context. Padding
    counts nowhere: a row may be as long as if it were alone. Raises `JaxgenError` where nothing would be left to
    generate, and where a row would exceed its context, of which errors say `note`. Source: transformers
    `GenerationMixin._prepare_generated_length`.
    """
    row = int((contexts - lengths).argmin())  # which has the least room
    longest, context = int(lengths[row]), int(contexts[row])
    if (config.max_cache_len or 0) > contexts.max():
        raise JaxgenError(
            f"max_cache_len={config.max_cache_len} is more than the model's context of {contexts.max()} tokens{note}, "
            "which no row outgrows"
        )
    if longest >= context:
        raise JaxgenError(
            f"the prompt has {longest} tokens; the model's context of {context}{note} leaves no room for more"
        )
    if config.max_new_tokens is not None:
        asked, max_lengths = f"max_new_tokens={config.max_new_tokens}", lengths.astype(np.int64) + config.max_new_tokens
    elif config.max_length is not None:
        asked, max_lengths = f"max_length={config.max_length}", np.full(lengths.shape, config.max_length, np.int64)
        if lengths.max() >= config.max_length:
            raise JaxgenError(
                f"{asked} leaves nothing to generate after the {lengths.max()} tokens of row {lengths.argmax()}; "
                "set max_new_tokens instead"
            )
    else:
        max_lengths = np.minimum(lengths + DEFAULT_NEW_TOKENS, contexts)
        asked = f"the default of {max_lengths[row] - longest} new tokens"
    if (max_lengths > contexts).any():
        raise JaxgenError(
            f"a prompt of {longest} tokens and {asked} exceed the model's context of {context} tokens{note}; "
            f"at most {context - longest} new tokens fit"
        )
    name = "min_length" if config.min_new_tokens is None else "min_new_tokens"  # which wins, as in HF
    wide = lengths.astype(np.int64)  # a sum of two int32
    least = (
        wide + (config.min_new_tokens or 0) if name == "min_new_tokens" else np.full_like(wide, config.min_length or 0)
    )
    if (least > max_lengths).any():
        row = int((least - max_lengths).argmax())
        raise JaxgenError(
            f"{name}={getattr(config, name)} asks more of row {row} than the {max_lengths[row] - lengths[row]} tokens "
            f"that {asked} allows it"
        )
    return max_lengths.astype(np.int32)


def check_negative_lengths(
    lengths: Int[np.ndarray, " B"], new: Int[np.ndarray, " B"], contexts: Int[np.ndarray, " B"], note: str = ""
) -> None:
    """Raise `JaxgenError` where a negative prompt with its row's new tokens would exceed its context."""
    row = int((lengths + new - contexts).argmax())
    if lengths[row] + new[row] > contexts[row]:
        raise JaxgenError(
            f"negative_prompt_ids: the {lengths[row]} tokens of row {row} and its {new[row]} new ones exceed the "
            f"model's context of {contexts[row]} tokens{note}"
        )
