"""The shape of a batch: how many rows, how long, and what is reserved for them."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.programs.inputs import BatchLayout, StaticOptions
from jaxgen.generation.programs.strict import Strict
from jaxgen.generation.prompts.contexts import contexts, note, short_context
from jaxgen.generation.prompts.layout import SMALLEST_PROMPT, SMALLEST_TOTAL, bucket
from jaxgen.generation.prompts.row_limits import row_limits


class Sizes(NamedTuple):
    """The shape of a batch, and where its rows end."""

    rows: int  # prompts, with the idle ones
    length: int  # of the prompts
    total: int  # of a row, prompt and new tokens
    new_tokens: int  # the most that a row may get
    max_lengths: Int[Array | np.ndarray, " B"]  # the length at which each prompt's rows end


def bucketed_sizes(
    config: GenerationConfig,
    samples: int,
    longest: int,
    lengths: Int[np.ndarray, " B"],
    model_config: Any,
    strict: Strict | None,
    groups: int = 1,
) -> Sizes:
    """Sizes rounded up, so that few of them are compiled; `longest` is the longest prompt, negative ones included.

    Outside of `strict` rows come in multiples of `groups`, each of which has as many.
    """
    max_lengths = row_limits(config, lengths, contexts(model_config, lengths), note(model_config))
    guided = config.is_guided  # a negative row may be longer than its row
    budget = int((max_lengths - lengths).max())
    if strict:
        total = strict.fits(max(int(max_lengths.max()), longest + budget if guided else 0))
        return Sizes(strict.prompts(len(lengths), samples), total, total, budget, max_lengths)
    length = bucket(longest, SMALLEST_PROMPT)
    # From the bucketed prompt, not the real one: the prompt's bucket then decides the total's.
    total = max(int(max_lengths.max()), length) if _by_length(config) and not guided else length + budget
    total = bucket(max(total, config.max_cache_len or 0), SMALLEST_TOTAL)
    rows = bucket(len(lengths))
    return Sizes(rows + -rows % groups, length, total, budget, max_lengths)


def sizes_inside_jit(config: GenerationConfig, lengths: Int[Array, " B"], columns: int, model_config: Any) -> Sizes:
    """Sizes as if every column were a real token: how many are is known to the device only, as are the limits."""
    batch = len(lengths)
    # A row that has fewer may be of the other kind, where there are two: all stay within the short context.
    context = short_context(model_config) or model_config.max_position_embeddings
    limits = np.full(batch, min(context, model_config.max_position_embeddings), np.int64)
    total = int(row_limits(config, np.full(batch, columns, np.int32), limits, note(model_config)).max())
    if _by_length(config):
        return Sizes(batch, columns, total, total, jnp.full(batch, total))
    return Sizes(batch, columns, total, total - columns, lengths + (total - columns))


def _by_length(config: GenerationConfig) -> bool:
    """Whether `max_length` says where rows end."""
    return config.max_new_tokens is None and config.max_length is not None


def layout_of(
    model: Any, config: GenerationConfig, static: StaticOptions, samples: int, sizes: Sizes, strict: Strict | None
) -> BatchLayout:
    """Sizes of rows, caches and records."""
    chunk = config.prefill_chunk_size or (strict.chunk if strict else 0)
    recorded = static.record_scores or static.record_logits or static.top_logprobs
    # No row has a use for more drafts than the tokens that it may get.
    drafts = min(static.drafts, sizes.total if strict else bucket(sizes.new_tokens, SMALLEST_TOTAL))
    static = dataclasses.replace(static, recorded=bucket(sizes.new_tokens, 16) if recorded else 0, drafts=drafts)
    return BatchLayout(
        static=static,
        samples=samples,
        total=sizes.total,
        slots=model.config.cache_slots(sizes.total, ahead=max(chunk, drafts + 1 if drafts else 0)),
        int8_cache=config.cache_implementation == "quantized",
        chunk=chunk,
    )
