"""Watermarks: a bias towards a "greenlist" of tokens that the preceding ones choose, and the test for it.

Kirchenbauer et al. 2023 (arXiv 2301.10226) and 2024 (arXiv 2306.04634), with the options of transformers'
`WatermarkLogitsProcessor`. That one draws greenlists from torch's generator, which JAX does not have; so the scheme
is the same and the lists are not. Here a token's colour is a hash, JAX's threefry:

    word(k, t)  = half `t % 2` of the key data of fold_in(k, t // 2)
    root        = the threefry key of hashing_key: its high and its low 32 bits
    lefthash    : seed = fold_in(root, newest token)
    selfhash    : least = min over w of word(fold_in(root, w), t), w being the last context_width tokens, t the last
                  of them; seed = fold_in(fold_in(root, 2**31), least)
    t is green  : word(seed, t) < greenlist_ratio * 2**32

Each token of the vocabulary is green with probability greenlist_ratio, independently of the others.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from jaxgen.errors import JaxgenError, UnsupportedError, shown
from jaxgen.generation.processors.processor import Call, Count, Logits, Number, Processor, as_count, as_number
from jaxgen.generation.processors.select import best_of
from jaxgen.generation.prompts.layout import bucket, pad_to
from jaxgen.generation.prompts.rows import Rows
from jaxgen.lowering import own_rules

Words = UInt32[Array | np.ndarray, " 2"]
Word = UInt32[Array | np.ndarray, ""]

SCHEMES = ("lefthash", "selfhash")
SELFHASH_TOKENS = 40  # only so many of the most likely tokens are tried, as in transformers
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_SEEDED = 1 << 31  # no token id


@no_type_check  # its own checks say what is wrong
@dataclasses.dataclass(frozen=True)
class WatermarkingConfig:
    """How to watermark: HF's fields and defaults. Raises `JaxgenError` for values that make no watermark.

    `greenlist_ratio` in (0, 1) is the share of green tokens, `bias` is added to their logits, `hashing_key` (64 bits
    count) is the secret, `context_width` >= 1 is how many tokens the row must have before it starts, and, for
    "selfhash", how many choose the colour. Source: transformers `WatermarkingConfig`.

    >>> WatermarkingConfig(bias=3.0).greenlist_ratio
    0.25
    """

    greenlist_ratio: float = 0.25
    bias: float = 2.0
    hashing_key: int = 15485863
    seeding_scheme: str = "lefthash"
    context_width: int = 1

    def __post_init__(self):
        if not _is_number(self.greenlist_ratio) or not 0 < self.greenlist_ratio < 1:
            self._refuse("greenlist_ratio", "a number in (0, 1)")
        if not _is_number(self.bias) or not (self.bias == 0 or _SMALLEST <= abs(self.bias) <= _LARGEST):
            self._refuse("bias", "a finite number of float32")
        if not _is_int(self.hashing_key):
            self._refuse("hashing_key", "an int")
        if self.seeding_scheme not in SCHEMES:
            self._refuse("seeding_scheme", f"one of {', '.join(map(repr, SCHEMES))}")
        if not _is_int(self.context_width) or not 1 <= self.context_width < 1 << 31:
            self._refuse("context_width", "an int of at least 1")

    def _refuse(self, field: str, expected: str) -> None:
        raise JaxgenError(f"watermarking_config: {field}={shown(getattr(self, field))} must be {expected}")

    @classmethod
    def from_hf(cls, value: object) -> "WatermarkingConfig":
        """Read transformers' form, an object or a dict. Raises `UnsupportedError` for SynthID, `JaxgenError` else."""
        if isinstance(value, cls):
            return value
        fields = value
        if not isinstance(value, Mapping) and callable(to_dict := getattr(value, "to_dict", None)):
            fields = to_dict()
        if not isinstance(fields, Mapping):
            raise JaxgenError(
                f"watermarking_config={shown(value)} must be a WatermarkingConfig or a dict of its fields"
            )
        if "SynthID" in type(value).__name__ or {"ngram_len", "keys"} & set(fields):
            raise UnsupportedError("watermarking_config: SynthID is not supported by jaxgen; use WatermarkingConfig")
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(fields) - set(known), key=str):
            raise JaxgenError(f"watermarking_config: {shown(unknown[0])} is not one of its fields {', '.join(known)}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """HF's form."""
        return dataclasses.asdict(self)

    @property
    def key_words(self) -> UInt32[np.ndarray, " 2"]:
        """The data of the key that all hashes start from."""
        return np.array(divmod(int(self.hashing_key) % (1 << 64), 1 << 32), np.uint32)

    @property
    def threshold(self) -> UInt32[np.ndarray, ""]:
        """Words below it are green."""
        return np.array(min(round(self.greenlist_ratio * (1 << 32)), (1 << 32) - 1), np.uint32)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _root(words: object) -> Key[Array, ""]:
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def _pair(key: Key[Array, ""], index: Any) -> UInt32[Array, " 2"]:
    return jax.random.key_data(jax.random.fold_in(key, index))


def word(key: Key[Array, ""], token: Int[Array, ""]) -> UInt32[Array, ""]:
    """The 32 bits that `key` gives a token."""
    return _pair(key, token // 2)[token % 2]


def words(key: Key[Array, ""], vocab_size: int) -> UInt32[Array, " V"]:
    """The same for the whole vocabulary: one hash for two tokens."""
    pairs = jax.vmap(lambda index: _pair(key, index))(jnp.arange(-(-vocab_size // 2)))
    return pairs.reshape(-1)[:vocab_size]


class Watermark(Processor):
    """Add `bias` to the tokens that are green, in rows of at least `width` tokens."""

    key_words: Words
    threshold: Word
    bias: Number
    width: Count

    @classmethod
    def of(cls, value: WatermarkingConfig, call: Call) -> "Watermark":
        scheme = Selfhash if value.seeding_scheme == "selfhash" else Lefthash
        return scheme(value.key_words, value.threshold, as_number(value.bias), as_count(value.context_width))


class Lefthash(Watermark):
    """Green is what the newest token makes so."""

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        newest = jnp.take_along_axis(rows.tokens, rows.lengths[:, None] - 1, axis=1)[:, 0]
        root, vocab_size = _root(self.key_words), logits.shape[1]
        green = jax.vmap(lambda token: words(jax.random.fold_in(root, token), vocab_size) < self.threshold)(newest)
        return jnp.where(green & (rows.lengths >= self.width)[:, None], logits + self.bias, logits)


class Selfhash(Watermark):
    """Green are those of the 40 most likely tokens that choose themselves so."""

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        _, best = best_of(logits, SELFHASH_TOKENS)
        looked_at = jnp.minimum(self.width, rows.tokens.shape[1])  # all there is: shorter rows get no bias

        def of_row(tokens: Int[Array, " S"], length: Int[Array, ""], candidates: Int[Array, " C"]) -> Array:
            def preceding(back: Int[Array, ""]) -> Int[Array, ""]:
                return tokens[jnp.maximum(length - back, 0)]

            root = _root(self.key_words)
            return jax.vmap(lambda candidate: _selfhash(root, preceding, candidate, looked_at))(candidates)

        green = jax.vmap(of_row)(rows.tokens, rows.lengths, best) < self.threshold
        added = jnp.where(green & (rows.lengths >= self.width)[:, None], self.bias, 0.0)
        return logits.at[jnp.arange(len(logits))[:, None], best].add(added, unique_indices=True)


def _selfhash(root: Key[Array, ""], preceding: Any, token: Int[Array, ""], width: object) -> UInt32[Array, ""]:
    """The token's word, where `preceding(n)` is the token n places before it."""

    def smaller(back: Int[Array, ""], least: UInt32[Array, ""]) -> UInt32[Array, ""]:
        return jnp.minimum(least, word(jax.random.fold_in(root, preceding(back)), token))

    least = jax.lax.fori_loop(1, jnp.asarray(width), smaller, word(jax.random.fold_in(root, token), token))
    return word(jax.random.fold_in(jax.random.fold_in(root, jnp.uint32(_SEEDED)), least), token)


@jax.jit
def lefthash_words(key_words: Words, windows: Int[Array | np.ndarray, "N W"]) -> UInt32[Array, " N"]:
    """The word of each window's last token, after the one before it."""
    root = _root(key_words)
    return jax.vmap(lambda window: word(jax.random.fold_in(root, window[-2]), window[-1]))(windows)


@jax.jit
def selfhash_words(key_words: Words, windows: Int[Array | np.ndarray, "N W"]) -> UInt32[Array, " N"]:
    """The word of each window's last token, among the window."""
    root, width = _root(key_words), windows.shape[1]

    def of_window(window: Int[Array, " W"]) -> UInt32[Array, ""]:
        return _selfhash(root, lambda back: window[width - 1 - back], window[-1], width)

    return jax.vmap(of_window)(jnp.asarray(windows))


# Is there a watermark in a text? The z-test of Kirchenbauer et al. on the number of green tokens.


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

    def __call__(self, input_ids: object, z_threshold: float = 3.0, return_dict: bool = False) -> Any:
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

    def _read(self, input_ids: object) -> Int[np.ndarray, "B T"]:
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
