"""Beam search against transformers on torch, live, on random models: ids, scores and where every token came from.

transformers runs each row alone, where the other rows of a batch cannot keep its search going; jaxgen runs them as
one ragged batch.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen import demo
from jaxgen.convert.load import AutoModelForCausalLM
from tests.oracle.beams import Watched, compare
from tests.oracle.draws import draw
from tests.reference import live
from tests.reference.cases import left_padded
from tests.reference.weights import write_checkpoint

pytestmark = pytest.mark.oracle


def pair(seed: int, directory: Path) -> tuple[Watched, Any, list[list[int]]]:
    case = draw(seed)
    ours = AutoModelForCausalLM.from_pretrained(write_checkpoint(directory, case.config, case.seed), dtype="float32")
    return Watched(live.hf_model(case.config, case.seed)), ours, case.prompts()


def reachable(theirs: Watched, prompts: list[list[int]], rng: np.random.Generator, count: int) -> list[int]:
    """End-of-sequence ids that beams do meet."""
    met = [
        theirs.generate(p, num_beams=4, num_return_sequences=4, max_new_tokens=8, eos_token_id=None) for p in prompts
    ]
    return [int(x) for x in rng.choice(np.concatenate([result.new.ravel() for result, _ in met]), count, replace=False)]


EARLY = (False, True, "never")


@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("beams", [2, 4, 7])
def test_random_models_search_as_hf(beams: int, early: Any, tmp_path: Path):
    seed = 10 * beams + EARLY.index(early)
    theirs, ours, prompts = pair(seed, tmp_path)
    rng = np.random.default_rng(seed)
    eos = reachable(theirs, prompts, rng, 1 + seed % 3)
    rows, ends = [], 0
    for penalty in (-1.0, 0.0, 1.0, 2.0):
        decided, ended = compare(
            theirs, ours, prompts, num_beams=beams, early_stopping=early, length_penalty=penalty, eos_token_id=eos,
            num_return_sequences=2,
        )  # fmt: skip
        rows, ends = rows + decided, ends + ended
    assert np.mean(rows) > 0.6
    assert ends > 0


PROCESSORS = (
    {"repetition_penalty": 1.4, "min_new_tokens": 5},
    {"no_repeat_ngram_size": 2, "suppress_tokens": [5, 6, 7]},
    {"renormalize_logits": True, "begin_suppress_tokens": [3], "exponential_decay_length_penalty": (4, 1.2)},
)


@pytest.mark.parametrize("index", range(len(PROCESSORS)))
def test_processors_work_on_log_probabilities_as_in_hf(index: int, tmp_path: Path):
    theirs, ours, prompts = pair(90 + index, tmp_path)
    eos = reachable(theirs, prompts, np.random.default_rng(index), 2)
    decided, _ = compare(
        theirs, ours, prompts, num_beams=4, num_return_sequences=4, eos_token_id=eos, **PROCESSORS[index]
    )
    assert np.mean(decided) > 0.5


def test_without_an_end_all_beams_run_to_the_limit(tmp_path: Path):
    theirs, ours, prompts = pair(77, tmp_path)
    for options in ({"num_return_sequences": 3}, {"max_new_tokens": 1, "num_return_sequences": 3}):
        decided, ended = compare(theirs, ours, prompts, num_beams=3, eos_token_id=None, **options)
        assert np.mean(decided) > 0.5
        assert not ended


def test_where_few_tokens_are_allowed_the_sentinels_are_those_of_hf(tmp_path: Path):
    """Fewer answers than beams: what fills up the beams is as bad, and in the same order of scores, as in HF."""
    theirs, ours, prompts = pair(78, tmp_path)
    vocab = ours.config.vocab_size
    options = {"num_beams": 5, "num_return_sequences": 2, "eos_token_id": 2, "max_new_tokens": 4}
    options["suppress_tokens"] = [token for token in range(vocab) if token not in (2, 11)]
    ids, mask = left_padded(prompts)
    result = ours.generate(ids, mask, return_dict_in_generate=True, **options, pad_token_id=0)
    for row, prompt in enumerate(prompts):
        expected, _ = theirs.generate(prompt, **options, pad_token_id=0)
        rows = slice(2 * row, 2 * row + 2)
        np.testing.assert_allclose(result.sequences_scores[rows], expected.totals, atol=1e-4)


def test_stop_strings_end_beams_as_in_hf(tmp_path: Path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(demo.path(), dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.path())
    texts = ["A list of colors: red, blue", "One, two, three", "The sun"]
    decided, _ = compare(
        Watched(theirs.eval()), ours, [tokenizer(text).input_ids for text in texts], num_beams=3, eos_token_id=None,
        num_return_sequences=2, stop_strings=["e", "or"], tokenizer=tokenizer,
    )  # fmt: skip
    assert sum(decided) >= 2


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.lists(st.floats(-8, 0), min_size=6, max_size=6), st.integers(0, 2**31))
def test_torch_draws_without_replacement_in_the_order_that_gumbel_top_k_has(scores: list[float], seed: int):
    """The premise of beam-sample: the first of `torch.multinomial` are the ones that were drawn first."""
    torch.manual_seed(seed)
    weights = torch.softmax(torch.tensor(scores), 0)
    draws = torch.multinomial(weights.expand(4000, -1), 3)
    first = torch.bincount(draws[:, 0], minlength=6).double().numpy()
    expected = 4000 * weights.double().numpy()
    common = expected > 5
    degrees = max(int(common.sum()) - 1, 1)
    assert (((first - expected) ** 2 / expected)[common]).sum() < degrees + 6 * np.sqrt(2 * degrees)
