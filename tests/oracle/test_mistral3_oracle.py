"""Mistral 3's text part, and fp8 files, against transformers on torch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import jaxgen
from tests.families import CONFIGS
from tests.fp8_files import written

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]

IDS = np.random.default_rng(0).integers(3, 97, (2, 40))  # beyond the original context of 32
VISION = {
    "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8,
    "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
}  # fmt: skip


def assert_same_logits(directory: Path, theirs: Any) -> Any:
    model = jaxgen.AutoModelForCausalLM.from_pretrained(directory, dtype="float32", device_map="cpu")
    with torch.no_grad():
        expected = theirs(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(model(IDS).logits, expected, atol=1e-4)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("text", ["ministral3", "mistral"])
def test_the_text_part(tmp_path: Path, text: str, tied: bool):
    fields = CONFIGS["ministral3"] if text == "ministral3" else {**_plain(CONFIGS["ministral"]), "model_type": text}
    config = transformers.Mistral3Config(text_config=fields, vision_config=VISION, tie_word_embeddings=tied)
    torch.manual_seed(0)
    theirs = transformers.Mistral3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.12)
    theirs.save_pretrained(tmp_path / "seeing")
    model = assert_same_logits(tmp_path / "seeing", theirs)
    assert model.config.tie_word_embeddings == tied
    model.save_pretrained(tmp_path / "text")
    alone = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "text", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert type(alone).__name__ == type(model).__name__
    assert_same_logits(tmp_path / "text", theirs)
    with torch.no_grad():
        assert torch.equal(alone(torch.from_numpy(IDS)).logits, theirs(torch.from_numpy(IDS)).logits)


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "layer_types"}


@pytest.mark.parametrize("block", [None, (32, 32)])
def test_fp8(tmp_path: Path, block: Any):
    fp8, _ = written(tmp_path, block)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        fp8, dtype=torch.float32, device_map="cpu", attn_implementation="eager"
    ).eval()
    assert_same_logits(fp8, theirs)
