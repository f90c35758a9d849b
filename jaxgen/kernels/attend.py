"""Attention of one or a few new tokens per row, on a GPU: rotation, the write into the cache, a pass over what is held.

A program takes one row, one key-value head with its G query heads for each new token, and one of SPLITS parts of the
slots, dealt out in blocks. It rotates queries and new keys, goes over its blocks of keys and values with a running
maximum and a running sum (flash attention), and leaves the unfinished parts for `_combine`, if there is more than one.
The last program of a row and head has the fewest blocks. It adds the new keys and values, which it has in registers,
and puts them into their slots; all programs look past those, so no one waits for the write. Only slots that hold
something are read: an empty cache costs nothing, however large.

Scores and sums are float32; what is multiplied on the matrix units has the cache's dtype. These want at least 16 rows:
queries and new keys are repeated up to that.
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
_NEW = 16  # new keys, at most, and as many as a product on the matrix units wants at least
_MOST_QUERIES = 64  # of a program: tokens times query heads
_PROGRAMS = 256  # that fill a GPU
_MOST_SPLITS = 32


class _Slots:
    """The keys or values of one row and head, in halves."""

    def __init__(self, before: Any, after: Any, where: tuple[Any, Any], interpret: bool):
        self.before, self.after, self.where = before, after, where  # references: slots, and with int8 their scales
        self.half, self.interpret = before[0].shape[3] // 2, interpret

    def _index(self, slots: Array) -> list[tuple[Any, ...]]:
        columns = [start + backend.arange(self.half)[None, :] for start in (0, self.half)]
        return [(*self.where, slots[:, None], column) for column in columns]

    def read(self, slots: Array, dtype: Any) -> list[Array]:
        """The halves of some slots."""
        found = [self.before[0][index] for index in self._index(slots)]
        return _unpacked(found, self.before[1][(*self.where, slots)] if len(self.before) == 2 else None, dtype)

    def write(self, slots: Array, real: Array, new: tuple[Array, Array]) -> list[Array]:
        """Put those that are `real` into their slots; returns them all as whoever reads the slots will find them."""
        halves, scales = _to_int8(new, self.interpret) if len(self.after) == 2 else (new, None)
        halves = [x.astype(self.after[0].dtype) for x in halves]
        for index, x in zip(self._index(slots), halves, strict=True):
            backend.store(self.after[0], index, x, jnp.broadcast_to(real[:, None], x.shape))
        if scales is not None:
            backend.store(self.after[1], (*self.where, slots), scales, real)
        return _unpacked(halves, scales, new[0].dtype)


def _unpacked(halves: list[Array], scales: Array | None, dtype: Any) -> list[Array]:
    return halves if scales is None else [(x.astype(jnp.float32) * scales[:, None]).astype(dtype) for x in halves]


class _Projected:
    """What the fused projection holds for one row and head: lines of its new tokens, from `first` on."""

    def __init__(self, qkv: Any, cosine: Any, sine: Any, first: Any, head: Any):
        self.qkv, self.cosine, self.sine, self.first, self.head = qkv, cosine, sine, first, head
        self.half = cosine.shape[1]

    def plain(self, token: Array, which: Array) -> tuple[Array, Array]:
        """Both halves of some queries (0 to G - 1), keys (G) or values (G + 1) of the new tokens."""
        part, column = backend.arange(self.qkv.shape[0])[:, None, None], backend.arange(self.half)[None, None, :]
        line, which = (self.first + token)[None, :, None], which[None, :, None]
        first, second = (
            # As one tile: of separate ones Triton would take each apart for the matrix units, instead of their sum.
            self.qkv[part, line, self.head, which, start + column].astype(jnp.float32).sum(0)
            for start in (0, self.half)
        )
        return first, second

    def rotated(self, token: Array, which: Array) -> tuple[Array, Array]:
        """The same, rotated to their positions, in the dtype of the tables."""
        line, column, dtype = (self.first + token)[:, None], backend.arange(self.half)[None, :], self.cosine.dtype
        cos, sin = self.cosine[line, column].astype(jnp.float32), self.sine[line, column].astype(jnp.float32)
        first, second = self.plain(token, which)
        return (first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)


def _kernel(
    qkv: Any, cosine: Any, sine: Any, starts: Any, newest: Any, *references: Any, tokens: int, groups: int,
    splits: int, block: int, window: int | None, int8: bool, interpret: bool,
) -> None:  # fmt: skip
    arrays = 4 if int8 else 2
    cache, (out, *sums), written = references[:arrays], references[arrays:-arrays], references[-arrays:]
    row, head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    slots, half, dtype = cache[0].shape[2], cache[0].shape[3] // 2, cosine.dtype
    start, last, column = starts[row], newest[row], backend.arange(half)[None, :]
    count = last - start + 1  # of the new tokens, how many are real
    projected = _Projected(qkv, cosine, sine, row * tokens, head)

    query = jnp.minimum(backend.arange(_queries(tokens, groups)), tokens * groups - 1)
    position = start + lax.div(query, groups)  # of each query
    queries = projected.rotated(lax.div(query, groups), lax.rem(query, groups))
    keys = _Slots(cache[: arrays // 2], written[: arrays // 2], (row, head), interpret)
    values = _Slots(cache[arrays // 2 :], written[arrays // 2 :], (row, head), interpret)

    def mix(carry: tuple[Array, ...], keys: list[Array], values: list[Array], visible: Array) -> tuple[Array, ...]:
        """Some more keys and values: a step of flash attention."""
        first, second, most, total = carry
        products = [backend.dot(q, k.T, interpret) for q, k in zip(queries, keys, strict=True)]
        scores = jnp.where(visible, (products[0] + products[1]) * (2 * half) ** -0.5, _NOTHING)
        higher = jnp.maximum(most, scores.max(1))
        weights, fade = jnp.exp(scores - higher[:, None]), jnp.exp(most - higher)
        first, second = (
            old * fade[:, None] + backend.dot(weights.astype(dtype), new, interpret)
            for old, new in zip((first, second), values, strict=True)
        )
        return first, second, higher, total * fade + weights.sum(1)

    def in_window(held: Array) -> Array:
        """Which queries see a token at the position `held` that is not after them."""
        return held[None] > position[:, None] - window if window is not None else jnp.full((len(query), 1), True)

    def body(step: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        begin = (step * splits + split) * block
        at = backend.clamped(begin, block, slots)
        age = lax.rem(lax.rem(last, slots) - at + slots, slots)  # tokens since the one in that slot
        visible = (age >= count) & (age <= last) & (begin + backend.arange(block) < slots)
        return mix(carry, keys.read(at, dtype), values.read(at, dtype), visible[None] & in_window(last - age))

    nothing = jnp.zeros((len(query), half), jnp.float32)
    carry = nothing, nothing, jnp.full((len(query),), _NOTHING, jnp.float32), jnp.zeros((len(query),), jnp.float32)
    blocks = lax.div(jnp.minimum(start, slots) + (block - 1), block)
    carry = lax.fori_loop(0, lax.div(blocks - split + (splits - 1), splits), body, carry)

    def with_new(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        """The new ones, for the program that has the fewest blocks."""
        held, new = start + backend.arange(_NEW), jnp.minimum(backend.arange(_NEW), tokens - 1)
        slot, real = lax.rem(held, slots), held <= last
        first, second = projected.plain(new, jnp.full((_NEW,), groups + 1))
        found = (
            keys.write(slot, real, projected.rotated(new, jnp.full((_NEW,), groups))),
            values.write(slot, real, (first.astype(dtype), second.astype(dtype))),
        )
        return mix(carry, *found, real[None] & (held[None] <= position[:, None]) & in_window(held))

    *mixed, most, total = (
        with_new(carry) if splits == 1 else lax.cond(split == splits - 1, with_new, lambda x: x, carry)
    )
    for first, x in zip((0, half), mixed, strict=True):
        if splits == 1:
            _put(out, row, head, tokens, groups, query[:, None], first + column, 2 * half, x / total[:, None])
        else:
            out[row, head, split, query[:, None], first + column] = x
    if splits > 1:
        sums[0][row, head, split, query] = most
        sums[1][row, head, split, query] = total


def _to_int8(halves: tuple[Array, Array], interpret: bool) -> tuple[tuple[Array, Array], Array]:
    """As `jaxgen.cache.to_int8`, of some vectors in halves."""
    first, second = (x.astype(jnp.float32) for x in halves)
    scale = jnp.maximum(jnp.abs(first).max(1), jnp.abs(second).max(1)) / 127
    divisor = jnp.where(scale > 0, scale, 1)[:, None]
    rounded = [backend.rounded(x / divisor, interpret).astype(jnp.int8) for x in (first, second)]
    return (rounded[0], rounded[1]), scale


def _queries(tokens: int, groups: int) -> int:
    """How many a program computes."""
    return max(16, backend.power_of_two(tokens * groups))


def takes(tokens: int, groups: int) -> bool:
    """Whether so many new tokens per row, with `groups` query heads to a key-value head, are few enough."""
    return tokens <= _NEW and _queries(tokens, groups) <= _MOST_QUERIES


def _combine(parts: Any, most: Any, total: Any, out: Any, *, tokens: int) -> None:
    """One query of one row and head: the parts, each scaled to the common maximum, over the common sum."""
    row, head, query = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    splits, groups, column = parts.shape[2], parts.shape[3] // tokens, backend.arange(parts.shape[4])
    split = backend.clamped(0, backend.power_of_two(splits), splits)
    highest = most[row, head, split, query]
    weight = jnp.exp(highest - highest.max(0))
    if len(split) != splits:
        weight = jnp.where(backend.arange(len(split)) < splits, weight, 0)
    mixed = (parts[row, head, split[:, None], query, column[None, :]] * weight[:, None]).sum(0)
    result = mixed / (total[row, head, split, query] * weight).sum(0)
    _put(out, row, head, tokens, groups, query, column, len(column), result)


def _put(
    out: Any, row: Any, head: Any, tokens: int, groups: int, query: Any, column: Any, size: int, value: Array
) -> None:
    """Into `[B * T, K, G, H]`, or as columns into `[K * G * H, M]`."""
    line, query, value = row * tokens + lax.div(query, groups), lax.rem(query, groups), value.astype(out.dtype)
    if len(out.shape) == 4:
        out[line, head, query, column] = value
    else:
        out[(head * groups + query) * size + column, line] = value


def splits_for(rows: int, heads: int, slots: int) -> tuple[int, int]:
    """In how many parts the slots are read, so that the programs fill a GPU; and how many slots at a time.

    The fastest on an H200 for 1, 8 and 32 rows of 8 heads, and 512 or 4,096 tokens.
    """
    splits = max(1, min(_MOST_SPLITS, _PROGRAMS // (rows * heads)))
    block = 64 if splits <= 4 else 32
    return min(splits, -(-slots // block)), block


def attend(
    qkv: Float[Array, "S M K P H"],
    rotation: tuple[Float[Array, "BT half"], Float[Array, "BT half"]],
    starts: Int[Array, " B"],
    cache: LayerCache,
    *,
    newest: Int[Array, " B"] | None = None,
    columns: int = 0,
    splits: int | None = None,
    block: int | None = None,
    warps: int = 4,
    stages: int = 3,
    interpret: bool = False,
) -> tuple[Array, LayerCache]:
    """What each query reads, and the cache with the new keys and values in their slots, in place.

    A row reads T tokens, those at positions `starts` to `newest` and then, if there are fewer, some of padding, which
    are not kept. `qkv`: the fused projection as S sums that are to be added (S a power of two); per key-value head its
    P = G + 2 vectors, the queries, the key, the value. It may have more than B * T rows. The result has the dtype of
    `rotation`, and is `[B * T, K, G, H]`, or `[K * G * H, columns]` for `int4_rows`.
    """
    rows, (heads, projections, size) = len(starts), qkv.shape[2:]
    groups, slots, dtype = projections - 2, cache.slots, rotation[0].dtype
    tokens = len(rotation[0]) // rows
    newest = starts if newest is None else newest
    best = splits_for(rows, heads, slots)
    splits, block = splits or best[0], block or best[1]
    int8 = isinstance(cache.keys, Int8Slots)
    arrays, structure = jax.tree.flatten(cache)
    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    shape = (heads * groups * size, columns) if columns else (rows * tokens, heads, groups, size)
    one = jax.ShapeDtypeStruct(shape, dtype)
    outs = [one]
    if splits > 1:
        shape = (rows, heads, splits, tokens * groups)
        outs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*shape, size), shape, shape)]
    window = None if cache.window is not None and tokens == 1 and cache.window >= slots else cache.window
    kernel = functools.partial(
        _kernel, tokens=tokens, groups=groups, splits=splits, block=block, window=window, int8=int8,
        interpret=interpret,
    )  # fmt: skip
    out, *rest = backend.call(
        kernel, qkv, *rotation, starts, newest, *arrays, grid=(rows, heads, splits), out=[*outs, *abstract],
        name="attend", warps=warps, stages=stages, interpret=interpret,
        aliases={5 + i: len(outs) + i for i in range(len(arrays))},
    )  # fmt: skip
    after = jax.tree.unflatten(structure, rest[-len(arrays) :])
    if splits > 1:
        kernel = functools.partial(_combine, tokens=tokens)
        grid = (rows, heads, tokens * groups)
        out = backend.call(
            kernel, out, *rest[:2], grid=grid, out=one, name="attend_combine", warps=1, interpret=interpret
        )
    return out, after


def attend_plainly(
    qkv: Float[Array, "S BT K P H"],
    rotation: tuple[Float[Array, "BT half"], Float[Array, "BT half"]],
    reading: Reading,
    cache: LayerCache,
) -> tuple[Float[Array, "BT K G H"], LayerCache]:
    """The same in plain JAX."""
    from jaxgen.attention import Rotation, rotate

    def by_row(x: Array) -> Array:
        return x.reshape(*reading.positions.shape, *x.shape[1:])

    dtype = rotation[0].dtype
    fused = by_row(qkv.astype(jnp.float32).sum(0).astype(dtype))
    tables = Rotation(by_row(rotation[0]), by_row(rotation[1]))
    queries, keys = (rotate(x, tables) for x in (fused[..., :-2, :], fused[..., -2, :]))
    mixed, cache = cache.attend(queries, keys, fused[..., -1, :], reading)
    return mixed.reshape(-1, *mixed.shape[2:]), cache
