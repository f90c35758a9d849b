"""What loading onto several devices takes of the host's memory: the shards, and two tensors on the way."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.family_files import written
from tests.helpers import SOAK

LOADED = """
import sys, threading, jax
from flax import nnx
import jaxgen

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.0005):
        seen.append(anonymous())

def load():
    return jaxgen.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32", device_map=sizes)

sizes = {"model": int(sys.argv[2]), "data": int(sys.argv[3])}
jaxgen.AutoModelForCausalLM.from_pretrained(sys.argv[4], dtype="float32", device_map=sizes)  # what comes with it
before, seen, done = anonymous(), [], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
model = load()
done.set()
thread.join()
arrays = jax.tree.leaves(nnx.state(model))
shards = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
sizes = [array.nbytes for array in arrays]
print(max(seen) - before, anonymous() - before, shards, sum(sizes), max(sizes))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4, 1), (2, 2), *(pytest.param(sizes, marks=SOAK) for sizes in ((2, 1), (8, 1)))])
def test_no_second_copy_of_the_model(sizes: tuple[int, int], tmp_path: Path):
    """Simulated devices keep their shards in the host's memory, and beside them are at most two tensors."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    place = written(tmp_path / "wide", "llama, as Llama 2", num_hidden_layers=6, vocab_size=8192, **wide)
    small = written(tmp_path / "small", "llama, as Llama 2", num_key_value_heads=4)
    command = [sys.executable, "-c", LOADED, str(place), *map(str, sizes), str(small)]
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, left, shards, whole, largest = map(int, done.stdout.split())
    assert whole <= left + largest  # what is seen is this model; devices with the same part may share its memory
    assert peak <= shards + 2 * largest, (peak / 1e6, shards / 1e6, largest / 1e6)
