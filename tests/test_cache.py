"""The key-value cache: what a model hands over to it, and that nobody else knows how it is kept."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen import MistralConfig, MistralForCausalLM, cache
from jaxgen.cache import KVCache, LayerCache, Reading, empty_layer_cache

ROWS, LENGTH = 2, 14
IDS = np.random.default_rng(0).integers(0, 40, (ROWS, LENGTH)).astype(np.int32)
READ = 3  # tokens at a time, before single ones


@pytest.fixture(scope="module")
def model() -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    return MistralForCausalLM(config, rngs=nnx.Rngs(0))


def logits_of(model: MistralForCausalLM, caches: KVCache) -> np.ndarray:
    """The logits after each token from the second block on: a block of READ, another one, and the rest one by one."""
    caches = model.extend(jnp.asarray(IDS[:, :READ]), jnp.zeros(ROWS, jnp.int32), jnp.full(ROWS, READ), caches)[1]
    starts, counts = jnp.full(ROWS, READ), jnp.full(ROWS, READ)
    hidden, caches = model.extend(jnp.asarray(IDS[:, READ : 2 * READ]), starts, counts, caches)
    found = [model.logits(hidden)]
    for position in range(2 * READ, LENGTH):
        logits, caches = model.step(jnp.asarray(IDS[:, position]), jnp.full(ROWS, position), caches)
        found.append(logits[:, None])
    return np.concatenate(found, axis=1)


def empty(slots: int, window: int | None, int8: bool = False) -> LayerCache:
    return empty_layer_cache(ROWS, 2, slots, 4, jnp.dtype("float32"), int8, window)


@pytest.mark.slow
def test_each_layer_has_its_own_window_and_its_own_number_of_slots(model):
    """As the whole text at once: a full layer, a ring that turns, and a window with more slots than it needs."""
    windows = [None, 4, 4]
    for layer, window in zip(model.model.layers, windows, strict=True):
        layer.self_attn.window = window
    try:
        expected = model(IDS).logits[:, READ:]
        found = logits_of(model, [empty(LENGTH, None), empty(4 + READ, 4), empty(11, 4)])
    finally:
        for layer in model.model.layers:
            layer.self_attn.window = 4
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - np.asarray(model(IDS).logits[:, READ:])).max() > 1e-3  # the windows mattered


def test_caches_of_a_model_have_its_windows(model):
    made = [model.empty_cache(1, 8), model.prefill(jnp.asarray(IDS[:, :5]), jnp.full(ROWS, 5), 8, True)[1]]
    assert [[layer.window for layer in layers] for layers in made] == [[4, 4, 4]] * 2
    assert [layer.resized(jnp.full(ROWS, 5), 4).window for layer in made[1]] == [4, 4, 4]
    written = made[0][0].write(jnp.ones((1, 2, 4)), jnp.ones((1, 2, 4)), jnp.zeros(1, jnp.int32))
    assert written.window == 4


@pytest.mark.slow
def test_what_may_be_seen_is_worked_out_once_a_step(model, monkeypatch):
    """And not once a layer; twice, where layers are of two kinds."""
    asked = []
    plain = cache.visible_slots

    def counted(positions: Any, newest: Any, slots: int, window: int | None) -> Any:
        asked.append((slots, window))
        return plain(positions, newest, slots, window)

    monkeypatch.setattr(cache, "visible_slots", counted)
    for caches, kinds in (
        ([empty(8, 4)] * 3, {(8, 4)}),
        ([empty(8, 4), empty(9, None), empty(8, 4)], {(8, 4), (9, None)}),
    ):
        model.step(jnp.zeros(ROWS, jnp.int32), jnp.zeros(ROWS, jnp.int32), caches)
        assert sorted(asked, key=str) == sorted(kinds, key=str)
        asked.clear()
        starts = jnp.zeros(ROWS, jnp.int32)
        model.extend(jnp.zeros((ROWS, 2), jnp.int32), starts, jnp.full(ROWS, 2), caches)
        assert sorted(asked, key=str) == sorted(kinds, key=str)
        asked.clear()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Scattered(LayerCache):
    """A cache that keeps its slots in another order, as pages would."""

    order: Any = None  # where each slot is

    def attend(self, queries: Any, keys: Any, values: Any, reading: Reading, scoring: Any = None) -> Any:
        plain = LayerCache(*(x[:, :, self.order] for x in self.read(queries.dtype)), window=self.window)
        mixed, plain = plain.attend(queries, keys, values, reading, scoring)
        back = jnp.argsort(self.order)
        keys, values = (x[:, :, back] for x in plain.read(queries.dtype))
        return mixed, dataclasses.replace(self, keys=keys, values=values)


def test_a_cache_of_another_kind_is_one_class(model):
    """The model neither reads nor writes keys: what it gets is what its queries found."""
    order = np.random.default_rng(1).permutation(11)
    scattered: KVCache = [Scattered(layer.keys, layer.values, layer.window, order) for layer in [empty(11, 4)] * 3]
    np.testing.assert_array_equal(logits_of(model, scattered), logits_of(model, [empty(11, 4)] * 3))


@pytest.mark.parametrize("int8", [False, True])
def test_a_block_of_one_token_is_a_step(int8: bool):
    """Both forms of `attend` keep and find the same; tokens that are not real are not kept."""
    rng = np.random.default_rng(2)

    def heads(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    before = empty(6, None, int8)
    keys, values = heads(ROWS, 4, 2, 4), heads(ROWS, 4, 2, 4)
    counts = jnp.array([4, 2])
    _, before = before.attend(heads(ROWS, 4, 2, 2, 4), keys, values, Reading.several(jnp.zeros(ROWS, int), counts, 4))
    empty_slots = np.asarray(before.read(jnp.dtype("float32"))[0])[1, :, 2:]
    assert not empty_slots.any()

    queries, key, value = heads(ROWS, 1, 2, 2, 4), heads(ROWS, 1, 2, 4), heads(ROWS, 1, 2, 4)
    one, after = before.attend(queries, key, value, Reading.one(counts))
    block, other = before.attend(queries, key, value, Reading.several(counts, jnp.ones(ROWS, int), 1))
    np.testing.assert_allclose(one, block, atol=1e-6)
    for mine, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(mine, theirs)
