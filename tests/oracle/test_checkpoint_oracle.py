"""Checkpoints exchanged with transformers on torch, in both directions."""

import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxgen.convert.load import AutoModelForCausalLM
from jaxgen.generation.options.config import GenerationConfig
from tests.hf_files import CONFIG, hf_tensors, parameters, same_bits, write_hf

pytestmark = pytest.mark.oracle

DTYPES = ["float32", "bfloat16", "float16"]
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "mha": {"num_key_value_heads": 4, "head_dim": 2},
    "tied": {"tie_word_embeddings": True},
    "window": {"sliding_window": 3},
}
IDS = np.array([[1, 5, 9, 2, 7, 10, 3]])


def torch_model(config: dict[str, Any], dtype: str = "float32") -> Any:
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**config)).eval()
    return model.to(getattr(torch, dtype))


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.float().numpy()


def ours(directory: Path, dtype: str = "float32"):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map="cpu")


@pytest.mark.parametrize("variant", VARIANTS)
def test_hand_built_tensors_have_the_same_logits_in_both(tmp_path, variant):
    config = CONFIG | VARIANTS[variant]
    write_hf(tmp_path, config, hf_tensors(config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    np.testing.assert_allclose(ours(tmp_path)(jnp.asarray(IDS)).logits, torch_logits(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("max_shard_size", ["5GB", "1KB"])
def test_transformers_checkpoints_load_and_come_back_bit_for_bit(tmp_path, variant, dtype, max_shard_size):
    theirs = torch_model(CONFIG | VARIANTS[variant], dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    model = ours(tmp_path / "theirs", dtype)
    if dtype == "float32":
        np.testing.assert_allclose(model(jnp.asarray(IDS)).logits, torch_logits(theirs), atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path / "ours", max_shard_size=max_shard_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "ours", dtype="auto", output_loading_info=True
        )
    again, info = loaded
    assert not any(info.values()), info
    assert again.dtype == getattr(torch, dtype)
    state, original = again.state_dict(), theirs.state_dict()
    assert state.keys() == original.keys()
    for name in state:
        assert torch.equal(state[name], original[name]), name
    np.testing.assert_array_equal(torch_logits(again.eval()), torch_logits(theirs))
    kept = ("vocab_size", "head_dim", "rope_parameters", "sliding_window", "rms_norm_eps", "eos_token_id")
    assert all(getattr(again.config, name) == getattr(theirs.config, name) for name in kept)
    assert same_bits(parameters(ours(tmp_path / "ours", dtype)), parameters(model))


def test_generation_config_reaches_transformers(tmp_path):
    torch_model(CONFIG).save_pretrained(tmp_path / "theirs")
    model = ours(tmp_path / "theirs")
    model.generation_config = GenerationConfig(max_new_tokens=9, eos_token_id=(4, 5), pad_token_id=0)
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").generation_config
    assert (theirs.max_new_tokens, theirs.eos_token_id, theirs.pad_token_id) == (9, [4, 5], 0)


def test_without_generation_config_both_take_the_ids_of_config_json(tmp_path):
    config = CONFIG | {"eos_token_id": 7, "bos_token_id": 3, "pad_token_id": 0}
    write_hf(tmp_path, config, hf_tensors(config))
    (tmp_path / "generation_config.json").unlink()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    mine = ours(tmp_path).generation_config
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        assert getattr(mine, name) == getattr(theirs, name), name


def test_pickled_checkpoints_convert_as_the_error_says(tmp_path):
    torch_model(CONFIG).save_pretrained(tmp_path / "pickled")
    weights = tmp_path / "pickled" / "model.safetensors"
    torch.save(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pickled").state_dict(),
               tmp_path / "pickled" / "pytorch_model.bin")  # fmt: skip
    weights.unlink()
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        ours(tmp_path / "pickled")
    converted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pickled")
    converted.save_pretrained(tmp_path / "converted", safe_serialization=True)
    np.testing.assert_allclose(
        ours(tmp_path / "converted")(jnp.asarray(IDS)).logits, torch_logits(converted.eval()), atol=1e-4, rtol=0
    )
