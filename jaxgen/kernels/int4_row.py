"""The product of one row with a weight of 4-bit codes, on a GPU: every weight is read once, and nothing else is large.

A program computes ROWS outputs. It holds their weights, a few blocks of columns at a time, as 32-bit words of eight
codes each, beside the columns' x, and adds up in float32. The codes lie "planar" (`jaxgen.quant.planar`): code j of
word t of a block stands for column `j * words + t` of the block, so that x is read as it lies. What number a code
stands for is the business of `codes`.

Around the product, where asked for: before it, the RMS norm of x, whose factor is one number for the whole row and is
applied to the sums; after it, `silu(gate) * up` of neighbouring outputs, or the addition of a residual.
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
from jaxgen.kernels.low_rank import added_to_row
from jaxgen.quant.int4 import Int4
from jaxgen.quant.lookup import Lookup4

_MOST_UNROLLED = 8


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program does: `rows` outputs, `blocks` blocks of columns at a time, by `warps` warps.

    `ahead`: whether the words of the next blocks are loaded before those of the last are used.
    """

    rows: int = 8
    blocks: int = 16
    warps: int = 2
    ahead: bool = False


def _kernel(
    *references: Any, codes: Codes, tile: Tile, per_scale: int, has_offset: bool, eps: float | None, swiglu: bool,
    residual: bool, low_rank: bool, interpret: bool,
) -> None:  # fmt: skip
    words, scales, x, *others, out = references
    offsets = others.pop(0) if has_offset else None
    codes = codes.start(others, jnp.float32)
    norm = others.pop(0) if eps is not None else None
    outputs, blocks, width = words.shape
    fma = functools.partial(backend.fma, interpret=interpret)
    first = pl.program_id(0) * tile.rows
    clamped = backend.clamped_pairs if swiglu else backend.clamped
    rows, column = clamped(first, tile.rows, outputs), backend.arange(width)

    def load(step: Any) -> Array:
        block = backend.clamped(step * tile.blocks, tile.blocks, blocks)
        return words[rows[:, None, None], block[None, :, None], column[None, None, :]]

    def body(step: Any, carry: tuple[Array, Array], packed: Array | None = None) -> tuple[Array, Array]:
        total, squares = carry
        block = backend.clamped(step * tile.blocks, tile.blocks, blocks)
        inside = (step * tile.blocks + backend.arange(tile.blocks) < blocks)[:, None]
        packed = load(step) if packed is None else packed
        scale = scales[rows[:, None], (block // per_scale)[None, :]].astype(jnp.float32)
        start = jnp.zeros((tile.blocks, width), jnp.float32)
        plain, xs = start, []
        for j in range(8):
            value = x[block[:, None], j, column[None, :]].astype(jnp.float32)
            value = value if blocks % tile.blocks == 0 else jnp.where(inside, value, 0)
            if norm is not None:
                squares = fma(value, value, squares)
                value = value * norm[block[:, None], j, column[None, :]].astype(jnp.float32)
            if codes.zeros[j]:
                start = fma(value, jnp.full((), -codes.zeros[j], jnp.float32), start)
            xs.append((value * codes.units[j])[None])
            plain = plain if offsets is None else plain + value
        total = fma(codes.add(packed, xs, start[None], interpret), scale[:, :, None], total)
        if offsets is not None:
            offset = offsets[rows[:, None], (block // per_scale)[None, :]].astype(jnp.float32)
            total = fma(plain[None], offset[:, :, None], total)
        return total, squares

    empty = jnp.zeros((tile.rows, tile.blocks, width), jnp.float32), jnp.zeros((tile.blocks, width), jnp.float32)
    steps = pl.cdiv(blocks, tile.blocks)
    if tile.ahead and steps <= _MOST_UNROLLED:
        carry, packed = empty, load(0)
        for step in range(steps):
            following = load(step + 1) if step + 1 < steps else packed
            carry, packed = body(step, carry, packed), following
        total, squares = carry
    else:
        total, squares = lax.fori_loop(0, steps, body, empty)
    sums = total.reshape(tile.rows, tile.blocks * width).sum(1)
    if eps is not None:
        mean = squares.reshape(tile.blocks * width).sum(0) / (8 * blocks * width)
        sums = sums * lax.rsqrt(mean + eps)
    if low_rank:
        sums = added_to_row(sums, rows, others.pop(0), others.pop(0))
    write_row(out, sums, rows, outputs, others[0] if residual else None, swiglu)


def write_row(out: Any, sums: Float[Array, " n"], rows: Array, outputs: int, residual: Any, swiglu: bool) -> None:
    """A program's sums, or the activations of their pairs, with the residual added if there is one."""
    if swiglu:
        gate, up = pairs(sums[:, None])
        sums, size = (gate * jax.nn.sigmoid(gate) * up)[:, 0], len(rows) // 2
        rows = backend.clamped(pl.program_id(0) * size, size, outputs // 2)
    if residual is not None:
        sums = sums + residual[rows].astype(jnp.float32)
    out[rows] = sums.astype(out.dtype)


def pairs(rows: Float[Array, "two_n M"]) -> tuple[Float[Array, "n M"], Float[Array, "n M"]]:
    """Rows 2i and rows 2i + 1; as sums over a mask, since a tile cannot be sliced."""
    both = rows.reshape(-1, 2, rows.shape[1])
    first = (backend.arange(2) == 0)[None, :, None]
    return jnp.where(first, both, 0).sum(1), jnp.where(first, 0, both).sum(1)


def int4_row_product(
    x: Float[Array, "1 I"],
    weight: Int4 | Lookup4,
    *,
    norm: tuple[Float[Array, " I"], float] | None = None,
    residual: Float[Array, "1 O"] | None = None,
    low_rank: tuple[Float[Array, "1 r"], Float[Array, "O r"]] | None = None,
    swiglu: bool = False,
    tile: Tile = Tile(),
    interpret: bool = False,
) -> Float[Array, "1 P"]:
    """`x @ weight.T` for one row and a planar weight without permutation, summed in float32 and rounded to x's dtype.

    `norm`: weight and eps of an RMS norm of x. `swiglu`: P is O / 2, from gates in the even outputs and ups in the odd
    ones. `residual` is added before rounding. `low_rank`: hidden numbers and what multiplies them, see `low_rank.py`.
    """
    outputs, inputs = weight.shape
    width = weight.planar // 8
    blocks = inputs // weight.planar
    words = lax.bitcast_convert_type(weight.packed.reshape(outputs, blocks, width, 4), jnp.uint32)
    arguments = [words, weight.scale, x.reshape(blocks, 8, width)]
    codes, beside = codes_of(weight)
    offset = weight.offset if isinstance(weight, Int4) else None
    arguments += [*([] if offset is None else [offset]), *beside]
    arguments += [] if norm is None else [norm[0].reshape(blocks, 8, width)]
    arguments += [] if low_rank is None else [low_rank[0][0], low_rank[1]]
    arguments += [] if residual is None else [residual[0]]
    kernel = functools.partial(
        _kernel, codes=codes, tile=tile, per_scale=blocks // weight.scale.shape[1], has_offset=offset is not None,
        eps=None if norm is None else norm[1], swiglu=swiglu, residual=residual is not None,
        low_rank=low_rank is not None, interpret=interpret,
    )  # fmt: skip
    out = jax.ShapeDtypeStruct((outputs // 2 if swiglu else outputs,), x.dtype)
    grid = (pl.cdiv(outputs, tile.rows),)
    return backend.call(
        kernel, *arguments, grid=grid, out=out, name=f"{codes.name}_row", warps=tile.warps, interpret=interpret
    )[None]
