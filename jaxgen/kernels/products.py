"""What a decode step makes of each kind of weight: kernels where there are some, XLA's product otherwise."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.kernels import dense_row, tiles
from jaxgen.kernels.dense_row import dense_row_product
from jaxgen.kernels.dense_rows import dense_rows_product
from jaxgen.kernels.int4_row import int4_row_product
from jaxgen.kernels.int4_rows import as_columns, int4_rows_product
from jaxgen.quant.adapted import Adapted
from jaxgen.quant.int4 import Int4
from jaxgen.quant.lookup import Lookup4
from jaxgen.quant.weight import Floats, Weight

MOST_ROWS = 64  # of a product; more are worth unpacking the weight for


class Products:
    """The products with a weight that no kernel reads."""

    def __init__(self, weight: Weight, interpret: bool):
        self.weight, self.interpret = weight, interpret

    def row(self, x: Float[Array, "1 I"], **around: Any) -> Array | None:
        """The product of one row with what stands `around` it, or None where no kernel does both."""
        return None

    def reads_columns(self, rows: int) -> bool:
        """Whether `columns` multiplies so many rows."""
        return False

    def columns(self, x: Float[Array, "I M"], rows: int, swiglu: bool = False, **beside: Any) -> Array:
        """The product of several rows that lie as columns: sums of it, or with `swiglu` the columns of the next."""
        raise NotImplementedError

    def alone(self, x: Float[Array, "B I"]) -> Float[Array, "B O"]:
        """A product that stands alone."""
        return self.weight.matmul(x)


class DenseProducts(Products):
    """16-bit floats: a kernel for one row. Several are XLA's product: steps with `dense_rows` were slower."""

    weight: Floats

    def _read(self) -> bool:
        """Whether the kernels read this weight."""
        array = self.weight.array
        return isinstance(array, jax.Array) and array.dtype.itemsize == 2

    def row(self, x: Float[Array, "1 I"], **around: Any) -> Array | None:
        """Of weights in x's dtype."""
        if not self._read() or self.weight.array.dtype != x.dtype:
            return None
        return dense_row_product(x, self.weight.array, interpret=self.interpret, **around)


class CodedProducts(Products):
    """Int4, or a table, in planar order: a kernel for one row, and one for several."""

    weight: Int4 | Lookup4

    @property
    def _permutation(self) -> Array | None:
        return self.weight.permutation if isinstance(self.weight, Int4) else None

    def _read(self) -> bool:
        """Whether the kernels read this weight as it is."""
        return bool(self.weight.planar) and self._permutation is None

    def row(self, x: Float[Array, "1 I"], **around: Any) -> Array | None:
        """Of planar weights without permutation."""
        if not self._read():
            return None
        tile = tiles.row_tile(*self.weight.shape, self.weight.planar)
        return int4_row_product(x, self.weight, tile=tile, interpret=self.interpret, **around)

    def reads_columns(self, rows: int) -> bool:
        """From 2 rows on, up to MOST_ROWS."""
        return self._read() and 1 < rows <= MOST_ROWS

    def columns(self, x: Float[Array, "I M"], rows: int, swiglu: bool = False, **beside: Any) -> Array:
        """See `int4_rows_product`."""
        tile = tiles.rows_tile(rows, *self.weight.shape, swiglu)
        return int4_rows_product(x, self.weight, swiglu=swiglu, tile=tile, interpret=self.interpret, **beside)

    def alone(self, x: Float[Array, "B I"]) -> Float[Array, "B O"]:
        """By these kernels, also of permuted weights."""
        if self.weight.planar and self._permutation is not None:
            plain = dataclasses.replace(self.weight, permutation=None)
            return plain.kernels(self.interpret).alone(jnp.take(x, self._permutation, axis=-1))
        result = self.row(x) if len(x) == 1 else None
        if result is not None:
            return result
        if self.reads_columns(len(x)):
            parts = self.columns(as_columns(x), len(x))
            return parts[:, : len(x)].astype(jnp.float32).sum(0).astype(x.dtype)
        return self.weight.matmul(x)


class AdaptedProducts(Products):
    """The base's product, and the correction: inside it where the base has kernels."""

    weight: Adapted

    @property
    def _base(self) -> Products:
        return self.weight.base.kernels(self.interpret)

    def row(self, x: Float[Array, "1 I"], **around: Any) -> Array | None:
        """As the base, with one more launch."""
        down, up = (jnp.asarray(part, x.dtype) for part in (self.weight.down, self.weight.up))
        tile = dense_row.Tile(rows=2, columns=1024)
        hidden = dense_row_product(x, down, norm=around.get("norm"), tile=tile, interpret=self.interpret)
        return self._base.row(x, low_rank=(hidden, up), **around)

    def reads_columns(self, rows: int) -> bool:
        """As the base."""
        return self._base.reads_columns(rows)

    def columns(self, x: Float[Array, "I M"], rows: int, swiglu: bool = False, **beside: Any) -> Array:
        """As the base, with one more launch."""
        down, up = (jnp.asarray(part, x.dtype) for part in (self.weight.down, self.weight.up))
        hidden = dense_rows_product(x, down, interpret=self.interpret)
        return self._base.columns(x, rows, swiglu, low_rank=(hidden, up))

    def alone(self, x: Float[Array, "B I"]) -> Float[Array, "B O"]:
        """Added in float32, and rounded once more."""
        base = self._base.alone(x).astype(jnp.float32)
        return (base + self.weight.correction(x)).astype(x.dtype)
