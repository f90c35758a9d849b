"""A model on a mesh, as the compiled loop sees it: each device runs the same layers on its part, and they sum.

The layers say where (`jaxgen.shards`): twice per layer, once for the embedding, and the head's logits are joined. What
comes after the logits, every device computes for itself, with the same keys: so all draw the same tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxgen.cache import KVCache, Slots
from jaxgen.generation.programs.structure import value_of
from jaxgen.parallel.layout import Layout
from jaxgen.shards import dividing


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
        self._specs = [
            layout.specs(self.config, name, array) for name, array in zip(names, self._arrays, strict=True)
        ]

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], slots: Slots, int8: bool = False
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """As of the model."""
        rows = self._rows(tokens)
        run = lambda model, tokens, lengths: model.prefill(tokens, lengths, slots, int8)  # noqa: E731
        return self._each(run, (rows, rows), (rows, self._cache(tokens)))(tokens, lengths)

    def step(
        self, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """As of the model."""
        rows, held = self._rows(tokens), self._cache(tokens)
        run = lambda model, *args: model.step(*args)  # noqa: E731
        return self._each(run, (rows, rows, held), (rows, held))(tokens, positions, cache)

    def extend(
        self, tokens: Int[Array, "B T"], starts: Int[Array, " B"], counts: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """As of the model."""
        rows, held = self._rows(tokens), self._cache(tokens)
        run = lambda model, *args: model.extend(*args)  # noqa: E731
        return self._each(run, (rows, rows, rows, held), (rows, held))(tokens, starts, counts, cache)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """As of the model."""
        rows = self._rows(hidden)
        return self._each(lambda model, hidden: model.logits(hidden), (rows,), rows)(hidden)

    def hidden(self, input_ids: Any, attention_mask: Any = None) -> Float[Array, "B T D"]:
        """As of the model."""
        rows, given = self._rows(input_ids), [x for x in (input_ids, attention_mask) if x is not None]
        return self._each(lambda model, *given: model.hidden(*given), (rows,) * len(given), rows)(*given)

    def empty_cache(self, rows: int, slots: Slots, int8: bool = False) -> KVCache:
        """As of the model."""
        cache = self._model.empty_cache(rows, slots, int8)
        sharding = NamedSharding(self._layout.mesh, self._cache(jax.tree.leaves(cache)[0]))
        return jax.lax.with_sharding_constraint(cache, jax.tree.map(lambda _: sharding, cache))

    def _rows(self, batch: Array) -> PartitionSpec:
        return PartitionSpec(self._over_rows(batch))

    def _cache(self, batch: Array) -> PartitionSpec:
        return PartitionSpec(self._over_rows(batch), self._layout.over("heads") or None)

    def _over_rows(self, batch: Array) -> Any:
        even = len(batch) % self._layout.parts("rows") == 0
        return (self._layout.over("rows") or None) if even else None

    def _each(self, run: Callable[..., Any], ins: tuple[PartitionSpec, ...], outs: Any) -> Callable[..., Any]:
        """What every device makes of its part of the model and of the arguments."""

        def part(arrays: list[Any], *args: Any) -> Any:
            pairs = zip(self._variables, arrays, strict=True)
            flat = [(path, variable.replace(array)) for (path, variable), array in pairs]
            with dividing(dict(self._layout.axes)):
                return run(nnx.merge(self._graph, nnx.from_flat_state(flat)), *args)

        mapped = jax.shard_map(
            part, mesh=self._layout.mesh, in_specs=(self._specs, *ins), out_specs=outs, check_vma=False
        )
        return lambda *args: mapped(self._arrays, *args)
