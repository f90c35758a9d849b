"""The forms of a computation for different platforms agree, each with float64 numpy: CPU tests run only one of them."""

import numpy as np
import pytest

from jaxgen import attention, linear

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("form", [linear._weight_first, linear._weight_second])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5), (2, 4, 5)])
def test_linear(form, shape: tuple[int, ...]):
    x, weight = RANDOM.normal(size=shape).astype(np.float32), RANDOM.normal(size=(7, 5)).astype(np.float32)
    result = np.asarray(form(*map(linear.jnp.asarray, (x, weight))))
    np.testing.assert_allclose(result, x.astype(np.float64) @ weight.astype(np.float64).T, atol=1e-5)


@pytest.mark.parametrize("form", [attention._attend_by_products, attention._attend_by_sums])
def test_attention_to_slots(form):
    queries = RANDOM.normal(size=(3, 2, 4, 8)).astype(np.float32)
    keys, values = RANDOM.normal(size=(2, 3, 2, 6, 8)).astype(np.float32)
    visible = np.array([[1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0]], bool)
    result = np.asarray(form(*map(attention.jnp.asarray, (queries, keys, values, visible)), attention.Scoring(8**-0.5)))
    for row, head, group in np.ndindex(3, 2, 4):
        seen = np.flatnonzero(visible[row])
        scores = keys[row, head, seen].astype(np.float64) @ queries[row, head, group] / np.sqrt(8)
        weights = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(result[row, head, group], weights @ values[row, head, seen], atol=1e-5)
