"""Adapters that jaxgen does not read are refused by name, with all that is wrong at once."""

import re
from typing import Any

import numpy as np
import pytest

from jaxgen.convert.checkpoint import Checkpoint
from jaxgen.convert.load import AutoModelForCausalLM
from jaxgen.errors import CheckpointError, JaxgenError, UnsupportedError
from tests.hf_files import CONFIG, hf_tensors, write_hf
from tests.lora_files import O_PROJ, adapter_tensors, key, load, scales, write_adapter


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; jaxgen reads 'LORA'"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type='PROMPT_TUNING'"),
        ({"peft_type": "LOHA"}, "merge the adapter into its base with peft"),
        ({"peft_type": None}, "peft_type=None"),
        ({"use_dora": True}, "use_dora=True: not supported; jaxgen reads plain LoRA"),
        ({"use_dora": 0}, "use_dora=0"),
        ({"modules_to_save": ["lm_head"], "bias": "all"}, "modules_to_save=['lm_head'], bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication=[[0, 2], [1, 2]]"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters=['mlp.experts']"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=[1]"),
        ({"use_qalora": True, "alora_invocation_tokens": [3]}, "use_qalora=True, alora_invocation_tokens=[3]"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"use_something_new": 1}, "use_something_new=1"),
    ],
)
def test_other_adapters_are_refused(tmp_path, fields, message):
    adapter = write_adapter(tmp_path, {}, **fields)
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        load(tmp_path, adapter=adapter)


def test_what_computes_nothing_is_ignored(tmp_path):
    hf = hf_tensors(CONFIG)
    write_hf(tmp_path / "base", CONFIG, hf)
    fields = {
        "base_model_name_or_path": "x/y", "revision": "main", "inference_mode": False, "task_type": "CAUSAL_LM",
        "lora_dropout": 0.5, "init_lora_weights": "gaussian", "peft_version": "0.99", "qalora_group_size": 16,
        "use_dora": False, "lora_bias": False, "modules_to_save": None, "bias": "none", "loftq_config": {},
        "layer_replication": None, "trainable_token_indices": [], "use_something_new": False,
        "rank_pattern": {}, "layers_to_transform": None, "exclude_modules": [],
        "auto_mapping": {"base_model_class": "MistralForCausalLM"}, "eva_config": {"rho": 2.0},
    }  # fmt: skip
    adapter = write_adapter(tmp_path / "adapter", adapter_tensors(hf, scales(hf)), **fields)
    load(tmp_path / "base", adapter=adapter)


def test_impossible_values_are_named_together(tmp_path):
    fields: dict[str, Any] = {
        "r": 0, "lora_alpha": float("nan"), "use_rslora": 1, "rank_pattern": {"q_proj": 2.5}, "alpha_pattern": {"(": 1},
        "target_modules": None, "exclude_modules": "[", "layers_to_transform": ["1"], "layers_pattern": "blocks",
    }  # fmt: skip
    adapter = write_adapter(tmp_path, {}, **fields)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, adapter=adapter)
    assert [problem.split("=")[0] for problem in caught.value.problems] == list(fields)
    assert "r=0 must be a positive int" in str(caught.value)


@pytest.mark.parametrize(
    "fields, why",
    [
        ({"target_modules": "(?>.*)"}, "target_modules='(?>.*)': .* jaxgen does not match atomic group"),
        ({"exclude_modules": "a{99999999999999999999}"}, "exclude_modules='a{9+}': .* too large"),
        ({"rank_pattern": {r"(q)\1": 2}}, "rank_pattern={.*}: .* jaxgen does not match groupref"),
        ({"alpha_pattern": {"x(?i)": 2}}, "alpha_pattern={.*}: .* global flags not at the start"),
    ],
)
def test_regular_expressions_that_cannot_be_used(tmp_path, fields, why):
    adapter = write_adapter(tmp_path, {}, **fields)
    with pytest.raises(CheckpointError, match=re.escape("adapter_config.json: ") + why.replace("(?>.*)", r"\(\?>.*\)")):
        load(tmp_path, adapter=adapter)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_regular_expressions_that_backtrack_for_ever(tmp_path, field):
    hf = hf_tensors(CONFIG)
    write_hf(tmp_path / "base", CONFIG, hf)
    bomb = "(([a-z0-9_.]+)+)+!"
    fields = {field: bomb if field.endswith("modules") else {bomb: 1}}
    adapter = write_adapter(tmp_path / "adapter", adapter_tensors(hf, scales(hf)), **fields)
    if field == "target_modules":
        with pytest.raises(CheckpointError, match="names no linear layer"):
            load(tmp_path / "base", adapter=adapter)
    else:
        load(tmp_path / "base", adapter=adapter)


def test_every_problem_of_base_and_adapter_before_any_weight_is_read(tmp_path, monkeypatch):
    def read(*arguments):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read_into", read)
    monkeypatch.setattr(Checkpoint, "read", read)
    hf = hf_tensors(CONFIG)
    tensors = adapter_tensors(hf, scales(hf))
    write_hf(tmp_path / "base", CONFIG, {name: tensor for name, tensor in hf.items() if name != O_PROJ})
    up, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
    del tensors[key(O_PROJ, "B")]
    tensors[key(up, "A")] = tensors[key(up, "A")][:, :-2].copy()
    tensors[key(gate, "B")] = tensors[key(gate, "B")].astype(np.int32)
    strange = (
        "base_model.model.lm_head.base_layer.weight", "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight",
    )  # fmt: skip
    tensors |= {name: np.ones((2, 2), np.float32) for name in strange}
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "base", adapter=write_adapter(tmp_path / "adapter", tensors))
    missing, *problems = caught.value.problems
    assert missing == f"tensor '{O_PROJ}' is missing"
    wrong_dtype, wrong_shape, no_b, unexpected = (
        problem.removeprefix("adapter_model.safetensors: ") for problem in problems
    )
    assert no_b == f"tensor '{key(O_PROJ, 'B')}' is missing"
    assert wrong_shape == f"'{key(up, 'A')}' has shape [2, 6]; base and adapter_config.json imply [2, 8]"
    assert wrong_dtype == f"'{key(gate, 'B')}' has dtype I32; jaxgen reads BF16, F16, F32"
    assert unexpected.startswith(", ".join(map(repr, strange))) and "save_embedding_layers=False" in unexpected


def test_adapters_that_fit_nothing(tmp_path):
    hf = hf_tensors(CONFIG)
    write_hf(tmp_path / "base", CONFIG, hf)
    adapter = write_adapter(tmp_path / "adapter", {}, target_modules=["c_attn"])
    with pytest.raises(CheckpointError, match=r"target_modules=\['c_attn'\] names no linear layer of the base"):
        load(tmp_path / "base", adapter=adapter)
    write_adapter(adapter, adapter_tensors(hf, scales(hf)), target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"down_proj.*and 19 more: no LoRA factor .* targets"):
        load(tmp_path / "base", adapter=adapter)
    tied = CONFIG | {"tie_word_embeddings": True}
    write_hf(tmp_path / "tied", tied, hf_tensors(tied))
    write_adapter(adapter, adapter_tensors(hf, scales(hf, r"lm_head\.weight")), target_modules=["lm_head"])
    with pytest.raises(CheckpointError, match=r"'base_model.model.lm_head.lora_A.weight'.*no LoRA factor"):
        load(tmp_path / "tied", adapter=adapter)


def test_adapters_that_cannot_be_read(tmp_path):
    hf = hf_tensors(CONFIG)
    write_hf(tmp_path / "base", CONFIG, hf)
    adapter = write_adapter(tmp_path / "adapter", adapter_tensors(hf, scales(hf)))
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors .* is truncated"):
        load(tmp_path / "base", adapter=adapter)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing.*adapter_model\.bin"):
        load(tmp_path / "base", adapter=adapter)
    with pytest.raises(CheckpointError, match=r"there is no adapter_config\.json"):
        load(tmp_path / "base", adapter=tmp_path / "base")
    with pytest.raises(JaxgenError, match=r"nowhere'.*no such directory"):
        load(tmp_path / "base", adapter=tmp_path / "nowhere")


def test_hub_ids_of_adapters_bring_only_the_adapter(tmp_path, monkeypatch):
    import huggingface_hub

    hf = hf_tensors(CONFIG)
    write_hf(tmp_path / "o/base", CONFIG, hf)
    write_adapter(tmp_path / "o/lora", adapter_tensors(hf, scales(hf)))
    calls = {}

    def download(repo_id, **options):
        calls[repo_id] = options
        return str(tmp_path / repo_id)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    AutoModelForCausalLM.from_pretrained("o/base", adapter="o/lora", revision="v1", token="t", local_files_only=True)
    assert calls["o/lora"] == {
        "revision": None, "token": "t", "local_files_only": True, "cache_dir": None,
        "allow_patterns": ["adapter_config.json", "adapter_model.safetensors"],
    }  # fmt: skip
    assert calls["o/base"]["revision"] == "v1"
    assert not any("adapter" in pattern for pattern in calls["o/base"]["allow_patterns"])
