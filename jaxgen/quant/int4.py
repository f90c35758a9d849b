"""The int4 weight: two weights to a byte, a scale for each group of them, and how both are found."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int8, Int32

from jaxgen.errors import UnsupportedError
from jaxgen.linear import product
from jaxgen.lowering import own_rules, target
from jaxgen.pytree import pytree
from jaxgen.quant.config import check_group
from jaxgen.quant.matmul import FUSED_ROWS, scaled_product, unpacked_product
from jaxgen.quant.nibbles import pack
from jaxgen.quant.planar import block_size, codes_in_order, swap_order, to_planar
from jaxgen.quant.weight import Interleave, Weight, divided_groups
from jaxgen.shards import Axes

if TYPE_CHECKING:
    from jaxgen.kernels.products import Products

SCALE_DTYPE = jnp.dtype("bfloat16")  # the range of float32; what rounding costs, the search for the scale sees

_GROUPS_AT_ONCE = 1 << 15  # bounds the memory of the search: 4M weights of group 128
_CANDIDATES = np.linspace(0.6, 1.1, 26)  # of the scale, relative to the one that just reaches the largest weight


@pytree
@dataclasses.dataclass(frozen=True)
class Int4(Weight):
    """A weight `[out, in]`: `w[o, i] = q[o, i] * scale[o, i // group] + offset[o, i // group]`, q from -8 to 7.

    Arrays are JAX's, or numpy's while loading. Column j holds HF's column `permutation[j]`, where there is one.
    G groups to a row.
    """

    by_row = ("packed", "scale", "offset")
    fuses = True

    packed: Any  # uint8 [O, I/2]: q as two's complement, the even column in the low nibble
    scale: Any  # float [O, G], of either sign
    offset: Any = None  # float [O, G], or None: symmetric
    permutation: Any = None  # int32 [I], or None: columns are in HF's order
    low_cpu_memory: bool = dataclasses.field(default=False, metadata={"static": True})
    planar: int = dataclasses.field(default=0, metadata={"static": True})  # columns per block, or 0: `planar.py`

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.packed.shape[0], 2 * self.packed.shape[1]

    @property
    def group_size(self) -> int:
        """Weights per scale."""
        return self.shape[1] // self.scale.shape[1]

    @own_rules()
    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "O I"]:
        """The weight in HF's column order, computed in float32 and rounded once."""
        codes = (codes_in_order(self.packed, self.planar) ^ 8).astype(jnp.int32) - 8
        weight = codes.astype(jnp.float32).reshape(*self.scale.shape, -1)
        weight = weight * jnp.asarray(self.scale)[..., None].astype(jnp.float32)
        if self.offset is not None:
            weight = weight + jnp.asarray(self.offset)[..., None].astype(jnp.float32)
        weight = weight.reshape(self.shape)
        if self.permutation is not None:
            weight = weight[:, jnp.argsort(self.permutation)]
        return weight.astype(dtype)

    def matmul(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        """`x @ weight.T`: see `int4_matmul`."""
        return int4_matmul(x, self)

    def describe(self) -> str:
        """With the size of the groups."""
        return f"{type(self).__name__}, groups of {self.group_size}"

    def join(self, others: Sequence[Weight], interleave: Interleave) -> "Weight | None":
        """As every weight; beside rows with an offset, those without have one of zero."""
        pieces = [self, *others]
        offset = next((x.offset for x in pieces if isinstance(x, Int4) and x.offset is not None), None)
        if offset is not None:
            pieces = [x.with_offset(offset.dtype) if isinstance(x, Int4) else x for x in pieces]
        return Weight.join(pieces[0], pieces[1:], interleave)

    def divided(self, rows: Axes, columns: Axes, parts: int) -> "Int4":
        """In whole groups; not by columns where a permutation leads from one part to another."""
        if columns and self.permutation is not None:
            raise UnsupportedError(
                "a checkpoint whose columns are permuted (GPTQ's desc_act) is not to be divided by columns; use a mesh "
                "without 'model', or one quantised with desc_act=false"
            )
        axes = divided_groups(self, rows, columns, parts)
        offset = None if self.offset is None else axes["scale"]
        permutation = None if self.permutation is None else PartitionSpec()
        return dataclasses.replace(self, **axes, offset=offset, permutation=permutation)

    def with_offset(self, dtype: Any) -> "Int4":
        """The same with an offset, of zero if it has none."""
        return self if self.offset is not None else dataclasses.replace(self, offset=np.zeros(self.scale.shape, dtype))

    def bounded(self) -> "Int4":
        """Unpacked a few rows at a time."""
        return dataclasses.replace(self, low_cpu_memory=True)

    def for_kernels(self) -> "Int4":
        """With columns in planar order, unless its groups are none that kernels read."""
        block = block_size(self.group_size)
        if self.planar or not block:
            return self
        return dataclasses.replace(self, packed=swap_order(self.packed, block, 8), planar=block)

    def as_stored(self) -> "Int4":
        """The inverse of `for_kernels`."""
        if not self.planar:
            return self
        return dataclasses.replace(self, packed=swap_order(self.packed, self.planar, self.planar // 8), planar=0)

    def kernels(self, interpret: bool = False) -> "Products":
        """Kernels for one row and for several."""
        from jaxgen.kernels.products import CodedProducts

        return CodedProducts(self, interpret)


def int4_matmul(x: Float[Array, "*rows I"], weight: Int4) -> Float[Array, "*rows O"]:
    """`x @ weight.T` for an int4 weight `[out, in]` and any number of rows; the result has x's dtype.

    >>> from jaxgen.quant import int4_matmul, quantize
    >>> weight = quantize(jnp.eye(32), group_size=32)
    >>> bool(jnp.allclose(int4_matmul(jnp.arange(32.0), weight), jnp.arange(32.0)))
    True
    """
    rows = math.prod(x.shape[:-1])
    if target().kernels and weight.planar and x.dtype.itemsize == 2 and rows <= FUSED_ROWS:
        return weight.kernels().alone(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
    if weight.permutation is not None:
        x = jnp.take(x, weight.permutation, axis=-1)
    if rows <= FUSED_ROWS:
        return _packed_product(x, weight)
    weight = dataclasses.replace(weight, permutation=None)
    return jax.lax.platform_dependent(x, weight, cpu=_packed_product, default=unpacked_product)


def _packed_product(x: Float[Array, "*rows I"], weight: Int4) -> Float[Array, "*rows O"]:
    x = to_planar(x, weight.planar)  # from here on, columns are in the order in which they are stored
    result = scaled_product(x, weight.packed, weight.scale, weight.low_cpu_memory)
    if weight.offset is None:
        return result
    # The offset of a group meets the sum of the group's inputs: 1 / group_size of the work of the product.
    sums = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, weight.group_size).sum(-1)
    shift = product("...g,og->...o", sums, weight.offset.astype(jnp.float32))
    return (result.astype(jnp.float32) + shift).astype(x.dtype)


@own_rules()
def quantize(
    weight: Float[Array | np.ndarray, "O I"], group_size: int = 128, *, search: bool = True, name: str = "weight"
) -> Int4:
    """The int4 weight nearest to `weight` in squared error: symmetric, all 16 codes, a signed scale per group.

    `group_size` is 32, 64, 128 or any even divisor of I, or -1 for whole rows. With `search=False` the scale is the
    plain absmax / 7. Numpy in, numpy out, with no more than a few million weights at a time in JAX; in a jit, all at
    once. Raises `JaxgenError`, which calls the weight `name`, where rows do not come out even.
    Source: the error of the forms is compared in README.md; searched full-range scales are those of AutoRound's
    `opt_rtn` without its weighting.

    >>> from jaxgen.quant import quantize
    >>> weight = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
    >>> int4 = quantize(weight, group_size=32)
    >>> int4.packed.shape, int4.scale.shape, bool(abs(int4.dequantize() - weight).max() < 0.07)
    ((1, 32), (1, 2), True)
    """
    size = check_group(weight.shape, group_size, name)
    method = _searched if search else _absmax
    groups = weight.reshape(-1, size)
    if not isinstance(weight, np.ndarray):
        codes, scale = method(groups)
    else:
        codes, scale = np.empty(groups.shape, np.int8), np.empty(len(groups), SCALE_DTYPE)
        step = max(1, _GROUPS_AT_ONCE * 128 // size)
        for start in range(0, len(groups), step):
            block = slice(start, start + step)
            codes[block], scale[block] = method(groups[block])
    return Int4(pack(codes.reshape(weight.shape)), scale.reshape(weight.shape[0], -1))


def round_to(groups: Float[Array, "N g"], scale: Float[Array, " N"]) -> Float[Array, "N g"]:
    """The nearest codes, as floats; all zero where the scale is zero."""
    inverse = jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))
    return jnp.clip(jnp.round(groups * inverse[:, None]), -8, 7)


@jax.jit
def _absmax(groups: Float[Array, "N g"]) -> tuple[Int8[Array, "N g"], Float[Array, " N"]]:
    scale = (jnp.abs(groups.astype(jnp.float32)).max(axis=1) / 7).astype(SCALE_DTYPE)
    codes = round_to(groups.astype(jnp.float32), scale.astype(jnp.float32))
    return codes.astype(jnp.int8), scale


@jax.jit
def _searched(groups: Float[Array, "N g"]) -> tuple[Int8[Array, "N g"], Float[Array, " N"]]:
    scale = search_scale(groups.astype(jnp.float32), jnp.ones((), jnp.float32))
    return round_to(groups.astype(jnp.float32), scale).astype(jnp.int8), scale.astype(SCALE_DTYPE)


def search_scale(groups: Float[Array, "N g"], importance: Float[Array, "..."]) -> Float[Array, " N"]:
    """The scale of each group (float32 that SCALE_DTYPE holds exactly) with the least squared error.

    `importance` weighs the squared errors; it broadcasts against `groups`. Tries either sign, because -8 reaches
    further than 7, and for each candidate also the least-squares scale of the codes it leads to. Finds the same on
    every version of XLA, since it compares sums that no order of adding changes.
    """
    # In units that make all terms of the sums -1 to 1; the weights' is a power of two, which changes no bit of them.
    groups, importance = groups.astype(jnp.float32), importance.astype(jnp.float32)  # `_total` counts their bits
    _, exponent = jnp.frexp(jnp.abs(groups).max(axis=1))
    groups, importance = jnp.ldexp(groups, -exponent[:, None]), importance / importance.max()
    reaching = -jnp.take_along_axis(groups, jnp.abs(groups).argmax(axis=1, keepdims=True), axis=1)[:, 0] / 8

    def try_one(best: tuple[Array, Array], factor: Array) -> tuple[tuple[Array, Array], None]:
        first = rounded(reaching * factor)
        codes = round_to(groups, first) / 8
        energy = _total(importance * (codes * codes))
        fitted = _total(importance * (codes * groups)) / jnp.where(energy == 0, 1, energy) / 8
        for scale in (first, rounded(fitted)):
            error = _total(importance * jnp.square(groups - round_to(groups, scale) * scale[:, None]))
            better = error < best[0]
            best = jnp.where(better, error, best[0]), jnp.where(better, scale, best[1])
        return best, None

    factors = jnp.asarray(np.concatenate([_CANDIDATES, -_CANDIDATES]), jnp.float32)
    start = jnp.full(len(groups), np.iinfo(np.int32).max, jnp.int32), jnp.zeros(len(groups), jnp.float32)
    (_, scale), _ = jax.lax.scan(try_one, start, factors)
    return jnp.ldexp(scale, exponent)


def _total(terms: Float[Array, "N g"]) -> Int32[Array, " N"]:
    """The sum of each group's terms from -1 to 1, as integers, whose sum is the same in any order."""
    size = terms.shape[1]
    bits = min(22, 30 - (size - 1).bit_length())
    shift = np.float32(1.5 * 2**23)  # in a float32 that it was added to, the lowest bits are an integer
    integers = jax.lax.bitcast_convert_type(terms * 2.0**bits + shift, jnp.int32) - shift.view(np.int32)
    # XLA:CPU adds 32 neighbours as a vector, longer rows one by one: a quarter of the time, if the sums stay apart.
    parts = integers.reshape(len(terms), -1, math.gcd(size, 32)).sum(axis=2, dtype=jnp.int32)
    return jax.lax.optimization_barrier(parts).sum(axis=1, dtype=jnp.int32)


def rounded(scale: Float[Array, "*groups"]) -> Float[Array, "*groups"]:
    """To what SCALE_DTYPE can hold, as float32; `reduce_precision` because XLA may drop a cast there and back."""
    information = jnp.finfo(SCALE_DTYPE)
    return jax.lax.reduce_precision(scale, information.nexp, information.nmant)
