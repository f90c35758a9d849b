"""One number per row into each of several tables, in place, on a GPU: what XLA makes a launch of for each table.

A program takes one row.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Int

from jaxgen.kernels import backend
from jaxgen.kernels.backend import pl


def _kernel(slots: Any, *references: Any, count: int) -> None:
    values, after = references[:count], references[-count:]
    row = pl.program_id(0)
    slot = slots[row]

    @pl.when(slot < after[0].shape[1])
    def _() -> None:
        for value, table in zip(values, after, strict=True):
            table[row, slot] = value[row]


def write_down(
    tables: Sequence[Array], slots: Int[Array, " R"], values: Sequence[Array], *, interpret: bool = False
) -> list[Array]:
    """`tables` `[R, S]` with each row's value in its slot, or as it was where that is S."""
    count = len(tables)
    written = backend.call(
        functools.partial(_kernel, count=count), slots, *values, *tables, grid=(len(slots),),
        out=[jax.ShapeDtypeStruct(table.shape, table.dtype) for table in tables], name="write_down", warps=1,
        interpret=interpret, aliases={1 + count + i: i for i in range(count)},
    )  # fmt: skip
    return list(written)
