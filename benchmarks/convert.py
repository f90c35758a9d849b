"""Host memory and speed of `jaxgen convert`: `python benchmarks/convert.py --layers 32 --shards 4 --json FILE`.

The promise: at most 2 GB of anonymous memory, whatever the size of the checkpoint. Exits with status 1 if it took
more. The checkpoint is random, bfloat16, and has Mistral-7B's shape, with as many layers as asked (32: 14.5 GB).
Needs disk for it and for the result, in the directory for temporary files or in `--directory`.
"""

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from loading import write_checkpoint

from jaxgen.convert.checkpoint import Checkpoint
from jaxgen.models.mistral import MistralConfig
from jaxgen.models.tensors import parameter_parts

_BOUND = 2_000_000_000
_SAMPLE_SECONDS = 0.005


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shards", type=int, default=4, help="files of the source")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--directory", type=Path, help="where to put both checkpoints meanwhile")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = MistralConfig(num_hidden_layers=arguments.layers)
    parts = [part for group in parameter_parts(config).values() for part in group]
    weights = sum(math.prod(part.shape) for part in parts)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        source, target = Path(directory) / "source", Path(directory) / "target"
        source.mkdir()
        write_checkpoint(source, 2 * weights, arguments.shards, config.hidden_size)
        options = ["--group-size", str(arguments.group_size)]
        seconds, peak = run([sys.executable, "-m", "jaxgen.cli", "convert", str(source), str(target), *options])
        result = {
            "layers": config.num_hidden_layers,
            "group_size": arguments.group_size,
            "source_files": arguments.shards,
            "source_bytes": size(source),
            "target_bytes": size(target),
            "target_files": len(list(target.glob("*.safetensors"))),
            "target_problems": Checkpoint(target).problems,
            "peak_anonymous_bytes": peak,
            "bound_bytes": _BOUND,
            "seconds": round(seconds, 1),
            "weights_per_second": round(weights / seconds),
        }
    passed = peak <= _BOUND and not result["target_problems"]
    for name, value in result.items():
        print(f"{name:22} {value:,}" if isinstance(value, int) else f"{name:22} {value}")
    print("pass" if passed else "FAIL")
    if arguments.json:
        text = json.dumps({"machine": machine(), **result}, indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0 if passed else 1


def run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak anonymous memory, in bytes, of a process; raises if it fails."""
    peak, start = 0, time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(_SAMPLE_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - start, peak


def anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0  # it has just ended


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def machine() -> dict:
    versions = {name: version(name) for name in ("jax", "jaxlib", "numpy", "jaxgen")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "versions": versions,
    }


if __name__ == "__main__":
    sys.exit(main())
