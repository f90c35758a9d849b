"""Checkpoints of models that see: the text model is loaded, under either naming, and the rest is left out aloud."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgen import AutoConfig, AutoModelForCausalLM, Int4Config, MistralConfig
from jaxgen.convert import convert_checkpoint
from jaxgen.convert.composite import text_name
from jaxgen.errors import CheckpointError, JaxgenError, UnsupportedError
from jaxgen.models.families import config_from_hf
from tests.families import CONFIGS, SEEING
from tests.family_files import tensors_of
from tests.hf_files import parameters, same_bits, write_hf

TEXT = CONFIGS["ministral3"] | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
BEFORE = {  # where the text model's tensors and the others are
    "hub": ("language_model.", "", "language_model.lm_head"),
    "transformers 5": ("model.language_model.", "model.", "lm_head"),
}


def written(directory: Path, naming: str = "hub", tied: bool = False, **outer: Any) -> Path:
    """A Mistral 3 checkpoint around the text model that `plain` writes."""
    text, others, head = BEFORE[naming]
    tensors = {}
    for name, tensor in tensors_of(config_from_hf(TEXT | {"tie_word_embeddings": tied})).items():
        inner = name if naming == "hub" else name.removeprefix("model.")
        tensors[f"{head}.weight" if name == "lm_head.weight" else text + inner] = tensor
    for name in ("vision_tower.patch_conv.weight", "multi_modal_projector.linear_1.weight"):
        tensors[others + name] = np.ones((4, 4), np.float32)
    fields = {"model_type": "mistral3", "text_config": TEXT, "vision_config": {"model_type": "pixtral"}}
    write_hf(directory, fields | outer, tensors)
    return directory


def plain(directory: Path, tied: bool = False) -> Path:
    fields = TEXT | {"tie_word_embeddings": tied}
    write_hf(directory, fields, tensors_of(config_from_hf(fields)))
    return directory


def load(place: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, dtype="float32", device_map="cpu", **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("naming", BEFORE)
def test_the_text_model_is_loaded_and_saved(tmp_path: Path, caplog, naming: str, tied: bool):
    place = written(tmp_path / naming, naming, tied)
    model, expected = load(place), load(plain(tmp_path / "plain", tied))
    assert type(model) is type(expected) and model.config == expected.config
    assert same_bits(parameters(model), parameters(expected))
    load(place)
    told = [record.message for record in caplog.records if "vision tower" in record.message]
    assert len(told) == 1 and "2 tensors" in told[0]
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "ministral3"
    assert same_bits(parameters(load(tmp_path / "saved")), parameters(model))


@pytest.mark.slow
def test_it_is_converted(tmp_path: Path):
    options = {"quantization_config": Int4Config(group_size=32)}
    ids = np.array([[5, 9, 7, 30]])
    converted = convert_checkpoint(written(tmp_path / "seeing"), tmp_path / "int4", group_size=32)
    np.testing.assert_allclose(
        load(converted)(ids).logits, load(plain(tmp_path / "plain"), **options)(ids).logits, atol=1e-4
    )


def test_a_head_that_is_missing_is_no_tied_one(tmp_path: Path):
    """Where the config says that it is none; where it says nothing, the files say it."""
    with pytest.raises(CheckpointError, match=r"lm_head\.weight' is missing"):
        load(written(tmp_path, tied=True, tie_word_embeddings=False))


def test_tensors_of_one_name(tmp_path: Path):
    place = written(tmp_path)
    tensors = {
        "model.norm.weight": np.ones(64, np.float32),
        "language_model.model.norm.weight": np.ones(64, np.float32),
    }
    write_hf(place, json.loads((place / "config.json").read_text()), tensors)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is there twice"):
        load(place)


def test_names():
    kept = ("model.layers.0.mlp.down_proj.weight", "lm_head.weight", "language_models.x", "model.language.weight")
    assert all(text_name(name) == name for name in kept)
    assert text_name("language_model.model.norm.weight") == text_name("model.language_model.norm.weight")


@pytest.mark.parametrize("name", SEEING)
def test_configs_of_the_hub_are_read(name: str):
    given = SEEING[name]["text_config"]
    config = config_from_hf({key: value for key, value in SEEING[name].items() if key != "quantization_config"})
    assert config.model_type == given["model_type"] and config_from_hf(config.to_hf()) == config
    rope = given.get("rope_parameters", {"rope_theta": given.get("rope_theta")})
    assert {key: config.rope_parameters[key] for key in rope if key != "type"} == {
        key: value for key, value in rope.items() if key != "type"
    }
    plain = {key: value for key, value in given.items() if hasattr(config, key) and "rope" not in key}
    assert {key: getattr(config, key) for key in plain} == plain


def test_the_config_alone(tmp_path: Path):
    config: Any = AutoConfig.from_pretrained(written(tmp_path), num_hidden_layers=1)
    assert type(config).__name__ == "Ministral3Config" and config.num_hidden_layers == 1
    small = {"model_type": "mistral3", "text_config": {"hidden_size": 64, "num_attention_heads": 8}}
    assert isinstance(config_from_hf(small), MistralConfig) and config_from_hf(small).tie_word_embeddings


@pytest.mark.parametrize("fields, message", [
    ({"text_config": None}, "text_config=None must be an object"),
    ({"text_config": {"model_type": "mistral4"}}, "model_type='mistral4' is not supported"),
    ({"text_config": {"model_type": "ministral3", "experts": 4}}, "experts=4 is not a field of Ministral3Config"),
])  # fmt: skip
def test_what_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises((UnsupportedError, JaxgenError), match=message):
        config_from_hf({"model_type": "mistral3", **fields})
