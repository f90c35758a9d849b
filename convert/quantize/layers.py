"""The layers of a checkpoint, one in memory at a time: their weights, and the model's own forward pass."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxgen.attention import rope
from jaxgen.config import MistralConfig
from jaxgen.errors import CheckpointError
from jaxgen.linear import product
from jaxgen.model import MistralDecoderLayer
from jaxgen.quant import Int4

from ..assemble import Assembler
from ..checkpoint import Checkpoint
from ..names import Part, parameter_parts

Weights = dict[str, Array]  # of one layer, in float32, by their names in it: "self_attn.qkv_proj.weight"
Hidden = Float[np.ndarray, "N T D"]  # hidden states of the calibration text, in host memory

_TOKENS_AT_ONCE = 4096  # bounds the memory of a forward pass


def linear_names(weights: Weights) -> list[str]:
    """The weights that become int4, in the order in which a forward pass meets them."""
    return [name for name in weights if name.endswith("_proj.weight")]


def batches(*hidden: Hidden) -> Iterator[tuple[Hidden, ...]]:
    """The same few rows of each, as views, until all have been seen."""
    step = max(1, _TOKENS_AT_ONCE // hidden[0].shape[1])
    for start in range(0, len(hidden[0]), step):
        yield tuple(states[start : start + step] for states in hidden)


class Layers:
    """A checkpoint's layers: read one by one, run by functions that are compiled once for all of them."""

    def __init__(self, checkpoint: Checkpoint, config: MistralConfig):
        self._assembler, self._config = Assembler(checkpoint, np.dtype(np.float32)), config
        self._parameters = parameter_parts(config)
        abstract = nnx.eval_shape(lambda: MistralDecoderLayer(config, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
        self._graph, _ = nnx.split(abstract)
        self._output = jax.jit(self.output)
        self._products = jax.jit(self._products_of_inputs, static_argnames="name")

    def read(self, layer: int) -> Weights:
        """A layer's weights; raises `CheckpointError` if one of them is not finite."""
        weights = {}
        for name, parts in self._parts(layer).items():
            rows = sum(part.shape[0] for part in parts)
            weight = self._assembler.parameter(parts, (rows, *parts[0].shape[1:]))
            assert isinstance(weight, np.ndarray)  # this assembler was not told to quantise
            if not np.isfinite(weight).all():
                names = " or ".join(repr(part.name) for part in parts)
                raise CheckpointError(
                    str(self._assembler.checkpoint.directory), [f"{names} has weights beyond float32"]
                )
            weights[name] = jnp.asarray(weight)
        return weights

    def split(self, layer: int, quantized: Mapping[str, Int4]) -> dict[str, Int4]:
        """A layer's int4 weights by HF tensor name, as numpy arrays."""

        def rows(part: Part, array: Array) -> np.ndarray:
            return part.view(np.asarray(array)).reshape(part.shape[0], -1)

        parts = self._parts(layer)
        return {
            part.name: Int4(rows(part, weight.packed), rows(part, weight.scale))
            for name, weight in quantized.items()
            for part in parts[name]
        }

    def join(self, layer: int, weights: Weights, quantized: Mapping[str, Int4]) -> Weights:
        """A layer's weights, its linear ones as the int4 weights `quantized` (by HF tensor name) have them."""
        joined = dict(weights)
        for name in linear_names(weights):
            buffer = np.empty(weights[name].shape, np.float32)
            for part in self._parts(layer)[name]:
                view = part.view(buffer)
                view[...] = np.asarray(quantized[part.name].dequantize()).reshape(view.shape)
            joined[name] = jnp.asarray(buffer)
        return joined

    def output(self, weights: Weights, x: Float[Array | np.ndarray, "B T D"]) -> Float[Array, "B T D"]:
        """A layer's output for sequences without padding; for use inside a jit."""
        return self._run(self._module(weights), jnp.asarray(x))

    def advance(self, weights: Weights, hidden: Hidden) -> None:
        """Replace a layer's inputs, in place, by its outputs."""
        for (x,) in batches(hidden):
            x[...] = self._output(weights, x)

    def gram(self, weights: Weights, hidden: Hidden, name: str) -> Float[Array, "I I"]:
        """The sum of `x xᵀ` over the inputs `x` that the linear layer `name` gets."""
        return jnp.asarray(sum(self._products(weights, x, name=name) for (x,) in batches(hidden)))

    def _products_of_inputs(
        self, weights: Weights, x: Float[Array | np.ndarray, "B T D"], *, name: str
    ) -> Float[Array, "I I"]:
        module = self._module(weights)
        part, attribute, _ = name.split(".")
        owner, seen = getattr(module, part), []
        linear = getattr(owner, attribute)

        def observed(x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
            seen.append(product("bti,btj->ij", x, x))
            return linear(x)

        setattr(owner, attribute, observed)
        self._run(module, jnp.asarray(x))  # whatever follows `observed` is never computed: nothing reads it
        return seen[0]

    def _module(self, weights: Weights) -> MistralDecoderLayer:
        variables: dict[Any, Any] = {tuple(name.split(".")): nnx.Param(value) for name, value in weights.items()}
        return nnx.merge(self._graph, nnx.from_flat_state(variables))

    def _run(self, module: MistralDecoderLayer, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        rotation = rope(positions, self._config.head_size, self._config.rope_theta, x.dtype)
        return module.prompt(x, rotation, positions, jnp.ones(x.shape[:2], bool))[0]

    def _parts(self, layer: int) -> dict[str, tuple[Part, ...]]:
        prefix = f"model.layers.{layer}."
        return {name.removeprefix(prefix): parts for name, parts in self._parameters.items() if name.startswith(prefix)}
