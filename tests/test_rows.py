"""A row's tokens depend on its prompt, its key and the parameters, and on nothing else.

Within one set of compiled shapes that holds bit for bit, log-probabilities included. Where the shape changes
(another batch or length bucket) the arithmetic may round differently: then tokens agree, and log-probabilities
to 1e-4.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen.generation.compiled import Run
from jaxgen.generation.config import resolve
from jaxgen.generation.output import GenerateOutput, collect
from jaxgen.generation.request import Request

OPTIONS = {
    "do_sample": True, "temperature": 1.3, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2,
    "min_new_tokens": 2, "max_new_tokens": 10, "eos_token_id": 7, "pad_token_id": 0, "return_dict_in_generate": True,
    "seed": 3,
}  # fmt: skip
BATCH = 4  # a bucket, so that every batch of 4 shares its shape
prompts = st.lists(st.integers(0, 96), min_size=1, max_size=14)
batches = st.lists(prompts, min_size=BATCH, max_size=BATCH)
few = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def model(reference_model):
    return reference_model("window_8")


def padded(rows: list[list[int]], side: str, extra: int, filler: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows as a table and its mask: padded left or right, or with holes in front of every token while they last."""
    width = max(map(len, rows)) + extra
    ids, mask = np.full((len(rows), width), filler), np.zeros((len(rows), width), int)
    for row, tokens in enumerate(rows):
        space = width - len(tokens)
        columns = {
            "left": np.arange(space, width),
            "right": np.arange(len(tokens)),
            "holes": np.minimum(2 * np.arange(len(tokens)) + 1, np.arange(len(tokens)) + space),
        }[side]
        ids[row, columns], mask[row, columns] = tokens, 1
    return ids, mask


def rows_of(model, ids, mask, row_ids, **options) -> list[tuple[list[int], Any, Any, str]]:
    """Per row: new tokens, both log-probabilities to the bit, and how it ended."""
    output = model.generate(ids, mask, row_ids=row_ids, **{**OPTIONS, **options})
    assert isinstance(output, GenerateOutput)
    return [
        (
            output.sequences[row, ids.shape[1] :][: output.lengths[row]].tolist(),
            output.logprobs[row, : output.lengths[row]].tobytes(),
            output.model_logprobs[row, : output.lengths[row]].tobytes(),
            output.finish_reason[row],
        )
        for row in range(len(ids))
    ]


@few
@given(batches, st.permutations(range(BATCH)), st.sampled_from(["left", "right", "holes"]), st.integers(0, 9))
def test_order_and_padding(model, rows, order, side, extra):
    names = [f"row {index}" for index in range(BATCH)]
    expected = rows_of(model, *padded(rows, "left", 0), names)
    shuffled = [rows[index] for index in order]
    result = rows_of(model, *padded(shuffled, side, extra, filler=96), [names[index] for index in order])
    assert result == [expected[index] for index in order]


@few
@given(batches, batches)
def test_neighbours(model, rows, others):
    expected = rows_of(model, *padded(rows, "left", 0), [10, 11, 12, 13])
    mixed = [rows[0], *others[1:]]
    assert rows_of(model, *padded(mixed, "left", 0), [10, 7, 8, 9])[0] == expected[0]


@few
@given(batches)
def test_alone_and_in_a_batch(model, rows):
    together = rows_of(model, *padded(rows, "left", 0), None)
    for index in range(BATCH):
        alone = rows_of(model, np.array([rows[index]]), None, [index])[0]
        assert alone[0] == together[index][0]
        assert alone[3] == together[index][3]
        for own, shared in zip(alone[1:3], together[index][1:3], strict=True):
            np.testing.assert_allclose(np.frombuffer(own, np.float32), np.frombuffer(shared, np.float32), atol=1e-4)


@few
@given(batches, st.lists(st.integers(1, 10), max_size=4))
def test_chunking(model, rows, stops):
    """The loop may be left and entered again anywhere."""
    ids, mask = padded(rows, "left", 0)
    expected = rows_of(model, ids, mask, None)
    request = Request.read(model, ids, mask, resolve({k: v for k, v in OPTIONS.items() if k != "seed"}, None,
                           model.generation_config), seed=OPTIONS["seed"])  # fmt: skip
    run = Run(model, request)
    for until in sorted(stops):
        run.advance(until)
    output = collect(model, run.advance(), request)
    assert isinstance(output, GenerateOutput)
    for row in range(BATCH):
        count = output.lengths[row]
        assert output.sequences[row, ids.shape[1] :][:count].tolist() == expected[row][0]
        assert output.logprobs[row, :count].tobytes() == expected[row][1]


@few
@given(batches, st.integers(3, 10))
def test_another_limit(model, rows, limit):
    """max_new_tokens cuts a row off, and changes nothing before (min_new_tokens does not reach that far)."""
    ids, mask = padded(rows, "left", 0)
    wholes, cuts = rows_of(model, ids, mask, None), rows_of(model, ids, mask, None, max_new_tokens=limit)
    for whole, cut in zip(wholes, cuts, strict=True):
        assert cut[0] == whole[0][:limit]
        assert cut[1] == whole[1][: 4 * limit]
        assert cut[2] == whole[2][: 4 * limit]


def test_the_same_prompt_twice_gets_different_noise(model):
    ids = np.array([[5, 6, 7]] * BATCH)
    results = rows_of(model, ids, None, None, temperature=5.0)
    assert len({tuple(row[0]) for row in results}) > 1
    same_id = rows_of(model, ids, None, [1, 1, 1, 1], temperature=5.0)
    assert all(row == same_id[0] for row in same_id)
