"""The product with int4 codes and their scales, `x @ weight.T`, in the form that each platform and stage runs fastest.

A GPU leaves many rows (a prompt) to the matrix library, which gets the weight unpacked, and few (decode) to
`jaxgen.kernels`, if it runs those. Otherwise it reads the packed weight of few rows inside the product, as one kernel
where the executable is compiled with `FUSION_OPTIONS`, and without experimental options as products per group, whose
sums are scaled afterwards.
A CPU dequantises: XLA moves that out of the decode loop, and keeps the unpacked copy while the loop runs; for
`low_cpu_memory` it happens a few rows at a time, within the loop.
"""

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxgen.linear import linear, product
from jaxgen.lowering import target
from jaxgen.quant.nibbles import scaled, unpack

if TYPE_CHECKING:
    from jaxgen.quant.weight import Weight

# XLA:GPU reads int4 and its group scales inside a matrix product only with the first; without the second it splits
# some of these products along K, and then refuses to fuse them.
FUSION_OPTIONS = {
    "xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True,
    "xla_gpu_experimental_force_split_k": 1,
}
FUSED_ROWS = 64  # beyond, each tile of rows would unpack the weight again: once, ahead of the product, is cheaper
_CPU_CHUNK_BYTES = 1 << 20  # of unpacked float32: stays in a core's cache


def unpacked_product(x: Float[Array, "*rows I"], weight: "Weight") -> Float[Array, "*rows O"]:
    """`x @ weight.T` on a GPU, for many rows: the weight is unpacked once, and the product left to the matrix library.

    Not before x is there, or one kernel would unpack the weights of all layers; and as a whole, or it might be unpacked
    within the product, again for each tile of rows.
    """
    x, weight = jax.lax.optimization_barrier((x, weight))
    return linear(x, jax.lax.optimization_barrier(weight.dequantize(x.dtype)))


def scaled_product(
    x: Float[Array, "*rows I"], packed: UInt8[Array, "O I/2"], scale: Float[Array, "O groups"], low_cpu_memory: bool
) -> Float[Array, "*rows O"]:
    """`x @ weight.T` for the codes times their groups' scales, columns in the order in which they are stored."""
    on_cpu = _in_chunks if low_cpu_memory else _dequantized
    elsewhere = _fused if target().fuses_int4 else _by_groups
    return jax.lax.platform_dependent(x, packed, scale, cpu=on_cpu, default=elsewhere)


def _codes(packed: UInt8[Array, "O bytes"], scale: Float[Array, "O groups"]) -> Array:
    """The packed bytes seen as `int4[O, groups, group]`: no operation at all on a GPU."""
    return jax.lax.bitcast_convert_type(packed, jnp.int4).reshape(*scale.shape, -1)


def _dequantized(
    x: Float[Array, "*rows I"], packed: UInt8[Array, "O I/2"], scale: Float[Array, "O groups"]
) -> Float[Array, "*rows O"]:
    return linear(x, jnp.asarray(scaled(packed, scale).reshape(len(packed), -1), x.dtype))


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
