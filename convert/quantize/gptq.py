"""GPTQ: columns are rounded one after the other, and those still to come make up for each one's error.

Source: Frantar et al. 2022 (arXiv 2210.17323). Columns are taken in the order of their inputs' energy, but only
within their group, and groups as wholes (as in arXiv 2505.14638): the scales stay where a plain group has them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from jaxgen.errors import JaxgenError
from jaxgen.linear import product
from jaxgen.lowering import own_rules
from jaxgen.models.config import DecoderConfig
from jaxgen.quant import Int4
from jaxgen.quant.config import check_group
from jaxgen.quant.int4 import SCALE_DTYPE, round_to, search_scale
from jaxgen.quant.nibbles import pack

from .forward import Hidden, Weights, gram_of_inputs, linear_names

_COLUMNS_AT_ONCE = 128  # rounded before the columns beyond them hear of their errors
_DAMPING = 0.01  # of the inputs' mean energy; doubled until the factorisation works


class Gptq:
    """Quantises a layer, each linear one with the inputs it gets from those already quantised before it."""

    needs_targets = False

    def __init__(self, config: DecoderConfig, group_size: int):
        self._config, self._group_size = config, group_size

    def passes(self, sequences: int) -> float:
        """How often a layer's work is that of the whole text going forward through it, once, about."""
        return 6  # four linear layers, each with the inputs it gets, and the product of these with themselves

    def __call__(self, weights: Weights, hidden: Hidden, targets: None = None) -> dict[str, Int4]:
        """The int4 weights of a layer whose inputs are `hidden`."""
        weights, quantized = dict(weights), {}
        for name in linear_names(weights):
            gram = gram_of_inputs(self._config, weights, hidden, name)
            quantized[name] = gptq(weights[name], gram, self._group_size, name)
            weights[name] = quantized[name].dequantize()
        return quantized


@own_rules()
def gptq(
    weight: Float[Array | np.ndarray, "O I"], gram: Float[Array | np.ndarray, "I I"], group_size: int, name: str
) -> Int4:
    """The int4 weight Q that makes `||(weight - Q) X||²` small; `gram` is `X Xᵀ`, up to a factor.

    Raises `JaxgenError`, which calls the weight `name`, where rows do not come out even, and for inputs that are not
    finite.
    """
    size = check_group(weight.shape, group_size, name)
    order = column_order(jnp.diagonal(gram), size)
    errors = _inverse_factor(jnp.asarray(gram)[order][:, order], name)
    codes, scale = _round(jnp.asarray(weight, jnp.float32)[:, order].T, errors, size)
    groups = order[::size] // size
    return Int4(pack(codes.T[:, jnp.argsort(order)]), scale.T[:, jnp.argsort(groups)].astype(SCALE_DTYPE))


def column_order(energy: Float[Array | np.ndarray, " I"], size: int) -> Int[Array, " I"]:
    """Columns by falling energy of their inputs within each group of `size`, and groups by theirs."""
    groups = jnp.asarray(energy).reshape(-1, size)
    within = jnp.argsort(-groups, axis=1) + size * jnp.arange(len(groups))[:, None]
    return within[jnp.argsort(-groups.sum(axis=1))].reshape(-1)


def _inverse_factor(gram: Float[Array, "I I"], name: str) -> Float[Array, "I I"]:
    """Upper triangular U with `inverse(gram) = Uᵀ U`: row i is how the columns after i answer an error of column i."""
    damping = _DAMPING
    while damping < 1:
        factor = _damped_inverse_factor(gram, damping)
        if jnp.isfinite(factor).all():
            return factor
        damping *= 2
    raise JaxgenError(f"{name}: the calibration text leads to inputs that are not finite; check the checkpoint")


@jax.jit
def _damped_inverse_factor(gram: Float[Array, "I I"], damping: float | Float[Array, ""]) -> Float[Array, "I I"]:
    one = jnp.eye(len(gram))
    mean = jnp.diagonal(gram).mean()
    damped = gram / jnp.where(mean == 0, 1, mean) + damping * one
    # Cholesky from the last column to the first gives damped = R Rᵀ with R upper triangular: U is its inverse.
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, one)


@functools.partial(jax.jit, static_argnames="size")
def _round(
    columns: Float[Array, "I O"], factor: Float[Array, "I I"], size: int
) -> tuple[Int8[Array, "I O"], Float[Array, "G O"]]:
    """Codes, and the scale of each group: searched when its first column's turn comes, for what it is by then."""
    step = math.gcd(size, _COLUMNS_AT_ONCE)
    importance = 1 / jnp.square(jnp.diagonal(factor))  # of a column's error, after the others have made up for it

    def block(carry: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        columns, scale = carry

        def search() -> Float[Array, " O"]:
            group = jax.lax.dynamic_slice_in_dim(columns, start, size)
            return search_scale(group.T, jax.lax.dynamic_slice_in_dim(importance, start, size))

        scale = jax.lax.cond(start % size == 0, search, lambda: scale)
        rows = jax.lax.dynamic_slice_in_dim(factor, start, step)
        answers = jax.lax.dynamic_slice_in_dim(rows, start, step, axis=1)

        def column(own: Array, i: Array) -> tuple[Array, tuple[Array, Array]]:
            code = round_to(own[i][:, None], scale)[:, 0]
            error = (own[i] - code * scale) / answers[i, i]
            return own - answers[i][:, None] * error, (code.astype(jnp.int8), error)

        own = jax.lax.dynamic_slice_in_dim(columns, start, step)
        _, (codes, errors) = jax.lax.scan(column, own, jnp.arange(step))
        return (columns - product("bi,bo->io", rows, errors), scale), (codes, scale)

    nothing = columns, jnp.zeros(columns.shape[1])
    _, (codes, scales) = jax.lax.scan(block, nothing, jnp.arange(0, len(columns), step))
    return codes.reshape(columns.shape), scales[:: size // step]
