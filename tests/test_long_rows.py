"""Rows beyond Phi's original context, which rotate otherwise from their first token on, beside rows within it.

Their numbers are compared with transformers in tests/oracle/test_families_oracle.py.
"""

from typing import Any

import numpy as np
import pytest

from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.generation.prompts.contexts import context_of
from tests.family_files import load, written
from tests.helpers import padded, some_slow

SHORT = 24
ROW = np.random.default_rng(3).integers(3, 97, 60).tolist()
OPTIONS: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(written(tmp_path_factory.mktemp("phi"), "phi3, long rows", num_hidden_layers=1, sliding_window=128))


@pytest.mark.slow
def test_rows_of_both_kinds_are_as_they_are_alone(model: Any):
    rows = [ROW[:5], ROW[:40], ROW[:19], ROW[:25]]
    together = model.generate(*padded(rows, "left", 0), max_new_tokens=5, **OPTIONS)[:, -5:]
    for row, new in zip(rows, together, strict=True):
        np.testing.assert_array_equal(model.generate([row], max_new_tokens=5, **OPTIONS)[0, -5:], new)


@pytest.mark.slow
def test_each_step_is_the_pass_over_the_whole_row(model: Any):
    ids = model.generate([ROW[:25]], max_new_tokens=12, **OPTIONS)
    np.testing.assert_array_equal(np.asarray(model(ids).logits)[0, 24:-1].argmax(-1), ids[0, 25:])
    drafted = model.generate([ROW[:25]], max_new_tokens=12, prompt_lookup_num_tokens=3, **OPTIONS)
    np.testing.assert_array_equal(drafted, ids)


@pytest.mark.parametrize("before, after", some_slow([(10, 40), (10, 20), (40, 45), (40, 16)], lambda row: row[0] != 10))
def test_the_past_is_of_use_where_it_rotates_alike(model: Any, before: int, after: int):
    past = model.generate([ROW[:before]], max_new_tokens=2, return_dict_in_generate=True, **OPTIONS).past_key_values
    again = model.generate([ROW[:after]], max_new_tokens=3, past_key_values=past, **OPTIONS)
    np.testing.assert_array_equal(again, model.generate([ROW[:after]], max_new_tokens=3, **OPTIONS))


def test_where_rows_end(model: Any):
    assert [context_of(model.config, length) for length in (1, SHORT, SHORT + 1)] == [SHORT, SHORT, 128]
    assert model.config.to_hf()["max_position_embeddings"] == 128
    assert model.generate([ROW[:20]], **OPTIONS).shape == (1, SHORT)
    both = padded([ROW[:40], ROW[:20]], "left", 0)
    for options in ({"max_new_tokens": 5}, {"max_length": 50}):
        with pytest.raises(JaxgenError, match=r"a prompt of 20 tokens and .* at most 24: .*; at most 4 new tokens fit"):
            model.generate(*both, **options, **OPTIONS)
    with pytest.raises(JaxgenError, match=r"the prompt has 24 tokens; the model's context of 24 .* leaves no room"):
        model.generate([ROW[:SHORT]], **OPTIONS)


def test_what_reads_in_pieces_is_refused(model: Any):
    with pytest.raises(UnsupportedError, match="prefill_chunk_size or strict: row 1 has 30 tokens, and beyond 24"):
        model.generate(*padded([ROW[:5], ROW[:30]], "left", 0), max_new_tokens=2, prefill_chunk_size=8, **OPTIONS)
    with pytest.raises(JaxgenError, match=r"the 23 tokens of row 0 and its 3 new ones exceed .* of 24 tokens"):
        model.generate([ROW[:30]], max_new_tokens=3, guidance_scale=2.0, negative_prompt_ids=[ROW[:23]], **OPTIONS)
