"""`prepare` lays a call out for `model.generate` and for the pure function; a search is chosen once, and is static."""

import jax
import numpy as np
import pytest

import jaxgen
from jaxgen import GenerationConfig
from jaxgen.generation.loop import PlainSearch
from jaxgen.generation.options.config import resolve
from jaxgen.generation.prepare import prepare
from jaxgen.generation.prompts.layout import SMALLEST_PROMPT, SMALLEST_TOTAL
from jaxgen.generation.searches.beam import BeamSearch
from jaxgen.generation.searches.speculate import Speculation

# Sizes that are buckets already: then both layouts are the same to the last number.
IDS = np.arange(3 * SMALLEST_PROMPT, dtype=np.int32).reshape(3, SMALLEST_PROMPT) + 3
MASK = np.ones_like(IDS)
MASK[0, :5], MASK[1, 4:9] = 0, 0


@pytest.fixture(scope="module")
def model():
    return jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), dtype="float32")


@pytest.mark.parametrize(
    "fields", [{"max_new_tokens": SMALLEST_TOTAL - SMALLEST_PROMPT}, {"max_length": SMALLEST_TOTAL}], ids=str
)
def test_both_forms_of_generate_are_laid_out_alike(model, fields):
    config = resolve({"num_return_sequences": 2, "do_sample": True, **fields}, None, GenerationConfig())
    key = jax.random.key(1)
    ours = prepare(model, IDS, MASK, config, key)
    pure = prepare(model, IDS, MASK, config, key, inside_jit=True)
    assert (ours.layout, ours.search) == (pure.layout, pure.search)
    jax.tree.map(np.testing.assert_array_equal, ours.prompts, pure.prompts)
    jax.tree.map(np.testing.assert_array_equal, ours.traced, pure.traced)


@pytest.mark.parametrize(
    ("options", "search"),
    [
        ({}, PlainSearch()),
        ({"num_beams": 1}, PlainSearch()),
        ({"num_beams": 3}, BeamSearch(3)),
        ({"prompt_lookup_num_tokens": 4}, Speculation()),
    ],
    ids=str,
)
def test_options_choose_a_search_that_jit_can_hash(model, options, search):
    request = prepare(model, IDS, None, resolve(options, None, GenerationConfig()))
    assert request.search == search and hash(request.search) == hash(search)
    assert request.layout.samples == options.get("num_beams", 1)
