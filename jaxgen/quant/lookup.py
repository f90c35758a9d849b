"""The lookup-table weight: bitsandbytes' NF4 and FP4, kept as they are."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxgen.lowering import own_rules, target
from jaxgen.pytree import pytree
from jaxgen.quant.matmul import FUSED_ROWS, unpacked_product
from jaxgen.quant.planar import block_size, codes_in_order, swap_order
from jaxgen.quant.weight import Weight, divided_groups
from jaxgen.shards import Axes

if TYPE_CHECKING:
    from jaxgen.kernels.products import Products


@pytree
@dataclasses.dataclass(frozen=True)
class Lookup4(Weight):
    """A weight `[out, in]` of 16 different values per block: `w[o, i] = table[code[o, i]] * scale[o, i // block]`.

    Source: QLoRA (arXiv 2305.14314); bitsandbytes `Linear4bit`.
    """

    by_row = ("packed", "scale")

    packed: Any  # uint8 [O, I/2]: codes 0 to 15, the even column in the low nibble
    scale: Any  # float [O, blocks]
    table: Any  # float [16]
    planar: int = dataclasses.field(default=0, metadata={"static": True})  # columns per block, or 0: `planar.py`

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.packed.shape[0], 2 * self.packed.shape[1]

    @property
    def group_size(self) -> int:
        """Weights per scale."""
        return self.shape[1] // self.scale.shape[1]

    def describe(self) -> str:
        """With the size of the blocks."""
        return f"{type(self).__name__}, groups of {self.group_size}"

    @own_rules()
    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "O I"]:
        """The weight, computed in float32 and rounded once."""
        codes = codes_in_order(self.packed, self.planar).reshape(*self.scale.shape, self.group_size)
        values = jnp.asarray(self.table)[codes] * jnp.asarray(self.scale)[..., None].astype(jnp.float32)
        return values.reshape(self.shape).astype(dtype)

    def matmul(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        """`x @ weight.T`, by kernels where they are to be used and rows are few."""
        rows = math.prod(x.shape[:-1])
        if target().kernels and self.planar and x.dtype.itemsize == 2 and rows <= FUSED_ROWS:
            return self.kernels().alone(x.reshape(rows, -1)).reshape(*x.shape[:-1], -1)
        # A CPU has no barrier: XLA moves the unpacking out of the decode loop.
        return jax.lax.platform_dependent(x, self, cpu=lambda x, w: Weight.matmul(w, x), default=unpacked_product)

    def divided(self, rows: Axes, columns: Axes, parts: int) -> "Lookup4":
        """In whole groups; each device has the table."""
        return dataclasses.replace(self, **divided_groups(self, rows, columns, parts), table=PartitionSpec())

    def for_kernels(self) -> "Lookup4":
        """With columns in planar order, unless its blocks are none that kernels read."""
        block = block_size(self.group_size)
        if self.planar or not block:
            return self
        return dataclasses.replace(self, packed=swap_order(self.packed, block, 8), planar=block)

    def as_stored(self) -> "Lookup4":
        """The inverse of `for_kernels`."""
        if not self.planar:
            return self
        return dataclasses.replace(self, packed=swap_order(self.packed, self.planar, self.planar // 8), planar=0)

    def kernels(self, interpret: bool = False) -> "Products":
        """Kernels for one row and for several."""
        from jaxgen.kernels.products import CodedProducts

        return CodedProducts(self, interpret)
