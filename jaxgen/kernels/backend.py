"""Pallas' Triton backend as every supported JAX has it, and what all kernels share.

A kernel is written for one program (a block of threads): it loads tiles from memory by arrays of indices, computes on
them as on any array, and stores a tile. Sizes of tiles are powers of two, as Triton wants them; where a dimension does
not come out even, indices past its end are clamped and what they contribute is zero.

JAX warns that this backend will be removed one day. Users of jaxgen need not hear of it: where it is missing, XLA's own
form of each product is used.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    _dot: Callable[..., Array] = getattr(triton, "dot", None) or pl.dot  # it moved in jax 0.10


def call(
    kernel: Callable[..., None],
    *arguments: Array,
    grid: tuple[int, ...],
    out: Any,
    name: str,
    warps: int,
    stages: int = 1,
    interpret: bool = False,
    aliases: dict[int, int] | None = None,
) -> Any:
    """Run a kernel once per index of `grid`; it gets a reference to each whole argument, then to each result.

    `warps`: of 32 threads, per program. `stages`: loads of a loop that are under way at a time. `aliases`: arguments
    that are overwritten by results. `interpret`: on any platform, in plain JAX, for tests.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=out,
            input_output_aliases=aliases or {},
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
            interpret=interpret,
            name=name,
        )(*arguments)


def inline_assembly(code: str, arguments: list[Array], constraints: str, result: Any, pack: int = 1) -> Array:
    """One PTX block for every `pack` neighbouring elements of arguments of one shape."""
    shapes = [result]
    [out] = triton.elementwise_inline_asm(
        code, args=arguments, constraints=constraints, pack=pack, result_shape_dtypes=shapes
    )
    return out


def fma(first: Array, second: Array, third: Array, interpret: bool) -> Array:
    """`first * second + third` in float32, as one instruction, which Triton does not make of the two."""
    arguments = list(jnp.broadcast_arrays(first, second, third))
    if interpret:
        return arguments[0] * arguments[1] + arguments[2]
    result = jax.ShapeDtypeStruct(arguments[0].shape, jnp.float32)
    return inline_assembly("fma.rn.f32 $0, $1, $2, $3;", arguments, "=f,f,f,f", result)


def rounded(x: Array, interpret: bool) -> Array:
    """To the nearest integer, of two the even one."""
    if interpret:
        return jnp.round(x)
    return inline_assembly("cvt.rni.f32.f32 $0, $1;", [x], "=f,f", jax.ShapeDtypeStruct(x.shape, jnp.float32))


def dot(left: Array, right: Array, interpret: bool) -> Array:
    """A product of 16-bit tiles on the matrix units, summed in float32."""
    if interpret:
        return jnp.matmul(left.astype(jnp.float32), right.astype(jnp.float32), precision="highest")
    return _dot(left, right)


def load(reference: Any, index: tuple[Any, ...], mask: Array | None = None) -> Array:
    """A tile at broadcasting indices; zero where the mask is False."""
    if mask is None:
        return reference[index]
    return triton.load(reference.at[index], mask=mask, other=jnp.zeros((), reference.dtype))


def store(reference: Any, index: tuple[Any, ...], value: Array, mask: Array) -> None:
    """Put a tile to broadcasting indices, where the mask is True."""
    triton.store(reference.at[index], value, mask=mask)


def arange(size: int) -> Array:
    """0 to `size`, as int32 also where JAX's integers are of 64 bits."""
    return jnp.arange(size, dtype=jnp.int32)


def clamped(start: Any, size: int, limit: int) -> Array:
    """`start` to `start + size`, at most `limit - 1`."""
    index = start + arange(size)
    return index if limit % size == 0 else jnp.minimum(index, limit - 1)


def clamped_pairs(start: Any, size: int, limit: int) -> Array:
    """As `clamped`, of indices that belong together in pairs: past the end, the last pair again."""
    index = start + arange(size)
    return index if limit % size == 0 else 2 * jnp.minimum(index // 2, limit // 2 - 1) + index % 2


def power_of_two(size: int) -> int:
    """The next one."""
    return 1 << max(size - 1, 0).bit_length()
