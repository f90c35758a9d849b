"""The product of 2 to 64 rows with 4-bit codes, on a GPU: every weight is read once, and meets the matrix units.

A program computes some outputs of all rows, over one of the parts that the columns are split into. It loads a tile of
words (eight codes each, planar, see `int4_row`), turns code j of two neighbouring words into a pair of 16-bit floats,
with their scales in them (`codes`), and multiplies that with the columns' x.

The rows come as columns: x transposed, `[I, M]`, filled up to the 16, 32 or 64 that the matrix units take, so that a
tile of it is read in whole lines. What fills it up may be anything: each row's sums are its own.

Where the weight's columns are split, the sums of the parts come back apart, in float32, for whoever adds them up
(`add_norm`, `attend`): always in the same order.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxgen.kernels import backend
from jaxgen.kernels.backend import pl
from jaxgen.kernels.codes import Codes, codes_of
from jaxgen.kernels.int4_row import pairs
from jaxgen.kernels.low_rank import added_to_rows
from jaxgen.quant.int4 import Int4
from jaxgen.quant.lookup import Lookup4


@dataclasses.dataclass(frozen=True)
class Tile:
    """`outputs` outputs per program, `words` words of a row at a time, the columns in `splits` parts."""

    outputs: int = 64
    words: int = 64
    splits: int = 1
    warps: int = 4
    stages: int = 3


def _kernel(
    *references: Any, codes: Codes, tile: Tile, per_scale: int, has_offset: bool, swiglu: bool, width: int,
    low_rank: bool, interpret: bool,
) -> None:  # fmt: skip
    words, scales, x, *others, out = references
    offsets = others.pop(0) if has_offset else None
    codes = codes.start(others, x.dtype)
    outputs, words_per_row = words.shape
    clamped = backend.clamped_pairs if swiglu else backend.clamped
    rows_out = clamped(pl.program_id(0) * tile.outputs, tile.outputs, outputs)
    rows = backend.arange(x.shape[1])
    steps = pl.cdiv(pl.cdiv(words_per_row, tile.words), tile.splits)
    even = words_per_row % (tile.words * tile.splits) == 0

    per_tile = tile.words // width  # blocks

    def spread(reference: Any, block: Array) -> Array:
        """One number per output and block, for each of the block's words."""
        values = reference[rows_out[:, None], (block // per_scale)[None, :]].astype(x.dtype)
        spread = jnp.broadcast_to(values[:, :, None], (tile.outputs, per_tile, width))
        return spread.reshape(tile.outputs, tile.words)

    def body(step: Any, total: Array) -> Array:
        word = step * tile.words + backend.arange(tile.words)
        block = step * per_tile + backend.arange(per_tile)
        inside = None if even else word < words_per_row
        if not even:
            word, block = jnp.minimum(word, words_per_row - 1), jnp.minimum(block, words_per_row // width - 1)
        packed = words[rows_out[:, None], word[None, :]]
        scale = spread(scales, block)
        offset = None if offsets is None else spread(offsets, block)
        column = word // width * (8 * width) + word % width
        for j in range(8):
            mask = None if inside is None else jnp.broadcast_to(inside[:, None], (tile.words, len(rows)))
            value = backend.load(x, ((column + j * width)[:, None], rows[None, :]), mask)
            total = total + backend.dot(codes.pairs(packed, scale, offset, j, interpret), value, interpret)
        return total

    first = pl.program_id(1) * steps
    total = lax.fori_loop(first, first + steps, body, jnp.zeros((tile.outputs, len(rows)), jnp.float32))
    if low_rank:
        hidden, up = others[-2:]
        total = added_to_rows(total, rows_out, hidden, up, interpret)
    write_sums(out, total, rows_out, tile.outputs, outputs, swiglu)


def write_sums(out: Any, total: Array, rows_out: Array, size: int, outputs: int, swiglu: bool) -> None:
    """A program's sums, `[size, M]`, into their part; or the activations of their pairs."""
    rows = backend.arange(total.shape[1])
    if swiglu:
        gate, up = pairs(total)
        unit = backend.clamped(pl.program_id(0) * (size // 2), size // 2, outputs // 2)
        out[unit[:, None], rows[None, :]] = (gate * jax.nn.sigmoid(gate) * up).astype(out.dtype)
    else:
        out[pl.program_id(1), rows[None, :], rows_out[:, None]] = total.astype(out.dtype)


def columns_for(rows: int) -> int:
    """M, the columns of x for so many rows."""
    return max(16, backend.power_of_two(rows))


def as_columns(x: Float[Array, "B I"]) -> Float[Array, "I M"]:
    """Rows as `int4_rows_product` reads them: a launch of its own, where no kernel writes them so."""
    return jnp.pad(x.T, ((0, 0), (0, columns_for(len(x)) - len(x))))


def int4_rows_product(
    x: Float[Array, "I M"],
    weight: Int4 | Lookup4,
    *,
    low_rank: tuple[Float[Array, "S M r"], Float[Array, "O r"]] | None = None,
    swiglu: bool = False,
    tile: Tile = Tile(),
    interpret: bool = False,
) -> Float[Array, "splits M O"] | Float[Array, "P M"]:
    """`x.T @ weight.T` for 16-bit columns x and a planar weight without permutation.

    In float32 as `tile.splits` sums that are to be added, or in x's dtype if that is one. `swiglu`: `[O / 2, M]`, the
    columns of the next product, from gates in the even outputs and ups in the odd ones; nothing is split then.
    `low_rank`: hidden numbers, as parts, and what multiplies them, see `low_rank.py`.
    """
    outputs, inputs = weight.shape
    width, rows = weight.planar // 8, x.shape[1]
    words = lax.bitcast_convert_type(weight.packed.reshape(outputs, inputs // 8, 4), jnp.uint32)
    arguments = [words, weight.scale, x]
    codes, beside = codes_of(weight)
    offset = weight.offset if isinstance(weight, Int4) else None
    arguments += [*([] if offset is None else [offset]), *beside]
    arguments += [] if low_rank is None else [*low_rank]
    kernel = functools.partial(
        _kernel, codes=codes, tile=tile, per_scale=inputs // weight.planar // weight.scale.shape[1],
        has_offset=offset is not None, swiglu=swiglu, width=width,
        low_rank=low_rank is not None, interpret=interpret,
    )  # fmt: skip
    dtype = x.dtype if tile.splits == 1 else jnp.float32
    shape = (outputs // 2, rows) if swiglu else (tile.splits, rows, outputs)
    grid = (pl.cdiv(outputs, tile.outputs), tile.splits)
    return backend.call(
        kernel, *arguments, grid=grid, out=jax.ShapeDtypeStruct(shape, dtype), name=f"{codes.name}_rows",
        warps=tile.warps, stages=tile.stages, interpret=interpret,
    )  # fmt: skip
