"""One block of a checkpoint: its weights as float32, and the model's own forward pass through them."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxgen.attention import rope
from jaxgen.config import MistralConfig
from jaxgen.linear import product
from jaxgen.model import MistralDecoderLayer
from jaxgen.quant import Int4

from ..assemble import Assembler
from ..checkpoint import Checkpoint
from ..names import Part, parameter_parts

Weights = dict[str, Array]  # of one block, by name within it: "self_attn.qkv_proj.weight"

_TOKENS_AT_ONCE = 4096  # bounds the memory of a forward pass


def linears(weights: Weights) -> list[str]:
    """The weights that become int4, in the order in which a forward pass meets them."""
    return [name for name in weights if name.endswith("_proj.weight")]


class Block:
    """The decoder layers of a checkpoint, one at a time; compiled once for all of them."""

    def __init__(self, checkpoint: Checkpoint, config: MistralConfig):
        self._assembler, self._config = Assembler(checkpoint, np.dtype(np.float32)), config
        self._table = parameter_parts(config)
        abstract = nnx.eval_shape(lambda: MistralDecoderLayer(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
        self._graph = nnx.split(abstract)[0]
        self._run, self._observe = jax.jit(self.output), jax.jit(self._output_and_gram, static_argnames="name")

    def parts(self, layer: int) -> dict[str, tuple[Part, ...]]:
        """The HF tensors of each weight of a layer."""
        prefix = f"model.layers.{layer}."
        return {name.removeprefix(prefix): parts for name, parts in self._table.items() if name.startswith(prefix)}

    def read(self, layer: int) -> Weights:
        """The weights of a layer."""
        parts = self.parts(layer)
        shapes = {name: (sum(part.shape[0] for part in group), *group[0].shape[1:]) for name, group in parts.items()}
        return {name: jnp.asarray(self._assembler.parameter(group, shapes[name])) for name, group in parts.items()}

    def split(self, layer: int, quantized: dict[str, Int4]) -> dict[str, Int4]:
        """Int4 weights of a layer by HF tensor name, as numpy arrays."""
        parts = self.parts(layer)

        def rows(part: Part, array: Array) -> np.ndarray:
            return part.view(np.asarray(array)).reshape(part.shape[0], -1)

        return {
            part.name: Int4(rows(part, int4.packed), rows(part, int4.scale))
            for name, int4 in quantized.items()
            for part in parts[name]
        }

    def join(self, layer: int, weights: Weights, quantized: dict[str, Int4]) -> Weights:
        """The weights of a layer, of which those in `quantized` (by HF tensor name) are replaced."""
        joined = dict(weights)
        for name, parts in self.parts(layer).items():
            if all(part.name in quantized for part in parts):
                buffer = np.empty(weights[name].shape, np.float32)
                for part in parts:
                    view = part.view(buffer)
                    view[...] = np.asarray(quantized[part.name].dequantize()).reshape(view.shape)
                joined[name] = jnp.asarray(buffer)
        return joined

    def output(self, weights: Weights, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The layer's output for rows of full length; pure, for use in a jit."""
        return self._forward(self._layer(weights), x)

    def outputs(self, weights: Weights, hidden: Float[np.ndarray, "N T D"]) -> Float[np.ndarray, "N T D"]:
        """The layer's output for the whole calibration set, a few rows at a time."""
        return np.concatenate([np.asarray(self._run(weights, x)) for x in batches(hidden)])

    def gram(self, weights: Weights, hidden: Float[np.ndarray, "N T D"], name: str) -> Float[Array, "I I"]:
        """The mean of `x xᵀ` over all inputs `x` of one linear layer: GPTQ's Hessian, up to a factor."""
        total = sum(self._observe(weights, x, name=name) for x in batches(hidden))
        return jnp.asarray(total) / math.prod(hidden.shape[:2])

    def _output_and_gram(self, weights: Weights, x: Float[Array, "B T D"], *, name: str) -> Float[Array, "I I"]:
        layer = self._layer(weights)
        module, linear, _ = name.split(".")
        seen = []
        original: Callable[[Array], Array] = getattr(getattr(layer, module), linear)

        def observed(x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
            rows = x.reshape(-1, x.shape[-1])
            seen.append(product("ri,rj->ij", rows, rows))
            return original(x)

        setattr(getattr(layer, module), linear, observed)
        self._forward(layer, x)
        return seen[0]

    def _layer(self, weights: Weights) -> MistralDecoderLayer:
        state = nnx.from_flat_state({tuple(name.split(".")): nnx.Param(value) for name, value in weights.items()})
        return nnx.merge(self._graph, state)

    def _forward(self, layer: MistralDecoderLayer, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        rotation = rope(positions, self._config.head_size, self._config.rope_theta, x.dtype)
        return layer.prompt(x, rotation, positions, jnp.ones(x.shape[:2], bool))[0]


def batches(hidden: Float[np.ndarray, "N T D"]) -> list[np.ndarray]:
    """Views of a few rows each."""
    step = max(1, _TOKENS_AT_ONCE // hidden.shape[1])
    return [hidden[start : start + step] for start in range(0, len(hidden), step)]
