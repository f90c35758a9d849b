"""Layers with a sliding window beside layers without: each has the cache that it needs, whatever option is on.

The rule that each test holds to: with rings in some layers, a call gives what it gives with a slot for every token in
all of them.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Strict
from jaxgen.cache import LayerCache, Slots, of_layers, to_int8
from jaxgen.convert.inspect import describe
from jaxgen.errors import JaxgenError
from jaxgen.generation.prompts import memory
from jaxgen.generation.searches.beam_cache import reordered
from jaxgen.records.record import generation_of
from tests.helpers import padded, some_slow

WINDOW, NEW = 6, 30
PROMPTS = [np.random.default_rng(row).integers(3, 61, length).tolist() for row, length in enumerate((15, 3))]
IDS, MASK = padded(PROMPTS, "left", 0)
PLAIN: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": None, "return_dict_in_generate": True}


class Full(Qwen2Config):
    """The same mathematics, with as many slots in every layer as a row has tokens."""

    def cache_slots(self, total_length: int, ahead: int = 0) -> Slots:
        return total_length


def made(kind: Any = Qwen2Config) -> Any:
    config = kind(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, use_sliding_window=True,
        sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = Qwen2ForCausalLM(config, rngs=nnx.Rngs(0))
    for layer in model.model.layers:  # which otherwise read too little of one another for a token to differ
        layer.self_attn.qkv_proj.weight = nnx.Param(3 * layer.self_attn.qkv_proj.weight[...])
    return model


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Any, Any]]:
    yield made(), made(Full)


def test_a_layer_has_the_slots_that_it_needs(pair):
    config, (model, full) = pair[0].config, pair
    assert config.layer_windows == (WINDOW, None)
    assert config.cache_slots(48) == (WINDOW, 48) and config.cache_slots(48, ahead=5) == (11, 48)
    assert config.cache_slots(WINDOW) == WINDOW  # alike, where no row is longer than the window
    per_layer = 2 * 2 * 8 * 4
    for one, count in ((model, 48 + WINDOW), (full, 2 * 48)):
        cache = one.empty_cache(2, one.config.cache_slots(48))
        assert sum(x.nbytes for x in jax.tree.leaves(cache)) == 2 * per_layer * count
        assert memory.cache_bytes(one.config, 4, one.config.cache_slots(48)) == per_layer * count


@pytest.mark.slow
def test_tokens_are_those_of_the_whole_text_read_at_once(pair):
    """Far past the window, of ragged rows; and the window matters."""
    model = pair[0]
    output = model.generate(IDS, MASK, **PLAIN)
    assert output.origin.request.layout.slots == (WINDOW, 64)
    for row, prompt in enumerate(PROMPTS):
        text = np.array([*prompt, *output.sequences[row, IDS.shape[1] :]])
        logits = np.asarray(model(text[None]).logits[0, len(prompt) - 1 : -1])
        np.testing.assert_array_equal(logits.argmax(-1), text[len(prompt) :])
        log_probs = jax.nn.log_softmax(logits)[np.arange(NEW), text[len(prompt) :]]
        np.testing.assert_allclose(output.logprobs[row], log_probs, atol=1e-4)
    without = dataclasses.replace(model.config, use_sliding_window=False, layer_types=None)
    plain = Qwen2ForCausalLM(without, rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.state(model))
    assert np.abs(plain(IDS[:1]).logits - model(IDS[:1]).logits).max() > 1e-2


WAYS: dict[str, dict[str, Any]] = {
    "drawn": {"do_sample": True, "seed": 3},
    "int8": {"cache_implementation": "quantized"},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams, chunks, int8": {"num_beams": 3, "prefill_chunk_size": 4, "cache_implementation": "quantized"},
    "guided": {"guidance_scale": 1.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", some_slow(WAYS, soak=("beams", "int8").__contains__))  # which another one has together
def test_every_way_gives_what_full_caches_give(pair, name: str):
    ours, expected = (model.generate(IDS, MASK, **PLAIN, **WAYS[name]) for model in pair)
    assert isinstance(ours.origin.request.layout.slots, tuple)
    np.testing.assert_array_equal(ours.sequences, expected.sequences)
    np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=1e-4)


@pytest.mark.parametrize("options", some_slow([
    {"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 1},
    {"strict": Strict(rows=2, tokens=48, chunk=4)},
], lambda options: "prefill_chunk_size" not in options))  # fmt: skip
def test_what_changes_no_token(pair, options: dict[str, Any]):
    expected, found = (pair[0].generate(IDS, MASK, **PLAIN, **more) for more in ({}, options))
    assert isinstance(found.origin.request.layout.slots, tuple)
    np.testing.assert_array_equal(found.sequences, expected.sequences)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)


@pytest.mark.slow
def test_an_assistant_with_layers_of_two_kinds(pair):
    model, full = pair
    expected = model.generate(IDS, MASK, **PLAIN)
    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=128,
        ),
        rngs=nnx.Rngs(1),
    )  # fmt: skip
    with_own = model.generate(IDS, MASK, **PLAIN, assistant_model=made())
    np.testing.assert_array_equal(with_own.sequences, expected.sequences)
    drafted_by_it = [other.generate(IDS, MASK, **PLAIN, assistant_model=one).sequences for one in (model, full)]
    np.testing.assert_array_equal(*drafted_by_it)


def test_a_conversation_goes_on(pair):
    """From a ring that turned: what it still holds is not read again, and what it lost is."""
    model = pair[0]
    short = PLAIN | {"max_new_tokens": 9}
    first = model.generate(IDS, MASK, **short)
    turn = np.array([[7, 8, 9, 10]] * 2)
    ids, mask = np.concatenate([first.sequences, turn], 1), np.pad(MASK, ((0, 0), (0, 13)), constant_values=1)
    again = model.generate(ids, mask, **short, past_key_values=first.past_key_values)
    layout = again.origin.request.layout
    assert layout.fresh == 16 and layout.slots[0] < layout.slots[1]
    expected = model.generate(ids, mask, **short)
    np.testing.assert_array_equal(again.sequences, expected.sequences)
    np.testing.assert_allclose(again.logprobs, expected.logprobs, atol=1e-4)
    # Another continuation of the prompt alone: the rings have turned past it, whatever the full layer holds.
    back = model.generate(IDS, MASK, **short, past_key_values=first.past_key_values)
    assert back.origin.request.layout.fresh == 16 and not back.origin.request.prompts.past.held.any()
    np.testing.assert_array_equal(back.sequences, first.sequences)


def test_records_say_the_slots_of_each_layer(pair):
    entry = generation_of(pair[0].generate(IDS, MASK, **PLAIN))
    assert entry["shapes"]["cache_slots"] == [WINDOW, 64]
    assert json.loads(json.dumps(entry)) == entry  # lists, as files have them


def test_memory_that_is_asked_for(pair, monkeypatch: pytest.MonkeyPatch):
    """The rings' part does not grow with the row; so many tokens fit as a call then gets."""
    model, rows = pair[0], len(PROMPTS)
    per_layer = 2 * 2 * 8 * 4
    working = memory.prefill_bytes(model.config, 4, rows, 16, 16, 16) + rows * 4 * 61
    free = rows * per_layer * (96 + WINDOW) + working + 10
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    with pytest.raises(JaxgenError, match="at most 80 new tokens fit"):
        model.generate(IDS, MASK, max_new_tokens=100)
    assert model.generate(IDS, MASK, max_new_tokens=80, eos_token_id=list(range(60))).shape[0] == rows
    with pytest.raises(JaxgenError, match="new tokens fit"):
        pair[1].generate(IDS, MASK, max_new_tokens=80)


def test_inspect_counts_each_layer(pair, tmp_path: Path):
    pair[0].save_pretrained(tmp_path / "saved")
    text = describe(tmp_path / "saved", "float32")
    assert "window 6 in 1 of 2 layers" in text
    per_layer = 2 * 2 * 8 * 4
    assert f"256 B per token and row, {per_layer * (128 + WINDOW) / 1000:.4g} kB for a row of 128 tokens" in text


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.data())
def test_beams_move_each_layer_by_its_own_slots(data: Any):
    """A ring that has turned moves whole; the layer beside it only where rows may differ."""
    rows, sizes, rng = 4, (75, 8, 75, 40), np.random.default_rng(0)
    last = data.draw(st.integers(0, 74))
    first = data.draw(st.integers(0, last))
    parents = data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))
    cache = []
    for slots in sizes:
        values = rng.normal(size=(rows, 2, slots, 3)).astype(np.float32)
        if last < slots:
            values[:, :, :first] = values[:1, :, :first]
        cache.append(LayerCache(jnp.asarray(values), to_int8(jnp.asarray(values))))
    result = _REORDERED(cache, jnp.array(parents), jnp.int32(first), jnp.int32(last))
    for slots, before, after in zip(sizes, cache, result, strict=True):
        used = slice(None) if last >= slots else slice(0, last + 1)
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(np.asarray(new)[:, :, used], np.asarray(old)[parents][:, :, used])


_REORDERED = jax.jit(reordered)


def test_slots_of_layers():
    assert of_layers(5, 3) == (5, 5, 5) and of_layers((1, 2, 3), 3) == (1, 2, 3)
