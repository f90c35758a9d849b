"""A checkpoint's layers, one in memory at a time, between HF's tensors and the model's fused weights."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxgen.errors import CheckpointError
from jaxgen.models.config import DecoderConfig
from jaxgen.models.tensors import Part, parameter_parts
from jaxgen.quant import Int4

from ..assemble import Assembler
from ..checkpoint import Checkpoint
from .forward import Weights, linear_names


class Layers:
    """The layers of a checkpoint that is stored in floats."""

    def __init__(self, checkpoint: Checkpoint, config: DecoderConfig):
        self._assembler = Assembler(checkpoint, np.dtype(np.float32))
        self._parameters = parameter_parts(config)

    def read(self, layer: int) -> Weights:
        """A layer's weights; raises `CheckpointError` if one of them is not finite."""
        weights = {}
        for name, parts in self._parts(layer).items():
            rows = sum(part.shape[0] for part in parts)
            weight = self._assembler.parameter(parts, (rows, *parts[0].shape[1:]))
            assert isinstance(weight, np.ndarray)  # this assembler was not told to quantise
            if not np.isfinite(weight).all():
                names = " or ".join(repr(part.name) for part in parts)
                problem = f"{names} has weights that are not finite"
                raise CheckpointError(str(self._assembler.checkpoint.directory), [problem])
            weights[name] = jnp.asarray(weight)
        return weights

    def split(self, layer: int, quantized: Mapping[str, Int4]) -> dict[str, Int4]:
        """A layer's int4 weights by HF tensor name, as numpy arrays."""
        parts = self._parts(layer)
        return {
            part.name: Int4(part.take(np.asarray(weight.packed)), part.take(np.asarray(weight.scale)))
            for name, weight in quantized.items()
            for part in parts[name]
        }

    def join(self, layer: int, weights: Weights, quantized: Mapping[str, Int4]) -> Weights:
        """A layer's weights, its linear ones as the int4 weights `quantized` (by HF tensor name) have them."""
        joined = dict(weights)
        for name in linear_names(weights):
            buffer = np.empty(weights[name].shape, np.float32)
            for part in self._parts(layer)[name]:
                part.put(buffer, np.asarray(quantized[part.name].dequantize()))
            joined[name] = jnp.asarray(buffer)
        return joined

    def _parts(self, layer: int) -> dict[str, tuple[Part, ...]]:
        prefix = f"model.layers.{layer}."
        return {name.removeprefix(prefix): parts for name, parts in self._parameters.items() if name.startswith(prefix)}
