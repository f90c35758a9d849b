"""The committed checkpoints with uniform codes, and copies of them with something changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from jaxgen.convert.checkpoint import Checkpoint
from jaxgen.convert.formats import detect
from jaxgen.convert.load import AutoModelForCausalLM
from jaxgen.files import read_json
from jaxgen.models.tensors import Part
from jaxgen.quant import Int4

UNIFORM = Path(__file__).parent / "uniform"
IDS = np.array([[1, 5, 9, 2, 7, 15, 3, 0, 11]])
LAYER = "model.layers.0."
DOWN = f"{LAYER}mlp.down_proj"
QUERY = f"{LAYER}self_attn.q_proj"

Tensors = dict[str, np.ndarray]
Change = Callable[[Tensors], Any]


def load(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory, dtype="float32", device_map="cpu")


def read(directory: Path, module: str) -> Int4:
    """One weight through `detect`, its shape taken from the committed, unchanged one."""
    shape = tuple(np.load(UNIFORM / "awq" / "expected.npz")[f"{DOWN}.weight"].shape)
    if (expected := directory / "expected.npz").is_file():
        shape = np.load(expected)[f"{module}.weight"].shape
    _, stored_as = detect(read_json(directory / "config.json"), Checkpoint(directory))
    assert stored_as is not None
    part = Part(f"{module}.weight", shape, shape)
    assert stored_as.stored(part) is not None
    int4 = stored_as.weight(part)
    assert isinstance(int4, Int4)
    return int4


def changed(directory: Path, case: str, change: Change | None = None, **fields: Any) -> Path:
    """A copy of a committed checkpoint with its tensors changed, and fields of its quantisation config."""
    directory.mkdir(exist_ok=True)
    config = json.loads((UNIFORM / case / "config.json").read_text())
    config["quantization_config"] |= fields
    tensors = load_file(UNIFORM / case / "model.safetensors")
    if change is not None:
        change(tensors)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def drop(suffix: str) -> Change:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(suffix)]


def put(name: str, *values: Any) -> Change:
    """Overwrite the first values of a tensor."""
    return lambda tensors: tensors[name].reshape(-1).__setitem__(slice(len(values)), values)


def add(name: str, tensor: np.ndarray) -> Change:
    return lambda tensors: tensors.__setitem__(name, tensor)


def same(left: Int4, right: Int4) -> bool:
    return np.array_equal(np.asarray(left.dequantize()), np.asarray(right.dequantize()))
