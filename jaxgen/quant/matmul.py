"""The one product with a quantised weight, `x @ weight.T`, in the form that each platform and stage runs fastest.

A GPU that runs `jaxgen.kernels` leaves few rows (decode) to them. Otherwise it has three forms: many rows (a prompt)
dequantise the weight once and leave the product to the matrix library; few rows read the packed weight inside the
product, as one kernel where the executable is compiled with `FUSION_OPTIONS`, and without experimental options as
products per group, whose sums are scaled afterwards.
A CPU dequantises: XLA moves that out of the decode loop, and keeps the unpacked copy while the loop runs; for
`low_cpu_memory` it happens a few rows at a time, within the loop.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxgen.linear import linear, product
from jaxgen.lowering import target
from jaxgen.quant.adapted import Adapted
from jaxgen.quant.int4 import Int4, unpack
from jaxgen.quant.lookup import Lookup4
from jaxgen.quant.planar import to_planar

# XLA:GPU reads int4 and its group scales inside a matrix product only with the first; without the second it splits
# some of these products along K, and then refuses to fuse them.
FUSION_OPTIONS = {
    "xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True,
    "xla_gpu_experimental_force_split_k": 1,
}
_FUSED_ROWS = 64  # beyond, each tile of rows would unpack the weight again: once, ahead of the product, is cheaper
_CPU_CHUNK_BYTES = 1 << 20  # of unpacked float32: stays in a core's cache


def matmul(x: Float[Array, "*rows I"], weight: "Array | Int4 | Lookup4 | Adapted") -> Float[Array, "*rows O"]:
    """`x @ weight.T`, whatever the weight is made of."""
    if isinstance(weight, Adapted):
        return matmul(x, weight.base) + linear(linear(x, weight.down), weight.up)
    if isinstance(weight, Int4):
        return int4_matmul(x, weight)
    if isinstance(weight, Lookup4):
        return linear(x, weight.dequantize(x.dtype))
    return linear(x, weight)


def int4_matmul(x: Float[Array, "*rows I"], weight: Int4) -> Float[Array, "*rows O"]:
    """`x @ weight.T` for an int4 weight `[out, in]` and any number of rows; the result has x's dtype.

    >>> from jaxgen.quant import int4_matmul, quantize
    >>> weight = quantize(jnp.eye(32), group_size=32)
    >>> bool(jnp.allclose(int4_matmul(jnp.arange(32.0), weight), jnp.arange(32.0)))
    True
    """
    if target().kernels and weight.planar and x.dtype.itemsize == 2 and math.prod(x.shape[:-1]) <= _FUSED_ROWS:
        from jaxgen.kernels import step

        return step.product(x.reshape(-1, x.shape[-1]), weight)[0].reshape(*x.shape[:-1], -1)
    if weight.permutation is not None:
        x = jnp.take(x, weight.permutation, axis=-1)
    x = to_planar(x, weight.planar)  # from here on, columns are in the order in which they are stored
    on_cpu = _in_chunks if weight.low_cpu_memory else _dequantized
    few_rows = _fused if target().fuses_int4 else _by_groups
    elsewhere = few_rows if math.prod(x.shape[:-1]) <= _FUSED_ROWS else _dequantized
    result = jax.lax.platform_dependent(x, weight.packed, weight.scale, cpu=on_cpu, default=elsewhere)
    if weight.offset is None:
        return result
    # The offset of a group meets the sum of the group's inputs: 1 / group_size of the work of the product.
    sums = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, weight.group_size).sum(-1)
    shift = product("...g,og->...o", sums, weight.offset.astype(jnp.float32))
    return (result.astype(jnp.float32) + shift).astype(x.dtype)


def _codes(packed: UInt8[Array, "O bytes"], scale: Float[Array, "O groups"]) -> Array:
    """The packed bytes seen as `int4[O, groups, group]`: no operation at all on a GPU."""
    return jax.lax.bitcast_convert_type(packed, jnp.int4).reshape(*scale.shape, -1)


def _dequantized(
    x: Float[Array, "*rows I"], packed: UInt8[Array, "O I/2"], scale: Float[Array, "O groups"]
) -> Float[Array, "*rows O"]:
    return linear(x, Int4(packed, scale).dequantize(x.dtype))


def _fused(
    x: Float[Array, "*rows I"], packed: UInt8[Array, "O I/2"], scale: Float[Array, "O groups"]
) -> Float[Array, "*rows O"]:
    weight = _codes(packed, scale).astype(x.dtype) * scale[..., None].astype(x.dtype)
    return product("...i,oi->...o", x, weight.reshape(packed.shape[0], -1))


def _by_groups(
    x: Float[Array, "*rows I"], packed: UInt8[Array, "O I/2"], scale: Float[Array, "O groups"]
) -> Float[Array, "*rows O"]:
    """Products per group, then their scaled sum: no product reads a scale, which is what keeps XLA from fusing."""
    rows = x.reshape(-1, scale.shape[1], x.shape[-1] // scale.shape[1])
    codes = _codes(packed, scale)
    if len(rows) == 1:
        # As a plain sum: XLA:GPU would turn a product of one row into this, but with the partial sums in memory.
        terms = codes.astype(jnp.float32) * scale[..., None].astype(jnp.float32) * rows[0].astype(jnp.float32)
        result = terms.sum(axis=(1, 2))
    else:
        partial = product("rgk,ogk->gro", rows, codes.astype(x.dtype), preferred_element_type=jnp.float32)
        result = (partial * scale.T[:, None].astype(jnp.float32)).sum(axis=0)
    return result.astype(x.dtype).reshape(*x.shape[:-1], -1)


def _in_chunks(
    x: Float[Array, "*rows I"], packed: UInt8[Array, "O I/2"], scale: Float[Array, "O groups"]
) -> Float[Array, "*rows O"]:
    """A few output rows at a time, unpacked inside a loop: XLA:CPU cannot move that out of the decode loop."""
    rows_at_once = max(1, _CPU_CHUNK_BYTES // (4 * x.shape[-1]))
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    def chunk(part: tuple[Array, Array]) -> Float[Array, "*rows"]:
        packed, scale = part
        groups = jnp.asarray(unpack(packed), x.dtype).reshape(*scale.shape, -1)
        return product("i,ri->r", (groups * scale[..., None].astype(x.dtype)).reshape(-1), flat)

    transposed = jax.lax.map(chunk, (packed, scale), batch_size=min(rows_at_once, len(packed)))
    return transposed.T.reshape(*x.shape[:-1], len(packed))
