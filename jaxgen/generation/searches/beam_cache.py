"""How caches follow their beams: what a beam that goes on in another row has in its cache moves there."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxgen.cache import KVCache

_BLOCK = 32  # cache slots that are moved at a time


def reordered(cache: KVCache, parents: Int[Array, " M"], first: Int[Array, ""], last: Int[Array, ""]) -> KVCache:
    """The cache with row `parents[r]` in row r, where rows differ in no other positions than `first` to `last`.

    Works in place, a block of slots at a time. If no row moves, `first` must lie behind `last`. In a ring that has
    turned, the positions may be anywhere, and all slots are moved.
    """
    alike: dict[int, list[int]] = {}  # layers by their slots
    for index, layer in enumerate(cache):
        alike.setdefault(layer.slots, []).append(index)
    moved = list(cache)
    for slots, layers in alike.items():
        after = _reordered([cache[index] for index in layers], slots, parents, first, last)
        for index, layer in zip(layers, after, strict=True):
            moved[index] = layer
    return moved


def _reordered(
    cache: KVCache, slots: int, parents: Int[Array, " M"], first: Int[Array, ""], last: Int[Array, ""]
) -> KVCache:
    size = min(_BLOCK, slots)
    turned = (last >= slots) & (first <= last)
    start = jnp.where(turned, 0, first // size)
    stop = jnp.where(turned, -(-slots // size), last // size + 1)

    def move(block: Int[Array, ""], cache: KVCache) -> KVCache:
        # The last block may reach back into the one before, whose rows have been moved already.
        begin = jnp.minimum(block * size, slots - size)
        fresh = begin + jnp.arange(size) >= block * size

        def one(x: Array) -> Array:
            here = jax.lax.dynamic_slice_in_dim(x, begin, size, axis=2)
            there = jnp.take(here, parents, axis=0)
            if slots % size:
                there = jnp.where(fresh.reshape(-1, *(1,) * (x.ndim - 3)), there, here)
            return jax.lax.dynamic_update_slice_in_dim(x, there, begin, axis=2)

        return jax.tree.map(one, cache)

    return jax.lax.fori_loop(start, stop, move, cache)
