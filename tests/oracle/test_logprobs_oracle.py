"""Log-probabilities of given tokens against transformers on torch, live: both meanings, and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jaxgen
from tests.oracle.versions import OLD
from tests.reference import live
from tests.reference.cases import CASES, PAD, left_padded

pytestmark = pytest.mark.oracle
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.7, "top_k": 25, "top_p": 0.9, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def hf():
    models: dict[str, Any] = {}
    return lambda name: models.setdefault(name, live.hf_model(CASES[name].config, CASES[name].seed))


def torch_logprobs(model: Any, ids: np.ndarray, mask: np.ndarray, temperature: float) -> Any:
    """Of every id but the first, as a trainer has them."""
    ids, real = torch.from_numpy(ids).long(), torch.from_numpy(mask).long()
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=real, position_ids=positions).logits / temperature
    return logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize("name", ["window_8", "tied"])
def test_values_and_gradients(name: str, reference_model, hf):
    """Of a policy loss at a temperature: the sum of weighted log-probabilities."""
    case, model = CASES[name], reference_model(name)
    ids, mask = left_padded(case.prompts())
    pairs = mask[:, :-1] * mask[:, 1:]
    advantages = np.linspace(-1, 1, len(ids), dtype=np.float32)[:, None] * pairs
    config = jaxgen.GenerationConfig(do_sample=True, temperature=1.7, top_k=0)
    graph, weights = nnx.split(model)

    @jax.jit
    def loss(weights: Any) -> Any:
        found = jaxgen.logprobs(nnx.merge(graph, weights), ids, mask, config)[:, 1:]
        return (found * jnp.asarray(advantages)).sum(), found

    (_, found), gradients = jax.value_and_grad(loss, has_aux=True)(weights)
    theirs = hf(name)
    expected = torch_logprobs(theirs, ids, mask, 1.7)
    np.testing.assert_allclose(np.asarray(found) * pairs, expected.detach().numpy() * pairs, atol=1e-4)
    theirs.zero_grad()
    (expected * torch.from_numpy(advantages)).sum().backward()
    parameters = dict(theirs.named_parameters())
    pairs_of_names = (
        (gradients["model"]["embed_tokens"]["weight"], "model.embed_tokens.weight"),
        (gradients["model"]["layers"][0]["self_attn"]["o_proj"]["weight"], "model.layers.0.self_attn.o_proj.weight"),
        (gradients["model"]["layers"][1]["mlp"]["down_proj"]["weight"], "model.layers.1.mlp.down_proj.weight"),
    )
    for ours, hf_name in pairs_of_names:
        expected_gradient = parameters[hf_name].grad.numpy()
        np.testing.assert_allclose(ours[...], expected_gradient, atol=1e-4, rtol=1e-3, err_msg=hf_name)


@pytest.mark.parametrize("name", ["gqa_8", "window_8"])
@pytest.mark.parametrize("strict", [None, jaxgen.Strict(rows=6, tokens=48, chunk=8)])
def test_scores_are_transition_scores(name: str, strict: Any, reference_model, hf):
    """What transformers sampled, under the distribution that it was drawn from, and under the model's own."""
    ids, mask = left_padded(CASES[name].prompts())
    penalty = {} if OLD else {"repetition_penalty": 1.3}  # 5.15 penalises padding
    options = {**SAMPLED, **penalty, "eos_token_id": None, "pad_token_id": PAD}
    torch.manual_seed(0)
    with torch.no_grad():
        out = hf(name).generate(
            torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long(), output_scores=True,
            output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
    sequences, model = out.sequences.numpy(), reference_model(name)
    whole = np.concatenate([mask, np.ones((len(ids), 8), mask.dtype)], axis=1)
    found = jaxgen.score_tokens(model, sequences, mask.sum(axis=1), whole, strict=strict, **options)
    for mine, steps in ((found.logprobs, out.scores), (found.model_logprobs, out.logits)):
        theirs = hf(name).compute_transition_scores(out.sequences, steps, normalize_logits=True)
        np.testing.assert_allclose(mine, theirs.numpy(), atol=2e-4)
