"""The model's logits: against transformers, under every padding, in every graph mode; and its gradients."""

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen import attention
from jaxgen.models.mistral import MistralConfig, MistralForCausalLM
from tests.helpers import Models, forward, loss_and_gradients, real_logits, some_slow
from tests.reference.cases import CASES, left_padded, right_padded, with_holes
from tests.reference.read import read

ATOL = 1e-4


def assert_reference(name: str, logits: list[np.ndarray]) -> None:
    """Logits equal the committed ones of a case."""
    for row, actual in enumerate(logits):
        np.testing.assert_allclose(actual, read().logits[f"{name}/{row}"], atol=ATOL, rtol=0, err_msg=f"row {row}")


DEFAULT = ("one_layer", "gqa_8", "window_8", "tied", "narrow_heads")


@pytest.mark.parametrize("name", some_slow(CASES, lambda name: name not in DEFAULT))
def test_logits_equal_hf(name: str, reference_model: Models):
    assert_reference(name, real_logits(reference_model(name), *left_padded(CASES[name].prompts())))


@pytest.mark.parametrize("name", ["gqa_8", "window_8", "window_8_deep"])
def test_padding_does_not_matter(name: str, reference_model: Models):
    prompts = CASES[name].prompts()
    for ids, mask in (right_padded(prompts), with_holes(prompts, junk=3)):
        assert_reference(name, real_logits(reference_model(name), ids, mask))


@pytest.mark.slow
def test_no_mask_means_all_real(reference_model: Models):
    # The longest row of the case has no padding, so its reference needs no mask.
    case, model = CASES["one_layer"], reference_model("one_layer")
    row = int(np.argmax(case.lengths))
    ids = np.array([case.prompts()[row]])
    expected = read().logits[f"one_layer/{row}"]
    for mask in (None, np.ones(ids.shape, bool), np.ones(ids.shape, np.int64)):
        np.testing.assert_allclose(model(ids, mask).logits[0], expected, atol=ATOL)


GRAPH_MODES = [True, False] if hasattr(nnx, "set_graph_mode") else [None]


@pytest.mark.parametrize("mode", GRAPH_MODES)
def test_graph_modes(mode: bool | None, checkpoint: Callable):
    # flax 0.12 can treat modules as graphs or as trees; models built and split under either must work.
    from jaxgen.convert.load import AutoModelForCausalLM

    name = "tied"
    with contextlib.nullcontext() if mode is None else nnx.set_graph_mode(mode):
        model = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype="float32")
        prompts = CASES[name].prompts()
        assert_reference(name, real_logits(model, *left_padded(prompts)))
        structure, weights = nnx.split(model)
        ids, mask = left_padded(prompts)
        merged = jax.jit(lambda w: nnx.merge(structure, w)(ids, mask).logits)(weights)
        np.testing.assert_allclose(merged[0, mask[0] == 1], read().logits[f"{name}/0"], atol=ATOL)


@pytest.mark.parametrize("name", some_slow(["window_8", "tied"], "window_8".__eq__))
def test_gradients_reach_every_parameter(name: str, reference_model: Models):
    model, prompts = reference_model(name), CASES[name].prompts()
    left_loss, left = loss_and_gradients(model, *left_padded(prompts))
    assert len(left) == len(jax.tree.leaves(nnx.state(model, nnx.Param)))
    for path, gradient in left.items():
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 1e-6, path
    # Padding contributes nothing, on whichever side it is.
    right_loss, right = loss_and_gradients(model, *right_padded(prompts))
    assert left_loss == pytest.approx(right_loss, abs=1e-5)
    for path, gradient in right.items():
        np.testing.assert_allclose(gradient, left[path], atol=1e-5, err_msg=path)


def test_fully_masked_row_is_finite(reference_model: Models):
    model, name = reference_model("window_8"), "window_8"
    ids, mask = left_padded(CASES[name].prompts())
    mask[1] = 0
    logits = np.asarray(forward(model, jnp.asarray(ids), jnp.asarray(mask)))
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[0, mask[0] == 1], read().logits["window_8/0"], atol=ATOL)
    _, gradients = loss_and_gradients(model, ids, mask)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def one_layer(window: int | None) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=window,
    )  # fmt: skip
    return MistralForCausalLM(config, rngs=nnx.Rngs(0))


def reach(model: MistralForCausalLM, length: int, padding: int = 0) -> list[int]:
    """How many tokens back a change of one token still changes the last token's logits."""
    ids = np.tile(np.arange(3, 3 + length), (length + 1, 1))
    ids[np.arange(length), np.arange(length)] = 49
    mask = np.ones_like(ids)
    ids, mask = (np.pad(x, ((0, 0), (padding, 0))) for x in (ids, mask))
    last = np.asarray(forward(model, jnp.asarray(ids), jnp.asarray(mask)))[:, -1]
    changed = np.abs(last[:-1] - last[-1]).max(axis=1) > 0
    return (length - 1 - np.flatnonzero(changed))[::-1].tolist()


@pytest.mark.parametrize("padding", [0, 3])
def test_window_cuts_off_exactly(padding: int):
    # A window of 4 sees itself and the three tokens before it: W - 1 back changes the logits, W back does not.
    assert reach(one_layer(4), 10, padding) == [0, 1, 2, 3]
    assert reach(one_layer(None), 10, padding) == list(range(10))


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 4])
def test_query_blocks_change_nothing(window: int | None, monkeypatch: pytest.MonkeyPatch):
    # Long prompts are computed in blocks of queries; small blocks here stand for long prompts.
    model = one_layer(window)
    ids = np.arange(24).reshape(2, 12)
    mask = np.array([[0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 12])
    whole = model(ids, mask).logits
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    np.testing.assert_allclose(model(ids, mask).logits[mask == 1], whole[mask == 1], atol=1e-5)
    assert "scan" in str(jax.make_jaxpr(lambda ids: model(ids, mask).logits)(ids))  # the blocks did run


def test_low_precision_is_close_to_float32(checkpoint: Callable):
    from jaxgen.convert.load import AutoModelForCausalLM

    # bfloat16 keeps 8 bits: logits of size 3 may be off by some hundredths, not by their own size.
    name = "gqa_8"
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype="bfloat16")
    rows = real_logits(model, *left_padded(CASES[name].prompts()))
    errors = np.concatenate([np.abs(x - read().logits[f"{name}/{row}"]).ravel() for row, x in enumerate(rows)])
    assert rows[0].dtype == np.float32
    assert 1e-4 < errors.mean() < 0.05
