"""A row's tokens depend on its prompt, its key and the parameters, and on nothing else; whatever the options.

Within one set of compiled shapes that holds bit for bit, log-probabilities included. Where the shape changes
(another batch or length bucket) the arithmetic may round differently: then tokens agree, and log-probabilities
to 1e-4. So it is with prompt lookup: whether the model reads one token at a time or several depends on all rows.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen.generation.execute import advance, prefill, program_for
from jaxgen.generation.options.config import resolve
from jaxgen.generation.options.table import Extras
from jaxgen.generation.prepare import prepare
from jaxgen.generation.processors.constraint import AllowedTokens
from jaxgen.generation.results.output import GenerateOutput, collect
from tests.helpers import padded, some_slow
from tests.tokenizers import characters


def discouraged(tokens: Any, lengths: Any, logits: Any) -> Any:
    """A user's processor: the row's newest token gets less likely, the more so the longer the row is."""
    rows = jnp.arange(len(lengths))
    return logits.at[rows, tokens[rows, lengths - 1]].add(-0.1 * lengths)


def met(tokens: Any, lengths: Any, scores: Any) -> Any:
    """A user's criterion: the newest two tokens add up to a multiple of 19."""
    rows = jnp.arange(len(lengths))
    return ((tokens[rows, lengths - 1] + tokens[rows, lengths - 2]) % 19 == 0) & (scores.max(axis=1) < jnp.inf)


def no_successor(tokens: Any, length: Any) -> Any:
    return jnp.arange(97) != tokens[length - 1] + 1


OPTIONS = {
    "do_sample": True, "temperature": 1.3, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2,
    "min_new_tokens": 2, "max_new_tokens": 10, "eos_token_id": 7, "pad_token_id": 0, "return_dict_in_generate": True,
    "seed": 3,
}  # fmt: skip
PROCESSORS = {
    "sequence_bias": {(8,): 1.5, (9, 10): -3.0, (3, 4, 5): 2.0}, "encoder_repetition_penalty": 1.1,
    "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 3, "bad_words_ids": [[5], [6, 7]],
    "prefix_allowed_tokens_fn": AllowedTokens(no_successor), "forced_bos_token_id": 13, "forced_eos_token_id": 7,
    "exponential_decay_length_penalty": (4, 1.1), "suppress_tokens": [11], "begin_suppress_tokens": [12],
    "logits_processor": [discouraged], "renormalize_logits": True, "watermarking_config": {"bias": 1.0},
}  # fmt: skip
STOPS = {"stop_strings": ["st", "he"], "tokenizer": characters(), "stopping_criteria": [met]}
EVERYTHING = {
    **OPTIONS, **PROCESSORS, **STOPS, "top_h": 0.9, "typical_p": 0.95, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3,
    "remove_invalid_values": True, "guidance_scale": 1.5, "num_return_sequences": 2, "prefill_chunk_size": 3,
}  # fmt: skip
BEAMS = {
    **EVERYTHING, "do_sample": False, "num_beams": 3, "min_new_tokens": None, "min_length": 4, "length_penalty": 0.7,
    "remove_invalid_values": None,
}  # fmt: skip
SETS: dict[str, dict[str, Any]] = {
    "few": OPTIONS,
    "everything": {**EVERYTHING, "cache_implementation": "quantized"},
    "beams": BEAMS,
    "beam_sample": {**BEAMS, "do_sample": True, "early_stopping": True},
    "lookup": {**EVERYTHING, "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
}
every_set = pytest.mark.parametrize("name", some_slow(SETS, lambda name: name != "few"))
BATCH = 4  # a bucket, so that every batch of 4 shares its shape
# Few different tokens, now and then: then there is something to look up.
prompts = st.lists(st.integers(0, 96), min_size=1, max_size=14) | st.lists(st.integers(14, 16), min_size=1, max_size=14)
batches = st.lists(prompts, min_size=BATCH, max_size=BATCH)
few = settings(max_examples=12, deadline=None, derandomize=True)


class Row(NamedTuple):
    """All that comes of a prompt: one entry per sequence that is returned for it."""

    tokens: list[list[int]]
    ends: list[str]
    beams: list[list[int]]  # which of the prompt's beams each token came from
    logprobs: list[np.ndarray]  # [2, n]: after processors, and the model's own
    scores: list[float]  # of beams


def close(actual: np.ndarray, expected: np.ndarray, exactly: bool) -> bool:
    """Equal to the bit, or nearly."""
    return actual.tobytes() == expected.tobytes() if exactly else np.allclose(actual, expected, rtol=0, atol=1e-4)


def same(actual: Row, expected: Row, exactly: bool) -> bool:
    """Equal; log-probabilities and scores to the bit or nearly."""
    if actual[:3] != expected[:3]:
        return False
    numbers = zip(
        [*actual.logprobs, np.array(actual.scores)], [*expected.logprobs, np.array(expected.scores)], strict=True
    )
    return all(close(mine, other, exactly) for mine, other in numbers)


def is_exact(name: str) -> bool:
    return name != "lookup"


@pytest.fixture(scope="module")
def model(reference_model):
    return reference_model("window_8")


def arguments(name: str, ids: np.ndarray, mask: np.ndarray | None, **options: Any) -> dict[str, Any]:
    """The options of a set; with guidance, a row's negative prompt is half its prompt, backwards, and a token more."""
    options = {**SETS[name], **options}
    if "guidance_scale" in options:
        real = np.ones_like(ids) if mask is None else mask
        negative = [[*row[keep == 1][::-2].tolist(), 17] for row, keep in zip(ids, real, strict=True)]
        options["negative_prompt_ids"], options["negative_prompt_attention_mask"] = padded(negative, "right", 1)
    return options


def read(output: Any, prompts: int, width: int, beams: int) -> list[Row]:
    assert isinstance(output, GenerateOutput)
    tokens, logprobs = [], []
    for row, count in enumerate(output.lengths):
        tokens.append(output.sequences[row, width:][:count].tolist())
        logprobs.append(np.stack([output.logprobs[row, :count], output.model_logprobs[row, :count]]))
    rows, samples = [], len(tokens) // prompts
    for prompt in range(prompts):
        own = slice(prompt * samples, (prompt + 1) * samples)
        sources, scores = [], []
        if output.beam_indices is not None and output.sequences_scores is not None:
            indices = np.where(output.beam_indices < 0, -1, output.beam_indices - prompt * beams)[own]
            sources = [row[row >= 0].tolist() for row in indices]
            scores = output.sequences_scores[own].tolist()
        rows.append(Row(tokens[own], output.finish_reason[own], sources, logprobs[own], scores))
    return rows


def rows_of(model, name: str, ids, mask, row_ids, **options) -> list[Row]:
    """What a call gives each of its rows."""
    output = model.generate(ids, mask, row_ids=row_ids, **arguments(name, ids, mask, **options))
    return read(output, len(ids), ids.shape[1], SETS[name].get("num_beams", 1))


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


@pytest.mark.parametrize("name", ["few", "everything", "lookup"])  # with beams the limit decides what is best
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
