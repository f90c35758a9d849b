"""Prompts on the device, and their prefill: all at once, in chunks, or only what they add to an earlier call."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxgen.cache import KVCache, Slots, of_layers
from jaxgen.generation.programs.inputs import BatchLayout
from jaxgen.models.protocol import DecodingModel
from jaxgen.pytree import pytree

Count = Int[Array | np.ndarray, ""]


@pytree
@dataclasses.dataclass
class Past:
    """Keys and values of an earlier call, and how much of them each prompt begins with."""

    cache: KVCache
    sources: Int[Array | np.ndarray, " B"]  # the cache row that a prompt continues
    held: Int[Array | np.ndarray, " B"]  # how many of the prompt's tokens it holds; fewer than the prompt has


@pytree
@dataclasses.dataclass
class Negative:
    """Negative prompts for guidance, one per prompt."""

    tokens: Int[Array | np.ndarray, "B T"]
    lengths: Int[Array | np.ndarray, " B"]


@pytree
@dataclasses.dataclass
class Prompts:
    """A batch of prompts as the device takes them: right-padded, possibly with idle rows that fill up a bucket."""

    tokens: Int[Array | np.ndarray, "B T"]
    lengths: Int[Array | np.ndarray, " B"]  # real tokens per row, at least 1
    max_lengths: Int[Array | np.ndarray, " B"]  # the length at which a row ends
    row_ids: UInt32[Array | np.ndarray, "B 2"]  # two words per row, see `sample.row_id_words`
    idle: Bool[Array | np.ndarray, " B"]  # nobody asked for this row
    negative: Negative | None = None
    past: Past | None = None
    given: Int[Array | np.ndarray, "R S"] | None = None  # as in `DecodeState`; R: with all samples


def prefill_prompts(
    model: DecodingModel, prompts: Prompts, layout: BatchLayout
) -> tuple[Float[Array, "model_rows V"], KVCache]:
    """Logits after each prompt's last token, and the cache; with guidance, the negative prompts follow as rows."""
    tokens, lengths = jnp.asarray(prompts.tokens), jnp.asarray(prompts.lengths)
    if prompts.negative is not None:
        tokens = jnp.concatenate([tokens, jnp.asarray(prompts.negative.tokens)])
        lengths = jnp.concatenate([lengths, jnp.asarray(prompts.negative.lengths)])
    if prompts.past is not None:
        cache, held = _past_cache(prompts.past, layout.slots)
        column = jnp.minimum(held[:, None] + jnp.arange(layout.fresh), tokens.shape[1] - 1)
        return _extend(model, jnp.take_along_axis(tokens, column, axis=1), held, lengths - held, cache, layout.chunk)
    if layout.chunk:
        cache = model.empty_cache(len(tokens), layout.slots, layout.int8_cache)
        return _extend(model, tokens, jnp.zeros_like(lengths), lengths, cache, layout.chunk)
    return model.prefill(tokens, lengths, layout.slots, layout.int8_cache)


def read_one_by_one(model: DecodingModel, prompts: Prompts, layout: BatchLayout) -> KVCache:
    """The cache that holds all of each prompt but its last token; a prompt is read alone, a piece at a time."""
    chunk = layout.chunk
    tokens, lengths = jnp.asarray(prompts.tokens), jnp.asarray(prompts.lengths)
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % chunk)))
    ends = jnp.where(jnp.asarray(prompts.idle), 0, lengths - 1)

    def one_prompt(row: Count, cache: KVCache) -> KVCache:
        def one_piece(index: Count, cache: KVCache) -> KVCache:
            start = index * chunk
            piece = jax.lax.dynamic_slice(tokens, (row, start), (1, chunk))[0]
            return read_piece(model, cache, row, piece, start, jnp.minimum(ends[row] - start, chunk))

        return jax.lax.fori_loop(0, (ends[row] + chunk - 1) // chunk, one_piece, cache)

    cache = model.empty_cache(len(tokens), layout.slots, layout.int8_cache)
    return jax.lax.fori_loop(0, len(tokens), one_prompt, cache)


def read_piece(
    model: DecodingModel, cache: KVCache, row: Count, piece: Int[Array, " T"], start: Count, count: Count
) -> KVCache:
    """Read `count` of T tokens into one row of a cache, from position `start` on; the other rows stay as they are.

    In one shape, [1, T], whatever else the batch holds: so the same piece behind the same ones gives the same bits.
    """
    one = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, axis=0), cache)
    _, one = model.extend(piece[None], jnp.asarray(start)[None], jnp.asarray(count)[None], one)
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, axis=0), cache, one)


def _past_cache(past: Past, slots: Slots) -> tuple[KVCache, Int[Array, " B"]]:
    """The past as the cache of this call: its rows, its number of slots."""
    sources, held = jnp.asarray(past.sources), jnp.asarray(past.held)
    cache = jax.tree.map(lambda x: jnp.take(x, sources, axis=0), past.cache)
    counts = of_layers(slots, len(cache))
    return [layer.resized(held, count) for layer, count in zip(cache, counts, strict=True)], held


def _extend(
    model: DecodingModel,
    tokens: Int[Array, "B T"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
    cache: KVCache,
    chunk: int,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Process `counts` more tokens per row, `chunk` at a time (0: all at once)."""
    chunk = min(chunk, tokens.shape[1]) or tokens.shape[1]
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % chunk)))

    def one_chunk(index: Array, carry: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
        last, cache = carry
        begin = index * chunk
        piece = jax.lax.dynamic_slice_in_dim(tokens, begin, chunk, axis=1)
        real = jnp.clip(counts - begin, 0, chunk)
        hidden, cache = model.extend(piece, starts + jnp.minimum(begin, counts), real, cache)
        at = counts - 1 - begin
        here = (at >= 0) & (at < chunk)
        newest = jnp.take_along_axis(hidden, jnp.clip(at, 0, chunk - 1)[:, None, None], axis=1)
        return jnp.where(here[:, None, None], newest, last), cache

    hidden, _ = jax.eval_shape(lambda: model.extend(tokens[:, :chunk], starts, counts, cache))
    nothing = jnp.zeros((len(tokens), 1, hidden.shape[2]), hidden.dtype)
    last, cache = jax.lax.fori_loop(0, (counts.max() + chunk - 1) // chunk, one_chunk, (nothing, cache))
    return model.logits(last)[:, 0], cache
