"""What `jaxgen convert` writes, opened by transformers with compressed-tensors on torch."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxgen import AutoModelForCausalLM, Int4Config, demo
from jaxgen.convert import convert_checkpoint
from jaxgen.convert.checkpoint import Checkpoint
from tests.hf_files import CONFIG, hf_tensors, write_hf

pytestmark = pytest.mark.oracle

quantization = pytest.importorskip("compressed_tensors.quantization", reason="needs compressed-tensors")

WIDE = CONFIG | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 40}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "group 128": ({}, {"group_size": 128}),
    "group 64": ({}, {"group_size": 64}),
    "group 32, several files": ({}, {"group_size": 32, "max_shard_size": "30KB"}),
    "whole rows": ({}, {"group_size": -1}),
    "lm_head": ({}, {"group_size": 32, "lm_head": True}),
    "tied": ({"tie_word_embeddings": True}, {"group_size": 32}),
    "window": ({"sliding_window": 3}, {"group_size": 32}),
}


def torch_logits(directory: Path, ids: np.ndarray) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def logits(directory: Path, ids: np.ndarray, **options: Any) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32", device_map="cpu", **options)
    return np.asarray(model(jnp.asarray(ids)).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_logits_in_both(tmp_path, variant):
    fields, options = VARIANTS[variant]
    config = WIDE | fields
    small = {name: tensor * tensor.dtype.type(1 / 8) for name, tensor in hf_tensors(config, "BF16").items()}
    write_hf(tmp_path / "source", config, small, shards=2)  # logits of order 1: rounding stays far below 1e-4
    path = convert_checkpoint(tmp_path / "source", tmp_path / "out", **options)
    scales = [name for name in Checkpoint(path).tensors if name.endswith("_scale")]
    assert any((Checkpoint(path).read(name) < 0).any() for name in scales)
    ids = np.array([[1, 5, 9, 2, 7, 10, 3]])
    theirs = torch_logits(path, ids)
    int4 = Int4Config(group_size=options["group_size"], lm_head=options.get("lm_head", False))
    np.testing.assert_allclose(logits(path, ids), theirs, atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits(tmp_path / "source", ids, quantization_config=int4), theirs, atol=1e-4, rtol=0)


def test_the_demo(tmp_path):
    path = convert_checkpoint(demo.path(), tmp_path / "out")
    ids = np.random.default_rng(0).integers(3, 600, (2, 100))
    np.testing.assert_allclose(logits(path, ids), torch_logits(path, ids), atol=1e-4, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    inputs = tokenizer("A list of colors: red, blue", return_tensors="pt")
    ours = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    expected = model.generate(**inputs, max_new_tokens=40).numpy()
    np.testing.assert_array_equal(ours.generate(inputs["input_ids"].numpy(), max_new_tokens=40), expected)


@pytest.mark.parametrize("group_size", [64, -1])
@pytest.mark.parametrize("lm_head", [False, True])
def test_the_config_is_the_one_that_the_library_writes(tmp_path, group_size, lm_head):
    write_hf(tmp_path / "source", WIDE, hf_tensors(WIDE, "BF16"))
    path = convert_checkpoint(tmp_path / "source", tmp_path / "out", group_size=group_size, lm_head=lm_head)
    weights = quantization.QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=True,
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=[] if lm_head else ["lm_head"],
        format="pack-quantized",
        quantization_status="compressed",
    )
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    from compressed_tensors.compressors import ModelCompressor

    ModelCompressor(quantization_config=config).update_config(tmp_path / "theirs")
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "theirs", path))
    assert ours["quantization_config"] == theirs["quantization_config"]
