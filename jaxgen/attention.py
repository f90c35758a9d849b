"""Rotary positions, and grouped-query attention over fresh tokens or over cache slots.

Letters, here and in every annotation: B batch, T query, S slots, D model, N heads, K key-value heads, G = N / K,
H head dim, F feed-forward, V vocabulary.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgen.linear import product
from jaxgen.lowering import target
from jaxgen.models.rope import LongRope, Scaling, Yarn, plain_frequencies

# Queries are taken this many at a time, so that scores take B*N*BLOCK*T floats and not B*N*T*T.
QUERY_BLOCK = 512
# For one row XLA:GPU makes one kernel of the softmax and a sum weighted by it, up to about this many slots; beyond,
# it splits the sum badly, and a matrix product is better.
SUMMED_SLOTS = 2048


def query_block(length: int) -> int:
    """How many queries of a prompt are taken at a time: all of them unless QUERY_BLOCK divides a longer prompt."""
    return QUERY_BLOCK if length % QUERY_BLOCK == 0 else length


class Rotation(NamedTuple):
    """The rotary tables of some positions, and what queries there are multiplied by, if anything."""

    cos: Float[Array, "#B T half"]
    sin: Float[Array, "#B T half"]
    query_scale: Float[Array, "#B T"] | None = None


def rope(
    positions: Int[Array, "B T"],
    head_dim: int,
    theta: float,
    dtype: jnp.dtype,
    scaling: "Scaling | None" = None,
    ends: Int[Array, " B"] | None = None,
) -> Rotation:
    """Cosines and sines of the rotary angles: computed in float32, cast to `dtype` as HF does.

    `ends`: the position of each row's last token, by which LongRoPE chooses; by default that of its first column.
    Source: Su et al. 2021 (arXiv 2104.09864); transformers `LlamaRotaryEmbedding`.
    """
    frequencies, amplitude = plain_frequencies(head_dim, theta), 1.0
    if scaling is not None:
        amplitude = scaling.amplitude
        frequencies = (
            scaling.of_rows(frequencies, theta, positions[:, 0] if ends is None else ends)
            if isinstance(scaling, LongRope)
            else scaling.frequencies(frequencies, theta)
        )
    angles = positions[..., None].astype(jnp.float32) * frequencies
    tables = jnp.cos(angles), jnp.sin(angles)
    cos, sin = tables if amplitude == 1 else (table * jnp.float32(amplitude) for table in tables)
    scale = scaling.query_scale(positions) if isinstance(scaling, Yarn) else None
    return Rotation(cos.astype(dtype), sin.astype(dtype), None if scale is None else scale.astype(dtype))


def rotate(x: Float[Array, "B T *heads H"], rotation: Rotation | None) -> Float[Array, "B T *heads H"]:
    """Rotate the pairs (i, i + H/2) of every head: HF's half-split layout, not the interleaved one.

    A shorter table rotates that many of a head's first dimensions only; None rotates nothing.
    """
    if rotation is None:
        return x
    head_axes = tuple(range(2, x.ndim - 1))
    cos, sin = (jnp.expand_dims(table, head_axes) for table in rotation[:2])
    size = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :size], 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    kept = [x[..., size:]] if size < x.shape[-1] else []
    return jnp.concatenate([*rotated, *kept], axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What becomes of a query's product with a key: it is scaled, and kept within +-`softcap` where there is one."""

    scale: float
    softcap: float | None = None

    @classmethod
    def plain(cls, queries: Array) -> "Scoring":
        """By the square root of a head's size, as almost everywhere."""
        return cls(queries.shape[-1] ** -0.5)

    def capped(self, scores: Array) -> Array:
        """Scaled scores within the limit. Source: transformers `Gemma2Attention`."""
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)


def rotate_queries(x: Float[Array, "B T *heads H"], rotation: Rotation | None) -> Float[Array, "B T *heads H"]:
    """As `rotate`, and then scaled where the rotation says so."""
    x, scale = rotate(x, rotation), None if rotation is None else rotation.query_scale
    return x if scale is None else x * jnp.expand_dims(scale, tuple(range(2, x.ndim)))


def attend(
    queries: Float[Array, "B T K G H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    allowed: Bool[Array, "B #T S"],
    scoring: Scoring | None = None,
) -> Float[Array, "B T K G H"]:
    """Softmax attention in float32 where query head (k, g) reads key-value head k and only `allowed` slots."""
    weights = attention_weights(queries, keys, allowed, scoring).astype(values.dtype)
    return product("bkgts,bksh->btkgh", weights, values)


def attention_weights(
    queries: Float[Array, "B T K G H"],
    keys: Float[Array, "B K S H"],
    allowed: Bool[Array, "B #T S"],
    scoring: Scoring | None = None,
) -> Float[Array, "B K G T S"]:
    """How much each query reads of each slot, in float32."""
    scoring = scoring or Scoring.plain(queries)
    scores = product("btkgh,bksh->bkgts", queries, keys, preferred_element_type=jnp.float32)
    return _softmax(scoring.capped(scores * scoring.scale), allowed[:, None, None])


def attend_to_slots(
    queries: Float[Array, "B K G H"],
    keys: Float[Array, "B K C H"],
    values: Float[Array, "B K C H"],
    visible: Bool[Array, "B C"],
    scoring: Scoring | None = None,
) -> Float[Array, "B K G H"]:
    """One query per row against the cache: as `attend`, in the form that each platform runs fastest."""
    scoring = scoring or Scoring.plain(queries)
    sums, products = (functools.partial(form, scoring=scoring) for form in (_attend_by_sums, _attend_by_products))
    return jax.lax.platform_dependent(queries, keys, values, visible, cpu=sums, default=products)


def _attend_by_products(
    queries: Float[Array, "B K G H"],
    keys: Float[Array, "B K C H"],
    values: Float[Array, "B K C H"],
    visible: Bool[Array, "B C"],
    scoring: Scoring,
) -> Float[Array, "B K G H"]:
    """Not `attend` with one query: for one row XLA:GPU would then copy the whole cache, transposed, at each step."""
    scores = product("bkgh,bkch->bkgc", queries, keys, preferred_element_type=jnp.float32)
    weights = _softmax(scoring.capped(scores * scoring.scale), visible[:, None, None]).astype(values.dtype)
    if len(queries) == 1 and values.shape[2] <= SUMMED_SLOTS:
        mixed = weights[..., None].astype(jnp.float32) * values[:, :, None].astype(jnp.float32)
        return mixed.sum(-2).astype(values.dtype)
    return product("bkgc,bkch->bkgh", weights, values)


def _attend_by_sums(
    queries: Float[Array, "B K G H"],
    keys: Float[Array, "B K C H"],
    values: Float[Array, "B K C H"],
    visible: Bool[Array, "B C"],
    scoring: Scoring,
) -> Float[Array, "B K G H"]:
    """XLA:CPU runs B * K small matrix products one after the other; as fused sums it takes a quarter of the time."""
    query = queries[..., None, :].astype(jnp.float32) * scoring.scale
    weights = _softmax(scoring.capped((query * keys[:, :, None]).sum(-1)), visible[:, None, None])
    return (weights[..., None] * values[:, :, None]).sum(-2).astype(values.dtype)


def _softmax(scores: Float[Array, "*axes S"], allowed: Bool[Array, "*#axes S"]) -> Float[Array, "*axes S"]:
    """Over the allowed slots; where none is (padding), finite numbers and not NaN, which would poison neighbours."""
    return jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(jnp.float32).min), axis=-1)


def allowed_in_prompt(
    positions: Int[Array, "B T"], real: Bool[Array, "B T"], window: int | None, start: int | Array, size: int
) -> Bool[Array, "B t T"]:
    """Which columns of a prompt its columns `start` to `start + size` may read."""
    length = positions.shape[1]
    allowed = real[:, None, :] & (jnp.arange(length) <= (start + jnp.arange(size))[:, None])
    if window is not None:
        own = jax.lax.dynamic_slice_in_dim(positions, start, size, axis=1)
        allowed &= own[:, :, None] - positions[:, None, :] < window
    return allowed


def attend_to_prompt(
    queries: Float[Array, "B T K G H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    real: Bool[Array, "B T"],
    window: int | None,
    scoring: Scoring | None = None,
) -> Float[Array, "B T K G H"]:
    """Causal attention of a whole prompt to itself, at most `window` real tokens back (the token itself counts).

    Prompts of a multiple of QUERY_BLOCK tokens (the buckets from 1024 on) are taken in blocks of queries, which
    bounds the memory of the scores.
    """
    scoring = scoring or Scoring.plain(queries)
    if target().flash_prefill and scoring.softcap is None:
        return _flash(queries, keys, values, real, window, scoring.scale)
    keys, values = (jnp.moveaxis(x, 1, 2) for x in (keys, values))
    length = queries.shape[1]

    def block(start: int | Array, size: int) -> Float[Array, "B t K G H"]:
        part = jax.lax.dynamic_slice_in_dim(queries, start, size, axis=1)
        return attend(part, keys, values, allowed_in_prompt(positions, real, window, start, size), scoring)

    if query_block(length) == length:
        return block(0, length)
    starts = jnp.arange(0, length, QUERY_BLOCK)
    blocks = jax.lax.map(lambda start: block(start, QUERY_BLOCK), starts)
    return jnp.moveaxis(blocks, 0, 1).reshape(queries.shape)


def _flash(
    queries: Float[Array, "B T K G H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    real: Bool[Array, "B T"],
    window: int | None,
    scale: float,
) -> Float[Array, "B T K G H"]:
    """The same for right-padded 16-bit prompts, by cuDNN, without scores in memory."""
    lengths = real.sum(1, dtype=jnp.int32)
    mixed = jax.nn.dot_product_attention(
        queries.reshape(*queries.shape[:2], -1, queries.shape[-1]),
        keys,
        values,
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None or window >= queries.shape[1] else (window - 1, 0),
        implementation="cudnn",
    )
    # What padding reads is not defined, and must not become a NaN in the cache.
    return jnp.where(real[:, :, None, None], mixed, 0).reshape(queries.shape)
