"""What scripts for transformers have that needs torch beside jaxgen: what it becomes here, and what it gives there."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers

import jaxgen
from jaxgen import JaxgenError
from jaxgen.convert.options import as_quantization

pytestmark = pytest.mark.oracle

IDS = np.array([[1, 5, 9, 4], [1, 7, 7, 8]], np.int32)


@pytest.fixture(scope="module")
def model() -> Any:
    return jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path())


@pytest.fixture(scope="module")
def theirs() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), dtype=torch.float32)


def test_the_loss_for_labels(model: Any, theirs: Any):
    labels = np.where(IDS == 7, -100, IDS)
    wanted = theirs(torch.tensor(IDS, dtype=torch.long), labels=torch.tensor(labels, dtype=torch.long)).loss
    np.testing.assert_allclose(model(IDS, labels=labels).loss, wanted.item(), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"exclude_embeddings": True}, {"only_trainable": True}])
def test_num_parameters(model: Any, theirs: Any, options: Any):
    assert model.num_parameters(**options) == theirs.num_parameters(**options)


def test_pipeline_of_transformers(model: Any):
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(jaxgen.demo.path())
    with pytest.raises(JaxgenError, match=r"write jaxgen\.pipeline"):
        transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)


def test_a_logits_processor_of_transformers(model: Any):
    class Mine(transformers.LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return scores

    with pytest.raises(JaxgenError, match="takes two arguments"):
        model.generate(IDS, logits_processor=transformers.LogitsProcessorList([Mine()]))


def test_a_stopping_criterion_of_transformers(model: Any):
    class Mine(transformers.StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
            return False

    with pytest.raises(JaxgenError, match="takes two arguments"):
        model.generate(IDS, stopping_criteria=transformers.StoppingCriteriaList([Mine()]))
    with pytest.raises(JaxgenError, match="MaxTimeCriteria of transformers"):
        model.generate(IDS, stopping_criteria=[transformers.MaxTimeCriteria(1.0)])


def test_what_bitsandbytes_config_sets_and_changes_nothing_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jaxgen.generation.options.unused._said", set())
    as_quantization(False, transformers.BitsAndBytesConfig(load_in_4bit=True))
    assert caplog.messages == []
    as_quantization(False, transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16))
    [said] = caplog.messages
    assert "bnb_4bit_compute_dtype='bfloat16'" in said and "quant_type" not in said


def test_bitsandbytes_config():
    theirs = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    fields = {name for name in theirs.to_dict() if not name.startswith("_")} - {"quant_method"}
    assert fields <= vars(jaxgen.BitsAndBytesConfig()).keys()
    for config in (theirs, theirs.to_dict()):
        model = jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), quantization_config=config)
        assert model.get_memory_footprint() < 2 * model.num_parameters()


def test_torch_devices_and_dtypes(model: Any):
    assert model.to(torch.device("cpu")).to(torch.float32).to("cpu", torch.float32) is model
    with pytest.raises(JaxgenError, match="load it with dtype='bfloat16'"):
        model.to(torch.bfloat16)
