"""The key-value cache: a fixed number of slots per row, used as a ring once a row outgrows it.

A row's token at position p lives in slot p % C. With a sliding window W, C = min(W, total) slots are enough:
the token that a write replaces has just left the window. Without a window C = total, and the ring never turns.
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@no_type_check  # JAX rebuilds it around placeholders
@dataclasses.dataclass
class LayerCache:
    """Keys and values of one layer."""

    keys: Float[Array, "B K C H"]
    values: Float[Array, "B K C H"]

    def write(
        self, keys: Float[Array, "B K H"], values: Float[Array, "B K H"], positions: Int[Array, " B"]
    ) -> "LayerCache":
        """Put one token per row into its slot: one in-place write each for keys and values."""
        rows = jnp.arange(keys.shape[0])
        slots = positions % self.keys.shape[2]

        def put(cache: Array, new: Array) -> Array:
            if len(new) == 1:  # for one row XLA:GPU would lower the scatter below to two kernels
                return jax.lax.dynamic_update_slice_in_dim(cache, new[:, :, None], slots[0], axis=2)
            where = cache.at[rows, :, slots]
            return where.set(new, unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds")

        return LayerCache(put(self.keys, keys), put(self.values, values))


KVCache = list[LayerCache]


def visible_slots(positions: Int[Array, " B"], slots: int) -> Bool[Array, "B C"]:
    """Which of `slots` slots the token at each row's position may read, once it has been written itself."""
    return held_positions(positions, slots) >= 0


def held_positions(last: Int[Array, " B"], slots: int) -> Int[Array, "B C"]:
    """The position of the token in each slot when `last` is the newest one; negative where the slot is empty."""
    slot = jnp.arange(slots)
    return last[:, None] - (last[:, None] - slot) % slots


def layer_cache_from_prompt(
    keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"], lengths: Int[Array, " B"], slots: int
) -> LayerCache:
    """A layer's cache after a right-padded prompt of `lengths` real tokens per row.

    Slots beyond a row's length hold the keys of padding; `visible_slots` never shows them, and the row's own
    tokens overwrite them one by one.
    """

    def place(x: Float[Array, "B T K H"]) -> Float[Array, "B K C H"]:
        by_head = jnp.moveaxis(x, 1, 2)
        tokens = x.shape[1]
        if tokens <= slots:
            return jnp.pad(by_head, ((0, 0), (0, 0), (0, slots - tokens), (0, 0)))
        held = jnp.maximum(held_positions(lengths - 1, slots), 0)
        return jnp.take_along_axis(by_head, held[:, None, :, None], axis=2)

    return LayerCache(place(keys), place(values))
