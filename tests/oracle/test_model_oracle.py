"""Logits, gradients and configs against transformers on torch, live; and that the committed logits still hold."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from jaxgen.convert.load import AutoModelForCausalLM
from jaxgen.models.mistral import MistralConfig
from tests.helpers import Models, loss_and_gradients, real_logits
from tests.hf_files import HUB, in_v5_spelling
from tests.oracle.draws import draw
from tests.reference import live, make
from tests.reference.cases import CASES, left_padded
from tests.reference.read import read
from tests.reference.weights import write_checkpoint

pytestmark = pytest.mark.oracle


# transformers recommends max_new_tokens in the run that is there to test its default.
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`:UserWarning")
def test_the_committed_reference_is_what_transformers_computes():
    assert make.differences(read(), make.compute()) == []


def test_the_check_finds_a_wrong_reference():
    committed = read()
    one_token = {name: rows.copy() for name, rows in committed.tokens.items()}
    one_token["gqa_8"][3, 60] += 1
    one_logit = {name: rows.copy() for name, rows in committed.logits.items()}
    one_logit["tied/0"][2, 5] += 1e-3
    missing = {name: rows for name, rows in committed.filtered.items() if name != "top_k=5"}
    wrong = make.Reference(one_token, one_logit, missing, {})
    assert len(make.differences(wrong, committed)) == 3


@pytest.mark.parametrize("seed", range(6))
def test_random_models_have_hf_logits(seed: int, tmp_path: Any):
    case = draw(seed)
    model = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path, case.config, case.seed), dtype="float32")
    expected = live.prefill_logits(live.hf_model(case.config, case.seed), case.prompts())
    actual = real_logits(model, *left_padded(case.prompts()))
    for row, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0, err_msg=f"row {row}")


@pytest.mark.parametrize("name", ["window_8", "tied", "wide_heads"])
def test_gradients_equal_torch(name: str, reference_model: Models):
    case, model = CASES[name], reference_model(name)
    ids, mask = left_padded(case.prompts())
    _, gradients = loss_and_gradients(model, ids, mask)

    theirs = live.hf_model(case.config, case.seed)
    ids, mask = torch.from_numpy(ids).long(), torch.from_numpy(mask).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    log_probs = theirs(input_ids=ids, attention_mask=mask, position_ids=positions).logits.log_softmax(-1)
    chosen = log_probs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    pairs = mask[:, :-1] * mask[:, 1:]
    (-(chosen * pairs).sum() / pairs.sum()).backward()
    expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}

    for ours, hf_name in {
        "['model']['embed_tokens']['weight']": "model.embed_tokens.weight",
        "['model']['norm']['weight']": "model.norm.weight",
        "['model']['layers'][0]['self_attn']['o_proj']['weight']": "model.layers.0.self_attn.o_proj.weight",
        "['model']['layers'][1]['mlp']['down_proj']['weight']": "model.layers.1.mlp.down_proj.weight",
        "['model']['layers'][0]['input_layernorm']['weight']": "model.layers.0.input_layernorm.weight",
    }.items():
        found = [value for path, value in gradients.items() if path.replace(".value", "") == ours]
        np.testing.assert_allclose(found[0], expected[hf_name], atol=1e-5, rtol=1e-4, err_msg=hf_name)


# Fields of ours under transformers' names; rope_theta lives in rope_parameters there.
FIELDS = [field.name for field in dataclasses.fields(MistralConfig) if field.name != "rope_theta"]


@pytest.mark.parametrize("name", HUB)
@pytest.mark.parametrize("spelling", [dict, in_v5_spelling])
def test_configs_mean_the_same_to_transformers(name: str, spelling: Any):
    source = spelling(HUB[name])
    ours = MistralConfig.from_hf(source)
    for theirs in (transformers.MistralConfig(**source), transformers.MistralConfig(**ours.to_hf())):
        assert {field: getattr(ours, field) for field in FIELDS} == {field: getattr(theirs, field) for field in FIELDS}
        assert theirs.rope_parameters["rope_theta"] == ours.rope_theta
        assert theirs.rope_parameters["rope_type"] == "default"


def test_defaults_are_those_of_transformers():
    ours, theirs = MistralConfig(), transformers.MistralConfig()
    assert {field: getattr(ours, field) for field in FIELDS} == {field: getattr(theirs, field) for field in FIELDS}
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta
