"""The Weight protocol: all that loading, models, records and kernels ask of a linear layer's matrix.

A kind of weight (`int4.py`, `lookup.py`, `adapted.py`) is one file with one subclass; nobody else asks which it is,
but for the kernels that are made for one.
A model holds floats as the plain arrays that training wants: `as_weight` gives them the same methods.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.linear import linear
from jaxgen.pytree import pytree
from jaxgen.shards import Axes

if TYPE_CHECKING:
    from jaxgen.kernels.products import Products

Interleave = Callable[[Sequence[np.ndarray]], np.ndarray]  # the rows of several arrays, as a parameter wants them


@dataclasses.dataclass(frozen=True)
class Weight(ABC):
    """A matrix `[out, in]`, as it is stored: a frozen dataclass of arrays (JAX's, or numpy's while loading).

    A subclass is registered as a pytree, and says in `by_row` which of its arrays have one entry per output row
    along axis 0, or are None; the other fields belong to all rows. It must have `shape` and `dequantize`; `matmul` is
    then right, and may be made fast.

    >>> @pytree
    ... @dataclasses.dataclass(frozen=True)
    ... class Signs(Weight):
    ...     by_row = ("positive", "scale")
    ...     positive: Any  # bool [O, I]
    ...     scale: Any  # float [O]
    ...     shape = property(lambda self: self.positive.shape)
    ...     def dequantize(self, dtype=jnp.float32):
    ...         return jnp.where(self.positive, 1, -1).astype(dtype) * self.scale[:, None].astype(dtype)
    >>> weight = Signs(jnp.array([[True, False], [True, True]]), jnp.array([0.5, 2.0]))
    >>> weight.matmul(jnp.array([3.0, 1.0])).tolist(), weight.rows(slice(1, 2)).shape, weight.nbytes
    ([1.0, 8.0], (1, 2), 12)
    """

    by_row: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """`(out, in)`."""

    @abstractmethod
    def dequantize(self, dtype: object = jnp.float32) -> Float[Array, "O I"]:
        """The matrix in HF's order of columns, computed in float32 and rounded once."""

    def matmul(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        """`x @ weight.T` for any number of rows, in x's dtype."""
        return linear(x, self.dequantize(x.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in jax.tree.leaves(self))

    def describe(self) -> str:
        """What the weight is made of, in a few words, for records and errors."""
        return type(self).__name__

    def rows(self, chosen: slice) -> "Weight":
        """Some rows of the matrix."""
        arrays = {name: getattr(self, name) for name in self.by_row}
        return dataclasses.replace(self, **{name: x[chosen] for name, x in arrays.items() if x is not None})

    def rows_from(self, start: Int[Array, ""], count: int) -> "Weight":
        """`count` rows from a traced one on."""
        arrays = {name: getattr(self, name) for name in self.by_row}
        taken = {n: jax.lax.dynamic_slice_in_dim(x, start, count) for n, x in arrays.items() if x is not None}
        return dataclasses.replace(self, **taken)

    def divided(self, rows: Axes, columns: Axes, parts: int) -> "Weight":
        """The axes of a mesh that each array is divided over, as `PartitionSpec`s in the place of the arrays.

        Rows and columns of the matrix are divided over `rows` and `columns`, the latter into so many parts. Raises
        `JaxgenError` where a part would not hold whole groups of columns.
        """
        if columns:
            raise UnsupportedError(f"{self.describe()}: not to be divided by columns; use a mesh without 'model'")
        arrays = jax.tree.map(lambda _: PartitionSpec(), self)
        by_row = {name: PartitionSpec(rows or None) for name in self.by_row if getattr(self, name) is not None}
        return dataclasses.replace(arrays, **by_row)

    def join(self, others: "Sequence[Weight]", interleave: Interleave) -> "Weight | None":
        """The one weight that has the rows of this and the others, or None where no weight has them as they are."""
        if not all(type(other) is type(self) and self._is_like(other) for other in others):
            return None
        arrays = {name: [getattr(weight, name) for weight in (self, *others)] for name in self.by_row}
        joined = {name: interleave(parts) for name, parts in arrays.items() if parts[0] is not None}
        return dataclasses.replace(self, **joined)

    def _is_like(self, other: "Weight") -> bool:
        fields = [field.name for field in dataclasses.fields(self)]
        return all(_agree(getattr(self, name), getattr(other, name), name in self.by_row) for name in fields)

    # How it runs: on a CPU of little memory, on GPUs by XLA, and by kernels. The defaults are right for any weight.

    fuses: ClassVar[bool] = False  # whether XLA:GPU reads it inside a product, compiled with `matmul.FUSION_OPTIONS`

    def bounded(self) -> "Weight":
        """The form whose product on a CPU keeps no unpacked copy, if there is one."""
        return self

    def for_kernels(self) -> "Weight":
        """The form that `jaxgen.kernels` read fastest, if there is one."""
        return self

    def as_stored(self) -> "Weight":
        """The inverse of `for_kernels`: with the bytes that files have."""
        return self

    def kernels(self, interpret: bool = False) -> "Products":
        """What `jaxgen.kernels` make of it in a decode step."""
        from jaxgen.kernels.products import Products

        return Products(self, interpret)


def divided_groups(weight: Any, rows: Axes, columns: Axes, parts: int) -> dict[str, PartitionSpec]:
    """Of a weight whose columns lie in groups: each part must hold whole ones, or all of a lone one's scale."""
    grouped = weight.scale.shape[1]
    if columns and grouped > 1 and grouped % parts:
        width, size = weight.shape[1], weight.shape[1] // grouped
        fits = [count for count in range(1, parts) if grouped % count == 0]
        raise JaxgenError(
            f"{width} columns in groups of {size} are not to be divided by {parts}: a device would not hold whole "
            f"groups; 'model' may be {', '.join(map(str, fits))}, or a checkpoint of smaller groups divides"
        )
    packed = PartitionSpec(rows or None, columns or None)
    return {"packed": packed, "scale": packed if grouped > 1 else PartitionSpec(rows or None)}


def _agree(mine: Any, theirs: Any, by_row: bool) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    if by_row:
        return mine.shape[1:] == theirs.shape[1:] and mine.dtype == theirs.dtype
    return np.array_equal(mine, theirs)


@pytree
@dataclasses.dataclass(frozen=True)
class Floats(Weight):
    """Floats as they are."""

    by_row = ("array",)
    array: Any  # float [O, I]

    @property
    def shape(self) -> tuple[int, ...]:
        """`(out, in)`."""
        return self.array.shape

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "O I"]:
        """The array in another dtype."""
        return jnp.asarray(self.array, dtype)

    def matmul(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        """`x @ weight.T`."""
        return linear(x, self.array)

    def divided(self, rows: Axes, columns: Axes, parts: int) -> "Floats":
        """Both ways."""
        return Floats(PartitionSpec(rows or None, columns or None))

    def describe(self) -> str:
        """The dtype's name."""
        return self.array.dtype.name

    def kernels(self, interpret: bool = False) -> "Products":
        """The kernel for one row."""
        from jaxgen.kernels.products import DenseProducts

        return DenseProducts(self, interpret)


def as_weight(value: object) -> Weight:
    """A weight as it is, an array as `Floats`."""
    return value if isinstance(value, Weight) else Floats(value)


def matmul(x: Float[Array, "*rows I"], weight: object) -> Float[Array, "*rows O"]:
    """`x @ weight.T`, for an array or a `Weight`."""
    return as_weight(weight).matmul(x)
