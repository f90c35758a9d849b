"""How many instructions the products of packed weights take per weight, compiled on a machine without a GPU.

    python benchmarks/gpu_instructions.py                  # the products of the 7B shape on an H200
    python benchmarks/gpu_instructions.py --card a100 --json

Needs what `gpu_aot.py` needs. Counted are those of the inner loop in PTX (of the whole where there is none), without
copies, and without the choice of each lane's number of a table, which NVIDIA's assembler makes once per turn.
"""

import argparse
import collections
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_aot import CARDS, DUMP, device, on  # before jax: it says that no driver is to be looked for

os.environ["XLA_FLAGS"] += " --xla_dump_emitter_re=ptx"

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jaxgen.kernels import int4_row, int4_rows, tiles
from jaxgen.quant import Int4, Lookup4

PRODUCTS = {"o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
_NOT_COUNTED = ("mov", "selp", "setp", "and.b32 t, lane")


def inner_loop(ptx: str) -> list[str]:
    """The instructions of the longest loop, in short, or all where there is none."""
    lines = ptx[ptx.index(".entry") :].splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\$L__\w+):", line))}
    jumps = [
        (labels.get(match[1], i), i)
        for i, line in enumerate(lines)
        if (match := re.search(r"bra\S*\s+(\$L__\w+);", line))
    ]
    start, end = max(jumps, key=lambda jump: jump[1] - jump[0], default=(0, len(lines)))
    body = [line for line in lines[start : end + 1] if not line.lstrip().startswith("//")] if start < end else lines
    found = (re.sub(r"^(?:@!?\S+\s+|\{\s*)", "", part.strip()) for line in body for part in line.split(";")[:-1])
    return [part for part in found if part and not part.startswith((*_NOT_COUNTED, "."))]


def product(kind: str, rows: int, shape: tuple[int, int], group: int, swiglu: bool, gpu: Any) -> float:
    """Compile a product; the weights that one thread reads in a turn of its loop, or in all."""
    out, inputs = shape
    place, (tile, weight) = SingleDeviceSharding(gpu), (None, None)

    def array(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    packed, groups = array((out, inputs // 2), jnp.uint8), (out, inputs // group)
    if kind == "int4":
        weight: Any = Int4(packed, array(groups), planar=group)
    else:
        weight = Lookup4(packed, array(groups, jnp.float32), array((16,), jnp.float32), group)
    if rows == 1:
        tile: Any = tiles.row_tile(out, inputs, group)
        norm, x = array((inputs,)), array((1, inputs))
        steps = -(-inputs // (group * tile.blocks))
        counted = tile.rows * tile.blocks * group / (32 * tile.warps) * (steps if tile.ahead and steps <= 8 else 1)

        def run(weight: Any, x: Any, norm: Any) -> Any:
            around = {"norm": (norm, 1e-5), "swiglu": True} if swiglu else {}
            return int4_row.int4_row_product(x, weight, tile=tile, **around)
    else:
        tile = tiles.rows_tile(rows, out, inputs, swiglu)
        norm, x = array((inputs,)), array((inputs, int4_rows.columns_for(rows)))
        counted = tile.outputs * tile.words * 8 / (32 * tile.warps)

        def run(weight: Any, x: Any, norm: Any) -> Any:
            return int4_rows.int4_rows_product(x, weight, tile=tile, swiglu=swiglu)

    with on(gpu):
        lowered = jax.jit(run).trace(weight, x, norm).lower(lowering_platforms=("cuda",))
    lowered.compile()
    return counted


def count(card: str, rows: list[int]) -> Iterator[dict[str, Any]]:
    """One finished row after the other."""
    gpu = device(card)
    for kind, group in (("int4", 128), ("nf4", 64)):
        for name, shape in PRODUCTS.items():
            for number in rows:
                for file in DUMP.iterdir():
                    file.unlink()
                weights = product(kind, number, shape, group, name == "gate_up", gpu)
                (ptx,) = (text for file in DUMP.glob("*.ptx") if ".entry" in (text := file.read_text()))
                loop = inner_loop(ptx)
                names = collections.Counter(re.split(r"[. ]", part)[0] for part in loop)
                yield {
                    "card": card, "weights": kind, "product": name, "rows": number,
                    "per_weight": round(len(loop) / weights, 2),
                    "most": dict(names.most_common(6)),
                }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=list(CARDS), default="h200")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--json", action="store_true", help="a list of objects, instead of a line for each")
    options = parser.parse_args()
    counted = []
    for row in count(options.card, options.rows):
        counted.append(row)
        if not options.json:
            print("  ".join(f"{k}={v}" for k, v in row.items()), flush=True)
    if options.json:
        sys.stdout.write(json.dumps(counted, indent=1) + "\n")


if __name__ == "__main__":
    main()
