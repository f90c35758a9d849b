"""Keys and values that outlive a call: a chat goes on, or many prompts share a beginning, without reading it again."""

import dataclasses
import weakref
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxgen.cache import Int8Slots, KVCache, of_layers
from jaxgen.errors import JaxgenError
from jaxgen.generation.programs.inputs import BatchLayout
from jaxgen.generation.programs.structure import references, same_arrays, split
from jaxgen.generation.prompts.contexts import short_context
from jaxgen.generation.prompts.layout import bucket, pad_to
from jaxgen.generation.prompts.prefill import Past, Prompts

# New tokens are prefilled so many at a time: scores take memory, and a ring needs room for one piece.
CHUNK = 256
SMALLEST_FRESH = 16


class PastKeyValues:
    """The keys and values of a call, row by row; `generate(..., past_key_values=)` prefills only what a prompt adds.

    The next prompt is passed whole, as in HF. How much of it is known is found by comparing tokens, so a prompt that
    differs early costs time and never correctness. One row serves any number of prompts. The object stays valid, and
    keeps its memory, until it is dropped. Source: transformers `Cache`, in the part that `generate` uses.
    """

    def __init__(self, model: Any, state: Any, rows: int, drafts: int = 0):
        """The keys and values of the first `rows` rows of a finished state, which drafted so many tokens at a time."""
        tokens, lengths = jax.device_get((state.tokens, state.lengths))
        self.tokens: Int[np.ndarray, "R S"] = tokens[:rows]
        self.lengths: Int[np.ndarray, " R"] = lengths[:rows] - 1  # the newest token is not in the cache
        self.cache: KVCache = state.cache
        # A row that has ended goes on reading its newest token, and rejected drafts were read after it: so many
        # slots of a ring hold something else than what was there.
        self._overwritten = drafts + 1
        self._model, self._weights = weakref.ref(model), references(split(model)[1])

    def get_seq_length(self) -> int:
        """Tokens that the longest row holds."""
        return int(self.lengths.max())

    def continue_with(
        self, prompts: Prompts, layout: BatchLayout, rows: int, model: Any
    ) -> tuple[Prompts, BatchLayout]:
        """Prompts and layout of a call that continues this; the first `rows` prompts are real.

        Raises `JaxgenError` if the rows do not fit together, or if the model is another one or has changed.
        """
        self._check(prompts, layout, rows, model)
        sources = np.arange(rows) if len(self.lengths) == rows else np.zeros(rows, np.int64)
        known = [self._known(prompts, row, source) for row, source in enumerate(sources.tolist())]
        held = np.array(known, np.int32)
        if not self._rotates_like(np.asarray(prompts.lengths[:rows]), sources, held, short_context(model.config)):
            return prompts, dataclasses.replace(layout, int8_cache=isinstance(self.cache[0].keys, Int8Slots))
        fresh = bucket(int((prompts.lengths[:rows] - held).max()), SMALLEST_FRESH)
        chunk = min(fresh, layout.chunk or CHUNK)
        past = Past(
            cache=self.cache,
            sources=pad_to(sources.astype(np.int32), prompts.lengths.shape),
            held=pad_to(held, prompts.lengths.shape),
        )
        ahead = model.config.cache_slots(layout.total, ahead=chunk)
        layout = dataclasses.replace(
            layout,
            fresh=fresh,
            chunk=chunk,
            slots=max(layout.slots, ahead, key=lambda slots: of_layers(slots, len(self.cache))),  # layer by layer
            int8_cache=isinstance(self.cache[0].keys, Int8Slots),
        )
        return dataclasses.replace(prompts, past=past), layout

    def _known(self, prompts: Prompts, row: int, source: int) -> int:
        """How many of a prompt's tokens need not be prefilled again: never all, as its last one gives the logits."""
        most = min(int(prompts.lengths[row]) - 1, int(self.lengths[source]))
        differs = np.flatnonzero(prompts.tokens[row, :most] != self.tokens[source, :most])
        known = int(differs[0]) if differs.size else most
        end = int(self.lengths[source]) + self._overwritten
        for slots, window in {(layer.slots, layer.window) for layer in self.cache}:
            first = end - slots  # position that is surely there
            if window is not None and first > max(known - window + 1, 0):
                return 0  # the ring has turned past what the next token would look at
        return known

    def _rotates_like(
        self, lengths: Int[np.ndarray, " B"], sources: Int[np.ndarray, " B"], held: Int[np.ndarray, " B"], short: Any
    ) -> bool:
        """Whether what is held was rotated as the prompts are; else all is read anew (`prompts.contexts`)."""
        if short is None:
            return True
        was_long, is_long = self.lengths[sources] >= short, lengths > short
        return bool(((was_long == is_long) & (~is_long | (held >= short))).all())

    def _check(self, prompts: Prompts, layout: BatchLayout, rows: int, model: Any) -> None:
        if prompts.negative is not None:
            raise JaxgenError("past_key_values and guidance_scale exclude each other: the negative rows have no past")
        if len(self.lengths) not in (1, rows):
            raise JaxgenError(
                f"past_key_values holds {len(self.lengths)} rows, input_ids has {rows}; they must agree, or the past "
                "have one row that all continue"
            )
        if self._model() is not model or not same_arrays(self._weights, split(model)[1]):
            raise JaxgenError("past_key_values comes from another model, or from this one before its weights changed")
        if layout.int8_cache and not isinstance(self.cache[0].keys, Int8Slots):
            raise JaxgenError(
                "cache_implementation='quantized', but past_key_values is not: give the option from the first call on"
            )
