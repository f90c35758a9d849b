"""Beam search against transformers on torch, live, on random models: ids, scores and where every token came from.

transformers runs each row alone, where the other rows of a batch cannot keep its search going; jaxgen runs them as
one ragged batch.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen import demo
from jaxgen.convert.load import AutoModelForCausalLM
from tests.oracle.draws import draw
from tests.reference import live
from tests.reference.cases import left_padded
from tests.reference.weights import write_checkpoint

pytestmark = pytest.mark.oracle

# Scores that lie closer together than this may come in another order after float32 sums of another order.
SMALLEST_LEAD = 3e-5
NEW_TOKENS = 20


class Watched:
    """A transformers model whose beam search tells how close its closest decision was."""

    def __init__(self, model: Any):
        self.model, self.lead = model, np.inf
        self._watch("_get_top_k_continuations", self._candidates)
        self._watch("_update_finished_beams", self._finished)
        self._watch("_check_early_stop_heuristic", self._stop)

    def _watch(self, name: str, look: Any) -> None:
        method = getattr(self.model, name)

        def watched(**kwargs: Any) -> Any:
            look(SimpleNamespace(**kwargs))
            return method(**kwargs)

        setattr(self.model, name, watched)

    def _order(self, scores: torch.Tensor) -> None:
        real = scores[scores > -1e8].sort().values
        if len(real) > 1:
            self.lead = min(self.lead, float(real.diff().min()))

    def _candidates(self, step: Any) -> None:
        scores = step.accumulated_log_probs
        self._order(scores.topk(min(step.beams_to_keep + 1, scores.shape[1])).values)

    def _finished(self, step: Any) -> None:
        ends = step.next_token_hits_stopping_criteria[0] & step.top_num_beam_mask
        length = step.cur_len + 1 - step.decoder_prompt_len
        self._order(torch.cat([step.beam_scores[0], step.topk_log_probs[0, ends] / length**step.length_penalty]))

    def _stop(self, step: Any) -> None:
        if not step.is_sent_finished.all():
            return
        longest = step.early_stopping == "never" and step.length_penalty > 0
        length = (step.max_length if longest else step.cur_len) - step.decoder_prompt_len
        best, worst = step.running_beam_scores[0, 0] / length**step.length_penalty, step.beam_scores.min()
        self.lead = min(self.lead, float((best - worst).abs()))

    @torch.no_grad()
    def generate(self, prompt: list[int], **options: Any) -> tuple[SimpleNamespace, bool]:
        """Its result for one row, and whether every decision was clear."""
        self.lead = np.inf
        cache = {"use_cache": False} if self.model.config.sliding_window == 1 else {}
        result = self.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            return_dict_in_generate=True, output_scores=True, **options, **cache,
        )  # fmt: skip
        return SimpleNamespace(
            new=result.sequences[:, len(prompt) :].numpy(),
            indices=result.beam_indices.numpy(),
            totals=result.sequences_scores.numpy(),
            scores=[step.numpy() for step in result.scores],
        ), self.lead > SMALLEST_LEAD


def pair(seed: int, directory: Path) -> tuple[Watched, Any, list[list[int]]]:
    case = draw(seed)
    ours = AutoModelForCausalLM.from_pretrained(write_checkpoint(directory, case.config, case.seed), dtype="float32")
    return Watched(live.hf_model(case.config, case.seed)), ours, case.prompts()


def compare(theirs: Watched, ours: Any, prompts: list[list[int]], **options: Any) -> tuple[list[bool], int]:
    """Check the rows that transformers decided clearly; which those are, and how many sequences an eos ended."""
    ids, mask = left_padded(prompts)
    beams, returned = options["num_beams"], options.get("num_return_sequences", 1)
    options = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0} | options
    result = ours.generate(ids, mask, return_dict_in_generate=True, output_scores=True, **options)
    decided, ended = [], 0
    for row, prompt in enumerate(prompts):
        expected, clear = theirs.generate(prompt, **options)
        decided.append(clear)
        if not clear:
            continue
        for rank in range(returned):
            mine, inside = row * returned + rank, expected.indices[rank] >= 0
            count = int(inside.sum())
            assert result.lengths[mine] == count
            new = result.sequences[mine, ids.shape[1] :]
            np.testing.assert_array_equal(new[:count], expected.new[rank, :count])
            assert (new[count:] == 0).all()
            sources = np.where(result.beam_indices[mine] >= 0, result.beam_indices[mine] - row * beams, -1)
            np.testing.assert_array_equal(sources[:count], expected.indices[rank, :count])
            assert (sources[count:] == -1).all()
            terms = [expected.scores[t][expected.indices[rank, t], new[t]] for t in range(count)]
            np.testing.assert_allclose(result.logprobs[mine, :count], terms, atol=1e-4)
            ended += result.finish_reason[mine] == "eos"
        totals = result.sequences_scores[row * returned : (row + 1) * returned]
        np.testing.assert_allclose(totals, expected.totals, atol=1e-4, rtol=2e-6)  # a penalty of -1 multiplies
        for step, scores in enumerate(expected.scores):
            actual = result.scores[step][row * beams : (row + 1) * beams]
            np.testing.assert_allclose(actual, scores, atol=2e-4)
        assert all((later[row * beams] == 0).all() for later in result.scores[len(expected.scores) :])
    return decided, ended


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
