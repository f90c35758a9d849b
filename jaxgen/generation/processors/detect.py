"""Is there a watermark in a text? The z-test of Kirchenbauer et al. on the number of green tokens."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxgen.errors import JaxgenError
from jaxgen.generation.processors.watermark import WatermarkingConfig, lefthash_words, selfhash_words
from jaxgen.generation.prompt import bucket, pad_to
from jaxgen.lowering import own_rules


@dataclasses.dataclass(frozen=True)
class WatermarkDetectorOutput:
    """What a detector found, one entry per row. Source: transformers `WatermarkDetectorOutput`."""

    num_tokens_scored: Float[np.ndarray, " B"]
    num_green_tokens: Float[np.ndarray, " B"]
    green_fraction: Float[np.ndarray, " B"]
    z_score: Float[np.ndarray, " B"]  # standard deviations above what a text without a watermark has
    p_value: Float[np.ndarray, " B"]  # the probability of such a score in a text without a watermark
    prediction: Bool[np.ndarray, " B"]  # whether there is one
    confidence: Float[np.ndarray, " B"]  # 1 - p_value


class WatermarkDetector:
    """Tells texts that were generated with a watermark from others, given the configuration that made it.

    `model_config` gives `vocab_size` and `bos_token_id`; `watermarking_config` is jaxgen's, transformers' or a dict.
    With `ignore_repeated_ngrams` a token in the same context counts once: use it for repetitive texts. Watermarks
    made by torch have other greenlists and are not found. Source: transformers `WatermarkDetector`.
    """

    def __init__(self, model_config: Any, watermarking_config: Any, *, ignore_repeated_ngrams: bool = False):
        self.config = WatermarkingConfig.from_hf(watermarking_config)
        self.vocab_size, self.bos_token_id = model_config.vocab_size, model_config.bos_token_id
        self.ignore_repeated_ngrams = ignore_repeated_ngrams

    def __call__(self, input_ids: Any, z_threshold: float = 3.0, return_dict: bool = False) -> Any:
        """Whether each row of `input_ids` [B, T] is watermarked: bool [B], its z-score exceeds `z_threshold`.

        With `return_dict` a `WatermarkDetectorOutput`, the numbers behind it. A BOS that all rows begin with is not
        counted; every other token is, padding too. Raises `JaxgenError` for ids that are no such table, that begin
        with BOS in some rows only, or that are too few.
        """
        ids = self._read(input_ids)
        scored, green = self._count(ids)
        ratio = self.config.greenlist_ratio
        z_score = (green - ratio * scored) / np.sqrt(scored * ratio * (1 - ratio))
        prediction = z_score > z_threshold
        if not return_dict:
            return prediction
        p_value = np.array([0.5 * math.erfc(z / math.sqrt(2)) for z in z_score])
        return WatermarkDetectorOutput(scored, green, green / scored, z_score, p_value, prediction, 1 - p_value)

    def _read(self, input_ids: Any) -> Int[np.ndarray, "B T"]:
        try:
            ids = np.asarray(input_ids)
        except ValueError as error:
            raise JaxgenError("input_ids has rows of different lengths; pass texts of one length at a time") from error
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or not len(ids):
            raise JaxgenError(f"input_ids has shape {ids.shape} and dtype {ids.dtype}; expected ints [batch, length]")
        if ((ids < 0) | (ids >= self.vocab_size)).any():
            row, column = np.argwhere((ids < 0) | (ids >= self.vocab_size))[0]
            raise JaxgenError(
                f"input_ids[{row}, {column}]={ids[row, column]} is outside the vocabulary of {self.vocab_size} tokens"
            )
        begins = ids[:, :1] == self.bos_token_id
        if begins.any() != begins.all():
            row = int(np.flatnonzero(~begins)[0])
            raise JaxgenError(f"input_ids: row {row} does not begin with BOS ({self.bos_token_id}), others do")
        ids = ids[:, 1:] if begins.size and begins.all() else ids
        if ids.shape[1] - self.config.context_width < 1:
            raise JaxgenError(
                f"input_ids has {ids.shape[1]} tokens per row without BOS; "
                f"context_width={self.config.context_width} needs at least one more than that"
            )
        return ids.astype(np.int32)

    @own_rules()
    def _count(self, ids: Int[np.ndarray, "B T"]) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, " B"]]:
        """Tokens that were scored, and how many of them are green."""
        selfhash = self.config.seeding_scheme == "selfhash"
        width = self.config.context_width + (not selfhash)
        windows = np.lib.stride_tricks.sliding_window_view(ids, width, axis=1)
        unique, inverse = np.unique(windows.reshape(-1, width), axis=0, return_inverse=True)
        hashes = (selfhash_words if selfhash else lefthash_words)(
            self.config.key_words, pad_to(unique, (bucket(len(unique), 64), width))
        )
        green = (np.asarray(hashes)[: len(unique)] < self.config.threshold)[inverse.reshape(windows.shape[:2])]
        if not self.ignore_repeated_ngrams:
            return np.full(len(ids), windows.shape[1], float), green.sum(axis=1).astype(float)
        kept = np.array([_first_of_each(row) for row in inverse.reshape(windows.shape[:2])])
        return kept.sum(axis=1).astype(float), (green & kept).sum(axis=1).astype(float)


def _first_of_each(values: Int[np.ndarray, " T"]) -> Bool[np.ndarray, " T"]:
    first = np.zeros(len(values), bool)
    first[np.unique(values, return_index=True)[1]] = True
    return first
