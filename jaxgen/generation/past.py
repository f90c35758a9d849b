"""Keys and values that outlive a call: a chat goes on, or many prompts share a beginning, without reading it again."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxgen.cache import Int8Slots, KVCache
from jaxgen.errors import JaxgenError
from jaxgen.generation.controls import Plan
from jaxgen.generation.prompt import bucket, pad_to
from jaxgen.generation.read import Past, Prompts

# Beside a sliding window, what is new is read this many tokens at a time: the ring needs room for one piece.
WINDOWED_CHUNK = 256
SMALLEST_FRESH = 16


class PastKeyValues:
    """What a call has read, row by row; `generate(..., past_key_values=)` reads only what a prompt adds to it.

    The next prompt is passed whole, as in HF. How much of it is known is found by comparing tokens, so a prompt that
    differs early costs time and never correctness. One row serves any number of prompts. The object stays valid, and
    keeps its memory, until it is dropped. Source: transformers `Cache`, in the part that `generate` uses.
    """

    def __init__(self, tokens: Int[np.ndarray, "R S"], lengths: Int[np.ndarray, " R"], cache: KVCache):
        self.tokens, self.lengths, self.cache = tokens, lengths, cache

    def get_seq_length(self) -> int:
        """Tokens that the longest row holds."""
        return int(self.lengths.max())

    def continue_with(self, prompts: Prompts, plan: Plan, rows: int, model: Any) -> tuple[Prompts, Plan]:
        """Prompts and plan of a call that continues this; the first `rows` prompts are real.

        Raises `JaxgenError` if the rows do not fit together, or another model made this.
        """
        self._check(prompts, rows, model)
        sources = np.arange(rows) if len(self.lengths) == rows else np.zeros(rows, np.int64)
        known = [self._known(prompts, row, source, model) for row, source in enumerate(sources.tolist())]
        held = np.array(known, np.int32)
        fresh = bucket(int((prompts.lengths[:rows] - held).max()), SMALLEST_FRESH)
        window, chunk = model.config.sliding_window, plan.chunk
        if window is not None:
            chunk = min(fresh, chunk or WINDOWED_CHUNK)
        past = Past(
            cache=self.cache,
            sources=pad_to(sources.astype(np.int32), prompts.lengths.shape),
            held=pad_to(held, prompts.lengths.shape),
        )
        plan = dataclasses.replace(
            plan,
            fresh=fresh,
            chunk=chunk,
            slots=max(plan.slots, model.config.cache_slots(plan.total, ahead=chunk)),
            int8_cache=isinstance(self.cache[0].keys, Int8Slots),
        )
        return dataclasses.replace(prompts, past=past), plan

    def _known(self, prompts: Prompts, row: int, source: int, model: Any) -> int:
        """How many of a prompt's tokens need not be read again: never all, as its last one gives the logits."""
        most = min(int(prompts.lengths[row]) - 1, int(self.lengths[source]))
        differs = np.flatnonzero(prompts.tokens[row, :most] != self.tokens[source, :most])
        known = int(differs[0]) if differs.size else most
        window = model.config.sliding_window
        if window is not None and self.lengths[source] - self.cache[0].slots > max(known - window + 1, 0):
            return 0  # the ring has turned past what the next token would look at
        return known

    def _check(self, prompts: Prompts, rows: int, model: Any) -> None:
        if prompts.negative is not None:
            raise JaxgenError("past_key_values and guidance_scale exclude each other: the negative rows have no past")
        if len(self.lengths) not in (1, rows):
            raise JaxgenError(
                f"past_key_values holds {len(self.lengths)} rows, input_ids has {rows}; they must agree, or the past "
                "have one row that all continue"
            )
        config, layer = model.config, self.cache[0]
        values = layer.keys.values if isinstance(layer.keys, Int8Slots) else layer.keys
        made = (len(self.cache), values.shape[1], values.shape[3])
        needed = (config.num_hidden_layers, config.num_key_value_heads, config.head_size)
        if made != needed:
            raise JaxgenError(
                f"past_key_values has {made[0]} layers of {made[1]} heads of {made[2]}, the model {needed[0]} of "
                f"{needed[1]} of {needed[2]}: it comes from another model"
            )
