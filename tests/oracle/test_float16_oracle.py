"""float16 against transformers in float16 on torch: neither is farther from transformers in float32."""

import numpy as np
import pytest
import torch

import jaxgen
from jaxgen.convert.load import AutoModelForCausalLM
from jaxgen.text.tokenizer import load_tokenizer
from tests.helpers import real_logits
from tests.reference import live
from tests.reference.cases import CASES, left_padded
from tests.reference.weights import write_checkpoint

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("name", ["gqa_8", "window_8"])
def test_random_models(name: str, tmp_path):
    """Row by row, in root mean square: rounding errors are random, and their largest one is luck."""
    case = CASES[name]
    directory = write_checkpoint(tmp_path, case.config, case.seed)
    ours, brain = (
        real_logits(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype), *left_padded(case.prompts()))
        for dtype in ("float16", "bfloat16")
    )
    exact = live.prefill_logits(live.hf_model(case.config, case.seed), case.prompts())
    theirs = live.prefill_logits(live.hf_model(case.config, case.seed).half(), case.prompts())
    error, error_of_theirs, error_of_bfloat16 = (rms(rows, exact) for rows in (ours, theirs, brain))
    assert error < 1.5 * error_of_theirs
    assert error < error_of_bfloat16 / 4
    assert rms(ours, theirs) < 2 * error_of_theirs


def rms(rows: list[np.ndarray], exact: list[np.ndarray]) -> float:
    differences = [np.asarray(a, np.float64) - np.asarray(b, np.float64) for a, b in zip(rows, exact, strict=True)]
    return float(np.sqrt(np.mean(np.concatenate([each.ravel() for each in differences]) ** 2)))


def test_greedy_tokens_of_the_demo():
    from transformers import AutoModelForCausalLM as Theirs

    inputs = load_tokenizer(jaxgen.demo.path())(["A list of colors: red, blue", "1, 2, 3", "Portugal is"], padding=True)
    ours = AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), dtype="float16")
    theirs = Theirs.from_pretrained(jaxgen.demo.path(), dtype=torch.float16)
    tensors = {name: torch.tensor(np.asarray(value)) for name, value in inputs.items()}
    expected = theirs.generate(**tensors, max_new_tokens=30, do_sample=False)
    np.testing.assert_array_equal(ours.generate(**inputs, max_new_tokens=30), expected.numpy())
