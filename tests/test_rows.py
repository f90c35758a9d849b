"""A row's tokens depend on its prompt, its key and the parameters, and on nothing else; whatever the options.

Within one set of compiled shapes that holds bit for bit, log-probabilities included. Where the shape changes
(another batch or length bucket) the arithmetic may round differently: then tokens agree, and log-probabilities
to 1e-4. So it is with prompt lookup: whether the model reads one token at a time or several depends on all rows.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen.generation.execute import advance, prefill, program_for
from jaxgen.generation.options.config import resolve
from jaxgen.generation.options.table import Extras
from jaxgen.generation.prepare import prepare
from jaxgen.generation.results.output import collect
from tests.helpers import padded, some_slow
from tests.rows import BATCH, SETS, arguments, close, read, rows_of, same

every_set = pytest.mark.parametrize(
    "name", some_slow(SETS, lambda name: name != "few", lambda name: name == "beam_sample")
)
# Few different tokens, now and then: then there is something to look up.
prompts = st.lists(st.integers(0, 96), min_size=1, max_size=14) | st.lists(st.integers(14, 16), min_size=1, max_size=14)
batches = st.lists(prompts, min_size=BATCH, max_size=BATCH)
few = settings(max_examples=12, deadline=None, derandomize=True)


def is_exact(name: str) -> bool:
    return name != "lookup"


@pytest.fixture(scope="module")
def model(reference_model):
    return reference_model("window_8")


@pytest.mark.slow
@every_set
@few
@given(rows=batches, order=st.permutations(range(BATCH)), side=st.sampled_from(["left", "right", "holes"]),
       extra=st.integers(0, 9))  # fmt: skip
def test_order_and_padding(model, name, rows, order, side, extra):
    names = [f"row {index}" for index in range(BATCH)]
    expected = rows_of(model, name, *padded(rows, "left", 0), names)
    shuffled = [rows[index] for index in order]
    result = rows_of(model, name, *padded(shuffled, side, extra, filler=96), [names[index] for index in order])
    assert all(same(row, expected[index], is_exact(name)) for row, index in zip(result, order, strict=True))


@every_set
@few
@given(rows=batches, others=batches)
def test_neighbours(model, name, rows, others):
    expected = rows_of(model, name, *padded(rows, "left", 0), [10, 11, 12, 13])
    mixed = [rows[0], *others[1:]]
    result = rows_of(model, name, *padded(mixed, "left", 0), [10, 7, 8, 9])
    assert same(result[0], expected[0], is_exact(name))


@every_set
@few
@given(rows=batches)
def test_alone_and_in_a_batch(model, name, rows):
    # Eight bits may round to the next number where the arithmetic differs in its last bit.
    static = {"cache_implementation": "static"}
    together = rows_of(model, name, *padded(rows, "left", 0), None, **static)
    for index in range(BATCH):
        alone = rows_of(model, name, np.array([rows[index]]), None, [index], **static)[0]
        assert same(alone, together[index], exactly=False)


@every_set
@few
@given(rows=batches, stops=st.lists(st.integers(1, 10), max_size=4))
def test_chunking(model, name, rows, stops):
    """The loop may be left and entered again anywhere."""
    ids, mask = padded(rows, "left", 0)
    expected = rows_of(model, name, ids, mask, None)
    options = arguments(name, ids, mask)
    seed = options.pop("seed")
    extras, fields = Extras.take(options)
    config = resolve(fields, None, model.generation_config)
    request = prepare(model, ids, mask, config, seed=seed, extras=extras)
    program = program_for(model, request)
    state = prefill(program, request)
    for until in sorted(stops):
        state = advance(program, request, state, until)
    output = collect(model, request, advance(program, request, state))
    result = read(output, BATCH, ids.shape[1], SETS[name].get("num_beams", 1))
    assert all(same(row, whole, is_exact(name)) for row, whole in zip(result, expected, strict=True))


@pytest.mark.parametrize(
    "name", some_slow(["few", "everything", "lookup"], lambda name: name != "few")
)  # with beams the limit decides what is best
@few
@given(rows=batches, limit=st.integers(3, 10))
def test_another_limit(model, name, rows, limit):
    """max_new_tokens cuts a row off, and changes nothing before (min_new_tokens does not reach that far)."""
    ids, mask = padded(rows, "left", 0)
    wholes = rows_of(model, name, ids, mask, None)
    cuts = rows_of(model, name, ids, mask, None, max_new_tokens=limit)
    kept = limit - ("forced_eos_token_id" in SETS[name])  # which comes with the limit
    for whole, cut in zip(wholes, cuts, strict=True):
        for sample, (tokens, short) in enumerate(zip(whole.tokens, cut.tokens, strict=True)):
            assert short[:kept] == tokens[:kept]
            assert len(short) == min(limit, len(tokens))
            assert close(cut.logprobs[sample][:, :kept], whole.logprobs[sample][:, :kept], is_exact(name))


def test_the_same_prompt_twice_gets_different_noise(model):
    ids = np.array([[5, 6, 7]] * BATCH)
    results = rows_of(model, "few", ids, None, None, temperature=5.0)
    assert len({tuple(row.tokens[0]) for row in results}) > 1
    same_id = rows_of(model, "few", ids, None, [1, 1, 1, 1], temperature=5.0)
    assert all(same(row, same_id[0], exactly=True) for row in same_id)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SETS if name != "few"])
def test_the_options_do_something(model, name):
    """Rows end in every way that there is, and what is returned for a prompt is not twice the same."""
    rng = np.random.default_rng(0)
    ends, alike = set(), 0
    for _ in range(10):
        rows = [rng.integers(0, 97, rng.integers(1, 15)).tolist() for _ in range(BATCH)]
        for row in rows_of(model, name, *padded(rows, "left", 0), None):
            ends.update(row.ends)
            alike += len(row.tokens) > 1 and row.tokens[0] == row.tokens[1]
    assert ends == {"eos", "stop_string", "criterion"}
    assert alike < 10
