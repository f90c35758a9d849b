"""The logits processors against numbers worked out by hand, mostly over four tokens.

Every case runs through `chain_of`, as `generate` does; tests/oracle compares the same with transformers.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial

from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.processors import watermark
from jaxgen.generation.processors.chain import chain_of
from jaxgen.generation.processors.constraint import AllowedTokens, host_errors
from jaxgen.generation.processors.select import largest, ordered_keys
from jaxgen.generation.processors.watermark import WatermarkDetector, WatermarkingConfig
from tests.helpers import assert_same, floats, processed, rows_of, run, some_slow, traces
from tests.reference import filters
from tests.reference.filters import EOS
from tests.reference.read import read

INF = math.inf


def sampled(options: dict[str, Any], row: list[float], **chain_options: Any) -> list[float]:
    """One row through sampling filters."""
    return processed({"do_sample": True, **options}, [row], **chain_options)[0]


def kept(row: list[float]) -> list[int]:
    return [i for i, x in enumerate(row) if x > -INF]


# What looks back at the row's tokens


def test_repetition_penalty_by_hand():
    # Tokens 0, 1 and 3 are held: 2 / 2 = 1, -2 * 2 = -4, 0 stays 0. Token 2 only stands behind the end: 3 stays.
    rows = rows_of([[3, 0, 1, 0], [2]], garbage=2)
    assert processed({"repetition_penalty": 2.0}, [[2, -2, 3, 0]] * 2, rows) == [[1, -4, 3, 0], [2, -2, 1.5, 0]]


def test_encoder_repetition_penalty_by_hand():
    # The prompt is tokens 0 and 1; 3 was generated. The penalty is 1/2: 2 / 0.5 = 4, -2 * 0.5 = -1.
    rows = rows_of([[0, 1, 3]], new_tokens=[1])
    assert processed({"encoder_repetition_penalty": 2.0}, [[2, -2, 3, 1]], rows) == [[4, -1, 3, 1]]


def test_frequency_and_presence_penalties_by_hand():
    # The prompt is 0 0 1; then came 1, 3, 3, and in the second row nothing. What stands behind the end is no token.
    rows = rows_of([[0, 0, 1, 1, 3, 3], [3, 3, 1]], new_tokens=[3, 0], garbage=2)
    logits = [[1, 1, 1, -1]] * 2
    assert processed({"frequency_penalty": 0.5}, logits, rows) == [[1, 0.5, 1, -2], [1, 1, 1, -1]]
    assert processed({"presence_penalty": 0.25}, logits, rows) == [[1, 0.75, 1, -1.25], [1, 1, 1, -1]]
    assert processed({"presence_penalty": -2, "frequency_penalty": 1}, logits, rows)[0] == [1, 2, 1, -1]
    # Behind the repetition penalty and before the temperature, as in vLLM: (1 / 2 - 0.5) / 0.1, (-1 * 2 - 1) / 0.1.
    both = {"repetition_penalty": 2.0, "frequency_penalty": 0.5, "temperature": 0.1, "do_sample": True}
    np.testing.assert_allclose(processed(both, logits, rows)[0], [5, 0, 10, -30], rtol=1e-6, atol=1e-6)


def test_penalties_of_counts_as_openai_defines_them():
    """logit - count * frequency - (count > 0) * presence, in numpy."""
    rng = np.random.default_rng(0)
    prompts, news = rng.integers(1, 5, 6), rng.integers(0, 8, 6)
    histories = [rng.integers(0, 5, length).tolist() for length in prompts + news]
    logits = rng.normal(size=(6, 5)).astype(np.float32)
    rows = rows_of(histories, new_tokens=news.tolist(), slots=12)
    counts = np.stack([np.bincount(h[p:], minlength=5) for h, p in zip(histories, prompts, strict=True)])
    found = processed({"frequency_penalty": 0.7, "presence_penalty": -0.3}, logits, rows)
    np.testing.assert_allclose(found, logits - counts * 0.7 + (counts > 0) * 0.3, rtol=1e-5, atol=1e-6)


def test_sequence_bias_by_hand():
    # (1, 2) -> 3 matches the first row's end; (2,) -> 3 matches both; token 0 always gets 5; the last one is
    # longer than any row here.
    bias = {(1, 2, 3): 10.0, (2, 3): 1.0, (0,): 5.0, (0, 0, 0, 0, 0, 0, 1): 7.0}
    rows = rows_of([[0, 1, 2], [2]])
    assert processed({"sequence_bias": bias}, [[1, 1, 1, 1]] * 2, rows) == [[6, 1, 1, 12], [6, 1, 1, 2]]


def test_sequence_bias_does_not_see_tokens_before_the_row():
    # (1, 1) -> 3 needs two tokens; the second row has them.
    rows = rows_of([[1], [1, 1]])
    assert processed({"sequence_bias": {(1, 1, 3): 4.0}}, [[1, 1, 1, 1]] * 2, rows) == [[1, 1, 1, 1], [1, 1, 1, 5]]


def test_bad_words_by_hand():
    # Token 3 is banned after 1 2, token 1 always; token 2 ends the text, so its entry is dropped.
    rows = rows_of([[1, 2], [2, 2], [1, 2, 0]])
    result = processed({"bad_words_ids": [[1, 2, 3], [1], [2]], "eos_token_id": 2}, [[1, 1, 1, 1]] * 3, rows)
    assert result == [[1, -INF, 1, -INF], [1, -INF, 1, 1], [1, -INF, 1, 1]]


def test_bad_words_that_are_all_eos_are_refused():
    with pytest.raises(JaxgenError, match="end-of-sequence tokens only"):
        chain_of(GenerationConfig(bad_words_ids=[[2]], eos_token_id=2), 4)


@pytest.mark.parametrize(
    ("size", "history", "banned"),
    [
        (1, [2, 0], [0, 2]),  # every token that is there
        (2, [0, 1, 0, 2, 0], [1, 2]),  # the row ends in 0, which 1 and 2 have followed
        (2, [0, 1, 2], []),  # 2 is new
        (3, [0, 1, 3, 0, 1], [3]),
        (3, [1, 1], []),  # no three tokens yet
        (3, [1, 1, 1], [1]),  # the window may overlap the end
        (8, [0, 1, 2], []),  # longer than the row
    ],
)
def test_no_repeat_ngram_by_hand(size: int, history: list[int], banned: list[int]):
    # Behind the end stands 3: it must not be taken for a token, and not be found by wrapping around the front.
    result = processed({"no_repeat_ngram_size": size}, [[1, 1, 1, 1]], rows_of([history], garbage=3))[0]
    assert [i for i, x in enumerate(result) if x == -INF] == banned


def test_encoder_no_repeat_ngram_by_hand():
    # The prompt is 0 1 2; 0 3 were generated, then 0 again: only what followed 0 in the prompt is banned.
    rows = rows_of([[0, 1, 2, 0, 3, 0]], new_tokens=[3])
    assert processed({"encoder_no_repeat_ngram_size": 2}, [[1, 1, 1, 1]], rows) == [[1, -INF, 1, 1]]


# What looks at the length


def test_min_length_by_hand():
    rows = rows_of([[0, 0], [0, 0, 0]], new_tokens=[0, 2])
    result = processed({"min_length": 3, "eos_token_id": [1, 3]}, [[1, 1, 1, 1]] * 2, rows)
    assert result == [[1, -INF, 1, -INF], [1, 1, 1, 1]]


def test_min_new_tokens_by_hand():
    # Fillers of the list of ids must not mean the last token.
    rows = rows_of([[0, 0], [0, 0, 0]], new_tokens=[1, 2])
    result = processed({"min_new_tokens": 2, "eos_token_id": 1}, [[1, 1, 1, 1]] * 2, rows)
    assert result == [[1, -INF, 1, 1], [1, 1, 1, 1]]


def test_lengths_without_eos_do_nothing():
    assert chain_of(GenerationConfig(min_length=3, min_new_tokens=3), 4) == ()


def test_forced_bos_by_hand():
    rows = rows_of([[0], [0, 0]])
    assert processed({"forced_bos_token_id": 2}, [[1, 1, 1, 1]] * 2, rows) == [[-INF, -INF, 0, -INF], [1, 1, 1, 1]]


def test_forced_eos_by_hand():
    # The first row has room for one more token, the second for two.
    rows = rows_of([[0, 0], [0, 0]], max_lengths=[3, 4])
    result = processed({"forced_eos_token_id": [1, 2]}, [[1, 1, 1, 1]] * 2, rows)
    assert result == [[-INF, 0, 0, -INF], [1, 1, 1, 1]]


def test_exponential_decay_by_hand():
    # Two tokens are free. The fourth new token is two past that: factor 3**2 - 1 = 8; 0.5 + 8 * 0.5, -0.5 + 8 * 0.5.
    rows = rows_of([[0] * 5, [0] * 3, [0] * 5], new_tokens=[4, 2, 4])
    options = {"exponential_decay_length_penalty": (2, 3.0), "eos_token_id": [0, 1]}
    result = processed(options, [[0.5, -0.5, 1, 1], [0.5, -0.5, 1, 1], [-INF, 0, 1, 1]], rows)
    np.testing.assert_allclose(result, [[4.5, 3.5, 1, 1], [0.5, -0.5, 1, 1], [-INF, 0, 1, 1]], rtol=1e-6)


def test_exponential_decay_stays_finite():
    options = {"exponential_decay_length_penalty": (0, 1e30), "eos_token_id": 1}
    result = processed(options, [[1, 2, 3, 4]], rows_of([[0] * 6], new_tokens=[5]))
    assert result == [[1, float(np.finfo(np.float32).max), 3, 4]]


def test_exponential_decay_needs_eos():
    with pytest.raises(JaxgenError, match="eos_token_id is not set"):
        chain_of(GenerationConfig(exponential_decay_length_penalty=(2, 3.0)), 4)


def test_suppress_tokens_by_hand():
    assert processed({"suppress_tokens": [3, 0]}, [[1, 1, 1, 1]]) == [[-INF, 1, 1, -INF]]


def test_begin_suppress_tokens_by_hand():
    rows = rows_of([[0], [0, 0], [0, 0]], new_tokens=[0, 0, 1])
    assert processed({"begin_suppress_tokens": [3]}, [[1, 1, 1, 1]] * 3, rows) == [
        [1, 1, 1, -INF],
        [1, 1, 1, -INF],
        [1, 1, 1, 1],
    ]


def test_begin_suppress_tokens_waits_for_a_forced_bos():
    # A prompt of one token gets the forced BOS first: its text begins one later. A longer prompt's does not.
    rows = rows_of([[0], [0, 0], [0, 0]], new_tokens=[0, 1, 0])
    assert processed({"begin_suppress_tokens": [3], "forced_bos_token_id": 3}, [[1, 1, 1, 1]] * 3, rows) == [
        [-INF, -INF, -INF, 0],
        [1, 1, 1, -INF],
        [1, 1, 1, -INF],
    ]


# What the caller knows


def user_bias(amount: jax.Array, tokens: jax.Array, lengths: jax.Array, logits: jax.Array) -> jax.Array:
    newest = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)
    return logits + amount * (jnp.arange(logits.shape[1]) == newest)


def test_user_processor_runs_before_the_filters():
    # The row ends in 2, whose logit becomes 1 + 9 = 10. The temperature halves that; only then comes top_k.
    user = [Partial(user_bias, np.float32(9))]
    result = processed(
        {"do_sample": True, "temperature": 2.0, "top_k": 1}, [[4, 3, 1, 0]], rows_of([[1, 2]]), user=user
    )
    assert result == [[-INF, -INF, 5, -INF]]


def test_user_processor_of_another_shape_is_refused():
    with pytest.raises(JaxgenError, match=r"returned shape \(1, 2\); expected \(1, 4\)"):
        processed({}, [[1, 1, 1, 1]], user=[lambda tokens, lengths, logits: logits[:, :2]])


@pytest.mark.parametrize("user", [lambda tokens, lengths, logits: logits, [3], 3])
def test_user_processors_must_be_a_list_of_functions(user: Any):
    with pytest.raises(JaxgenError, match=r"logits_processor.* must be a"):
        chain_of(GenerationConfig(), 4, user=user)


def after(prompt: int, ids: np.ndarray) -> list[int]:
    """HF's form: after token t only t and the prompt's number may come."""
    assert isinstance(prompt, int)
    assert ids.ndim == 1
    return [int(ids[-1]), prompt]


def test_prefix_allowed_tokens_by_hand():
    rows = rows_of([[3], [0, 2], [1]])
    result = processed({}, [[5, 6, 7, 8], [5, 6, 7, 8], [5, -INF, -INF, 8]], rows, prefix_allowed_tokens_fn=after)
    # In the last row both allowed tokens are gone already: it chooses evenly between them.
    assert result == [[5, -INF, -INF, 8], [-INF, 6, 7, -INF], [-INF, 0, 0, -INF]]


def test_prefix_allowed_tokens_of_beams():
    # Two beams of prompt 0, of which one is dead, and two of prompt 1, which both are.
    rows = rows_of([[3], [1], [2], [2]])
    rows.prompts = jnp.array([0, 0, 1, 1], jnp.int32)
    logits = [[5, 6, 7, 8], [-INF, -INF, 7, 8], [5, -INF, -INF, 8], [5, -INF, -INF, 8]]
    expected = [[5, -INF, -INF, 8], [-INF] * 4, [-INF, 0, 0, -INF], [-INF, 0, 0, -INF]]
    assert processed({}, logits, rows, prefix_allowed_tokens_fn=after, beams=True) == expected


def test_only_running_rows_are_asked():
    asked = []

    def function(prompt: int, ids: np.ndarray) -> list[int]:
        asked.append((prompt, ids.tolist()))
        return [1]

    rows = rows_of([[3, 2], [0]])
    rows.running = jnp.array([True, False])
    result = processed({}, [[5, 6, 7, 8]] * 2, rows, prefix_allowed_tokens_fn=function)
    assert result == [[-INF, 6, -INF, -INF], [5, 6, 7, 8]]
    assert asked == [(0, [3, 2])]


class AccidentError(Exception):
    pass


def accident(prompt: int, ids: np.ndarray) -> list[int]:
    raise AccidentError("in the user's own function")


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda prompt, ids: [1] if prompt == 0 else [], JaxgenError, "allowed no token for row 1"),
        (lambda prompt, ids: [4], JaxgenError, "token 4 for row 0, outside the model's vocabulary of 4"),
        (lambda prompt, ids: [[1]], JaxgenError, "expected a list of token ids"),
        (accident, AccidentError, "in the user's own function"),
    ],
)
def test_errors_of_a_host_function_are_its_own(function: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message), host_errors():
        processed({}, [[1, 1, 1, 1]] * 2, prefix_allowed_tokens_fn=function)


def test_other_errors_pass_unchanged():
    with pytest.raises(KeyError, match="other"), host_errors():
        raise KeyError("other")


def only_the_next(step: jax.Array, tokens: jax.Array, length: jax.Array) -> jax.Array:
    return jnp.arange(4) == tokens[length - 1] + step


def test_allowed_tokens_by_hand():
    rows = rows_of([[1], [3, 0]])
    logits = [[5, 6, 7, 8], [5, -INF, 7, 8]]
    for step, expected in ((1, [[-INF, -INF, 7, -INF], [-INF, 0, -INF, -INF]]), (2, None)):
        function = AllowedTokens(Partial(only_the_next, np.int32(step)))
        result = processed({}, logits, rows, prefix_allowed_tokens_fn=function)
        assert result == (expected or [[-INF, -INF, -INF, 8], [-INF, -INF, 7, -INF]])


def test_allowed_tokens_of_another_form_are_refused():
    with pytest.raises(JaxgenError, match=r"AllowedTokens returned float32 \[4\] for a row; expected bool \[4\]"):
        processed({}, [[1, 1, 1, 1]], prefix_allowed_tokens_fn=AllowedTokens(lambda tokens, length: jnp.ones(4)))


def test_a_constraint_must_be_a_function():
    with pytest.raises(JaxgenError, match="prefix_allowed_tokens_fn=3 must be a function"):
        chain_of(GenerationConfig(), 4, prefix_allowed_tokens_fn=3)
    with pytest.raises(JaxgenError, match="AllowedTokens=3 must be a function"):
        AllowedTokens(3)  # pyright: ignore[reportArgumentType]


# What looks at the logits alone


def test_remove_invalid_values_by_hand():
    most = float(np.finfo(np.float32).max)
    assert processed({"remove_invalid_values": True}, [[math.nan, INF, -INF, 2]]) == [[0, most, -most, 2]]


def test_renormalize_by_hand():
    result = processed({"renormalize_logits": True}, [[math.log(2), math.log(6), -INF, -INF]])
    np.testing.assert_allclose(result, [[math.log(1 / 4), math.log(3 / 4), -INF, -INF]], rtol=1e-6)


def test_temperature_by_hand():
    assert sampled({"temperature": 0.5}, [1, -2, 0, -INF]) == [2, -4, 0, -INF]


def test_filters_need_sampling():
    options = {"temperature": 0.5, "top_k": 1, "top_p": 0.1, "min_p": 0.9, "top_h": 0.1, "typical_p": 0.1}
    assert chain_of(GenerationConfig(**options, epsilon_cutoff=0.5, eta_cutoff=0.5), 4) == ()


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, [-INF, 4, -INF, -INF]),
        # The second largest is 3, twice: a tie of the k-th value is kept whole, so three stay.
        (2, [3, 4, 3, -INF]),
        (3, [3, 4, 3, -INF]),
        (4, [3, 4, 3, 1]),
        (9, [3, 4, 3, 1]),  # more than there are
        (5000, [3, 4, 3, 1]),  # beyond the bounds: counted
    ],
)
def test_top_k_by_hand(k: int, expected: list[float]):
    assert sampled({"top_k": k}, [3, 4, 3, 1]) == expected


@pytest.mark.parametrize("k", [1, 2, 1025, 1500, 2999])
def test_top_k_sorted_and_counted_agree_with_numpy(k: int):
    row = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    row[:5] = [0.0, -0.0, -INF, row[9], row[10]]
    expected = np.where(row < np.sort(row)[-k], -INF, row)
    np.testing.assert_array_equal(floats(sampled({"top_k": k}, row.tolist())), expected)


# Probabilities 1/8, 1/2, 1/4, 1/8: as logits, their logarithms.
EIGHTHS = [math.log(1 / 8), math.log(1 / 2), math.log(1 / 4), math.log(1 / 8)]


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        # From the least likely up, the running sums are 1/8, 2/8, 4/8, 8/8; a token goes where that is <= 1 - p.
        (1e-9, [1]),  # all sums are <= 1, but the most likely one always stays
        (0.4, [1]),  # 1 - p = 0.6 removes 1/8, 2/8, 4/8
        (0.6, [1, 2]),  # 1 - p = 0.4 removes 1/8, 2/8: the token that crosses p stays
        # 1 - p = 0.2 removes one of two equal tokens: the sums of 1/8 are at 1/8 and 2/8. The first index goes.
        (0.8, [1, 2, 3]),
        (0.9, [0, 1, 2, 3]),  # 1 - p = 0.1 removes nothing
    ],
)
def test_top_p_by_hand(p: float, expected: list[int]):
    result = sampled({"top_p": p}, EIGHTHS)
    assert kept(result) == expected
    np.testing.assert_array_equal(floats([result[i] for i in expected]), floats([EIGHTHS[i] for i in expected]))


@pytest.mark.parametrize(("p", "left"), [(1e-9, 1), (0.1, 13), (0.5, 64), (0.995, 128)])
def test_top_p_of_equal_logits_removes_the_first_ones(p: float, left: int):
    # 128 tokens of 1/128 each: those go whose running sum is at most 1 - p, so ceil(128 p) stay.
    assert kept(sampled({"top_p": p}, [1.5] * 128)) == list(range(128 - left, 128))


def test_top_p_takes_minus_zero_for_zero():
    # Weights 1, 1, 1, 1: the two that go at p = 0.5 are the first, whatever the sign of their zero.
    assert kept(sampled({"top_p": 0.5}, [0.0, -0.0, -0.0, 0.0])) == [2, 3]


def by_sorting(row: np.ndarray, p: float, keep: int) -> np.ndarray:
    """top_p as it is defined: a stable sort, then a running sum. In float64."""
    order = np.argsort(row, kind="stable")
    weights = np.exp(row[order].astype(np.float64) - row.max())
    gone = np.cumsum(weights / weights.sum()) <= 1 - p
    gone[-keep:] = False
    return np.where(gone[np.argsort(order)], -INF, row)


@pytest.mark.slow
def test_top_p_of_large_vocabularies_equals_a_stable_sort():
    # A nucleus of a few tokens, of about a thousand, and one of 2000 equals that ends among them; bfloat16 ties; and
    # 100 likely tokens above 2900 equals, which are neither all among the likeliest 256 nor all beyond.
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((5, 3000)).astype(np.float32)
    logits[0] *= 6
    logits[2, :2000] = 5
    logits[3] = floats(jnp.asarray(2 * logits[3], jnp.bfloat16))
    logits[4] = -4.4
    logits[4, 1000:1100] = np.linspace(0, 0.1, 100)
    expected = np.stack([by_sorting(row, 0.7, keep=1) for row in logits])
    assert [int(n) for n in np.isfinite(expected).sum(axis=1)] == pytest.approx([6, 900, 1408, 200, 93], rel=0.6)
    options = {"do_sample": True, "top_p": 0.7}
    np.testing.assert_array_equal(floats(processed(options, logits)), expected)
    for row in range(5):  # alone, without neighbours that need the longer search
        np.testing.assert_array_equal(floats(processed(options, logits[row : row + 1])), expected[row : row + 1])


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    # Powers of two as weights, so that sums are exact and equal logits are frequent.
    exponents=st.lists(st.integers(0, 6), min_size=16, max_size=16),
    p=st.floats(0.01, 0.99),
    beams=st.booleans(),
)
def test_top_p_equals_a_stable_sort(exponents: list[int], p: float, beams: bool):
    row = np.log(np.exp2(np.array(exponents, np.float64))).astype(np.float32)
    total = np.exp2(exponents).sum()
    if abs(np.round((1 - p) * total) - (1 - p) * total) < 1e-3:  # on the edge of a token
        return
    result = sampled({"top_p": p}, row.tolist(), beams=beams)
    np.testing.assert_array_equal(floats(result), by_sorting(row, p, keep=2 if beams else 1))


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        # The largest is 1/2: the threshold is p / 2.
        (0.2, [0, 1, 2, 3]),  # 0.1
        (0.4, [1, 2]),  # 0.2
        (0.6, [1]),  # 0.3
        (1.0, [1]),  # 1/2: not less than itself
    ],
)
def test_min_p_by_hand(p: float, expected: list[int]):
    assert kept(sampled({"min_p": p}, EIGHTHS)) == expected


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        # In bits the entropy is 1/2 + 1/2 + 3/8 + 3/8 = 7/4; from the most likely down the running parts are
        # 2/7, 4/7, 5.5/7, 7/7 of it. Of the two tokens of 1/8 the first one comes first.
        (0.1, [1]),  # always one
        (0.5, [1]),
        (0.6, [1, 2]),
        (0.8, [0, 1, 2]),
    ],
)
def test_top_h_by_hand(share: float, expected: list[int]):
    assert kept(sampled({"top_h": share}, EIGHTHS)) == expected


def test_top_h_considers_100_tokens():
    assert kept(sampled({"top_h": 0.999}, [*range(150, 0, -1)]))[-1] < 100
    assert len(kept(sampled({"top_h": 0.985}, [1.0] * 150))) == 98


@pytest.mark.parametrize(
    ("mass", "expected"),
    [
        # Surprise in bits 3, 1, 2, 3; entropy 7/4; distances 5/4, 3/4, 1/4, 5/4. In that order: tokens 2, 1, then
        # both 0 and 3, whose distances are the same. Running sums 1/4, 3/4, 7/8, 1.
        (0.2, [2]),
        (0.3, [1, 2]),
        (0.7, [1, 2]),
        (0.8, [0, 1, 2, 3]),  # equals of the last one are kept
        (0.999, [0, 1, 2, 3]),
    ],
)
def test_typical_p_by_hand(mass: float, expected: list[int]):
    assert kept(sampled({"typical_p": mass}, EIGHTHS)) == expected


@pytest.mark.parametrize(("cutoff", "expected"), [(0.1, [0, 1, 2, 3]), (0.2, [1, 2]), (0.3, [1]), (0.9, [1])])
def test_epsilon_cutoff_by_hand(cutoff: float, expected: list[int]):
    assert kept(sampled({"epsilon_cutoff": cutoff}, EIGHTHS)) == expected


@pytest.mark.parametrize(
    ("cutoff", "expected"),
    [
        # exp(-entropy) = 2 ** -1.75 = 0.297, so eta = min(e, 0.297 sqrt(e)).
        (0.04, [0, 1, 2, 3]),  # min(0.04, 0.0595)
        (0.16, [0, 1, 2, 3]),  # min(0.16, 0.119): the epsilon cutoff would remove 1/8
        (0.36, [1, 2]),  # min(0.36, 0.178)
        (0.81, [1]),  # min(0.81, 0.268)
    ],
)
def test_eta_cutoff_by_hand(cutoff: float, expected: list[int]):
    assert kept(sampled({"eta_cutoff": cutoff}, EIGHTHS)) == expected


@pytest.mark.parametrize(
    "options",
    some_slow(
        [{"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}, {"typical_p": 0.01}, {"epsilon_cutoff": 0.9}],
        lambda options: "top_p" not in options,
    ),
)
def test_beams_keep_one_more_than_there_are_ends(options: dict[str, float]):
    # Without equal logits, so that nothing else decides which ones stay.
    row = [math.log(x) for x in (0.1, 0.5, 0.25, 0.15)]
    for eos, number in ((None, 2), ((1, 2), 3)):
        assert len(kept(sampled({**options, "eos_token_id": eos}, row, beams=True))) == number
    assert len(kept(sampled(options, row))) == 1


def test_order_by_hand():
    # Logits log(4), log(2), log(1), -inf at temperature 1/2: weights 16, 4, 1. top_p = 0.9 removes the last
    # (1/21 <= 0.1) and keeps 4/21 (sum 5/21 > 0.1). Before the temperature (4/7, 2/7, 1/7) it would keep all three.
    result = sampled({"temperature": 0.5, "top_p": 0.9}, [math.log(4), math.log(2), math.log(1), -INF])
    assert kept(result) == [0, 1]
    np.testing.assert_allclose(result[:2], [math.log(16), math.log(4)], rtol=1e-6)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=8, max_size=8))
def test_keys_are_ordered_as_their_floats(values: list[float]):
    x = np.array(values, np.float32)
    keys = np.asarray(ordered_keys(jnp.asarray(x)[None]))[0]
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)  # a CPU may flush what is smaller
    assert ((x[:, None] < x) <= (keys[:, None] <= keys)).all()
    normal = x != 0
    np.testing.assert_array_equal((x[:, None] < x)[normal][:, normal], (keys[:, None] < keys)[normal][:, normal])


@pytest.mark.parametrize("wanted", [0, 1, 5, 2**31, 2**32 - 1])
def test_largest_finds_every_number(wanted: int):
    number = jnp.array([wanted, 7], jnp.uint32)
    assert largest(lambda x: x <= number, 2).tolist() == [wanted, 7]


@pytest.mark.parametrize("name", filters.SETTINGS)
def test_committed_results_of_hf(name: str):
    """The light copy of what tests/oracle compares live."""
    batch, options = filters.inputs(filters.SEED), filters.SETTINGS[name]
    rows = rows_of([batch.history(row).tolist() for row in range(8)], batch.new_tokens.tolist(), slots=32)
    actual = floats(processed({**options, "do_sample": True, "eos_token_id": EOS}, batch.logits, rows))
    assert not filters.undecided(batch.logits, options).any()
    assert_same(actual, read().filtered[name], ties="top_p" in options)


# Chains


EVERYTHING: dict[str, Any] = {
    "sequence_bias": {(1, 2): 1.0, (3,): -1.0},
    "encoder_repetition_penalty": 1.1,
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 4,
    "bad_words_ids": [[1, 2, 3], [9]],
    "min_length": 5,
    "min_new_tokens": 3,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 7,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (2, 1.1),
    "suppress_tokens": [11, 12],
    "begin_suppress_tokens": [13],
    "do_sample": True,
    "temperature": 0.7,
    "top_h": 0.9,
    "top_k": 30,
    "top_p": 0.9,
    "min_p": 0.01,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.002,
    "watermarking_config": WatermarkingConfig(),
    "renormalize_logits": True,
    "eos_token_id": 7,
}
OTHERS: dict[str, Any] = {
    "sequence_bias": {(4, 5): 2.0, (6,): -3.0, (8,): 1.0},
    "encoder_repetition_penalty": 0.9,
    "repetition_penalty": 0.8,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 5,
    "bad_words_ids": [[1, 4, 3], [8], [10]],
    "min_length": 50,
    "min_new_tokens": 1,
    "forced_bos_token_id": 6,
    "forced_eos_token_id": [1, 2],
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (1, 1.5),
    "suppress_tokens": [20],
    "begin_suppress_tokens": [13, 14],
    "do_sample": True,
    "temperature": 1.0,
    "top_h": 0.8,
    "top_k": 50,
    "top_p": 0.5,
    "min_p": 0.1,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.02,
    "watermarking_config": WatermarkingConfig(0.5, 1.0, 42, "lefthash", 3),
    "renormalize_logits": True,
    "eos_token_id": [7, 9],
}


def everything_batch() -> tuple[np.ndarray, list[list[int]]]:
    rng = np.random.default_rng(3)
    return 3 * rng.standard_normal((4, 40)).astype(np.float32), [rng.integers(0, 5, n).tolist() for n in (1, 4, 9, 12)]


def test_other_numbers_compile_nothing():
    logits, histories = everything_batch()
    rows = rows_of(histories, slots=16)
    user = [Partial(user_bias, np.float32(1))]
    first = processed(EVERYTHING, logits, rows, user=user, prefix_allowed_tokens_fn=after)
    before = len(traces)
    second = processed(OTHERS, logits, rows, user=[Partial(user_bias, np.float32(2))], prefix_allowed_tokens_fn=after)
    assert len(traces) == before
    assert first != second
    assert (
        len(chain_of(GenerationConfig(**EVERYTHING), 40)) == len(EVERYTHING) - 3
    )  # do_sample, eos_token_id, and min_length gives way


def test_a_row_does_not_depend_on_its_neighbours_or_free_slots():
    logits, histories = everything_batch()
    options = {**EVERYTHING, "remove_invalid_values": False}
    together = floats(processed(options, logits, rows_of(histories, [0, 1, 2, 3], [2, 9, 10, 13], slots=16)))
    order = [2, 0, 3, 1, 2]
    shuffled = rows_of([histories[i] for i in order], order, [[2, 9, 10, 13][i] for i in order], slots=24, garbage=3)
    np.testing.assert_array_equal(floats(processed(options, logits[order], shuffled)), together[order])
    assert (~np.isneginf(together)).any(axis=1).all()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"sequence_bias": {(1, 4): 1.0}}, "sequence_bias"),
        ({"sequence_bias": {(4, 1): 1.0}}, "sequence_bias"),
        ({"bad_words_ids": [[1], [4]]}, "bad_words_ids"),
        ({"forced_bos_token_id": 4}, "forced_bos_token_id"),
        ({"forced_eos_token_id": [1, 4]}, "forced_eos_token_id"),
        ({"suppress_tokens": [4]}, "suppress_tokens"),
        ({"begin_suppress_tokens": [0, 4]}, "begin_suppress_tokens"),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(options: dict[str, Any], field: str):
    with pytest.raises(JaxgenError, match=f"{field}: token 4 is outside the model's vocabulary of 4 tokens"):
        chain_of(GenerationConfig(**options), 4)


@pytest.mark.parametrize("field", ["forced_bos_token_id", "forced_eos_token_id"])
def test_forced_and_suppressed_at_once_is_refused(field: str):
    with pytest.raises(JaxgenError, match=f"{field}=2 and suppress_tokens contradict"):
        chain_of(GenerationConfig(**{field: 2}, suppress_tokens=[1, 2]), 4)


# Watermarks


def word_by_hand(key: jax.Array, token: int) -> int:
    return int(jax.random.key_data(jax.random.fold_in(key, token // 2))[token % 2])


@pytest.mark.slow
def test_words_are_the_documented_hash():
    key = jax.random.key(15485863, impl="threefry2x32")
    seed = jax.random.fold_in(key, 3)
    assert watermark.words(seed, 5).tolist() == [word_by_hand(seed, token) for token in range(5)]
    assert int(watermark.word(seed, jnp.int32(4))) == word_by_hand(seed, 4)
    config = WatermarkingConfig()
    windows = np.array([[3, 0], [3, 1]], np.int32)
    assert watermark.lefthash_words(config.key_words, windows).tolist() == [word_by_hand(seed, t) for t in (0, 1)]

    # selfhash: the least of the words that the tokens of the window give its last one. It stands in each place once.
    places = set()
    for window in ([5, 4, 2], [4, 5, 2], [9, 8, 3], [3, 1, 6], [1, 3, 6]):
        words = [word_by_hand(jax.random.fold_in(key, token), window[-1]) for token in window]
        places.add(words.index(min(words)))
        seed = jax.random.fold_in(jax.random.fold_in(key, jnp.uint32(2**31)), jnp.uint32(min(words)))
        expected = [word_by_hand(seed, window[-1])]
        assert watermark.selfhash_words(config.key_words, np.array([window], np.int32)).tolist() == expected
    assert places == {0, 1, 2}


def test_colours_never_change():
    """Texts are tested long after they were made: these words are part of the format."""
    key = jax.random.wrap_key_data(jnp.asarray(WatermarkingConfig().key_words), impl="threefry2x32")
    assert watermark.words(jax.random.fold_in(key, 1), 4).tolist() == FIRST_WORDS
    assert watermark.selfhash_words(WatermarkingConfig().key_words, np.array([[1, 2]])).tolist() == SELF_WORD


FIRST_WORDS = [3057855766, 3193621510, 2046876382, 1917308050]
SELF_WORD = [3285265540]


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5])
def test_the_share_of_green_tokens(ratio: float):
    config = WatermarkingConfig(greenlist_ratio=ratio)
    key = jax.random.wrap_key_data(jnp.asarray(config.key_words), impl="threefry2x32")
    green = watermark.words(jax.random.fold_in(key, 9), 20000) < config.threshold
    assert abs(float(green.mean()) - ratio) < 4 * math.sqrt(ratio * (1 - ratio) / 20000)


@pytest.mark.parametrize("scheme", ["lefthash", "selfhash"])
def test_green_tokens_get_the_bias(scheme: str):
    config = WatermarkingConfig(0.5, 3.0, 7, scheme, 2)
    histories = [[4, 1], [1], [0, 2, 3]]
    logits = np.arange(3 * 8).reshape(3, 8).astype(np.float32)
    logits[2, 5] = -INF
    result = floats(processed({"watermarking_config": config}, logits, rows_of(histories, garbage=6)))
    np.testing.assert_array_equal(result[1], logits[1])  # one token is not enough context
    for row in (0, 2):
        windows = np.array([[*histories[row], token] for token in range(8)], np.int32)
        hashes = (watermark.selfhash_words if scheme == "selfhash" else watermark.lefthash_words)(
            config.key_words, windows[:, -2:]
        )
        green = np.asarray(hashes) < config.threshold
        np.testing.assert_array_equal(result[row], np.where(green, logits[row] + 3, logits[row]))
        assert 0 < green.sum() < 8


class Model:
    vocab_size = 1000
    bos_token_id = 1


def watermarked(config: WatermarkingConfig | None, rows: int = 4, length: int = 60) -> np.ndarray:
    """Texts drawn from random logits, evenly likely tokens otherwise."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((rows, 64), np.int32)
    tokens[:, 0], tokens[:, 1:4] = Model.bos_token_id, rng.integers(2, 1000, (rows, 3))
    chain = chain_of(GenerationConfig(watermarking_config=config), Model.vocab_size)
    for position in range(4, length):
        state = rows_of(tokens[:, :position].tolist(), slots=64)
        logits = rng.gumbel(size=(rows, 1000)).astype(np.float32)
        tokens[:, position] = np.asarray(run(chain, jnp.asarray(logits), state)).argmax(axis=1)
    return tokens[:, :length]


@pytest.mark.parametrize("scheme", ["lefthash", "selfhash"])
def test_watermarks_are_found(scheme: str):
    config = WatermarkingConfig(bias=4.0, seeding_scheme=scheme, context_width=1 + (scheme == "selfhash"))
    detector = WatermarkDetector(Model, {**config.to_dict()})
    assert detector(watermarked(config)).tolist() == [True] * 4
    assert detector(watermarked(None)).tolist() == [False] * 4
    assert WatermarkDetector(Model, WatermarkingConfig(hashing_key=1))(watermarked(config)).tolist() == [False] * 4


def green_after(token: int, green: bool) -> int:
    """The smallest token that is green, or not, after `token`."""
    config = WatermarkingConfig()
    windows = np.array([[token, t] for t in range(2, 100)], np.int32)
    colours = np.asarray(watermark.lefthash_words(config.key_words, windows)) < config.threshold
    return int(np.flatnonzero(colours == green)[0]) + 2


def test_z_score_by_hand():
    # Four pairs after BOS: green, green, not, green. z = (3 - 4/4) / sqrt(4 * 1/4 * 3/4) = 2 / sqrt(3/4).
    text = [Model.bos_token_id, 5]
    for green in (True, True, False, True):
        text.append(green_after(text[-1], green))
    result = WatermarkDetector(Model, WatermarkingConfig())([text], z_threshold=2.3, return_dict=True)
    z = 2 / math.sqrt(3 / 4)
    assert (result.num_tokens_scored.tolist(), result.num_green_tokens.tolist()) == ([4], [3])
    assert result.green_fraction.tolist() == [0.75]
    assert result.z_score.tolist() == pytest.approx([z])
    assert result.p_value.tolist() == pytest.approx([math.erfc(z / math.sqrt(2)) / 2])
    assert result.confidence.tolist() == pytest.approx([1 - result.p_value[0]])
    assert result.prediction.tolist() == [True]
    assert WatermarkDetector(Model, WatermarkingConfig())([text], z_threshold=2.4).tolist() == [False]


def test_repeated_ngrams_count_once_when_asked():
    green = green_after(5, True)
    text = [[5, green] * 4 + [5]]  # 4 times 5 -> green and 4 times green -> 5
    back = bool(np.asarray(watermark.lefthash_words(WatermarkingConfig().key_words, np.array([[green, 5]])))[0] < 2**30)
    for ignore, times in ((False, 4), (True, 1)):
        detector = WatermarkDetector(Model, WatermarkingConfig(), ignore_repeated_ngrams=ignore)
        result = detector(text, return_dict=True)
        assert result.num_tokens_scored.tolist() == [2 * times]
        assert result.num_green_tokens.tolist() == [times * (1 + back)]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2, 3], [2, 2, 3]], "row 1 does not begin with BOS"),
        ([[1, 2]], "1 tokens per row without BOS; context_width=1 needs at least one more"),
        ([1, 2, 3], r"shape \(3,\)"),
        ([[2, 1000]], r"input_ids\[0, 1\]=1000 is outside the vocabulary of 1000"),
        ([[2, 3], [2]], "different lengths"),
    ],
)
def test_detector_refuses(ids: Any, message: str):
    with pytest.raises(JaxgenError, match=message):
        WatermarkDetector(Model, WatermarkingConfig())(ids)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"greenlist_ratio": 0.0}, r"greenlist_ratio=0.0 must be a number in \(0, 1\)"),
        ({"greenlist_ratio": 1}, "greenlist_ratio=1 must"),
        ({"bias": INF}, "bias=inf must"),
        ({"hashing_key": 1.5}, "hashing_key=1.5 must"),
        ({"seeding_scheme": "righthash"}, "seeding_scheme='righthash' must be one of 'lefthash', 'selfhash'"),
        ({"context_width": 0}, "context_width=0 must"),
        ({"colour": 1}, "'colour' is not one of its fields"),
        (3, "must be a WatermarkingConfig or a dict"),
    ],
)
def test_watermarking_config_refuses(fields: Any, message: str):
    with pytest.raises(JaxgenError, match=message):
        WatermarkingConfig.from_hf(fields)


def test_synthid_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="SynthID"):
        WatermarkingConfig.from_hf({"ngram_len": 5, "keys": [1, 2]})


def test_watermarking_config_keeps_fields():
    config = WatermarkingConfig(0.5, 1.0, 42, "selfhash", 3)
    assert WatermarkingConfig.from_hf(config.to_dict()) == config
    assert WatermarkingConfig.from_hf(config) is config
    assert WatermarkingConfig(hashing_key=2**32 + 5).key_words.tolist() == [1, 5]
