"""When rows end, and what is said of it: limits, time, criteria, and the best tokens of every step."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import JaxgenError
from jaxgen.generation import execute
from jaxgen.generation.results.output import GenerateOutput
from tests.reference.cases import CASES, NEW_TOKENS, PAD, left_padded
from tests.reference.read import read

NAME = "gqa_8"
OPTIONS = {"pad_token_id": PAD, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def model(reference_model):
    return reference_model(NAME)


@pytest.fixture(scope="module")
def batch():
    return left_padded(CASES[NAME].prompts())


def new_tokens(output: GenerateOutput, width: int) -> list[list[int]]:
    return [row[width : width + n].tolist() for row, n in zip(output.sequences, output.lengths, strict=True)]


def test_max_length_counts_the_tokens_of_a_row(model, batch):
    """Prompts of 7, 1, 12, 4 and 19 tokens, 20 in all: what transformers would give each of them alone."""
    ids, mask = batch
    output = model.generate(ids, mask, max_length=20, eos_token_id=None, **OPTIONS)
    assert output.lengths.tolist() == [13, 19, 8, 16, 1]
    assert output.finish_reason == ["length"] * 5
    expected = read().tokens[NAME]
    for row, new in enumerate(new_tokens(output, ids.shape[1])):
        assert new == expected[row, : len(new)].tolist()


def test_criteria_end_rows_one_by_one(model, batch):
    """A criterion sees each row's tokens without padding, and its length."""
    ids, mask = batch

    def holds_a_multiple_of_5(tokens, lengths, scores):
        newest = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
        return (newest % 5 == 0) & (scores.shape[1] == 97)

    output = model.generate(
        ids, mask, stopping_criteria=[holds_a_multiple_of_5], eos_token_id=None, max_new_tokens=30, **OPTIONS
    )
    for row, new in zip(read().tokens[NAME][:, :30].tolist(), new_tokens(output, ids.shape[1]), strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token % 5 == 0), 30)
        assert new == row[:end]
    assert set(output.finish_reason) == {"criterion"}


@pytest.mark.slow
def test_an_end_of_sequence_is_the_first_of_several_reasons(model, batch):
    ids, mask = batch
    everything = {"stopping_criteria": lambda tokens, lengths, scores: lengths > 0, "max_new_tokens": 1}
    first = read().tokens[NAME][:, 0].tolist()
    output = model.generate(ids, mask, eos_token_id=first[:2], **everything, **OPTIONS)
    assert output.finish_reason == ["eos" if token in first[:2] else "criterion" for token in first]


def test_max_time_ends_what_is_running(model, batch, monkeypatch):
    """After the time is up no further step begins; what there is, is what transformers begins with."""
    ids, mask = batch
    advance = execute.advance

    def slow(*arguments):
        state = jax.block_until_ready(advance(*arguments))
        time.sleep(0.2)
        return state

    monkeypatch.setattr(execute, "advance", slow)
    output = model.generate(ids, mask, max_time=0.1, eos_token_id=None, max_new_tokens=NEW_TOKENS, **OPTIONS)
    assert output.finish_reason == ["time"] * 5
    assert output.lengths.tolist() == [1] * 5  # at least one token, as in HF
    np.testing.assert_array_equal(output.sequences[:, ids.shape[1] :], read().tokens[NAME][:, :1])


def test_enough_time_changes_nothing(model, batch):
    ids, mask = batch
    output = model.generate(ids, mask, max_time=600.0, eos_token_id=66, max_new_tokens=NEW_TOKENS, **OPTIONS)
    np.testing.assert_array_equal(output.sequences[:, ids.shape[1] :], read().tokens[f"{NAME}/eos"])
    assert set(output.finish_reason) == {"eos", "length"}


@pytest.mark.slow
def test_top_logprobs_are_the_best_of_the_logits(model, batch):
    ids, mask = batch
    options = {"eos_token_id": 66, "max_new_tokens": 9, "temperature": 2.0, "do_sample": True, "seed": 1, **OPTIONS}
    best = model.generate(ids, mask, top_logprobs=3, **options)
    full = model.generate(ids, mask, output_logits=True, **options)
    assert best.logits is None and full.top_ids is None
    assert best.top_ids.shape == best.top_logprobs.shape == (5, best.lengths.max(), 3)
    for row, count in enumerate(best.lengths):
        logits = np.stack(full.logits)[:count, row].astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        order = np.argsort(-expected, axis=1)[:, :3]
        np.testing.assert_array_equal(best.top_ids[row, :count], order)
        given = np.take_along_axis(expected, order, axis=1)
        np.testing.assert_allclose(best.top_logprobs[row, :count], given, atol=1e-5)


@pytest.mark.parametrize(
    "criterion",
    [
        lambda tokens, lengths, scores: True,
        lambda tokens, lengths, scores: lengths[:, None] > 3,
        lambda tokens, lengths, scores: lengths / 3,
    ],
)
def test_a_criterion_must_say_yes_or_no_of_every_row(criterion, model, batch):
    with pytest.raises(JaxgenError, match=r"a stopping criterion returned .* expected bool \(6,\)"):
        model.generate(*batch, stopping_criteria=criterion)
