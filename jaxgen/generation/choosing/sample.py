"""Randomness: which key belongs to which row and position, and how a token is drawn with it.

    row_key  = fold_in(fold_in(fold_in(fold_in(key, DOMAIN), id_high), id_low), sample)
    draw_key = fold_in(row_key, position)
    token    = argmax(filtered logits + gumbel(draw_key, [V]))

`id` is the row's id as 64 bits (its index in the call, or what `row_ids` gives; 0 where each row has its own seed),
`sample` counts `num_return_sequences` from 0, and `position` is the number of real tokens before the token to be
drawn. So a row's noise depends on nothing else: not on its neighbours, its padding, the batch, or how the loop was
cut. The noise covers the unfiltered vocabulary, so changing a filter only changes the mask: runs that differ in top_p
share their random numbers.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key, UInt32

from jaxgen.errors import JaxgenError, shown
from jaxgen.generation.choosing.seed import next_seed

# Which tokens a key gives, as defined above. A change that alters them raises this and is named in the changelog;
# tests/test_golden.py holds what version 1 gives.
SAMPLER_VERSION = 1
DOMAIN = 0x6A617867  # "jaxg": a user's own fold_in on the same key does not meet ours
_WORD = 1 << 32


class FreshSeed(int):
    """A seed that nobody asked for: where nothing is drawn, nothing needs to be said about it."""


def random_key(key: object, seed: Any) -> tuple[Key[Array, "*rows"], int | tuple[int, ...] | None]:
    """The key of a call, and the seed it came from (None when a key was given); or one of each per row.

    `key` is a typed key, or a raw uint32 threefry key; `seed` is any Python int. An array of typed keys, or a list of
    seeds, gives every row its own. With neither, a fresh seed is taken (`next_seed`); it is reported, so that
    the run can be repeated. Raises `JaxgenError` for both at once, and for `rbg` keys, which are not exact under
    vmap (rows would depend on their neighbours).
    """
    if key is not None and seed is not None:
        raise JaxgenError("both key and seed were given; pass one of them")
    if key is not None:
        return _checked_key(key), None
    words, ints = _seed_words(seed)
    return jax.random.wrap_key_data(words, impl="threefry2x32"), ints  # pyright: ignore[reportArgumentType]


def key_words(key: object, seed: Any) -> tuple[UInt32[np.ndarray, "*rows 2"], int | tuple[int, ...] | None]:
    """As `random_key`, with a key as its two words on the host: a key of a seed is made without asking a device."""
    if key is None:
        return _seed_words(seed)
    key, seed = random_key(key, seed)
    return np.asarray(jax.random.key_data(key)), seed


def _seed_words(seed: Any) -> tuple[UInt32[np.ndarray, "*rows 2"], int | tuple[int, ...]]:
    if seed is None:
        seed = FreshSeed(next_seed())
    sequence = isinstance(seed, Sequence) and not isinstance(seed, str)
    several = sequence or (isinstance(seed, np.ndarray) and seed.ndim == 1)
    seeds: list[Any] = list(seed) if several else [seed]
    for row, value in enumerate(seeds):
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            name = f"seed[{row}]" if several else "seed"
            raise JaxgenError(f"{name}={value!r} must be an int")
    if not seeds:
        raise JaxgenError("seed is an empty list; pass an int, or one per row")
    words = np.array([divmod(_as_64_bits("seed", int(value)), _WORD) for value in seeds], np.uint32)
    if several:
        return words, tuple(map(int, seeds))
    return words[0], seeds[0] if isinstance(seeds[0], FreshSeed) else int(seeds[0])


def _checked_key(key: Any) -> Key[Array, "*rows"]:
    if not hasattr(key, "dtype") or not hasattr(key, "shape"):
        raise JaxgenError(f"key={key!r} must be a key from jax.random.key; for a plain number use seed=")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.shape != (2,) or key.dtype != np.uint32:
            raise JaxgenError(f"key has shape {key.shape} and dtype {key.dtype}; make it with jax.random.key(seed)")
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
    if "rbg" in str(jax.random.key_impl(key)):
        raise JaxgenError(
            "key uses the 'rbg' implementation, whose draws depend on the other rows of a batch; "
            "make it with jax.random.key(seed, impl='threefry2x32')"
        )
    if key.ndim > 1 or key.size == 0:
        raise JaxgenError(f"key has shape {key.shape}; pass one key, or one per row")
    # Uncommitted, so that it goes where the model is.
    return key if isinstance(key, Tracer) else padded_key(key)


def padded_key(key: Key[Array, "*rows"], rows: int = 0) -> Key[Array, "*rows_out"]:
    """The same keys, with copies of the last one up to `rows` if there is one per row; on no device yet."""
    data = np.asarray(jax.random.key_data(key))
    if key.ndim:
        data = np.pad(data, [(0, max(rows - len(data), 0)), (0, 0)], mode="edge")
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))  # pyright: ignore[reportArgumentType]


def row_id_words(row_ids: object, rows: int) -> UInt32[np.ndarray, "B 2"]:
    """Each row's id as two 32-bit words; ids are ints or strings, by default the row's index.

    Raises `JaxgenError` for a wrong number of ids or an id of another type.
    """
    ids = range(rows) if row_ids is None else row_ids
    if isinstance(ids, str) or not isinstance(ids, Sequence | np.ndarray) or len(ids) != rows:
        count = f"{len(ids)} of them" if isinstance(ids, Sequence | np.ndarray) else repr(ids)
        raise JaxgenError(f"row_ids must hold one int or string per row: {rows} rows, got {count}")
    for row, row_id in enumerate(ids):
        if not isinstance(row_id, int | str | np.integer) or isinstance(row_id, bool):
            raise JaxgenError(f"row_ids[{row}]={row_id!r} must be an int or a string")
    named = ((f"row_ids[{row}]", i if isinstance(i, str) else int(i)) for row, i in enumerate(ids))
    words = [divmod(_as_64_bits(name, i), _WORD) for name, i in named]
    return np.array(words, np.uint32).reshape(rows, 2)


def row_keys(key: Key[Array, "*rows"], row_ids: UInt32[Array, "B 2"], samples: int) -> Key[Array, " R"]:
    """One key per row and sample, row-major: R = B * samples; from one key, or from one per row."""
    over_samples = jax.vmap(row_key, in_axes=(None, None, 0))
    over_rows = jax.vmap(over_samples, in_axes=(0 if key.ndim else None, 0, None))
    return over_rows(key, row_ids, jnp.arange(samples)).reshape(-1)


def row_key(key: Key[Array, ""], words: UInt32[Array, " 2"], sample: Int[Array, ""]) -> Key[Array, ""]:
    """The key of one row: of a call's key, the row's id in two words, and the sample."""
    domain_key = jax.random.fold_in(key, DOMAIN)
    key = jax.random.fold_in(jax.random.fold_in(domain_key, words[0]), words[1])
    return jax.random.fold_in(key, sample)


def draw(logits: Float[Array, "R V"], row_keys: Key[Array, " R"], positions: Int[Array, " R"]) -> Int[Array, " R"]:
    """One exact sample per row from `softmax(logits)`: Gumbel-argmax with the row's own key at its position."""

    def noise(row_key: Key[Array, ""], position: Int[Array, ""]) -> Float[Array, " V"]:
        draw_key = jax.random.fold_in(row_key, position)
        return jax.random.gumbel(draw_key, logits.shape[1:], jnp.float32, mode="low")

    return jnp.argmax(logits + jax.vmap(noise)(row_keys, positions), axis=-1).astype(jnp.int32)


def _as_64_bits(name: str, value: int | str) -> int:
    """Small non-negative ints as they are (so seed=7 is `jax.random.key(7)`), everything else by its hash."""
    if isinstance(value, int) and 0 <= value < _WORD**2:
        return value
    try:
        text = f"{type(value).__name__}:{value}".encode()
    except ValueError as error:  # half a character, or more digits than Python prints
        raise JaxgenError(f"{name}={shown(value)} cannot be hashed: {error}") from error
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
