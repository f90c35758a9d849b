"""Host memory and speed of loading a checkpoint: `python benchmarks/loading.py --gigabytes 4 --shards 4`.

The promise: on a CPU device, peak anonymous memory stays below the finished parameters plus two of the largest
tensor. Exits with status 1 if it does not. The checkpoint has Mistral-7B's layers, as many as fit.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

_SAMPLE_SECONDS = 0.002


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the bfloat16 checkpoint, at least")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--width", type=int, default=4096, help="hidden size; the other sizes follow Mistral-7B's")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], help="dtypes to load as")
    parser.add_argument("--child", nargs=2, metavar=("DIRECTORY", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(Path(arguments.child[0]), arguments.child[1])))
        return 0
    passed = True
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), int(arguments.gigabytes * 1e9), arguments.shards, arguments.width)
        for dtype in arguments.dtypes:
            command = [sys.executable, __file__, "--child", directory, dtype]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            passed &= report(json.loads(output.splitlines()[-1]))
    return 0 if passed else 1


def write_checkpoint(directory: Path, nbytes: int, shards: int, width: int) -> None:
    """A bfloat16 checkpoint of at least `nbytes`, random and finite, with Mistral-7B's proportions."""
    import ml_dtypes
    from safetensors.numpy import save_file

    from jaxgen.models.mistral import MistralConfig
    from jaxgen.models.tensors import parameter_parts

    def parts_of(layers: int):
        config = MistralConfig(
            hidden_size=width,
            intermediate_size=width * 7 // 2,
            num_hidden_layers=layers,
            num_attention_heads=width // 128,
            num_key_value_heads=max(1, width // 512),
        )
        return config, [part for group in parameter_parts(config).values() for part in group]

    def size(parts) -> int:
        return sum(2 * int(np.prod(part.shape)) for part in parts)

    one, two = size(parts_of(1)[1]), size(parts_of(2)[1])
    config, parts = parts_of(max(1, 1 - (one - nbytes) // (two - one)))
    per_shard = -(-size(parts) // shards)
    generator, weight_map, pending = np.random.default_rng(0), {}, {}
    for part in parts:
        bits = generator.integers(0, 2**16, part.shape, np.uint16) & 0x3FFF  # |x| < 2
        pending[part.name] = bits.view(ml_dtypes.bfloat16)
        if size(pending.values()) >= per_shard or part is parts[-1]:
            name = f"model-{len(set(weight_map.values())) + 1:05}-of-{shards:05}.safetensors"
            save_file(pending, directory / name, {"format": "pt"})
            weight_map |= dict.fromkeys(pending, name)
            pending = {}
    index = {"metadata": {"total_size": size(parts)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config.to_hf()))


def measure(directory: Path, dtype: str) -> dict:
    """Load the checkpoint in this process, watching its memory."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from flax import nnx

    from jaxgen.convert import AutoModelForCausalLM
    from jaxgen.models.tensors import parameter_parts

    jax.block_until_ready(jax.numpy.zeros(1))
    baseline = status("RssAnon")
    watch = PeakWatch()
    start = time.perf_counter()
    with watch:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map="cpu")
    seconds = time.perf_counter() - start
    itemsize = model.dtype.itemsize
    tensors = [part for group in parameter_parts(model.config).values() for part in group]
    return {
        "dtype": dtype,
        "checkpoint": sum(path.stat().st_size for path in directory.glob("*.safetensors")),
        "parameters": sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))),
        "largest": max(int(np.prod(part.shape)) for part in tensors) * itemsize,
        "peak": watch.peak - baseline,
        "high_water": status("VmHWM"),
        "seconds": seconds,
    }


def report(result: dict) -> bool:
    bound = result["parameters"] + 2 * result["largest"]
    passed = result["peak"] <= bound
    rows = {
        "loaded as": result["dtype"],
        "checkpoint": f"{result['checkpoint'] / 1e6:.1f} MB",
        "parameters": f"{result['parameters'] / 1e6:.1f} MB",
        "largest tensor": f"{result['largest'] / 1e6:.1f} MB",
        "peak anonymous memory": f"{result['peak'] / 1e6:.1f} MB over the baseline",
        "  over the parameters": f"{(result['peak'] - result['parameters']) / 1e6:.1f} MB "
        f"({(result['peak'] - result['parameters']) / result['largest']:.2f} largest tensors)",
        "bound": f"{bound / 1e6:.1f} MB (parameters + 2 x largest tensor): {'pass' if passed else 'FAIL'}",
        "VmHWM": f"{result['high_water'] / 1e6:.1f} MB (everything, file pages too)",
        "time": f"{result['seconds']:.1f} s, {result['checkpoint'] / 1e9 / result['seconds']:.2f} GB/s of checkpoint",
    }
    for name, text in rows.items():
        print(f"{name:22} {text}")
    return passed


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}: this benchmark needs Linux")


@dataclasses.dataclass
class PeakWatch:
    """Samples this process's anonymous memory in a thread while it is entered."""

    peak: int = 0

    def __enter__(self):
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()

    def _run(self):
        while not self._stop.is_set():
            self.peak = max(self.peak, status("RssAnon"))
            self._stop.wait(_SAMPLE_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
