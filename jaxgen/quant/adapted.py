"""A quantised weight with a low-rank correction beside it: what a LoRA adapter trained on such a base needs."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxgen.linear import linear
from jaxgen.pytree import pytree
from jaxgen.quant.weight import Interleave, Weight
from jaxgen.shards import Axes

if TYPE_CHECKING:
    from jaxgen.kernels.products import Products


@pytree
@dataclasses.dataclass(frozen=True)
class Adapted(Weight):
    """A weight `[out, in]`: `base + up @ down`, never computed as one matrix, which four bits could not hold.

    Source: LoRA (arXiv 2106.09685), QLoRA (arXiv 2305.14314).
    """

    base: Any  # a quantised Weight
    down: Any  # float [r, I], in HF's order of columns
    up: Any  # float [O, r], the adapter's scale multiplied in

    @property
    def shape(self) -> tuple[int, ...]:
        """`(out, in)`."""
        return self.base.shape

    def dequantize(self, dtype: object = jnp.float32) -> Float[Array, "O I"]:
        """The weight as one matrix after all, computed in float32 and rounded once."""
        up, down = jnp.asarray(self.up, jnp.float32), jnp.asarray(self.down, jnp.float32)
        return (self.base.dequantize() + jnp.matmul(up, down, precision="highest")).astype(dtype)

    def matmul(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        """`x @ weight.T`, in three products."""
        return self.base.matmul(x) + self.correction(x)

    def correction(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        """`x @ (up @ down).T`."""
        return linear(linear(x, self.down), self.up)

    def rows(self, chosen: slice) -> "Adapted":
        """Some rows of the matrix."""
        return Adapted(self.base.rows(chosen), self.down, self.up[chosen])

    def divided(self, rows: Axes, columns: Axes, parts: int) -> "Adapted":
        """The base as itself; of the correction each matrix by what it shares with it."""
        down, up = PartitionSpec(None, columns or None), PartitionSpec(rows or None)
        return Adapted(self.base.divided(rows, columns, parts), down, up)

    def rows_from(self, start: Int[Array, ""], count: int) -> "Adapted":
        """`count` rows from a traced one on."""
        up = jax.lax.dynamic_slice_in_dim(self.up, start, count)
        return Adapted(self.base.rows_from(start, count), self.down, up)

    def join(self, others: Sequence[Weight], interleave: Interleave) -> "Adapted | None":
        """None but of itself: a loader joins the bases, and then puts one correction beside them."""
        return None if others else self

    @property
    def fuses(self) -> bool:
        """As the base."""
        return self.base.fuses

    def bounded(self) -> "Adapted":
        """With the base in this form."""
        return dataclasses.replace(self, base=self.base.bounded())

    def for_kernels(self) -> "Adapted":
        """With the base in this form."""
        return dataclasses.replace(self, base=self.base.for_kernels())

    def as_stored(self) -> "Adapted":
        """With the base in this form."""
        return dataclasses.replace(self, base=self.base.as_stored())

    def kernels(self, interpret: bool = False) -> "Products":
        """Those of the base, and the correction."""
        from jaxgen.kernels.products import AdaptedProducts

        return AdaptedProducts(self, interpret)
