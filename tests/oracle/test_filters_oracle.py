"""HF's logits processors, live: the committed results, and many more random ones."""

import numpy as np
import pytest

from tests.reference import filters, live, read
from tests.test_filters import assert_same_filter, through_process

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("name", filters.SETTINGS)
def test_committed_filters_are_what_hf_computes(name: str):
    computed = live.filtered(filters.inputs(filters.SEED), filters.SETTINGS[name])
    assert_same_filter(read.read().filtered[name], computed, filters.SETTINGS[name])


def random_settings(rng: np.random.Generator) -> dict[str, float | int]:
    """A random choice of processors with random numbers."""
    settings = {
        "repetition_penalty": float(rng.uniform(0.5, 2.5)),
        "min_new_tokens": int(rng.integers(1, 9)),
        "temperature": float(rng.uniform(0.2, 3)),
        "top_k": int(rng.integers(1, 60)),
        "top_p": float(rng.uniform(0, 0.999)),
        "min_p": float(rng.uniform(0.001, 0.7)),
    }
    return {name: value for name, value in settings.items() if rng.random() < 0.5}


def test_random_filters_equal_hf():
    rng = np.random.default_rng(0)
    decided = 0
    for seed in range(60):
        # Few vocabularies, as each compiles anew.
        batch, settings = filters.inputs(seed, vocab=(31, 131)[seed % 2]), random_settings(rng)
        expected, actual = live.filtered(batch, settings), through_process(batch, settings)
        before = {name: value for name, value in settings.items() if name not in ("top_p", "min_p")}
        clear = ~filters.undecided(live.filtered(batch, before), settings)
        assert_same_filter(actual[clear], expected[clear], settings)
        decided += clear.sum()
    assert decided > 0.9 * 60 * 8
