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
from collections.abc import Mapping
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt32

from jaxgen.errors import JaxgenError, UnsupportedError, shown
from jaxgen.generation.processors.select import best_of
from jaxgen.generation.rows import Rows

Logits = Float[Array, "R V"]
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
    def from_hf(cls, value: Any) -> "WatermarkingConfig":
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _root(words: Any) -> Key[Array, ""]:
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


def lefthash_bias(
    logits: Logits, rows: Rows, *, key_words: Words, threshold: Word, bias: Float[Array | np.ndarray, ""], width: Any
) -> Logits:
    """Add `bias` to the tokens that are green after the newest token, in rows of at least `width` tokens."""
    newest = jnp.take_along_axis(rows.tokens, rows.lengths[:, None] - 1, axis=1)[:, 0]
    root = _root(key_words)
    green = jax.vmap(lambda token: words(jax.random.fold_in(root, token), logits.shape[1]) < threshold)(newest)
    return jnp.where(green & (rows.lengths >= width)[:, None], logits + bias, logits)


def selfhash_bias(
    logits: Logits, rows: Rows, *, key_words: Words, threshold: Word, bias: Float[Array | np.ndarray, ""], width: Any
) -> Logits:
    """Add `bias` to those of the 40 most likely tokens that choose themselves green, in rows of `width` tokens."""
    _, best = best_of(logits, SELFHASH_TOKENS)
    looked_at = jnp.minimum(width, rows.tokens.shape[1])  # all that there is: rows shorter than `width` get no bias

    def of_row(tokens: Int[Array, " S"], length: Int[Array, ""], candidates: Int[Array, " C"]) -> Array:
        def preceding(back: Int[Array, ""]) -> Int[Array, ""]:
            return tokens[jnp.maximum(length - back, 0)]

        return jax.vmap(lambda candidate: _selfhash(_root(key_words), preceding, candidate, looked_at))(candidates)

    green = jax.vmap(of_row)(rows.tokens, rows.lengths, best) < threshold
    added = jnp.where(green & (rows.lengths >= width)[:, None], bias, 0.0)
    return logits.at[jnp.arange(len(logits))[:, None], best].add(added, unique_indices=True)


def _selfhash(root: Key[Array, ""], preceding: Any, token: Int[Array, ""], width: Any) -> UInt32[Array, ""]:
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
