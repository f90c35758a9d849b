"""One shape for every batch, and one seed for every row: the same numbers, whoever else is in the call."""

import jax
import numpy as np
import pytest

import jaxgen
from jaxgen import JaxgenError, Strict, UnsupportedError, demo
from jaxgen.generation.programs import stages
from jaxgen.text.tokenizer import load_tokenizer
from tests.helpers import some_slow

TEXTS = ["A list of colors: red, blue", "Portugal is", "1, 2, 3, 4", "The cat"]


@pytest.fixture(scope="module")
def model():
    return jaxgen.AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")


@pytest.fixture(scope="module")
def inputs():
    return load_tokenizer(demo.path())(TEXTS, padding=True, return_tensors="np")


def run(model, inputs, rows, **options):
    """The rows' new tokens and log-probabilities, in the order given."""
    options = {"do_sample": True, "seed": 5, "max_new_tokens": 12, "row_ids": rows, **options}
    out = model.generate(
        inputs["input_ids"][rows], inputs["attention_mask"][rows], return_dict_in_generate=True, **options
    )
    width = inputs["input_ids"].shape[1]
    return {row: (out.sequences[i, width:].tolist(), out.logprobs[i].tobytes()) for i, row in enumerate(rows)}


@pytest.mark.parametrize(
    "options",
    some_slow(
        [{"prefill_chunk_size": 16}, {}, {"repetition_penalty": 1.3, "top_p": 0.8}], lambda options: len(options) != 1
    ),
)
def test_any_batch_to_the_last_bit(model, inputs, options):
    """Alone, in another order, with other mates and another number of new tokens asked for: the same bits."""
    options = {"strict": Strict(rows=4, tokens=64, chunk=8), **options}
    whole = run(model, inputs, [0, 1, 2, 3], **options)
    for rows in ([0], [3, 1], [2, 0, 3]):
        for row, found in run(model, inputs, rows, **options).items():
            assert found == whole[row]
    shorter = run(model, inputs, [1], **{**options, "max_new_tokens": 5})[1]
    assert (shorter[0], shorter[1]) == (whole[1][0][:5], whole[1][1][:20])


def test_one_executable_for_all(model, inputs):
    strict = Strict(rows=4, tokens=64, chunk=16)
    run(model, inputs, [0, 1, 2, 3], strict=strict)
    traces = (stages._prefill.traces, stages._decode.traces)
    run(model, inputs, [2], strict=strict, max_new_tokens=40)
    assert (stages._prefill.traces, stages._decode.traces) == traces


def test_what_does_not_fit(model, inputs):
    for options, message in (
        ({"strict": Strict(rows=2, tokens=64)}, "4 prompts times 1 are more than its 2 rows.*rows=4"),
        ({"strict": Strict(rows=6, tokens=64), "num_return_sequences": 2}, "4 prompts times 2.*pass 3 at a time"),
        ({"strict": Strict(rows=4, tokens=24)}, "26 tokens, more than the 24.*tokens=32"),
        ({"strict": 8}, "must be True, or a jaxgen.Strict"),
        ({"strict": True, "max_cache_len": 64}, "max_cache_len and strict exclude each other"),
    ):
        with pytest.raises(JaxgenError, match=message):
            run(model, inputs, [0, 1, 2, 3], **options)
    with pytest.raises(JaxgenError, match="strict: rows=0"):
        Strict(rows=0)
    with pytest.raises(UnsupportedError, match="strict"):
        jaxgen.generate(model, inputs["input_ids"], strict=True)
    assert Strict.of(True) == Strict(8, 512, 64)


@pytest.mark.slow
def test_a_thousand_seeds_in_few_batches(model, inputs):
    """Seed 417 alone gives what it gives among the others."""
    ids = inputs["input_ids"][3:], inputs["attention_mask"][3:]
    options = {"do_sample": True, "temperature": 3.0, "top_k": 0, "max_new_tokens": 4}
    found = np.concatenate([model.generate(*ids, seed=range(i, i + 250), **options) for i in range(0, 1000, 250)])
    assert len(found) == 1000
    assert len({tuple(row) for row in found}) > 500  # they do differ
    for seed in (0, 417, 999):
        assert (found[seed] == model.generate(*ids, seed=seed, **options)[0]).all()


@pytest.mark.slow
def test_a_seed_per_row(model, inputs):
    """Each row as if it were alone with its seed; also with samples, as keys, and under jit."""
    both = {name: table[:2] for name, table in inputs.items()}
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 6}
    out = model.generate(**both, seed=[7, 2**70], num_return_sequences=2, return_dict_in_generate=True, **options)
    assert out.seed == (7, 2**70)
    for row, seed in enumerate(out.seed):
        alone = {name: table[row : row + 1] for name, table in both.items()}
        given = model.generate(**alone, seed=seed, num_return_sequences=2, **options)
        assert (out.sequences[2 * row : 2 * row + 2] == given).all()
    keys = jax.vmap(jax.random.key)(np.array([7, 8]))
    expected = model.generate(**both, seed=[7, 8], **options)
    assert (model.generate(**both, key=keys, **options) == expected).all()
    config = jaxgen.GenerationConfig(**options)
    pure = jax.jit(lambda key: jaxgen.generate(model, both["input_ids"], both["attention_mask"], key, config))
    assert (np.asarray(pure(keys)) == expected).all()


def test_seeds_that_do_not_fit(model, inputs):
    for options, message in (
        ({"seed": [1, 2, 3]}, "holds 3, input_ids 4 rows"),
        ({"seed": []}, "empty"),
        ({"seed": [1, "2", 3, 4]}, r"seed\[1\]='2' must be an int"),
        ({"key": jax.random.split(jax.random.key(0), (2, 2)), "seed": None}, r"shape \(2, 2\)"),
    ):
        with pytest.raises(JaxgenError, match=message):
            run(model, inputs, [0, 1, 2, 3], **options)
