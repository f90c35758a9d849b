"""The logits processors: numbers worked out by hand, and what HF's own processors make of the same logits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.generation import logits as library
from jaxgen.generation.config import GenerationConfig
from tests.reference import filters
from tests.reference.filters import EOS, Inputs
from tests.reference.read import read

INF = math.inf


def through_process(batch: Inputs, settings: dict[str, float | int]) -> np.ndarray:
    """The library's own chain, switched on by a GenerationConfig as `generate` does it."""
    config = GenerationConfig(**{"top_k": 0, **settings}, do_sample=True, max_new_tokens=200, eos_token_id=EOS)
    controls = library.Controls(
        temperature=jnp.float32(settings.get("temperature", 1.0)),
        top_k=jnp.int32(settings.get("top_k", 0)),
        top_p=jnp.float32(settings.get("top_p", 1.0)),
        min_p=jnp.float32(settings.get("min_p", 0.0)),
        repetition_penalty=jnp.float32(settings.get("repetition_penalty", 1.0)),
        min_new_tokens=jnp.int32(settings.get("min_new_tokens", 0)),
        max_new_tokens=jnp.int32(200),
        eos_ids=jnp.array([*EOS, -1, -1], jnp.int32),
    )
    recipe = library.Recipe.of(config)
    seen = jnp.asarray(batch.seen()) if recipe.repetition_penalty else None
    process = jax.jit(library.process, static_argnames="recipe")
    return np.asarray(process(jnp.asarray(batch.logits), seen, jnp.asarray(batch.new_tokens), controls, recipe=recipe))


def assert_same_filter(actual: np.ndarray, expected: np.ndarray, settings: dict[str, float | int]) -> None:
    """The same entries are removed; what stays has the same value.

    Where top_p cuts through equal logits, HF removes the right number of them, but which ones is up to torch's
    unstable sort. So under top_p the values that stay are compared; unless logits are equal, that fixes the ids.
    """
    both = ~np.isneginf(actual) & ~np.isneginf(expected)
    np.testing.assert_allclose(actual[both], expected[both], rtol=1e-6)
    if "top_p" in settings:
        np.testing.assert_allclose(np.sort(actual), np.sort(expected), rtol=1e-6)
    else:
        np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))


@pytest.mark.parametrize("name", filters.SETTINGS)
def test_filters_equal_hf(name: str):
    batch, settings = filters.inputs(filters.SEED), filters.SETTINGS[name]
    assert not filters.undecided(batch.logits, settings).any()
    assert_same_filter(through_process(batch, settings), read().filtered[name], settings)


def test_every_committed_setting_is_tested():
    assert read().filtered.keys() == filters.SETTINGS.keys()


def run(function, row: list[float], *arguments) -> list[float]:
    """One row through one processor."""
    return np.asarray(function(jnp.array([row], jnp.float32), *arguments))[0].tolist()


def test_repetition_penalty_by_hand():
    # Tokens 0, 1 and 3 are seen: 2 / 2 = 1, -2 * 2 = -4, 0 stays 0. Token 2 is not: 3 stays.
    seen = jnp.array([[True, True, False, True]])
    assert run(library.repetition_penalty, [2, -2, 3, 0], seen, jnp.float32(2)) == [1, -4, 3, 0]


def test_repetition_penalty_is_per_row():
    seen = jnp.array([[True, False], [False, True]])
    logits = jnp.full((2, 2), 4.0)
    assert library.repetition_penalty(logits, seen, jnp.float32(2)).tolist() == [[2, 4], [4, 2]]


def test_suppress_eos_by_hand():
    # Ids 3 and 1 go, in active rows only; -1 is a filler and must not mean the last token.
    logits = jnp.array([[1.0, 2, 3, 4, 5], [1, 2, 3, 4, 5]])
    result = library.suppress_eos(logits, jnp.array([3, -1, 1], jnp.int32), jnp.array([True, False]))
    assert result.tolist() == [[1, -INF, 3, -INF, 5], [1, 2, 3, 4, 5]]


def test_temperature_by_hand():
    assert run(library.temperature, [1, -2, 0, -INF], jnp.float32(0.5)) == [2, -4, 0, -INF]


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, [-INF, 4, -INF, -INF]),
        # The second largest is 3, twice: a tie of the k-th value is kept whole, so three stay.
        (2, [3, 4, 3, -INF]),
        (3, [3, 4, 3, -INF]),
        (4, [3, 4, 3, 1]),
        (9, [3, 4, 3, 1]),  # more than there are
    ],
)
@pytest.mark.parametrize("bound", [9, 64])
def test_top_k_by_hand(k: int, expected: list[float], bound: int):
    assert run(library.top_k, [3, 4, 3, 1], jnp.int32(k), bound) == expected


# Probabilities 1/8, 1/2, 1/4, 1/8: as logits, their logarithms.
EIGHTHS = [math.log(1 / 8), math.log(1 / 2), math.log(1 / 4), math.log(1 / 8)]


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        # From the least likely up, the running sums are 1/8, 2/8, 4/8, 8/8; a token goes where that is <= 1 - p.
        (0.0, [1]),  # all sums are <= 1, but the most likely one always stays
        (0.4, [1]),  # 1 - p = 0.6 removes 1/8, 2/8, 4/8
        (0.6, [1, 2]),  # 1 - p = 0.4 removes 1/8, 2/8: the token that crosses p stays
        # 1 - p = 0.2 removes one of two equal tokens: the sums of 1/8 are at 1/8 and 2/8. The first index goes.
        (0.8, [1, 2, 3]),
        (0.9, [0, 1, 2, 3]),  # 1 - p = 0.1 removes nothing
    ],
)
def test_top_p_by_hand(p: float, kept: list[int]):
    result = run(library.top_p, EIGHTHS, jnp.float32(p))
    assert [i for i, x in enumerate(result) if x > -INF] == kept
    assert [result[i] for i in kept] == pytest.approx([EIGHTHS[i] for i in kept])


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        # The largest is 1/2: the threshold is p / 2.
        (0.2, [0, 1, 2, 3]),  # 0.1
        (0.4, [1, 2]),  # 0.2
        (0.6, [1]),  # 0.3
        (1.0, [1]),  # 1/2: not less than itself
    ],
)
def test_min_p_by_hand(p: float, kept: list[int]):
    result = run(library.min_p, EIGHTHS, jnp.float32(p))
    assert [i for i, x in enumerate(result) if x > -INF] == kept


def test_order_by_hand():
    # Logits log(4), log(2), log(1), -inf at temperature 1/2: weights 16, 4, 1. top_p = 0.9 removes the last
    # (1/21 <= 0.1) and keeps 4/21 (sum 5/21 > 0.1). Before the temperature (4/7, 2/7, 1/7) it would keep all three.
    row = [math.log(4), math.log(2), math.log(1), -INF]
    nothing = np.zeros((1, 1), np.int32)
    batch = Inputs(np.array([row], np.float32), ids=nothing, mask=nothing, new_tokens=nothing[0])
    result = through_process(batch, {"temperature": 0.5, "top_p": 0.9})[0]
    assert np.isneginf(result).tolist() == [False, False, True, True]
    np.testing.assert_allclose(result[:2], [math.log(16), math.log(4)], rtol=1e-6)
