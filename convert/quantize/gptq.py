"""GPTQ: columns are rounded one after the other, and those still to come make up for the error of each."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.errors import JaxgenError
from jaxgen.linear import product
from jaxgen.quant import Int4
from jaxgen.quant.config import check_group
from jaxgen.quant.int4 import SCALE_DTYPE, pack, round_to, search_scale

_COLUMNS_AT_ONCE = 128


def gptq(weight, gram, group_size, name="weight", imp="U", order="gar", percent=0.01, full=False):
    size = check_group(weight.shape, group_size, name)
    diagonal = jnp.diagonal(gram)
    order = (
        group_order(diagonal, size)
        if order == "gar"
        else (jnp.arange(len(diagonal)) if order == "none" else jnp.argsort(-diagonal))
    )
    gram = gram[order][:, order]
    factor = inverse_factor(gram, percent)
    cols, codes, scale = _sweep(weight[:, order].T, factor, jnp.diagonal(gram), size, imp)
    back = jnp.argsort(order)
    groups = order[::size] // size
    Q = Int4(pack(codes.T[:, back]), scale.T[:, jnp.argsort(groups)].astype(SCALE_DTYPE))
    if full:
        return Q, cols.T[:, back]
    return Q


@functools.partial(jax.jit, static_argnames="size")
def group_order(diagonal, size):
    groups = diagonal.reshape(-1, size)
    within = jnp.argsort(-groups, axis=1) + size * jnp.arange(len(groups))[:, None]
    return within[jnp.argsort(-groups.sum(axis=1))].reshape(-1)


@jax.jit
def inverse_factor(gram, percent):
    damped = gram + percent * jnp.mean(jnp.diagonal(gram)) * jnp.eye(len(gram))
    lower = jnp.linalg.cholesky(damped[::-1, ::-1])
    upper = lower[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(gram)), lower=False)


@functools.partial(jax.jit, static_argnames=("size", "imp"))
def _sweep(columns, factor, diagonal, size, imp):
    step = math.gcd(size, _COLUMNS_AT_ONCE)
    importance = {"U": 1 / jnp.square(jnp.diagonal(factor)), "H": diagonal, "1": jnp.ones_like(diagonal)}[imp]

    def block(carry, start):
        columns, scale = carry

        def search():
            group = jax.lax.dynamic_slice_in_dim(columns, start, size).T
            return search_scale(group, jax.lax.dynamic_slice_in_dim(importance, start, size))

        scale = jax.lax.cond(start % size == 0, search, lambda: scale)
        rows = jax.lax.dynamic_slice_in_dim(factor, start, step)
        local = jax.lax.dynamic_slice_in_dim(rows, start, step, axis=1)

        def column(part, i):
            code = round_to(part[i][:, None], scale)[:, 0]
            error = (part[i] - code * scale) / local[i, i]
            return part - local[i][:, None] * error, (part[i], code.astype(jnp.int8), error)

        part = jax.lax.dynamic_slice_in_dim(columns, start, step)
        _, (final, codes, errors) = jax.lax.scan(column, part, jnp.arange(step))
        columns = columns - product("bi,bo->io", rows, errors)
        return (columns, scale), (final, codes, scale)

    starts = jnp.arange(0, len(columns), step)
    start = columns, jnp.zeros(columns.shape[1])
    _, (final, codes, scales) = jax.lax.scan(block, start, starts)
    return final.reshape(columns.shape), codes.reshape(columns.shape), scales[:: size // step]
