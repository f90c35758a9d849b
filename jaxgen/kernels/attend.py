"""Attention of one new token per row, on a GPU: rotation, the write into the cache, and a pass over what it holds.

A program takes one row, one key-value head with its G query heads, and one of SPLITS parts of the slots, dealt out in
blocks. It rotates queries and the new key, goes over its blocks of keys and values with a running maximum and a running
sum (flash attention), and leaves the unfinished parts for `_combine`, if there is more than one. The new key and value
are put into their slot by the program whose block holds it; all programs of that block see them in their registers, so
no one waits for the write. Only slots that hold something are read: an empty cache costs nothing, however large.

Scores and sums are float32; what is multiplied on the matrix units has the cache's dtype, and the queries are repeated
to the 16 rows that these want.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxgen.cache import Int8Slots, LayerCache, Reading
from jaxgen.kernels import backend
from jaxgen.kernels.backend import pl

_NOTHING = -1e30  # a score; exp of it is 0, and it is finite
_QUERIES = 16  # rows of a product on the matrix units
_PROGRAMS = 256  # that fill a GPU
_MOST_SPLITS = 32


class _Slots:
    """The keys or values of one row and head, in halves: those in the cache, and the new one."""

    def __init__(self, before: Any, after: Any, where: tuple[Any, Any], new: tuple[Array, Array], interpret: bool):
        self.before, self.after, self.where = before, after, where  # references: slots, and with int8 their scales
        self.new, self.scale = _to_int8(new, interpret) if len(before) == 2 else (new, None)

    def write(self, slot: Array) -> None:
        """Put the new one into its slot."""
        half = self.new[0].shape[1]
        for start, x in zip((0, half), self.new, strict=True):
            index = (*self.where, slot + jnp.zeros((1, 1), jnp.int32), start + backend.arange(half)[None, :])
            self.after[0][index] = x.astype(self.after[0].dtype)
        if self.scale is not None:
            self.after[1][(*self.where, slot)] = self.scale

    def read(self, at: Array, is_new: Array, dtype: Any) -> list[Array]:
        """The halves of some slots, the new one among them."""
        half, found = self.new[0].shape[1], []
        for start, x in zip((0, half), self.new, strict=True):
            old = self.before[0][(*self.where, at[:, None], start + backend.arange(half)[None, :])]
            found.append(jnp.where(is_new[:, None], x.astype(old.dtype), old))
        if self.scale is None:
            return found
        scales = jnp.where(is_new, self.scale, self.before[1][(*self.where, at)])[:, None]
        return [(x.astype(jnp.float32) * scales).astype(dtype) for x in found]


def _kernel(
    qkv: Any, cosine: Any, sine: Any, positions: Any, *references: Any, groups: int, splits: int, block: int,
    window: int | None, int8: bool, interpret: bool,
) -> None:  # fmt: skip
    arrays = 4 if int8 else 2
    cache, (out, *sums), written = references[:arrays], references[arrays:-arrays], references[-arrays:]
    row, head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    slots, half, dtype = cache[0].shape[2], cache[0].shape[3] // 2, cosine.dtype
    position, column = positions[row], backend.arange(half)[None, :]
    slot = lax.rem(position, slots)

    def projected(which: Array) -> tuple[Array, Array]:
        """Both halves of some of the head's queries (0 to G - 1), its key (G) or its value (G + 1)."""
        parts = [
            [qkv[part, row, head, which[:, None], start + column].astype(jnp.float32) for start in (0, half)]
            for part in range(qkv.shape[0])
        ]
        first, second = (functools.reduce(jnp.add, halves) for halves in zip(*parts, strict=True))
        return first, second

    def rotated(which: Array) -> tuple[Array, Array]:
        cos, sin = cosine[row, column].astype(jnp.float32), sine[row, column].astype(jnp.float32)
        first, second = projected(which)
        return (first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)

    query = jnp.minimum(backend.arange(_QUERIES), groups - 1)
    queries, key = rotated(query), rotated(jnp.full((1,), groups))
    first, second = projected(jnp.full((1,), groups + 1))
    value = first.astype(dtype), second.astype(dtype)
    keys = _Slots(cache[: arrays // 2], written[: arrays // 2], (row, head), key, interpret)
    values = _Slots(cache[arrays // 2 :], written[arrays // 2 :], (row, head), value, interpret)

    @pl.when(lax.rem(lax.div(slot, block), splits) == split)
    def _() -> None:
        keys.write(slot)
        values.write(slot)

    def body(step: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        first, second, most, total = carry
        start = (step * splits + split) * block
        at = backend.clamped(start, block, slots)
        age = lax.rem(slot - at + slots, slots)  # tokens since the one in that slot
        visible = (age <= position) & (start + backend.arange(block) < slots)
        visible = visible if window is None or window >= slots else visible & (age < window)
        products = [
            backend.dot(q, k.T, interpret) for q, k in zip(queries, keys.read(at, age == 0, dtype), strict=True)
        ]
        scores = jnp.where(visible[None], (products[0] + products[1]) * (2 * half) ** -0.5, _NOTHING)
        higher = jnp.maximum(most, scores.max(1))
        weights, fade = jnp.exp(scores - higher[:, None]), jnp.exp(most - higher)
        first, second = (
            old * fade[:, None] + backend.dot(weights.astype(dtype), new, interpret)
            for old, new in zip((first, second), values.read(at, age == 0, dtype), strict=True)
        )
        return first, second, higher, total * fade + weights.sum(1)

    blocks = lax.div(jnp.minimum(position + 1, slots) + (block - 1), block)
    mine = lax.div(blocks - split + (splits - 1), splits)
    nothing = jnp.zeros((_QUERIES, half), jnp.float32)
    start = nothing, nothing, jnp.full((_QUERIES,), _NOTHING, jnp.float32), jnp.zeros((_QUERIES,), jnp.float32)
    *mixed, most, total = lax.fori_loop(0, mine, body, start)
    for start, x in zip((0, half), mixed, strict=True):
        if splits == 1:
            result = (x / total[:, None]).astype(out.dtype)
            _put(out, row, head, groups, query[:, None], start + column, 2 * half, result)
        else:
            out[row, head, split, query[:, None], start + column] = x
    if splits > 1:
        sums[0][row, head, split, query] = most
        sums[1][row, head, split, query] = total


def _to_int8(halves: tuple[Array, Array], interpret: bool) -> tuple[tuple[Array, Array], Array]:
    """As `jaxgen.cache.to_int8`, of one vector in halves."""
    first, second = (x.astype(jnp.float32) for x in halves)
    scale = jnp.maximum(jnp.abs(first).max(), jnp.abs(second).max()) / 127
    divisor = jnp.where(scale > 0, scale, 1)
    rounded = [backend.rounded(x / divisor, interpret).astype(jnp.int8) for x in (first, second)]
    return (rounded[0], rounded[1]), scale


def _combine(parts: Any, most: Any, total: Any, out: Any) -> None:
    """One query head of one row: the parts, each scaled to the common maximum, over the common sum."""
    row, head, query = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    splits, column = parts.shape[2], backend.arange(parts.shape[4])
    split = backend.clamped(0, backend.power_of_two(splits), splits)
    highest = most[row, head, split, query]
    weight = jnp.exp(highest - highest.max(0))
    if len(split) != splits:
        weight = jnp.where(backend.arange(len(split)) < splits, weight, 0)
    mixed = (parts[row, head, split[:, None], query, column[None, :]] * weight[:, None]).sum(0)
    result = (mixed / (total[row, head, split, query] * weight).sum(0)).astype(out.dtype)
    _put(out, row, head, parts.shape[3], query, column, len(column), result)


def _put(out: Any, row: Any, head: Any, groups: int, query: Any, column: Any, size: int, value: Array) -> None:
    """Into `[B, K, G, H]`, or as columns into `[K * G * H, M]`."""
    if len(out.shape) == 4:
        out[row, head, query, column] = value
    else:
        out[(head * groups + query) * size + column, row] = value


def splits_for(rows: int, heads: int, slots: int) -> tuple[int, int]:
    """In how many parts the slots are read, so that the programs fill a GPU; and how many slots at a time.

    The fastest on an H200 for 1, 8 and 32 rows of 8 heads, and 512 or 4,096 tokens.
    """
    splits = max(1, min(_MOST_SPLITS, _PROGRAMS // (rows * heads)))
    block = 64 if splits <= 4 else 32
    return min(splits, -(-slots // block)), block


def attend(
    qkv: Float[Array, "S M K P H"],
    rotation: tuple[Float[Array, "B half"], Float[Array, "B half"]],
    positions: Int[Array, " B"],
    cache: LayerCache,
    *,
    columns: int = 0,
    splits: int | None = None,
    block: int | None = None,
    warps: int = 4,
    stages: int = 3,
    interpret: bool = False,
) -> tuple[Array, LayerCache]:
    """What each query reads, and the cache with the new keys and values in their slots, in place.

    `qkv`: the fused projection as S sums that are to be added; per key-value head its P = G + 2 vectors, the queries,
    the key, the value. It may have more than B rows. The result has the dtype of `rotation`, and is `[B, K, G, H]`, or
    `[K * G * H, columns]` for `int4_rows`.
    """
    rows, (heads, projections, size) = len(positions), qkv.shape[2:]
    groups, slots, dtype = projections - 2, cache.slots, rotation[0].dtype
    best = splits_for(rows, heads, slots)
    splits, block = splits or best[0], block or best[1]
    int8 = isinstance(cache.keys, Int8Slots)
    arrays, structure = jax.tree.flatten(cache)
    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    shape = (heads * groups * size, columns) if columns else (rows, heads, groups, size)
    one = jax.ShapeDtypeStruct(shape, dtype)
    outs = [one]
    if splits > 1:
        shape = (rows, heads, splits, groups)
        outs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*shape, size), shape, shape)]
    kernel = functools.partial(
        _kernel, groups=groups, splits=splits, block=block, window=cache.window, int8=int8, interpret=interpret
    )
    out, *rest = backend.call(
        kernel, qkv, *rotation, positions, *arrays, grid=(rows, heads, splits), out=[*outs, *abstract], name="attend",
        warps=warps, stages=stages, interpret=interpret, aliases={4 + i: len(outs) + i for i in range(len(arrays))},
    )  # fmt: skip
    after = jax.tree.unflatten(structure, rest[-len(arrays) :])
    if splits > 1:
        grid = (rows, heads, groups)
        out = backend.call(
            _combine, out, *rest[:2], grid=grid, out=one, name="attend_combine", warps=1, interpret=interpret
        )
    return out, after


def attend_plainly(
    qkv: Float[Array, "S B K P H"],
    rotation: tuple[Float[Array, "B half"], Float[Array, "B half"]],
    positions: Int[Array, " B"],
    cache: LayerCache,
) -> tuple[Float[Array, "B K G H"], LayerCache]:
    """The same in plain JAX."""
    from jaxgen.attention import rotate

    dtype = rotation[0].dtype
    fused = qkv.astype(jnp.float32).sum(0).astype(dtype)
    tables = (rotation[0][:, None], rotation[1][:, None])
    queries, keys = (rotate(x[:, None], tables) for x in (fused[..., :-2, :], fused[..., -2, :]))
    mixed, cache = cache.attend(queries, keys, fused[:, None, :, -1], Reading.one(positions))
    return mixed[:, 0], cache
