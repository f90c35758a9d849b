"""The key-value cache: a fixed number of slots per row, used as a ring once a row outgrows it.

A row's token at position p lives in slot p % C. Without a sliding window C is the largest length of a row, and the
ring never turns. With a window W, a row that reads one token at a time needs C = W slots: the token that a write
replaces has just left the window. One that reads up to T tokens at a time, or writes up to T that may be taken
back, needs C = W + T. Layers with a window and layers without lie side by side, each with the slots that it needs.

What is in a slot follows from the newest token's position alone: tokens after it, of padding or of rejected
drafts, are never seen, and are overwritten before they could be.

A model hands over queries, new keys and values, and positions; what is stored, in which form, and who may see it is
the cache's affair (`LayerCache.attend`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgen.attention import Scoring, attend, attend_to_slots
from jaxgen.pytree import pytree


class Reading:
    """Which tokens a step reads: their positions, and what each may see, worked out once for layers that are alike.

    Made and used within one trace. `real` is None where every row reads exactly one token.
    """

    def __init__(self, positions: Int[Array, "B T"], newest: Int[Array, " B"], real: Bool[Array, "B T"] | None = None):
        self.positions, self.newest, self.real = positions, newest, real
        self._visible: dict[tuple[int, int | None], Bool[Array, "B T C"]] = {}

    @classmethod
    def one(cls, positions: Int[Array, " B"]) -> "Reading":
        """One token per row."""
        return cls(positions[:, None], positions)

    @classmethod
    def several(cls, starts: Int[Array, " B"], counts: Int[Array, " B"], length: int) -> "Reading":
        """T = `length` tokens per row from position `starts` on, of which the first `counts` are real."""
        column = jnp.arange(length)
        return cls(starts[:, None] + column, starts + counts - 1, column < counts[:, None])

    def visible(self, slots: int, window: int | None) -> Bool[Array, "B T C"]:
        """Which slots of a layer each token may read, once all of them are written."""
        if (slots, window) not in self._visible:
            self._visible[slots, window] = visible_slots(self.positions, self.newest, slots, window)
        return self._visible[slots, window]


@pytree
@dataclasses.dataclass
class Int8Slots:
    """Keys or values as int8, with one scale per row, head and token: half the memory of 16 bits, and a bit."""

    values: Int[Array, "*axes H"]  # of a cache [B, K, C, H]; of what is put into it, without C
    scales: Float[Array, "*axes"]


@pytree
@dataclasses.dataclass
class LayerCache:
    """Keys and values of one layer, `[B, K, C, H]` each, as they are or as `Int8Slots`; and the layer's window."""

    keys: "Float[Array, 'B K C H'] | Int8Slots"
    values: "Float[Array, 'B K C H'] | Int8Slots"
    window: int | None = dataclasses.field(default=None, metadata={"static": True})  # tokens that a token looks back

    @property
    def slots(self) -> int:
        """C, the slots per row."""
        return jax.tree.leaves(self.keys)[0].shape[2]

    def attend(
        self,
        queries: Float[Array, "B T K G H"],
        keys: Float[Array, "B T K H"],
        values: Float[Array, "B T K H"],
        reading: Reading,
        scoring: Scoring | None = None,
    ) -> tuple[Float[Array, "B T K G H"], "LayerCache"]:
        """What the tokens that are read make of all that they may see, themselves included; and the cache with them.

        Queries and keys are rotated. Tokens that are not real are not kept, and what they read means nothing.
        """
        visible = reading.visible(self.slots, self.window)
        if reading.real is None:
            cache = self.write(keys[:, 0], values[:, 0], reading.newest)
            mixed = attend_to_slots(queries[:, 0], *cache.read(queries.dtype), visible[:, 0], scoring)
            return mixed[:, None], cache
        cache = self.write_block(keys, values, reading.positions, reading.real)
        return attend(queries, *cache.read(queries.dtype), visible, scoring), cache

    def attend_by_kernel(
        self,
        qkv: Float[Array, "S M K P H"],
        rotation: tuple[Float[Array, "BT half"], Float[Array, "BT half"]],
        reading: Reading,
        *,
        columns: int = 0,
        interpret: bool = False,
    ) -> "tuple[Array, LayerCache]":
        """`attend` for one token per row, or a few, on a GPU, with what comes before: see `jaxgen.kernels.attend`."""
        from jaxgen.kernels.attend import attend

        starts = reading.newest if reading.real is None else reading.positions[:, 0]
        options: dict[str, Any] = {"newest": reading.newest, "columns": columns, "interpret": interpret}
        return attend(qkv, rotation, starts, self, **options)

    def read(self, dtype: jnp.dtype) -> tuple[Float[Array, "B K C H"], Float[Array, "B K C H"]]:
        """Keys and values in `dtype`."""
        return _read(self.keys, dtype), _read(self.values, dtype)

    def write(
        self, keys: Float[Array, "B K H"], values: Float[Array, "B K H"], positions: Int[Array, " B"]
    ) -> "LayerCache":
        """Put one token per row into its slot: one in-place write each for keys and values."""
        rows, slots = jnp.arange(keys.shape[0]), positions % self.slots

        def put(cache: Array, new: Array) -> Array:
            if len(new) == 1:  # for one row XLA:GPU would lower the scatter below to two kernels
                return jax.lax.dynamic_update_slice_in_dim(cache, new[:, :, None], slots[0], axis=2)
            where = cache.at[rows, :, slots]
            return where.set(new, unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds")

        return self._map(put, keys, values)

    def write_block(
        self,
        keys: Float[Array, "B T K H"],
        values: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
        real: Bool[Array, "B T"],
    ) -> "LayerCache":
        """Put several tokens per row into their slots; those that are not `real` go nowhere. T is at most C."""
        rows = jnp.arange(keys.shape[0])[:, None]
        slots = jnp.where(real, positions % self.slots, self.slots)  # past the end: dropped

        def put(cache: Array, new: Array) -> Array:
            return cache.at[rows, :, slots].set(new, mode="drop")

        return self._map(put, keys, values)

    def _map(self, put: Callable[[Array, Array], Array], keys: Array, values: Array) -> "LayerCache":
        def one(cache: "Array | Int8Slots", new: Array) -> "Array | Int8Slots":
            return jax.tree.map(put, cache, to_int8(new) if isinstance(cache, Int8Slots) else new)

        return dataclasses.replace(self, keys=one(self.keys, keys), values=one(self.values, values))

    def resized(self, lengths: Int[Array, " B"], slots: int) -> "LayerCache":
        """The same tokens in another number of slots: rows of `lengths` tokens, of which the last `slots` are kept."""
        now = self.slots
        if slots == now:
            return self
        held = jnp.maximum(held_positions(lengths - 1, slots), 0) % now

        def move(x: Array) -> Array:
            index = held[:, None].reshape(len(x), 1, slots, *(1,) * (x.ndim - 3))
            return jnp.take_along_axis(x, index, axis=2)

        return jax.tree.map(move, self)


KVCache = list[LayerCache]
Slots = int | tuple[int, ...]  # per row: of every layer, or of each, where a window needs fewer than a full layer


def of_layers(slots: Slots, layers: int) -> tuple[int, ...]:
    """The slots of each layer."""
    return slots if isinstance(slots, tuple) else (slots,) * layers


def to_int8(x: Float[Array, "*axes H"]) -> Int8Slots:
    """Round the last axis to 8 bits under one scale, largest magnitude / 127."""
    x = x.astype(jnp.float32)
    scales = jnp.abs(x).max(axis=-1) / 127
    divisor = jnp.where(scales > 0, scales, 1)[..., None]
    return Int8Slots(jnp.round(x / divisor).astype(jnp.int8), scales)


def _read(slots: "Array | Int8Slots", dtype: jnp.dtype) -> Array:
    if not isinstance(slots, Int8Slots):
        return slots
    # By way of int32: a sum over int8 that is unpacked on the way has been wrong on XLA:CPU.
    return (slots.values.astype(jnp.int32).astype(jnp.float32) * slots.scales[..., None]).astype(dtype)


def visible_slots(
    positions: Int[Array, "B T"], newest: Int[Array, " B"], slots: int, window: int | None
) -> Bool[Array, "B T C"]:
    """Which slots the token at each position may read when `newest` is the last position that was written."""
    held = held_positions(newest, slots)[:, None]
    visible = (held >= 0) & (held <= positions[..., None])
    if window is not None and slots > window:
        visible &= held > positions[..., None] - window
    return visible


def held_positions(last: Int[Array, " B"], slots: int) -> Int[Array, "B C"]:
    """The position of the token in each slot when `last` is the newest one; negative where the slot is empty."""
    slot = jnp.arange(slots)
    return last[:, None] - (last[:, None] - slot) % slots


def layer_cache_from_prompt(
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    lengths: Int[Array, " B"],
    slots: int,
    int8: bool,
    window: int | None = None,
) -> LayerCache:
    """A layer's cache after a right-padded prompt of `lengths` real tokens per row.

    Slots beyond a row's length hold the keys of padding; `visible_slots` never shows them, and the row's own
    tokens overwrite them one by one.
    """

    def place(x: Float[Array, "B T K H"]) -> "Array | Int8Slots":
        by_head = jnp.moveaxis(x, 1, 2)
        tokens = x.shape[1]
        if tokens <= slots:
            by_head = jnp.pad(by_head, ((0, 0), (0, 0), (0, slots - tokens), (0, 0)))
        else:
            held = jnp.maximum(held_positions(lengths - 1, slots), 0)
            by_head = jnp.take_along_axis(by_head, held[:, None, :, None], axis=2)
        return to_int8(by_head) if int8 else by_head

    return LayerCache(place(keys), place(values), window)


def empty_layer_cache(
    rows: int, heads: int, slots: int, head_dim: int, dtype: jnp.dtype, int8: bool, window: int | None = None
) -> LayerCache:
    """A layer's cache without a token."""
    zeros = jnp.zeros((rows, heads, slots, head_dim), dtype)
    one = to_int8(zeros) if int8 else zeros
    return LayerCache(one, one, window)
