"""What `return_dict_in_generate` can hold, guidance, and scores of texts, against transformers on torch, live."""

from typing import Any

import numpy as np
import pytest
import torch

from jaxgen.generation.results.score import token_logprobs
from tests.oracle.versions import OLD
from tests.reference import live
from tests.reference.cases import CASES, PAD, left_padded, with_holes

pytestmark = pytest.mark.oracle
KEEP = {"eos_token_id": None, "pad_token_id": PAD, "max_new_tokens": 6, "return_dict_in_generate": True}
EVERYTHING = dict.fromkeys(("output_scores", "output_logits", "output_attentions", "output_hidden_states"), True)


@pytest.fixture(scope="module")
def hf():
    models: dict[str, Any] = {}
    return lambda name: models.setdefault(name, live.hf_model(CASES[name].config, CASES[name].seed))


def theirs(model: Any, ids: np.ndarray, mask: np.ndarray, **options: Any) -> Any:
    with torch.no_grad():
        return model.generate(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long(), **options)


@pytest.mark.parametrize("name", ["gqa_4", "gqa_8", "narrow_heads"])
def test_scores_logits_attentions_and_hidden_states(name: str, reference_model, hf):
    ids, mask = left_padded(CASES[name].prompts())
    penalty = {"encoder_no_repeat_ngram_size": 2} if OLD else {"repetition_penalty": 1.3}  # 5.15 penalises padding
    options = {**KEEP, **EVERYTHING, **penalty}
    ours, expected = reference_model(name).generate(ids, mask, **options), theirs(hf(name), ids, mask, **options)
    np.testing.assert_array_equal(ours.sequences, expected.sequences)
    for field in ("scores", "logits"):
        mine, its = getattr(ours, field), getattr(expected, field)
        np.testing.assert_allclose(np.stack(mine), np.stack([x.numpy() for x in its]), atol=1e-4)
    assert not np.allclose(np.stack(ours.scores), np.stack(ours.logits))
    for step in range(6):
        for mine, its in zip(ours.hidden_states[step], expected.hidden_states[step], strict=True):
            real = np.ones(mine.shape[:2], bool) if step else mask == 1
            assert mine.shape == its.shape
            np.testing.assert_allclose(mine[real], its.numpy()[real], atol=1e-4)
        for mine, its in zip(ours.attentions[step], expected.attentions[step], strict=True):
            real = mask[:, None, :, None] if step == 0 else 1
            assert mine.shape == its.shape
            np.testing.assert_allclose(mine, its.numpy() * real, atol=1e-4)


def test_hidden_states_beside_a_window(reference_model, hf):
    ids, mask = left_padded(CASES["window_8"].prompts())
    options = {**KEEP, "output_hidden_states": True}
    ours = reference_model("window_8").generate(ids, mask, **options).hidden_states
    expected = theirs(hf("window_8"), ids, mask, **options).hidden_states
    for step in range(6):
        real = np.ones((len(ids), 1), bool) if step else mask == 1
        for mine, its in zip(ours[step], expected[step], strict=True):
            np.testing.assert_allclose(mine[real], its.numpy()[real], atol=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
def test_transition_scores(normalize: bool, reference_model, hf):
    name = "tied"
    ids, mask = left_padded(CASES[name].prompts())
    options = {**KEEP, "output_scores": True}
    ours, expected = reference_model(name).generate(ids, mask, **options), theirs(hf(name), ids, mask, **options)
    mine = reference_model(name).compute_transition_scores(ours.sequences, ours.scores, normalize_logits=normalize)
    its = hf(name).compute_transition_scores(expected.sequences, expected.scores, normalize_logits=normalize)
    np.testing.assert_allclose(mine, its.numpy(), atol=1e-4)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 3}])
def test_transition_scores_of_beams(options: dict, reference_model, hf):
    """One row, which transformers' batch stopping cannot touch; ends at different lengths."""
    name = "gqa_8"
    ids, mask = left_padded([CASES[name].prompts()[0]])
    options = {**KEEP, **options, "output_scores": True, "eos_token_id": 66, "max_new_tokens": 12}
    ours, expected = reference_model(name).generate(ids, mask, **options), theirs(hf(name), ids, mask, **options)
    mine = reference_model(name).compute_transition_scores(ours.sequences, ours.scores, ours.beam_indices)
    its = hf(name).compute_transition_scores(expected.sequences, expected.scores, expected.beam_indices)
    np.testing.assert_array_equal(ours.sequences, expected.sequences)
    np.testing.assert_allclose(mine, its.numpy(), atol=1e-4)


@pytest.mark.parametrize("scale", [0.5, 1.5, 3.0])
@pytest.mark.parametrize("negative", ["none", "one", "each"])
@pytest.mark.parametrize("name", ["gqa_8", "window_8"])
def test_guidance(name: str, negative: str, scale: float, reference_model, hf):
    """Each row of a ragged batch as transformers guides it alone."""
    prompts = CASES[name].prompts()
    extra: dict[str, Any] = {}
    if negative == "one":
        extra = {"negative_prompt_ids": np.array([[9, 8, 7, 6]], np.int32)}
    elif negative == "each":
        ids, mask = left_padded([prompt[::-1] + prompt for prompt in prompts])
        extra = {"negative_prompt_ids": ids, "negative_prompt_attention_mask": mask}
    ids, mask = left_padded(prompts)
    options = {**KEEP, "guidance_scale": scale, "output_scores": True, "output_logits": True, "max_new_tokens": 12}
    ours = reference_model(name).generate(ids, mask, **options, **extra)
    for row, prompt in enumerate(prompts):
        alone = {}
        if negative == "one":
            alone = {"negative_prompt_ids": torch.tensor([[9, 8, 7, 6]])}
        elif negative == "each":
            alone = {"negative_prompt_ids": torch.tensor([prompt[::-1] + prompt])}
        ones = np.ones((1, len(prompt)), np.int32)
        expected = theirs(hf(name), np.array([prompt], np.int32), ones, **options, **alone)
        np.testing.assert_array_equal(ours.sequences[row, ids.shape[1] :], expected.sequences[0, len(prompt) :])
        for field in ("scores", "logits"):
            mine = np.stack(getattr(ours, field))[:, row]
            np.testing.assert_allclose(mine, np.stack([x.numpy()[0] for x in getattr(expected, field)]), atol=5e-4)


@pytest.mark.parametrize("name", ["gqa_1", "window_8", "tied"])
def test_scores_of_prompts(name: str, reference_model, hf):
    prompts = CASES[name].prompts()
    expected = [
        np.take_along_axis(torch.log_softmax(torch.from_numpy(x), -1).numpy(), np.array(p)[1:, None], 1)[:, 0]
        for x, p in zip((x[:-1] for x in live.prefill_logits(hf(name), prompts)), prompts, strict=True)
    ]
    for ids, mask in (left_padded(prompts), with_holes(prompts, junk=4)):
        scored = token_logprobs(reference_model(name), ids, mask)
        for row, own in enumerate(expected):
            mine = scored[row][mask[row] == 1]
            assert mine[0] == 0
            np.testing.assert_allclose(mine[1:], own, atol=1e-4)
        assert not scored[mask == 0].any()
