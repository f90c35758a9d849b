"""fp8 checkpoints: 8-bit floats times the scales of their blocks, read once into the model's dtype."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxgen import AutoModelForCausalLM, Int4Config
from jaxgen.convert import checkpoint
from jaxgen.convert.inspect import describe
from jaxgen.errors import CheckpointError, JaxgenError, UnsupportedError
from jaxgen.models.families import config_from_hf
from tests.families import CONFIGS
from tests.family_files import tensors_of
from tests.fp8_files import FIELDS, quantization, rounded, written
from tests.hf_files import parameters, same_bits, write_hf

BLOCKS: list[tuple[int, int] | None] = [None, (32, 32), (40, 24)]  # the last fits no matrix


def load(place: Path, dtype: str = "float32", **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, dtype=dtype, device_map="cpu", **options)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_is_read_is_what_the_bytes_stand_for(tmp_path: Path, monkeypatch, block: Any, scale_dtype: Any):
    """Rounded once, to whatever dtype is asked for; also where a matrix is read in several pieces."""
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 1000)
    fp8, plain = written(tmp_path, block, scale_dtype)
    for dtype in ("float32", "bfloat16"):
        assert same_bits(parameters(load(fp8, dtype)), parameters(load(plain, dtype)))


def test_blocks_that_lie_across_stacked_projections(tmp_path: Path, monkeypatch):
    """A tensor whose pieces go to several places is read in pieces of its own, too."""
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 1000)
    fp8, plain = written(tmp_path, (40, 24), fields=CONFIGS["phi3"])
    model, expected = (load(place) for place in (fp8, plain))
    assert same_bits(parameters(model), parameters(expected))
    _, meant = rounded(tensors_of(config_from_hf(CONFIGS["phi3"])), (40, 24), np.float32)
    gate_up = meant["model.layers.1.mlp.gate_up_proj.weight"]  # in the file all of gate, then all of up
    both = np.stack(np.split(gate_up, 2), axis=1).reshape(gate_up.shape)
    np.testing.assert_array_equal(model.model.layers[1].mlp.gate_up_proj.weight[...], both)


def test_it_is_quantised_and_saved_as_any_other(tmp_path: Path):
    fp8, plain = written(tmp_path)
    options: dict[str, Any] = {"quantization_config": Int4Config(group_size=32)}
    ids = np.array([[5, 9, 7, 30]])
    np.testing.assert_array_equal(load(fp8, **options)(ids).logits, load(plain, **options)(ids).logits)
    model = load(fp8)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert same_bits(parameters(load(tmp_path / "saved")), parameters(model))


def test_inspect_names_the_format(tmp_path: Path):
    text = describe(written(tmp_path)[0], "float32")
    assert "fp8, blocks of 32 x 32" in text and "F8_E4M3" in text


def changed(tmp_path: Path, **change: Any) -> Path:
    """A checkpoint of which one tensor is left out, or is another."""
    stored, _ = rounded(tensors_of(config_from_hf(FIELDS)), (32, 32), np.float32)
    for name, tensor in change.items():
        stored.pop(name) if tensor is None else stored.update({name: tensor})
    write_hf(tmp_path, FIELDS | quantization((32, 32)), stored)
    return tmp_path


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("change, message", [
    ({f"{DOWN}_scale_inv": None}, rf"'{DOWN}' has 8 bits, and there is no '{DOWN}_scale_inv'"),
    ({f"{DOWN}_scale_inv": np.ones((3, 2), np.float32)}, r"is F32 \[3, 2\], but .* \[64, 96\] needs floats \[2, 3\]"),
    ({f"{DOWN}_scale_inv": np.ones((2, 3), np.int32)}, "is I32"),
    ({f"{DOWN}_scale_inv": np.full((2, 3), np.nan, np.float32)}, "has scales that are not finite"),
    ({DOWN: None}, "down_proj.weight' is missing"),
    ({DOWN: np.ones((64, 96), np.float32)}, "down_proj.weight_scale_inv' is not part of the model"),
    ({"model.norm.weight": np.ones(64, ml_dtypes.float8_e4m3fn)}, "'model.norm.weight' has 8 bits"),
])  # fmt: skip
def test_damaged_files(tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message):
        load(changed(tmp_path, **change))


@pytest.mark.parametrize("fields, message", [
    ({"fmt": "e5m2"}, "fp8 with fmt='e5m2' is not supported"),
    ({"scale_fmt": "ue8m0"}, "fp8 with scale_fmt='ue8m0' is not supported"),
    ({"activation_scheme": 3}, "activation_scheme=3 of the quantisation must be a text"),
    ({"weight_block_size": [128]}, r"weight_block_size=\[128\] .* must be two positive ints"),
    ({"weight_block_size": [True, 128]}, "must be two positive ints"),
    ({"weight_block_size": 128}, "must be two positive ints"),
])  # fmt: skip
def test_settings_that_are_refused(tmp_path: Path, fields: dict[str, Any], message: str):
    write_hf(tmp_path, FIELDS | quantization((32, 32), **fields), tensors_of(config_from_hf(FIELDS)))
    with pytest.raises(JaxgenError, match=message):
        load(tmp_path)


def test_scales_without_a_config_are_refused(tmp_path: Path):
    fp8, _ = written(tmp_path)
    (fp8 / "config.json").write_text(json.dumps(FIELDS))
    with pytest.raises(CheckpointError, match=r"config\.json has no quantization_config"):
        load(fp8)
    with pytest.raises(UnsupportedError, match="fp16"):
        (fp8 / "config.json").write_text(json.dumps(FIELDS | {"quantization_config": {"quant_method": "fp16"}}))
        load(fp8)
