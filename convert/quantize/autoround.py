"""AutoRound: which way each weight is rounded, and how far each scale reaches, learned by descent on a layer's output.

Source: SignRound, Cheng et al. 2023 (arXiv 2309.05516).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, PyTree

from jaxgen.lowering import own_rules
from jaxgen.models.config import DecoderConfig
from jaxgen.pytree import pytree
from jaxgen.quant import Int4, quantize
from jaxgen.quant.int4 import SCALE_DTYPE, rounded
from jaxgen.quant.nibbles import pack

from .forward import Hidden, Weights, batches, linear_names, output

ITERATIONS, BATCH = 200, 8
_LIMIT = 0.5  # of what is learned: a weight may go to the next code, not further; a scale changes by a tenth
_SCALE_SHARE = 0.2  # of a step that a scale takes: it moves a whole group's weights
_MOMENTUM = 0.9  # signs of the mean gradient: those of one batch's are mostly noise
_CHECKS = 4  # looks at the whole calibration text, of which the best is kept


@pytree
@dataclasses.dataclass(frozen=True)
class Rounding:
    """What is learned of a weight: offsets of its codes before they are rounded, and of its scales."""

    codes: Float32[Array, "O G g"]
    scale: Float32[Array, "O G"]  # relative


Roundings = dict[str, Rounding]


class AutoRound:
    """Quantises a layer: `iterations` steps of sign descent on `batch` sequences each, with a falling step size."""

    needs_targets = True

    def __init__(self, config: DecoderConfig, group_size: int, iterations: int = ITERATIONS, batch: int = BATCH):
        self._config, self._group_size = config, group_size
        self._iterations, self._batch = iterations, batch
        # The steps add up to _LIMIT: every offset can just reach it.
        schedule = optax.linear_schedule(1 / iterations, 0, iterations)
        self._optimizer = optax.chain(optax.ema(_MOMENTUM), optax.sign_sgd(schedule))
        self._step, self._loss = jax.jit(self._descend), jax.jit(self._error)

    def passes(self, sequences: int) -> float:
        """How often a layer's work is that of the whole text going forward through it, once, about."""
        steps = self._iterations * min(self._batch, sequences) / sequences
        return 3 * steps + _CHECKS + 3  # a gradient is two passes more; the rest is looks at the text

    @own_rules()
    def __call__(self, weights: Weights, hidden: Hidden, targets: Hidden) -> dict[str, Int4]:
        """The int4 weights with which a layer makes of `hidden` about `targets`: what the exact model has there.

        Starts from rounding to nearest with searched scales, and is never worse than that on the calibration text.
        """
        scales = {name: quantize(weights[name], self._group_size, name=name).scale for name in linear_names(weights)}
        roundings: PyTree = {name: _nearest(weights[name], scale) for name, scale in scales.items()}
        state = self._optimizer.init(roundings)
        best, least = roundings, self._loss_on_all(roundings, scales, weights, hidden, targets)
        rng = np.random.default_rng(0)  # for each layer anew: an interrupted run goes on as it would have
        for iteration in range(1, self._iterations + 1):
            rows = rng.choice(len(hidden), min(self._batch, len(hidden)), replace=False)
            roundings, state = self._step(roundings, state, scales, weights, hidden[rows], targets[rows])
            if iteration * _CHECKS % self._iterations < _CHECKS:
                loss = self._loss_on_all(roundings, scales, weights, hidden, targets)
                if loss < least:
                    best, least = roundings, loss
        return {name: _int4(weights[name], scale, best[name]) for name, scale in scales.items()}

    def _loss_on_all(
        self, roundings: Roundings, scales: Weights, weights: Weights, hidden: Hidden, targets: Hidden
    ) -> float:
        losses = [(self._loss(roundings, scales, weights, x, y), len(x)) for x, y in batches(hidden, targets)]
        return sum(float(loss) * rows for loss, rows in losses) / len(hidden)

    def _descend(
        self, roundings: Roundings, state: PyTree, scales: Weights, weights: Weights, x: Array, y: Array
    ) -> tuple[Roundings, PyTree]:
        gradient = jax.grad(self._error)(roundings, scales, weights, x, y)
        updates, state = self._optimizer.update(gradient, state)
        return jax.tree.map(lambda old, update: jnp.clip(old + update, -_LIMIT, _LIMIT), roundings, updates), state

    def _error(self, roundings: Roundings, scales: Weights, weights: Weights, x: Array, y: Array) -> Float[Array, ""]:
        """Mean squared error of the layer's output."""
        quantized = {name: _dequantized(weights[name], scale, roundings[name]) for name, scale in scales.items()}
        return jnp.square(output(self._config, weights | quantized, x) - y).mean()


def _nearest(weight: Float[Array, "O I"], scale: Float[Array, "O G"]) -> Rounding:
    return Rounding(jnp.zeros((*scale.shape, weight.shape[1] // scale.shape[1])), jnp.zeros(scale.shape))


def _codes(
    weight: Float[Array, "O I"], scale: Float[Array, "O G"], rounding: Rounding
) -> tuple[Float[Array, "O G g"], Float[Array, "O G"]]:
    """Codes and scales, rounded, with the gradients of the exact ones."""
    scale = _straight_through(rounded, scale.astype(jnp.float32) * (1 + _SCALE_SHARE * rounding.scale))
    inverse = jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))
    exact = weight.reshape(rounding.codes.shape) * inverse[..., None] + rounding.codes
    return jnp.clip(_straight_through(jnp.round, exact), -8, 7), scale


def _dequantized(weight: Float[Array, "O I"], scale: Float[Array, "O G"], rounding: Rounding) -> Float[Array, "O I"]:
    codes, scale = _codes(weight, scale, rounding)
    return (codes * scale[..., None]).reshape(weight.shape)


@jax.jit
def _int4(weight: Float[Array, "O I"], scale: Float[Array, "O G"], rounding: Rounding) -> Int4:
    codes, scale = _codes(weight, scale, rounding)
    return Int4(pack(codes.astype(jnp.int8).reshape(weight.shape)), scale.astype(SCALE_DTYPE))


def _straight_through(rounding: Callable[[Array], Array], x: Array) -> Array:
    return x + jax.lax.stop_gradient(rounding(x) - x)
