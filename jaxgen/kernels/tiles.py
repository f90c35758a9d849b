"""Which tile a product of decode runs with, by its shape: the fastest of those raced on an H200.

`benchmarks/kernels.py` races the candidates for a shape and prints its line of the tables. A shape that is in neither
follows the rule: enough programs to fill the chip's 132 multiprocessors, each with as much work as that leaves.
"""

import dataclasses

from jaxgen.kernels import int4_row, int4_rows

# The products of a 7B model, (outputs, inputs).
_ROW: dict[tuple[int, int], int4_row.Tile] = {
    (6144, 4096): int4_row.Tile(rows=8, ahead=True),
    (4096, 4096): int4_row.Tile(rows=4, ahead=True),
    (28672, 4096): int4_row.Tile(rows=8),
    (4096, 14336): int4_row.Tile(rows=4, ahead=True),
}
# The same for some numbers of rows: (rows, outputs, inputs).
_ROWS: dict[tuple[int, int, int], int4_rows.Tile] = {
    (8, 6144, 4096): int4_rows.Tile(splits=4, stages=2),
    (8, 4096, 4096): int4_rows.Tile(splits=4),
    (8, 28672, 4096): int4_rows.Tile(words=32, warps=2, stages=4),
    (8, 4096, 14336): int4_rows.Tile(splits=4),
    (32, 6144, 4096): int4_rows.Tile(words=32, splits=4),
    (32, 4096, 4096): int4_rows.Tile(splits=2),
    (32, 28672, 4096): int4_rows.Tile(stages=2),
    (32, 4096, 14336): int4_rows.Tile(splits=2),
}

_PROGRAMS = 192


def row_tile(outputs: int, inputs: int, block: int = 128) -> int4_row.Tile:
    """For one row, and blocks of so many columns: as many words at a time, whatever blocks they belong to."""
    tile = _ROW.get((outputs, inputs)) or int4_row.Tile(rows=8 if outputs >= 6144 else 4, ahead=True)
    return dataclasses.replace(tile, blocks=tile.blocks * 128 // block)


def rows_tile(rows: int, outputs: int, inputs: int, swiglu: bool) -> int4_rows.Tile:
    """For 2 to 64 rows; `swiglu` allows no split."""
    known = _ROWS.get((rows, outputs, inputs))
    if known:
        return dataclasses.replace(known, splits=1) if swiglu else known
    programs, splits = -(-outputs // 64), 1
    while not swiglu and programs * splits < _PROGRAMS and inputs // (2 * splits) >= 1024:
        splits *= 2
    # Stages of words and of x for 64 rows fit no chip's shared memory if they are wider.
    return int4_rows.Tile(splits=splits, words=64 if rows <= 32 else 32)
