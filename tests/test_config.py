"""MistralConfig.from_hf: the hub's configs, both spellings of RoPE, and a clear refusal of everything else."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.models.mistral import MistralConfig
from tests.hf_files import HUB, in_v5_spelling
from tests.reference.cases import CASES, v4_rope, v5_rope

_EXPECTED_V01 = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": 4096, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
_EXPECTED_LATER = _EXPECTED_V01 | {"rope_theta": 1e6, "sliding_window": None}
EXPECTED: dict[str, dict[str, Any]] = {
    "7B-v0.1": _EXPECTED_V01,
    "Zephyr-7B": _EXPECTED_V01 | {"pad_token_id": 2},
    "7B-Instruct-v0.2": _EXPECTED_LATER,
    "7B-v0.3": _EXPECTED_LATER | {"vocab_size": 32768},
    "Mathstral-7B": _EXPECTED_LATER | {"vocab_size": 32768, "sliding_window": 4096},
    "Nemo-2407": _EXPECTED_LATER
    # head_dim is written: 5120 / 32 would be 160.
    | {"hidden_size": 5120, "num_hidden_layers": 40, "head_dim": 128, "vocab_size": 131072}
    | {"max_position_embeddings": 1024000},
    "Small-2409": _EXPECTED_LATER
    # head_dim is not written: 6144 / 48 = 128.
    | {"hidden_size": 6144, "intermediate_size": 16384, "num_attention_heads": 48, "num_hidden_layers": 56}
    | {"vocab_size": 32768},
    "Small-24B-2501": _EXPECTED_LATER
    | {"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40}
    | {"vocab_size": 131072, "rope_theta": 1e8},
    "TinyMistral": _EXPECTED_V01
    | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "sliding_window": 32}
    | {"rms_norm_eps": 1e-6, "head_dim": 32},
}


@pytest.mark.parametrize("name", HUB)
@pytest.mark.parametrize("spelling", [dict, in_v5_spelling])
def test_hub_configs(name: str, spelling: Any):
    assert dataclasses.asdict(MistralConfig.from_hf(spelling(HUB[name]))) == EXPECTED[name]


def test_missing_fields_take_transformers_defaults():
    # transformers 5: a missing sliding_window is 4096 (null: full attention), eps 1e-6, theta 1e4.
    config = MistralConfig.from_hf({"model_type": "mistral"})
    assert dataclasses.asdict(config) == _EXPECTED_V01 | {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072}


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 4096}])
def test_sliding_window_missing(fields: dict[str, Any]):
    assert MistralConfig.from_hf({"model_type": "mistral", **fields}).sliding_window == 4096


def test_sliding_window_null_is_full_attention():
    assert MistralConfig.from_hf({"model_type": "mistral", "sliding_window": None}).sliding_window is None


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_theta": 5e5, "rope_parameters": None},
    ],
)
def test_every_spelling_of_rope(rope: dict[str, Any]):
    assert MistralConfig.from_hf({"model_type": "mistral", **rope}).rope_theta == 5e5


def test_contradicting_rope_bases_raise():
    fields = {"model_type": "mistral", "rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}
    with pytest.raises(JaxgenError, match=r"10000\.0.*1000000\.0"):
        MistralConfig.from_hf(fields)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}, "rope_type='yarn'"),
        ("rope_parameters", {"rope_type": "default", "factor": 2.0}, "factor=2.0"),
        ("rope_parameters", {"rope_theta": 1e6, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "type='linear'"),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}, "rope_type='dynamic'"),
        ("layer_types", ["full_attention", "sliding_attention"], "['full_attention', 'sliding_attention']"),
        ("model_type", "mixtral", "'mixtral'"),
        ("model_type", "ministral3", "'ministral3'"),
        ("auto_map", {"AutoModelForCausalLM": "modeling.Custom"}, "modeling.Custom"),
        ("attention_bias", True, "True"),
        ("mlp_bias", True, "True"),
        ("hidden_act", "gelu", "'gelu'"),
        ("pretraining_tp", 2, "2"),
        ("is_encoder_decoder", True, "True"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ("num_local_experts", 8, "8"),
        ("logit_softcapping", 30.0, "30.0"),
        ("attn_logit_softcaping", None, "attn_logit_softcaping"),
    ],
)
def test_unsupported_fields_raise_with_name_and_value(name: str, value: Any, shown: str):
    with pytest.raises(UnsupportedError) as raised:
        MistralConfig.from_hf(HUB["7B-v0.1"] | {name: value})
    assert name in str(raised.value)
    assert shown in str(raised.value)


def test_model_type_is_required():
    with pytest.raises(UnsupportedError, match="model_type"):
        MistralConfig.from_hf({k: v for k, v in HUB["7B-v0.1"].items() if k != "model_type"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("vocab_size", "hidden_size", "num_hidden_layers") for value in (0, -1, True)),
        ("num_key_value_heads", 5),  # 32 query heads do not divide by 5
        ("num_key_value_heads", 64),
        ("head_dim", 7),  # rotary embeddings rotate pairs
        ("head_dim", 0),
        ("sliding_window", 0),
        ("rms_norm_eps", 0.0),
        ("rms_norm_eps", math.nan),
        ("rope_theta", math.inf),
        # What int32 and float32 do not hold.
        *(
            (name, value)
            for name in ("sliding_window", "max_position_embeddings", "vocab_size", "eos_token_id")
            for value in (2**31, 2**63)
        ),
        *((name, value) for name in ("rms_norm_eps", "rope_theta") for value in (10**40, 1e39, 1e-39, 1e-300, -1.0)),
    ],
)
def test_sizes_that_do_not_fit_raise(name: str, value: Any):
    with pytest.raises(JaxgenError) as raised:
        MistralConfig.from_hf(HUB["7B-v0.1"] | {name: value})
    assert f"{name}={value!r}" in str(raised.value)


@pytest.mark.parametrize("name", ["sliding_window", "rms_norm_eps", "rope_theta", "eos_token_id"])
def test_numbers_of_hundreds_of_digits_are_cut(name: str):
    with pytest.raises(JaxgenError, match=rf"{name}=10+ must be") as raised:
        MistralConfig.from_hf(HUB["7B-v0.1"] | {name: 10**400})
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("value", [2**31 - 1, 1])
def test_the_largest_window_is_one(value: int):
    assert MistralConfig(sliding_window=value).sliding_window == value


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
def test_integers_of_the_file_become_floats_where_int32_is_too_small(name: str):
    value = getattr(MistralConfig.from_hf({"model_type": "mistral", name: 10**38}), name)
    assert type(value) is float and value == 1e38


# What training and serving programs leave in config.json, none of which changes a number in transformers.
HARMLESS: dict[str, Any] = {
    "use_flash_attention_2": True,
    "_flash_attn_2_enabled": True,
    "_attn_implementation": "flash_attention_2",
    "_attn_implementation_autoset": True,
    "gradient_checkpointing": True,
    "use_sliding_window": False,
    "model_max_length": 4096,
    "use_cache": False,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_fields_that_change_no_number_are_passed_over(name: str):
    assert MistralConfig.from_hf(HUB["7B-v0.1"] | {name: HARMLESS[name]}) == MistralConfig.from_hf(HUB["7B-v0.1"])


def test_everything_that_is_refused_is_named_at_once():
    fields = {"mlp_bias": True, "logit_scale": 2.0, "rope_scaling": {"type": "yarn", "factor": 2.0}, "vocab_size": 0}
    with pytest.raises(UnsupportedError) as raised:
        MistralConfig.from_hf(HUB["7B-v0.1"] | fields)
    for problem in ("mlp_bias=True", "logit_scale=2.0", "rope_scaling.type='yarn'", "factor=2.0", "vocab_size=0"):
        assert problem in str(raised.value)


def test_a_config_of_ten_thousand_strange_fields_has_a_short_error():
    with pytest.raises(UnsupportedError, match=r"; and 9970 more$") as raised:
        MistralConfig.from_hf(HUB["7B-v0.1"] | {f"{index}" * 1000: "x" * 1000 for index in range(10_000)})
    assert len(str(raised.value)) < 20_000


def test_another_kind_of_model_is_all_that_is_said_of_it():
    with pytest.raises(UnsupportedError) as raised:
        MistralConfig.from_hf(HUB["7B-v0.1"] | {"model_type": "mixtral", "num_local_experts": 8})
    assert "num_local_experts" not in str(raised.value)


def test_all_problems_are_named_at_once():
    with pytest.raises(JaxgenError, match=r"vocab_size=0.*hidden_size=-4"):
        MistralConfig.from_hf(HUB["7B-v0.1"] | {"vocab_size": 0, "hidden_size": -4})


@pytest.mark.parametrize("config", [*HUB.values(), *(case.config for case in CASES.values())])
def test_to_hf_reads_back(config: dict[str, Any], tmp_path: Path):
    ours = MistralConfig.from_hf(config)
    (tmp_path / "config.json").write_text(json.dumps(ours.to_hf()))
    for source in (tmp_path, str(tmp_path), tmp_path / "config.json", ours.to_hf()):
        assert MistralConfig.from_hf(source) == ours


def test_several_eos_ids_survive_the_round_trip():
    config = MistralConfig.from_hf({"model_type": "mistral", "eos_token_id": [2, 5]})
    assert config.eos_token_id == (2, 5)
    assert config.to_hf()["eos_token_id"] == [2, 5]


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_unreadable_files_raise_with_their_path(content: str | None, tmp_path: Path):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(JaxgenError, match=r"config\.json"):
        MistralConfig.from_hf(tmp_path if content is not None else path)


@pytest.mark.parametrize("spelling", [v4_rope, v5_rope])
def test_reference_cases_use_both_spellings(spelling: Any):
    # The loader's reference would not notice a lost spelling otherwise.
    key = next(iter(spelling(1e4)))
    assert sum(key in case.config for case in CASES.values()) >= 5
