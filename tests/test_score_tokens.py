"""Log-probabilities of given tokens: by hand, in any arrangement, with gradients; and strict, equal to the last bit."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxgen
from jaxgen import AllowedTokens, GenerationConfig, Int4Config, JaxgenError, NonFiniteLogitsError, Strict
from jaxgen.generation.programs import stages
from jaxgen.generation.results.score import scores_of
from tests.helpers import counted, padded, real_logits, some_slow
from tests.reference.cases import CASES
from tests.reference.weights import write_checkpoint
from tests.tokenizers import characters

ROWS = [[5, 6, 7, 8, 9], [50, 4], [3, 96, 3, 96, 3, 96, 3], [11, 12, 13]]
CONFIG = {
    **CASES["window_8"].config, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "eos_token_id": 14,
}  # fmt: skip
DTYPES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int4": {"dtype": "float32", "quantization_config": Int4Config(group_size=32)},
}
STRICT = Strict(rows=4, tokens=64, chunk=8)
SAMPLE: dict[str, Any] = {
    "do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2, "pad_token_id": 0,
    "max_new_tokens": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    path = write_checkpoint(tmp_path_factory.mktemp("scored") / "model", CONFIG, 3)
    loaded: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in loaded:
            loaded[name] = jaxgen.AutoModelForCausalLM.from_pretrained(path, **DTYPES[name])
        return loaded[name]

    return get


def generated(model: Any, ids: Any, mask: Any = None, **options: Any) -> Any:
    return model.generate(ids, mask, return_dict_in_generate=True, **{"seed": 0, **SAMPLE, **options})


def differ(scores: Any, out: Any, rows: Any = slice(None)) -> int:
    """How many log-probabilities are not equal to the last bit, of both kinds."""
    width = scores.logprobs.shape[1]
    pairs = ((scores.logprobs, out.logprobs), (scores.model_logprobs, out.model_logprobs))
    assert (scores.lengths == out.lengths[rows]).all()
    return sum(int((a.view(np.uint32) != b[rows][:, :width].view(np.uint32)).sum()) for a, b in pairs)


def score(model: Any, out: Any, rows: Any = slice(None), **options: Any) -> Any:
    given = (out.sequences[rows], out.prompt_lengths[rows], out.attention_mask[rows])
    return jaxgen.score_tokens(model, *given, **{**SAMPLE, **options})


# Both meanings, worked out by hand.


def bigrams(*weights: list[int]) -> Any:
    """A model of four tokens, whose logits after token i are log(weights[i])."""
    table = jnp.log(jnp.array(weights, jnp.float32))
    return SimpleNamespace(
        config=SimpleNamespace(vocab_size=4, max_position_embeddings=64),
        generation_config=GenerationConfig(),
        hidden=lambda ids, mask: jax.nn.one_hot(ids, 4),
        logits=lambda hidden: hidden @ table,
    )


def probabilities(model: Any, *arguments: Any) -> np.ndarray:
    return np.exp(np.asarray(jax.jit(lambda: jaxgen.logprobs(model, *arguments))()))[0]


def test_both_meanings_by_hand():
    model = bigrams([1, 2, 4, 8], [1, 1, 1, 1], [7, 1, 1, 1], [1, 2, 3, 4])
    ids = jnp.array([[0, 3, 1, 2, 0]])
    own = probabilities(model, ids)
    np.testing.assert_allclose(own, [1, 8 / 15, 2 / 10, 1 / 4, 7 / 10], rtol=1e-6)
    # Squares, of which the two largest are kept: 16 and 64; 9 and 16, but not 4; of four equal ones all; 49 and 1s.
    config = GenerationConfig(do_sample=True, temperature=0.5, top_k=2)
    drawn = probabilities(model, ids, None, config)
    np.testing.assert_allclose(drawn, [1, 64 / 80, 0, 1 / 4, 49 / 52], rtol=1e-6)
    # Greedy search has processors, but no temperature and no filters; forbidden where the row ends too early.
    config = GenerationConfig(min_new_tokens=2, eos_token_id=1, temperature=0.5)
    drawn = probabilities(model, ids, None, config, 2)
    np.testing.assert_allclose(drawn, [1, 1, 0, 1 / 3, 7 / 10], rtol=1e-6)


def test_what_was_removed_has_no_gradient_and_no_nan():
    model = bigrams([1, 2, 4, 8], [1, 1, 1, 1], [7, 1, 1, 1], [1, 2, 3, 4])
    config = GenerationConfig(do_sample=True, top_k=2, top_p=0.9)

    def total(scale: Any) -> Any:
        scaled = SimpleNamespace(**{**vars(model), "logits": lambda hidden: scale * model.logits(hidden)})
        found = jaxgen.logprobs(scaled, jnp.array([[0, 3, 3]]), jnp.array([[1, 1, 0]]), config)
        return found.sum()

    value, slope = jax.jit(jax.value_and_grad(total))(jnp.float32(1))
    # log softmax of scale * (log 4, log 8) at the second: its slope is log 2 * (1 - 2/3).
    np.testing.assert_allclose((float(value), float(slope)), (np.log(2 / 3), np.log(2) / 3), rtol=1e-5)


# Any arrangement, and in jit.


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_any_arrangement_is_the_models_log_softmax(models, side):
    model = models("float32")
    ids, mask = padded(ROWS, side, 3, filler=96)
    found = np.asarray(nnx.jit(jaxgen.logprobs)(model, ids, mask))
    assert not found[mask == 0].any()
    for row, logits in enumerate(real_logits(model, ids, mask)):
        chosen = ids[row][mask[row] == 1][1:]
        expected = jax.nn.log_softmax(logits[:-1])[np.arange(len(chosen)), chosen]
        np.testing.assert_allclose(found[row][mask[row] == 1][1:], expected, atol=1e-5)


@pytest.mark.slow
def test_fast_scores_are_those_of_generate_up_to_rounding(models):
    """All processors that look at history, limits and ends among them; in batches of any size."""
    history = {
        "no_repeat_ngram_size": 2, "min_new_tokens": 3, "forced_eos_token_id": 14, "suppress_tokens": [11],
        "begin_suppress_tokens": [12], "encoder_repetition_penalty": 1.1, "bad_words_ids": [[5], [6, 7]],
        "logits_processor": [lambda tokens, lengths, logits: logits.at[:, 4].add(-0.1 * lengths)],
        "prefix_allowed_tokens_fn": AllowedTokens(lambda tokens, length: jnp.arange(97) != tokens[length - 1] + 1),
    }  # fmt: skip
    model, (ids, mask) = models("float32"), padded(ROWS, "left", 2)
    out = generated(model, ids, mask, num_return_sequences=2, **history)
    assert (out.sequences[:, -1] == 14).any()  # forced where the limit is
    for batch_size in (8, 3):
        found = score(model, out, num_return_sequences=2, batch_size=batch_size, **history)
        np.testing.assert_allclose(found.logprobs, out.logprobs, atol=1e-4)
        np.testing.assert_allclose(found.model_logprobs, out.model_logprobs, atol=1e-4)
    config = GenerationConfig(
        **{**SAMPLE, **{k: v for k, v in history.items() if "_fn" not in k and k != "logits_processor"}}
    )
    extras = {name: history[name] for name in ("logits_processor", "prefix_allowed_tokens_fn")}
    pure = jaxgen.logprobs(model, out.sequences, out.attention_mask, config, out.prompt_lengths, **extras)
    new = np.asarray(pure)[:, ids.shape[1] :]
    np.testing.assert_allclose(new, out.logprobs, atol=1e-4)


# Strict: the program that generated.

rows_of_ids = st.lists(st.integers(0, 96), min_size=1, max_size=14)


@pytest.mark.parametrize(
    ("name", "strict"),
    some_slow(
        [
            ("bfloat16", STRICT),
            ("float32", Strict(rows=4, tokens=48, chunk=16)),
            ("int4", Strict(rows=6, tokens=48, chunk=4)),
        ],
        lambda value: value[0] != "bfloat16",
    ),
)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(rows=st.lists(rows_of_ids, min_size=1, max_size=4), side=st.sampled_from(["left", "right", "holes"]),
       extra=st.integers(0, 9), seed=st.integers(0, 9), order=st.permutations(range(4)))  # fmt: skip
def test_strict_scores_equal_what_generate_said_to_the_last_bit(models, name, strict, rows, side, extra, seed, order):
    """Whatever the lengths, the padding, the batch it is scored in and the order there: the same programs run."""
    model, (ids, mask) = models(name), padded(rows, side, extra, filler=96)
    out = generated(model, ids, mask, seed=seed, strict=strict)
    with counted() as compilations:
        assert differ(score(model, out, strict=strict), out) == 0
    assert not compilations
    some = [row for row in order if row < len(rows)][:3]
    assert differ(score(model, out, some, strict=strict), out, some) == 0


@pytest.mark.slow
def test_samples_are_scored_in_the_shape_that_they_were_drawn_in(models):
    """Some of a prompt's samples too, and more prompts than the shape has room for."""
    model, strict = models("bfloat16"), Strict(rows=6, tokens=48, chunk=8)
    options: dict[str, Any] = {"num_return_sequences": 3}
    outs = [generated(model, [row], strict=strict, **options) for row in ROWS]
    for out in outs:
        assert differ(score(model, out, [2, 0], strict=strict, **options), out, [2, 0]) == 0
    prompts = [row for row in ROWS for _ in range(3)]
    ends = [row[len(prompt) :] for prompt, out in zip(ROWS, outs, strict=True) for row in out.sequences]
    lengths = np.concatenate([out.lengths for out in outs])
    ends = [end[:length].tolist() for end, length in zip(ends, lengths, strict=True)]
    ids, mask = padded([[*prompt, *end] for prompt, end in zip(prompts, ends, strict=True)], "right", 0)
    found = jaxgen.score_tokens(model, ids, [*map(len, prompts)], mask, strict=strict, **SAMPLE, **options)
    expected = np.concatenate([np.pad(out.logprobs, ((0, 0), (0, 12 - out.logprobs.shape[1]))) for out in outs])
    assert (found.logprobs == expected[:, : found.logprobs.shape[1]]).all()


@pytest.mark.slow
def test_scoring_runs_the_programs_that_generated(models):
    """Also beside stop strings, criteria and recorded scores: nothing is compiled."""
    options: dict[str, Any] = {
        "strict": Strict(rows=2, tokens=48, chunk=8), "stop_strings": ["st"], "tokenizer": characters(),
        "stopping_criteria": [lambda tokens, lengths, scores: lengths > 12], "output_scores": True,
    }  # fmt: skip
    model = models("float32")
    out = generated(model, ROWS[:1], **options)
    traces = (stages._prefill.traces, stages._decode.traces)
    with counted() as compilations:
        assert differ(score(model, out, return_dict_in_generate=True, **options), out) == 0
    assert not compilations
    assert (stages._prefill.traces, stages._decode.traces) == traces


def test_what_ends_a_row_ends_no_scoring(models):
    """EOS inside, more tokens than `max_new_tokens`; and what the filters remove is -inf, fast and strict."""
    model = models("bfloat16")
    rows, options = [[5, 6, 14, 8, 14, 9, 10], [50, 4, 3]], {**SAMPLE, "top_k": 3, "max_new_tokens": 2}
    ids, mask = padded(rows, "right", 0)
    fast = jaxgen.score_tokens(model, ids, [2, 1], mask, **options)
    exact = jaxgen.score_tokens(model, ids, [2, 1], mask, strict=STRICT, **options)
    assert fast.lengths.tolist() == exact.lengths.tolist() == [5, 2]
    assert np.isneginf(fast.logprobs).any() and (fast.model_logprobs[0] < 0).all()
    np.testing.assert_allclose(fast.model_logprobs, exact.model_logprobs, atol=0.1)  # bfloat16


def test_broken_weights_raise(models):
    model = models("bfloat16")
    norm = model.model.norm.weight[...]
    model.model.norm.weight[...] = norm * jnp.nan
    try:
        for strict in (None, STRICT):
            with pytest.raises(NonFiniteLogitsError, match="row 0 at step 0"):
                jaxgen.score_tokens(model, [[1, 2, 3]], 1, strict=strict, **SAMPLE)
    finally:
        model.model.norm.weight[...] = norm


ids = [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("sequences", "starts", "options", "message"),
    [
        (ids, [1, 3], {}, "row 1 has 3 real tokens, and none after its prompt of 3"),
        (ids, 0, {}, "prompt_lengths: 0 in row 0"),
        (ids, [1, 1, 1], {}, r"prompt_lengths=\[1, 1, 1\] must be an int, or one per row of sequences: 2"),
        ([[1, 97]], 1, {}, r"sequences\[0, 1\]=97 is outside"),
        (ids, 1, {"num_beams": 2}, "num_beams: tokens that were chosen with it cannot be scored"),
        (ids, 1, {"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens: tokens"),
        (ids, 1, {"prefix_allowed_tokens_fn": lambda row, ids: [1]}, "pass a jaxgen.AllowedTokens"),
        (ids, 1, {"strict": Strict(tokens=2)}, "3 tokens, more than the 2 of its shape"),
        (
            ids,
            1,
            {"strict": Strict(rows=1), "do_sample": True, "num_return_sequences": 2},
            "1 prompts times 2 are more",
        ),
        (ids, 1, {"temprature": 2}, "did you mean 'temperature'"),
        (ids, 1, {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_what_cannot_be_scored(models, sequences, starts, options, message):
    with pytest.raises(JaxgenError, match=message):
        jaxgen.score_tokens(models("float32"), sequences, starts, **options)


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"strict": True}, "strict: not in the pure function jaxgen.logprobs; use jaxgen.score_tokens"),
        ({"stopping_criteria": [print]}, "stopping_criteria: .* it changes no logits"),
        ({"temperature": 2}, "'temperature' is no argument of jaxgen.logprobs"),
    ],
)
def test_what_the_pure_function_refuses(models, extras, message):
    with pytest.raises(JaxgenError, match=message):
        jaxgen.logprobs(models("float32"), jnp.array(ids), **extras)


@pytest.mark.parametrize(
    ("rows", "mask", "starts", "message"),
    [
        (np.ones(3, int), None, None, r"input_ids has shape \(3,\)"),
        (np.ones((0, 3), int), None, None, r"input_ids has shape \(0, 3\)"),
        (np.ones((2, 3)), None, None, "input_ids has dtype float64; expected ints"),
        (ids, np.ones((1, 3), int), None, r"attention_mask has shape \(1, 3\), input_ids has \(2, 3\)"),
        (ids, np.ones((2, 1), int), None, r"attention_mask has shape \(2, 1\), input_ids has \(2, 3\)"),
        (ids, None, [1, 1, 1], r"prompt_lengths has shape \(3,\) .* expected an int, or one per row: 2"),
        (ids, None, 1.5, "prompt_lengths has shape .* dtype float64"),
    ],
)
def test_what_does_not_agree_is_refused_inside_jit_too(models, rows, mask, starts, message):
    jaxtyping.config.update("jaxtyping_disable", True)  # in tests annotated shapes are checked first
    try:
        with pytest.raises(JaxgenError, match=message):
            jax.jit(lambda: jaxgen.logprobs(models("float32"), rows, mask, None, starts))()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_score_tokens_inside_jit_names_the_pure_function(models):
    graph, params = nnx.split(models("float32"))
    calls = [
        lambda params, ids: jaxgen.score_tokens(nnx.merge(graph, params), [[1, 2, 3]], 1),
        lambda params, ids: jaxgen.score_tokens(models("float32"), ids, 1),
    ]
    for call in calls:
        with pytest.raises(JaxgenError, match="inside jit, grad or vmap use jaxgen"):
            jax.jit(call)(params, jnp.array(ids))


def test_scores_of_ids_say_what_greedy_search_would_have_chosen(models: Any):
    """Also of the token behind a bucket's last column, and behind the context's, which the model does not read."""
    model = models("float32")
    context = model.config.max_position_embeddings
    rows = [np.array([5, 6, 7, 8, 9]), np.arange(17) + 3, np.arange(context + 1) % 50]
    for row in rows:
        [logits] = real_logits(model, row[None, :-1], np.ones((1, len(row) - 1), int))
        row[-1] = logits[-1].argmax()
        [found] = scores_of(model, [row.astype(np.int32)])
        expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(row) - 1), row[1:]]
        np.testing.assert_allclose(found.logprobs, expected, atol=2e-5)
        assert (found.greedy == (logits.argmax(axis=1) == row[1:])).all() and found.greedy[-1]
    assert (jaxgen.logprobs(model, np.array([[5]])) == 0).all()  # nothing precedes it
