"""Greedy generation against transformers on torch, live, on random models and batches: token for token."""

from pathlib import Path

import numpy as np
import pytest

from jaxgen.convert.load import AutoModelForCausalLM
from jaxgen.errors import JaxgenError
from tests.oracle.clear import agreed
from tests.oracle.draws import draw
from tests.reference import live
from tests.reference.cases import Run, left_padded, with_holes
from tests.reference.weights import write_checkpoint

pytestmark = pytest.mark.oracle


def random_run(rng: np.random.Generator, greedy: np.ndarray) -> Run:
    """Random options; the eos, if any, is a token that greedy decoding meets."""
    options = {}
    if rng.random() < 0.5:
        options["repetition_penalty"] = float(rng.uniform(0.7, 1.8))
    if rng.random() < 0.5:
        options["eos_token_id"] = [int(token) for token in rng.choice(greedy.ravel(), 2)]
    if rng.random() < 0.5:
        options["min_new_tokens"] = int(rng.integers(1, 30))
    return Run("", options)


@pytest.mark.parametrize("seed", range(10))
def test_random_models_generate_as_hf(seed: int, tmp_path: Path):
    case, rng = draw(seed), np.random.default_rng(seed)
    theirs = live.hf_model(case.config, case.seed)
    ours = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path, case.config, case.seed), dtype="float32")
    prompts = case.prompts()
    greedy, _ = live.generate(theirs, prompts, Run(""))
    for run in (Run(""), random_run(rng, greedy)):
        expected, scores = live.generate(theirs, prompts, run)
        shared = agreed(expected, scores, run.eos())
        assert shared.mean() > 0.5
        for ids, mask in (left_padded(prompts), with_holes(prompts, junk=4)):
            actual = ours.generate(ids, mask, **run.arguments())[:, ids.shape[1] :]
            if shared.all():
                assert actual.shape == expected.shape
            columns = min(actual.shape[1], expected.shape[1])
            same = (actual[:, :columns] == expected[:, :columns]) | ~shared[:, :columns]
            assert same.all(), f"{case.config} {run}: rows {np.flatnonzero(~same.all(axis=1)).tolist()} differ"


def test_without_a_prompt_it_starts_from_bos_as_hf(tmp_path: Path):
    import torch

    case = draw(0)
    theirs = live.hf_model(case.config, case.seed)
    ours = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path, case.config, case.seed), dtype="float32")
    options = {"max_new_tokens": 5, "bos_token_id": 3, "do_sample": False}
    with torch.no_grad():
        expected = theirs.generate(**options, pad_token_id=0)
    np.testing.assert_array_equal(ours.generate(**options, pad_token_id=0), expected)
    with pytest.raises(JaxgenError, match="there is no prompt, and no bos_token_id"):
        ours.generate(bos_token_id=None)
