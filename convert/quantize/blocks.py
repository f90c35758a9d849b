"""Quantisation layer by layer: each sees the inputs that the layers before it, already quantised, give it."""

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
from jaxtyping import Int

from jaxgen.errors import JaxgenError
from jaxgen.models.config import DecoderConfig
from jaxgen.models.tensors import EMBEDDING
from jaxgen.quant import Int4

from ..checkpoint import Checkpoint
from .autoround import AutoRound
from .cost import say_cost
from .forward import advance
from .gptq import Gptq
from .layers import Layers

_METHODS = {"gptq": Gptq, "autoround": AutoRound}


def quantized_blocks(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    calibration: Int[np.ndarray, "N T"],
    *,
    group_size: int,
    method: str,
    finished: Callable[[int], dict[str, Int4] | None] = lambda layer: None,
) -> Iterator[tuple[int, dict[str, Int4]]]:
    """Each layer's int4 weights by HF tensor name, as numpy arrays, in order; one layer in memory at a time.

    `calibration`: ids of N sequences without padding, whose hidden states stay in host memory (float32 `[N, T, D]`,
    twice for "autoround"). `method`: "gptq" or "autoround". `finished`: the weights of a layer that an interrupted
    run has made already; they are yielded and built upon as they are. About how long the others will take is said
    by the logger "jaxgen.convert", beforehand. Raises `JaxgenError` for another method, and for groups that do not
    divide the rows; `CheckpointError` for weights that are not finite.
    """
    if method not in _METHODS:
        raise JaxgenError(f"method={method!r} must be one of {', '.join(map(repr, _METHODS))}")
    layers = Layers(checkpoint, config)
    quantizer = cache(lambda config: _METHODS[method](config, group_size))  # what it compiles is for layers like one
    hidden = checkpoint.read(EMBEDDING)[calibration].astype(np.float32) * np.float32(config.embedding_multiplier)
    exact = hidden.copy() if _METHODS[method].needs_targets else None
    said = False
    for layer in range(config.num_hidden_layers):
        weights, shape = layers.read(layer), config.with_layers([layer])
        quantize = quantizer(shape)
        if exact is not None:
            advance(shape, weights, exact)
        quantized = finished(layer)
        if quantized is None:
            if not said:
                passes, left = quantize.passes(len(hidden)), config.num_hidden_layers - layer
                say_cost(shape, weights, hidden, method=method, passes=passes, layers=left)
                said = True
            quantized = layers.split(layer, quantize(weights, hidden, exact))
        yield layer, quantized
        advance(shape, layers.join(layer, weights, quantized), hidden)
