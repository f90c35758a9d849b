"""What `benchmarks/mesh.py` found, as a table: a line per shape, weights and number of devices."""

from typing import Any


def meshes(rows: Any) -> str:
    """Bytes on each device, and those of a decode step that devices sum or join; nothing where it was not run.

    >>> row = {"shape": "7B", "weights": "int4", "devices": 2, "weight_bytes": 2062032896, "embedding_bytes": 65536}
    >>> row |= {"cache_bytes_per_row": 268435456, "layer_bytes": 262144, "logits_bytes": 512000, "step_bytes": 8966144}
    >>> _line(row)
    '| 7B | int4 | 2 | 2.06 GB | 268.4 MB | 66 kB | 262 kB | 512 kB | 9.0 MB |'
    """
    if rows is None:
        return ""
    header = "| | weights | devices | of weights | of a row's cache | embedding | a layer | logits | a step |"
    table = "\n".join([header, "|---|---|" + "---:|" * 7, *map(_line, rows)])
    prose = (
        "On each device, with all of them in `model`: weights, and the cache of a row of 4,096 tokens. Then what "
        f"{rows[0]['batch']} rows have devices tell each other in a decode step: the results of the embedding's sum, "
        "of the two of a layer, of the logits that are joined, and of all of it. Compiled for H200 that are not there: "
        f"nothing ran, and how long it takes is not known. {rows[0]['compiled_layers']} layers are compiled, and what "
        "one says is multiplied. `tests/aot` asserts that there are no other collectives, and that the cache stays in "
        "place. With four bits, rows are summed that their kernel pads to 16."
    )
    source = (
        "`python benchmarks/mesh.py --json` on a machine without a GPU. All figures: `benchmarks/results/mesh.json`.\n"
        "{ .source }"
    )
    return f"{prose}\n\n{table}\n\n{source}\n"


def _line(row: dict[str, Any]) -> str:
    told = (f"{row[f'{kind}_bytes'] / 1e3:.0f} kB" for kind in ("embedding", "layer", "logits"))
    weights, cache = f"{row['weight_bytes'] / 1e9:.2f} GB", f"{row['cache_bytes_per_row'] / 1e6:.1f} MB"
    step = f"{row['step_bytes'] / 1e6:.1f} MB"
    return "| " + " | ".join((row["shape"], row["weights"], str(row["devices"]), weights, cache, *told, step)) + " |"
