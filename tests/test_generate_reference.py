"""`model.generate`, greedy in float32: token for token what transformers generates."""

from collections.abc import Callable

import numpy as np
import pytest

from jaxgen.generation.results.output import GenerateOutput
from jaxgen.models.mistral import MistralForCausalLM
from tests.helpers import some_slow
from tests.reference.cases import CASES, LOG_PROBS, RUNS, Run, left_padded, right_padded, with_holes
from tests.reference.read import read

Models = Callable[[str], MistralForCausalLM]


def assert_generates(
    model: MistralForCausalLM, ids: np.ndarray, mask: np.ndarray, run: Run, expected: np.ndarray
) -> None:
    """HF's layout: the input's columns as they were, then the new tokens, then pad."""
    result = model.generate(ids, mask, **run.arguments())
    assert isinstance(result, np.ndarray)
    width = ids.shape[1]
    np.testing.assert_array_equal(result[:, :width], ids)
    np.testing.assert_array_equal(result[:, width:], expected)


DEFAULT = ("gqa_8", "gqa_8/own_eos", "gqa_8/no_pad", "window_8_deep", "tied/repetition_penalty_min_new_tokens")


@pytest.mark.parametrize("name", some_slow(RUNS, lambda name: name not in DEFAULT))
def test_tokens_equal_hf(name: str, reference_model: Models):
    run = RUNS[name]
    ids, mask = left_padded(CASES[run.case].prompts())
    assert_generates(reference_model(run.case), ids, mask, run, read().tokens[name])


def test_the_committed_runs_are_the_ones_tested():
    assert read().tokens.keys() == RUNS.keys()


@pytest.mark.parametrize("name", ["gqa_8/eos", "window_8", "window_8_deep", "gqa_8/repetition_penalty"])
def test_padding_does_not_matter(name: str, reference_model: Models):
    run = RUNS[name]
    prompts = CASES[run.case].prompts()
    # The junk id is in the vocabulary, and none of the rows' own: a penalty on it would show.
    junk = min(set(range(97)) - {token for prompt in prompts for token in prompt})
    for ids, mask in (left_padded(prompts, width=24), right_padded(prompts), with_holes(prompts, junk)):
        assert_generates(reference_model(run.case), ids, mask, run, read().tokens[name])


def test_rows_alone_equal_rows_in_a_batch(reference_model: Models):
    prompts, expected = CASES["window_8"].prompts(), read().tokens["window_8"]
    for row in (1, 2, 3):  # shorter than, as long as, and longer than the window
        result = reference_model("window_8").generate([prompts[row]], **RUNS["window_8"].arguments())
        assert np.asarray(result)[0].tolist() == [*prompts[row], *expected[row].tolist()]


@pytest.mark.parametrize("name", LOG_PROBS)
def test_log_probabilities_equal_hf(name: str, reference_model: Models):
    run = RUNS[name]
    ids, mask = left_padded(CASES[run.case].prompts())
    output = reference_model(run.case).generate(ids, mask, return_dict_in_generate=True, **run.arguments())
    assert isinstance(output, GenerateOutput)
    np.testing.assert_array_equal(output.sequences[:, ids.shape[1] :], read().tokens[name])
    np.testing.assert_allclose(output.logprobs, read().logits[f"{name}/log_probs"], atol=1e-4, rtol=0)
