"""The readers of uniform formats against the formats' libraries, live.

compressed-tensors is in the extra `oracle`. gptqmodel and auto-round are not: they pin numpy and torch to other
versions than ours, and their dependencies to a desktop's. What they make is committed instead (see
`tests/formats/make_uniform.py`) and checked by `tests/test_formats_uniform.py`; here, where they are installed.
"""

import importlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxgen.convert.checkpoint import Checkpoint
from jaxgen.convert.formats import detect
from jaxgen.convert.load import AutoModelForCausalLM
from jaxgen.files import read_json
from jaxgen.models.tensors import Part
from tests.formats import make_uniform

pytestmark = pytest.mark.oracle

LIBRARY = {"compressed": "compressed_tensors", "gptq": "gptqmodel", "awq": "gptqmodel", "autoround": "auto_round"}
VERSION = {"compressed-g-idx": "0.10.2", "compressed": "0.20.0", "gptqmodel": "7.7.0", "auto_round": "0.16.1"}
IDS = [make_uniform.IDS]


def group(targets: list[str], **weights: Any) -> dict[str, Any]:
    return make_uniform.group(targets, **weights)


GROUPS = {
    "symmetric": {"group_0": group(["Linear"], symmetric=True, strategy="group", group_size=6)},
    "asymmetric": {"group_0": group(["Linear"], symmetric=False, strategy="group", group_size=6)},
    "channel": {"group_0": group(["Linear"], symmetric=True, strategy="channel")},
    "asymmetric channel": {"group_0": group(["Linear"], symmetric=False, strategy="channel")},
    "mixed": make_uniform.SYMMETRIC,
}


def needs(library: str) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed; the committed files stand for it")


def ours(directory: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32", device_map="cpu")
    return np.asarray(model(jnp.asarray(IDS)).logits)


@pytest.mark.parametrize("groups", GROUPS)
def test_compressed_tensors_has_the_same_weights_and_logits(tmp_path, groups):
    needs("compressed_tensors")
    expected = make_uniform.compressed(tmp_path, make_uniform.ODD, 3, GROUPS[groups])
    _, stored_as = detect(read_json(tmp_path / "config.json"), Checkpoint(tmp_path))
    assert stored_as is not None
    for name in make_uniform.linears(expected):
        part = Part(name, tuple(expected[name].shape), tuple(expected[name].shape))
        assert stored_as.stored(part) is not None
        np.testing.assert_array_equal(stored_as.weight(part).dequantize(), expected[name].float().numpy())
    np.testing.assert_allclose(ours(tmp_path)[0], make_uniform.logits(make_uniform.ODD, expected), atol=1e-4, rtol=0)


# transformers 5.23 with compressed-tensors 0.20 expects zero points that are not packed, and refuses asymmetric files.
@pytest.mark.parametrize("groups", ["symmetric", "channel", "mixed"])
def test_transformers_with_compressed_tensors_has_the_same_logits(tmp_path, groups):
    needs("compressed_tensors")
    make_uniform.compressed(tmp_path, make_uniform.ODD, 4, GROUPS[groups])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    theirs.save_pretrained(tmp_path / "saved")
    assert any(name.endswith("weight_packed") for name in Checkpoint(tmp_path / "saved").tensors)
    with torch.no_grad():
        logits = theirs(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(ours(tmp_path), logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(ours(tmp_path / "saved"), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", make_uniform.CASES)
def test_libraries_still_make_what_is_committed(tmp_path, case):
    library = LIBRARY[case.split("-")[0]]
    needs(library)
    wanted = VERSION.get(case) or VERSION[library if library in VERSION else "compressed"]
    importlib.import_module(library)
    if version(library) != wanted:
        pytest.skip(f"{case} is from {library} {wanted}, here is {version(library)}")
    weights, expected = make_uniform.CASES[case](tmp_path), np.load(make_uniform.HERE / case / "expected.npz")
    for name in expected.keys() - {"logits"}:
        np.testing.assert_array_equal(weights[name].float().numpy(), expected[name])
    made, committed = Checkpoint(tmp_path), Checkpoint(make_uniform.HERE / case)
    assert made.tensors == committed.tensors
    for name in made.tensors:
        np.testing.assert_array_equal(made.read_bytes(name), committed.read_bytes(name))
    assert read_json(tmp_path / "config.json") == read_json(make_uniform.HERE / case / "config.json")
