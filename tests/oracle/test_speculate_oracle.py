"""Speculation against transformers' on torch, live: the same drafts from the same prefixes, the same greedy tokens."""

import copy
import warnings

import jax
import numpy as np
import pytest
import torch
from transformers.generation.candidate_generator import AssistedCandidateGenerator, PromptLookupCandidateGenerator

from jaxgen.convert.load import AutoModelForCausalLM
from jaxgen.generation.execute import prefill, program_for
from jaxgen.generation.options.config import resolve
from jaxgen.generation.options.table import Extras
from jaxgen.generation.prepare import prepare
from jaxgen.generation.searches import speculate
from tests.reference import live
from tests.reference.cases import CASES, left_padded
from tests.reference.weights import write_checkpoint

pytestmark = pytest.mark.oracle

CASE = CASES["gqa_8"]
# A smaller model of the same vocabulary, and the seed of its weights.
SMALL = {**CASE.config, "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
SMALL_SEED = 41
DRAFTS = 5


@pytest.fixture(scope="module")
def theirs():
    return live.hf_model(CASE.config, CASE.seed), live.hf_model(SMALL, SMALL_SEED)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    def load(config, seed):
        directory = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), config, seed)
        return AutoModelForCausalLM.from_pretrained(directory, dtype="float32")

    return load(CASE.config, CASE.seed), load(SMALL, SMALL_SEED)


def prefixes() -> list[list[int]]:
    """Ragged rows, some of which repeat themselves."""
    rng = np.random.default_rng(5)
    return [rng.integers(0, limit, int(length)).tolist() for limit in (4, 97) for length in rng.integers(2, 16, 4)]


def state_of(ours, options):
    """The batch of prefixes, each with the token that the model adds; with options and limits."""
    model, assistant = ours
    ids, mask = left_padded(prefixes())
    extras = Extras(assistant_model=None if "prompt_lookup_num_tokens" in options else assistant)
    config = resolve(options, None, model.generation_config)
    request = prepare(model, ids, mask, config, seed=0, extras=extras)
    return prefill(program_for(model, request), request), request


@pytest.mark.parametrize("confidence", [0.0, 0.2, 0.4, 0.9])
@pytest.mark.parametrize("penalty", [1.0, 1.6])
def test_an_assistant_drafts_as_in_transformers(theirs, ours, confidence, penalty):
    options = {
        "max_new_tokens": 12, "eos_token_id": None, "repetition_penalty": penalty, "num_assistant_tokens": DRAFTS,
        "assistant_confidence_threshold": confidence,
    }  # fmt: skip
    state, request = state_of(ours, options)
    traced, static = request.traced, request.layout.static
    ask = jax.jit(lambda state: speculate.ask_assistant(ours[1], state, traced, static)[0])
    drafts, lengths = np.asarray(ask(state)), np.asarray(state.lengths)
    small = theirs[1]
    small.generation_config.num_assistant_tokens = DRAFTS
    small.generation_config.assistant_confidence_threshold = confidence
    for row in range(len(prefixes())):
        prefix = torch.tensor(np.asarray(state.tokens)[row : row + 1, : lengths[row]]).long()
        config = copy.deepcopy(theirs[0].generation_config)
        config.update(eos_token_id=None, repetition_penalty=penalty, min_length=0)
        config.max_length = int(np.asarray(state.max_lengths)[row])
        generator = AssistedCandidateGenerator(
            input_ids=prefix, assistant_model=small, generation_config=config,
            model_kwargs={"attention_mask": torch.ones_like(prefix)},
        )  # fmt: skip
        candidates, _ = generator.get_candidates(prefix)
        expected = candidates[0, lengths[row] :].tolist()
        assert drafts[row].tolist() == expected + [speculate.NO_DRAFT] * (DRAFTS - len(expected))


@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_prompt_lookup_drafts_as_in_transformers(ngram):
    rng = np.random.default_rng(ngram)
    look_up = jax.jit(speculate.look_up, static_argnums=3)
    found = 0
    for _ in range(40):
        rows = [rng.integers(0, int(rng.integers(2, 9)), int(rng.integers(2, 20))) for _ in range(8)]
        tokens = np.stack([np.pad(row, (0, 20 - len(row)), constant_values=1) for row in rows])
        drafts = look_up(tokens, np.array([len(row) for row in rows]), np.array(ngram), DRAFTS)
        generator = PromptLookupCandidateGenerator(
            num_output_tokens=DRAFTS, max_matching_ngram_size=ngram, max_length=1000
        )
        for row, actual in zip(rows, np.asarray(drafts).tolist(), strict=True):
            candidates, _ = generator.get_candidates(torch.from_numpy(row)[None])
            expected = candidates[0, len(row) :].tolist()
            found += bool(expected)
            assert actual == expected + [speculate.NO_DRAFT] * (DRAFTS - len(expected))
    assert 80 < found < 320


@pytest.mark.parametrize("drafter", ["assistant", "prompt_lookup"])
def test_assisted_generation_as_in_transformers(theirs, ours, drafter):
    """Transformers speculates for one row at a time; here all of them are one batch."""
    prompts = [*CASE.prompts(), [5, 6, 5, 6, 5, 6]]
    options = {"max_new_tokens": 30, "eos_token_id": [66, 14], "pad_token_id": 0, "repetition_penalty": 1.1}
    lookup = {"prompt_lookup_num_tokens": DRAFTS}
    ids, mask = left_padded(prompts)
    our_speculation = lookup if drafter == "prompt_lookup" else {"assistant_model": ours[1]}
    output = ours[0].generate(ids, mask, return_dict_in_generate=True, **options, **our_speculation)
    for row, prompt in enumerate(prompts):
        their_speculation = lookup if drafter == "prompt_lookup" else {"assistant_model": theirs[1]}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            expected = theirs[0].generate(torch.tensor([prompt]), do_sample=False, **options, **their_speculation)
        actual = output.sequences[row, ids.shape[1] :][: output.lengths[row]]
        assert actual.tolist() == expected[0, len(prompt) :].tolist()
