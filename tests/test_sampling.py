"""Sampling: the documented keys, exact distributions, and independence, on the loop's own draw."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxgen import GenerateOutput, JaxgenError
from jaxgen.generation.choosing.sample import draw, random_key, row_id_words, row_keys

LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.04, 0.009, 0.001], np.float32))


def keys_for(rows: int, seed: int = 0) -> jax.Array:
    return row_keys(random_key(None, seed)[0], jnp.asarray(row_id_words(None, rows)), 1)


@pytest.mark.slow
def test_draws_follow_the_distribution():
    rows, steps = 500, 400
    keys = keys_for(rows)
    logits = jnp.broadcast_to(LOGITS, (rows, 7))
    draws = np.asarray(jax.vmap(lambda p: draw(logits, keys, jnp.full(rows, p)))(jnp.arange(steps)))
    counts = np.bincount(draws.ravel(), minlength=7)
    expected = np.exp(LOGITS.astype(np.float64))
    assert stats.chisquare(counts, expected / expected.sum() * draws.size).pvalue > 1e-3  # 200,000 draws

    # Neighbouring steps of a row, and neighbouring rows at a step, are independent.
    for first, second in ((draws[:-1], draws[1:]), (draws[:, :-1], draws[:, 1:])):
        table = np.zeros((7, 7))
        np.add.at(table, (first.ravel(), second.ravel()), 1)
        table = table[:4, :4]  # the cells with enough draws
        result: Any = stats.chi2_contingency(table)
        assert result.pvalue > 1e-3
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.01


@pytest.mark.slow
def test_removed_tokens_are_never_drawn_and_the_others_keep_their_proportions():
    rows, steps = 200, 500
    keys = keys_for(rows, seed=1)
    kept = jnp.broadcast_to(jnp.where(jnp.arange(7) < 3, LOGITS, -jnp.inf), (rows, 7))
    draws = np.asarray(jax.vmap(lambda p: draw(kept, keys, jnp.full(rows, p)))(jnp.arange(steps)))
    counts = np.bincount(draws.ravel(), minlength=7)
    assert counts[3:].sum() == 0
    expected = np.array([0.4, 0.3, 0.15]) / 0.85
    assert stats.chisquare(counts[:3], expected * draws.size).pvalue > 1e-3  # 100,000 draws


@pytest.mark.slow
def test_whole_generation_follows_the_distribution(reference_model):
    """The first token of 12,000 sampled rows against the model's own probabilities after top_k and temperature."""
    model = reference_model("window_8")
    output = model.generate(
        [[5, 6, 7]], do_sample=True, temperature=1.5, top_k=12, max_new_tokens=1, num_return_sequences=12_000, seed=0,
        eos_token_id=None,
    )  # fmt: skip
    logits = np.asarray(model(np.array([[5, 6, 7]])).logits, np.float64)[0, -1] / 1.5
    top = np.argsort(logits)[-12:]
    probabilities = np.exp(logits[top]) / np.exp(logits[top]).sum()
    counts = np.bincount(np.asarray(output)[:, -1], minlength=len(logits))
    assert counts.sum() == counts[top].sum() == 12_000
    often = probabilities * 12_000 > 5
    observed = np.append(counts[top][often], counts[top][~often].sum())
    expected = np.append(probabilities[often], probabilities[~often].sum()) * 12_000
    assert stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-3


@pytest.mark.slow
def test_the_documented_recipe_gives_the_tokens(reference_model):
    """Draw again by hand, with nothing but jax.random and the model's logits."""
    model, key = reference_model("window_8"), jax.random.key(11)
    prompts, mask = np.array([[0, 5, 6], [7, 8, 9]]), np.array([[0, 1, 1], [1, 1, 1]])
    result = model.generate(
        prompts, mask, key=key, do_sample=True, top_k=0, max_new_tokens=5, num_return_sequences=2,
        row_ids=["a", 2**40 + 3], eos_token_id=None,
    )  # fmt: skip
    domain = jax.random.fold_in(key, 0x6A617867)
    digest = hashlib.sha256(b"str:a").digest()
    words = [(int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")), (2**8, 3)]
    for row, sample in np.ndindex(2, 2):
        row_key = jax.random.fold_in(jax.random.fold_in(domain, words[row][0]), words[row][1])
        row_key = jax.random.fold_in(row_key, sample)
        sequence = [int(t) for t, real in zip(prompts[row], mask[row], strict=True) if real]
        for _ in range(5):
            noise = jax.random.gumbel(jax.random.fold_in(row_key, len(sequence)), (model.config.vocab_size,))
            logits = np.asarray(model(np.array([sequence])).logits)[0, -1]
            sequence.append(int(np.argmax(logits + np.asarray(noise))))
        assert np.asarray(result)[2 * row + sample, 3:].tolist() == sequence[-5:]


@pytest.mark.slow
def test_a_filter_only_masks_the_same_noise(reference_model):
    """Common random numbers: where the unfiltered choice survives the filter, both runs choose it."""
    model = reference_model("window_8")
    options = {"do_sample": True, "seed": 5, "max_new_tokens": 1, "eos_token_id": None, "num_return_sequences": 400}
    free = np.asarray(model.generate([[5, 6, 7]], top_k=0, **options))[:, -1]
    filtered = np.asarray(model.generate([[5, 6, 7]], top_k=3, **options))[:, -1]
    top = np.argsort(np.asarray(model(np.array([[5, 6, 7]])).logits)[0, -1])[-3:]
    survives = np.isin(free, top)
    assert 0 < survives.sum() < 400
    np.testing.assert_array_equal(free[survives], filtered[survives])


class TestSeedsAndIds:
    SEEDS = (0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**64 - 1, 2**64, -(2**70), 10**30)

    def test_every_int_is_its_own_seed(self):
        data = {tuple(np.asarray(jax.random.key_data(random_key(None, seed)[0])).tolist()) for seed in self.SEEDS}
        assert len(data) == len(self.SEEDS)

    def test_small_seeds_are_jax_keys(self):
        assert random_key(None, 7)[0] == jax.random.key(7)

    def test_a_fresh_seed_is_reported_and_repeats(self, reference_model):
        model = reference_model("window_8")
        options = {"do_sample": True, "max_new_tokens": 8, "return_dict_in_generate": True, "temperature": 3.0}
        first, second = (model.generate([[1, 2]], **options) for _ in range(2))
        assert isinstance(first, GenerateOutput)
        assert first.seed != second.seed
        again = model.generate([[1, 2]], seed=first.seed, **options)
        np.testing.assert_array_equal(again.sequences, first.sequences)

    def test_raw_keys_are_understood(self):
        assert random_key(jax.random.PRNGKey(9), None)[0] == jax.random.key(9)

    def test_ids_are_distinct(self):
        ids = [0, 1, 2**32, -1, 2**64, "0", "1", "", "row"]
        assert len({tuple(words) for words in row_id_words(ids, len(ids)).tolist()}) == len(ids)

    @pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
    def test_rbg_keys_are_refused(self, impl: str):
        with pytest.raises(JaxgenError, match=r"rbg.*threefry2x32"):
            random_key(jax.random.key(0, impl=impl), None)
