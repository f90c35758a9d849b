"""How eight codes of four bits, packed in a 32-bit word, become numbers inside a kernel: what the formats differ in.

`int4_row` wants sums: of a word's codes, each times the x of its column. `int4_rows` wants the numbers themselves, code
j of neighbouring words as a pair of 16-bit floats for the matrix units. Both are a few instructions of inline assembly
on each word, wherever in a tile it lies; beside them stands the same in plain JAX.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgen.kernels import backend
from jaxgen.quant.int4 import Int4
from jaxgen.quant.lookup import Lookup4

_SHIFTS = tuple(range(0, 32, 4))


class Codes(ABC):
    """What kernels ask of a format."""

    name: ClassVar[str]
    units: ClassVar[tuple[float, ...]]  # what the x of code j is to be multiplied by
    zeros: ClassVar[tuple[float, ...]]  # what that x adds to the sum beyond what it should

    @abstractmethod
    def start(self, references: list[Any], dtype: Any) -> "Codes":
        """Inside a kernel: take what the format has beside words, scales and offsets, as numbers of a dtype."""

    @abstractmethod
    def add(self, words: Array, xs: Sequence[Array], total: Array, interpret: bool) -> Array:
        """`total` + for each word the sum of its codes times the `xs` of their columns."""

    @abstractmethod
    def pairs(self, words: Array, scale: Array, offset: Array | None, j: int, interpret: bool) -> Array:
        """Code j of every word, scaled, in scale's dtype."""


def codes_of(weight: Int4 | Lookup4) -> tuple[Codes, list[Array]]:
    """How a weight's codes are read, and the arrays that this takes beside its words, scales and offsets."""
    if isinstance(weight, Int4):
        return Int4Codes(), []
    return TableCodes(), [weight.table]


# For code j of a word: how far to shift it (left is negative), and the bit where it then stands.
_PLAN = {3: (0, 12), 4: (0, 16), 6: (12, 12), 7: (12, 16), 1: (-8, 12), 2: (-8, 16), 0: (-12, 12), 5: (8, 12)}
# Pairs of 16-bit floats, as words: 136 (in float16: 1032), one, and minus 136 (1032).
_PAIRS = {"bfloat16": (0x43084308, 0x3F803F80, 0xC308C308), "float16": (0x64086408, 0x3C003C00, 0xE408E408)}
_MINUS_ZERO = "0x80008000"  # adding it changes no number


class Int4Codes(Codes):
    """Two's complement.

    For sums, a code becomes a float without a conversion: it is put into the mantissa of 1.0, four bits wide at bit 12
    or 16, with its sign bit flipped. That reads 1 + (q + 8) / 2048 or 1 + (q + 8) / 128, so x is multiplied by 2048 or
    128 beforehand, and the constant part, (2048 + 8) x or (128 + 8) x, is taken off as the start of the sum. Per word:
    4 shifts, 8 times "and with a mask, exclusive or with a constant" (one instruction, `lop3`), 8 fused multiply-adds.

    For pairs, one `lop3` puts two codes into the mantissas of two floats that then read 136 + q (bfloat16; 1032 + q in
    float16), from which 136 is taken off: exact. Then comes the scale, with the offset if there is one: one rounding.
    """

    name = "int4"
    units = tuple(2048.0 if _PLAN[j][1] == 12 else 128.0 for j in range(8))
    zeros = tuple(unit + 8 for unit in units)

    def start(self, references: list[Any], dtype: Any) -> "Int4Codes":
        """Nothing to take."""
        return self

    def add(self, words: Array, xs: Sequence[Array], total: Array, interpret: bool) -> Array:
        """See `Codes`."""
        if not interpret:
            return _sums(_int4_sum(), words, [*xs, total])
        for j, (shift, bit) in _PLAN.items():
            moved = lax.shift_right_logical(words, jnp.uint32(shift)) if shift >= 0 else words << jnp.uint32(-shift)
            mantissa = (moved & jnp.uint32(0xF << bit)) ^ jnp.uint32(0x3F800000 ^ (8 << bit))
            total = total + lax.bitcast_convert_type(mantissa, jnp.float32) * xs[j]
        return total

    def pairs(self, words: Array, scale: Array, offset: Array | None, j: int, interpret: bool) -> Array:
        """See `Codes`."""
        if not interpret:
            arguments = [words, scale] if offset is None else [words, scale, offset]
            return _floats(_int4_pair(j, scale.dtype.name, offset is not None), arguments, scale.dtype)
        codes = lax.shift_right_logical(words, jnp.uint32(4 * j)) & jnp.uint32(15)
        exact = ((codes ^ 8).astype(jnp.int32) - 8).astype(jnp.float32) * scale.astype(jnp.float32)
        return (exact if offset is None else exact + offset.astype(jnp.float32)).astype(scale.dtype)


class TableCodes(Codes):
    """Places in a table of 16 numbers.

    Each of a warp's lanes holds the number at its own index modulo 16, and a code's number is fetched from the lane of
    that index: a shift and one instruction (`shfl`, which looks at the index's lowest five bits alone) per code. Which
    lane holds which number is settled in the same assembly, and the compiler moves it out of the loop.
    """

    name = "lookup"
    units, zeros = (1.0,) * 8, (0.0,) * 8

    def __init__(self, table: Sequence[Array] = ()):
        self._table = table

    def start(self, references: list[Any], dtype: Any) -> "TableCodes":
        """The numbers of the table."""
        table = references.pop(0)
        # As tiles of one number: Triton computes on what was loaded in the layout that the matrix units want, and does
        # not on copies of scalars.
        return TableCodes([table[jnp.full((1, 1), i, jnp.int32)].astype(dtype) for i in range(16)])

    def add(self, words: Array, xs: Sequence[Array], total: Array, interpret: bool) -> Array:
        """See `Codes`."""
        if not interpret:
            return _sums(_table_sum(), words, [*xs, total, *self._table])
        for j in range(8):
            total = total + self._plainly(words, j) * xs[j]
        return total

    def pairs(self, words: Array, scale: Array, offset: Array | None, j: int, interpret: bool) -> Array:
        """See `Codes`."""
        assert offset is None
        if not interpret:
            table = [jnp.broadcast_to(x, words.shape) for x in self._table]
            return _floats(_table_pair(j, scale.dtype.name), [words, scale, *table], scale.dtype)
        return self._plainly(words, j) * scale

    def _plainly(self, words: Array, j: int) -> Array:
        codes = lax.shift_right_logical(words, jnp.uint32(4 * j)) & jnp.uint32(15)
        return jnp.stack(self._table).reshape(16)[codes]


def _sums(code: str, words: Array, others: Sequence[Array]) -> Array:
    arguments = [words, *(jnp.broadcast_to(x, words.shape) for x in others)]
    result = jax.ShapeDtypeStruct(words.shape, jnp.float32)
    return backend.inline_assembly(code, arguments, "=f,r" + ",f" * len(others), result)


def _floats(code: str, arguments: list[Array], dtype: Any) -> Array:
    """One for each word; two neighbouring words at a time."""
    result = jax.ShapeDtypeStruct(arguments[0].shape, dtype)
    return backend.inline_assembly(code, arguments, "=r,r" + ",r" * len(arguments), result, pack=2)


@functools.cache
def _int4_sum() -> str:
    """start + sum over the codes of word $1: code_j * $(2 + j); start is $10."""
    lines, shifted = ["{ .reg .b32 t<4>; .reg .b32 f; .reg .f32 a; mov.f32 a, $10;"], {0: "$1"}
    for j, (shift, bit) in _PLAN.items():
        if shift not in shifted:
            name = shifted[shift] = f"t{len(shifted) - 1}"
            # To the left by a multiplication: shifts share a pipeline with lop3, multiplications do not.
            step = f"shr.u32 {name}, $1, {shift};" if shift > 0 else f"mul.lo.u32 {name}, $1, {1 << -shift};"
            lines.append(step)
        # 0x6a: the truth table of (a & b) ^ c
        lines.append(f"lop3.b32 f, {shifted[shift]}, {0xF << bit:#x}, {0x3F800000 ^ (8 << bit):#x}, 0x6a;")
        lines.append(f"fma.rn.f32 a, f, ${2 + j}, a;")
    return " ".join([*lines, "mov.f32 $0, a; }"])


@functools.cache
def _int4_pair(j: int, dtype: str, has_offset: bool) -> str:
    """$0: code j of words $1 and $2, as floats times the scales $3, plus the offsets $4."""
    base, one, minus_base = _PAIRS[dtype]
    # Only fused multiply-adds: the A100 has no other arithmetic on pairs of bfloat16.
    fma = "fma.rn.bf16x2" if dtype == "bfloat16" else "fma.rn.f16x2"
    halves, shift = (0x5410, 4 * j) if j < 4 else (0x7632, 4 * (j - 4))
    lines = ["{ .reg .b32 t, one, minus, zero;"]
    lines += [f"mov.b32 one, {one:#x}; mov.b32 minus, {minus_base:#x}; mov.b32 zero, {_MINUS_ZERO};"]
    lines += [f"prmt.b32 t, $1, $2, {halves:#x};"] + [f"shr.u32 t, t, {shift};"] * bool(shift)
    lines += [f"lop3.b32 t, t, 0x000f000f, {base:#x}, 0x6a; {fma} t, t, one, minus;"]
    return " ".join([*lines, f"{fma} $0, t, $3, {'$4' if has_offset else 'zero'}; }}"])


def _own_number(first: int) -> list[str]:
    """Into `own`: of the table's 16 numbers, from operand `first` on, that of this lane; `p` are predicates."""
    lines = ["mov.u32 lane, %laneid;"]
    level = [f"${first + i}" for i in range(16)]
    for bit in range(4):
        lines += [f"and.b32 t, lane, {1 << bit}; setp.ne.u32 p{bit}, t, 0;"]
        names = [f"n{bit}_{i}" for i in range(len(level) // 2)]
        lines += [f".reg .b32 {', '.join(names)};"]
        lines += [f"selp.b32 {name}, {level[2 * i + 1]}, {level[2 * i]}, p{bit};" for i, name in enumerate(names)]
        level = names
    return [*lines, f"mov.b32 own, {level[0]};"]


def _fetch(word: str, j: int, into: str) -> str:
    """The number of code j of a word."""
    index = f"shr.u32 t, {word}, {4 * j}; " if j else ""
    return f"{index}shfl.sync.idx.b32 {into}, own, {'t' if j else word}, 0x1f, 0xffffffff;"


@functools.cache
def _table_sum() -> str:
    """start + sum over the codes of word $1: table[code_j] * $(2 + j); start is $10, the table $11 to $26."""
    lines = ["{ .reg .b32 lane, t, own, f; .reg .pred p<4>; .reg .f32 a; mov.f32 a, $10;", *_own_number(11)]
    for j in range(8):
        lines += [_fetch("$1", j, "f"), f"fma.rn.f32 a, f, ${2 + j}, a;"]
    return " ".join([*lines, "mov.f32 $0, a; }"])


@functools.cache
def _table_pair(j: int, dtype: str) -> str:
    """$0: the numbers of code j of words $1 and $2, times the scales $3; the table, each number twice, is $4 to $19."""
    fma = "fma.rn.bf16x2" if dtype == "bfloat16" else "fma.rn.f16x2"
    lines = ["{ .reg .b32 lane, t, own, f, g, zero; .reg .pred p<4>;", *_own_number(4)]
    lines += [_fetch("$1", j, "f"), _fetch("$2", j, "g")]
    lines += [f"prmt.b32 f, f, g, 0x5410; mov.b32 zero, {_MINUS_ZERO}; {fma} $0, f, $3, zero;"]
    return " ".join([*lines, "}"])
