"""A model on a mesh, as the compiled loop sees it: each device runs the same layers on its part, and they sum.

The layers say where (`jaxgen.shards`): twice per layer, once for the embedding, and the head's logits are joined. What
comes after the logits, every device computes for itself, with the same keys: so all draw the same tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxgen.cache import KVCache, Slots
from jaxgen.generation.programs.structure import value_of
from jaxgen.parallel.layout import Layout
from jaxgen.shards import Axes, dividing, joined, taken


class OnMesh:
    """What generation uses of a model (`jaxgen.models.protocol`), divided; made and used within one trace.

    Rows that `data` does not divide are computed by all.
    """

    def __init__(self, model: Any, layout: Layout):
        self.config, self.generation_config, self.dtype = model.config, model.generation_config, model.dtype
        self._model, self._layout = model, layout
        self._graph, state = nnx.split(model)
        flat = list(nnx.to_flat_state(state))
        self._variables = flat
        self._arrays = [value_of(variable) for _, variable in flat]
        names = [".".join(map(str, path)) for path, _ in flat]
        self._specs = [layout.specs(self.config, name, array) for name, array in zip(names, self._arrays, strict=True)]

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], slots: Slots, int8: bool = False
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """As of the model."""
        return self._each(lambda model, *rows: model.prefill(*rows, slots, int8), (tokens, lengths), caches=True)

    def step(
        self, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """As of the model."""
        return self._each(lambda model, *args: model.step(*args), (tokens, positions), cache, caches=True)

    def extend(
        self, tokens: Int[Array, "B T"], starts: Int[Array, " B"], counts: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """As of the model."""
        return self._each(lambda model, *args: model.extend(*args), (tokens, starts, counts), cache, caches=True)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """As of the model."""
        return self._each(lambda model, hidden: model.logits(hidden), (hidden,))

    def hidden(self, input_ids: Any, attention_mask: Any = None) -> Float[Array, "B T D"]:
        """As of the model."""
        given = [jnp.asarray(x) for x in (input_ids, attention_mask) if x is not None]
        return self._each(lambda model, *given: model.hidden(*given), given)

    def empty_cache(self, rows: int, slots: Slots, int8: bool = False) -> KVCache:
        """As of the model."""
        cache = self._model.empty_cache(rows, slots, int8)
        sharding = NamedSharding(self._layout.mesh, self._of_cache(rows))
        return jax.lax.with_sharding_constraint(cache, jax.tree.map(lambda _: sharding, cache))

    def _over_rows(self, rows: int) -> Axes:
        return self._layout.over("rows") if rows % self._layout.parts("rows") == 0 else ()

    def _of_cache(self, rows: int) -> PartitionSpec:
        return PartitionSpec(self._over_rows(rows) or None, self._layout.over("heads") or None)

    def _each(self, run: Callable[..., Any], rows: Sequence[Array], *cache: KVCache, caches: bool = False) -> Any:
        """What all devices make of their parts of model, rows and cache: the results of all rows, and the caches.

        Every device is given all rows and gets all results: if it were given its own only, the compiler would divide
        the loop around this as well, and have devices ask each other for the tokens of each row.
        """
        over, whole = self._over_rows(len(rows[0])), PartitionSpec()
        held = self._of_cache(len(rows[0]))

        def part(arrays: list[Any], rows: list[Array], *cache: KVCache) -> Any:
            pairs = zip(self._variables, arrays, strict=True)
            flat = [(path, variable.replace(array)) for (path, variable), array in pairs]
            with dividing({**dict(self._layout.axes), "rows": over}):
                result = run(nnx.merge(self._graph, nnx.from_flat_state(flat)), *map(taken, rows), *cache)
                return (joined(result[0], "rows", axis=0), result[1]) if caches else joined(result, "rows", axis=0)

        return jax.shard_map(
            part,
            mesh=self._layout.mesh,
            in_specs=(self._specs, whole, *(held for _ in cache)),
            out_specs=(whole, held) if caches else whole,
            check_vma=False,
        )(self._arrays, list(rows), *cache)
