"""The model's own forward pass through one layer, and what its linear layers see there.

Compiled once for all layers of a model that differ in their weights only. A config here is one layer's own
(`DecoderConfig.with_layers`).
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxgen.linear import product
from jaxgen.lowering import own_rules
from jaxgen.models.config import DecoderConfig
from jaxgen.models.decoder import DecoderLayer, rotations

Weights = dict[str, Array]  # of one layer, in float32, by their names in it: "self_attn.qkv_proj.weight"
Hidden = Float[np.ndarray, "N T D"]  # hidden states of the calibration text, in host memory

_TOKENS_AT_ONCE = 4096  # bounds the memory of a forward pass


def linear_names(weights: Weights) -> list[str]:
    """The weights that become int4, in the order in which a forward pass meets them."""
    return [name for name in weights if name.endswith("_proj.weight")]


def batches(*hidden: Hidden) -> Iterator[tuple[Hidden, ...]]:
    """The same few sequences of each, as views, until all have been seen."""
    step = max(1, _TOKENS_AT_ONCE // hidden[0].shape[1])
    for start in range(0, len(hidden[0]), step):
        yield tuple(states[start : start + step] for states in hidden)


@functools.partial(jax.jit, static_argnames="config")
def output(config: DecoderConfig, weights: Weights, x: Float[Array | np.ndarray, "B T D"]) -> Float[Array, "B T D"]:
    """A layer's output for sequences without padding."""
    return _run(config, _layer(config, weights), jnp.asarray(x))


@own_rules()
def advance(config: DecoderConfig, weights: Weights, hidden: Hidden) -> None:
    """Replace a layer's inputs, in place, by its outputs."""
    for (x,) in batches(hidden):
        x[...] = output(config, weights, x)


@own_rules()
def gram_of_inputs(config: DecoderConfig, weights: Weights, hidden: Hidden, name: str) -> Float[Array, "I I"]:
    """The sum of `x xᵀ` over the inputs `x` that the linear layer of weight `name` gets."""
    return jnp.asarray(sum(_gram(config, weights, x, name) for (x,) in batches(hidden)))


@functools.partial(jax.jit, static_argnames=("config", "name"))
def _gram(
    config: DecoderConfig, weights: Weights, x: Float[Array | np.ndarray, "B T D"], name: str
) -> Float[Array, "I I"]:
    layer = _layer(config, weights)
    module, attribute, _ = name.split(".")
    owner, seen = getattr(layer, module), []
    linear = getattr(owner, attribute)

    def observed(x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        seen.append(product("bti,btj->ij", x, x))
        return linear(x)

    setattr(owner, attribute, observed)
    _run(config, layer, jnp.asarray(x))  # whatever follows `observed` is never computed: nothing reads it
    return seen[0]


def _layer(config: DecoderConfig, weights: Weights) -> DecoderLayer:
    make = functools.partial(DecoderLayer, config, 0, dtype=jnp.dtype("float32"))
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    variables: dict[Any, Any] = {tuple(name.split(".")): nnx.Param(value) for name, value in weights.items()}
    return nnx.merge(graph, nnx.from_flat_state(variables))


def _run(config: DecoderConfig, layer: DecoderLayer, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return layer.prompt(x, rotations(config, positions, x.dtype)[0], positions, jnp.ones(x.shape[:2], bool))[0]
