"""What devices tell each other in a decode step, compiled for 2, 4 and 8 H200 by `benchmarks/mesh.py`.

Needs JAX's CUDA plugin, as `test_gpu_aot.py` does.
"""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "mesh.py"


@cache
def rows(*options: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(SCRIPT), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("shape, layers", [("7B", 2), ("7B", 3), ("24B", 2), ("Mixtral", 2)])
def test_two_sums_a_layer_one_for_the_embedding_and_the_logits(shape: str, layers: int):
    """Nothing else: no weight and no cache is sent, and the cache is written where it lies."""
    devices = ("2", "4", "8") if layers == 2 else ("4",)
    found = rows("--shapes", shape, "--layers", str(layers), "--devices", *devices)
    assert [row["devices"] for row in found] == [int(count) for count in devices] * (len(found) // len(devices))
    for row in found:
        assert row["collectives"] == {"all-reduce": 2 * layers + 1, "all-gather": 1}, row
        assert row["parts"] == dict.fromkeys(("heads", "mlp", "vocab"), row["devices"]), row
        assert row["copied_bytes"] < 1000, row
        vocabulary, width = {"7B": (32000, 4096), "24B": (131072, 5120), "Mixtral": (32000, 4096)}[shape]
        assert row["embedding_bytes"] == 8 * width * 2, row
        assert row["logits_bytes"] == 8 * vocabulary * 2, row
        assert row["layer_bytes"] <= 2 * 16 * width * 4, row  # float32, of rows that a kernel pads to 16
        if shape != "Mixtral":
            assert row["temp_bytes"] < 8_000_000, row
