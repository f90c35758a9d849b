"""Log-probabilities of tokens under a constraint: by hand over all texts, by gradients, and strict to the last bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxgen
from jaxgen import GenerationConfig, JaxgenError, NonFiniteLogitsError, Strict, UnsupportedError
from tests.constrained import EOS, PROMPT, all_of, tiny_model
from tests.helpers import counted, padded, real_logits, some_slow
from tests.tokenizers import characters

pytest.importorskip("outlines_core", reason="builds the automata, and has no wheel for this Python")
pytest.importorskip("llguidance", reason="reads the grammars")

TEXTS = ["aab", "ab", "at", "stop"]
REGULAR, GRAMMAR = jaxgen.choice(TEXTS), jaxgen.grammar('start: "aab" | "ab" | "at" | "stop"')
STRICT = Strict(rows=4, tokens=32, chunk=4)
OPTIONS: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def spelled(model: Any) -> set[tuple[int, ...]]:
    return set(all_of(model, TEXTS, PROMPT[0]))


def by_hand(model: Any, row: list[int], spellings: set[tuple[int, ...]], temperature: float) -> np.ndarray:
    """The model's own probabilities over all that some spelling goes on with; who may not come is as if it had not."""
    whole = np.array([[*PROMPT[0], *row]])
    [logits] = real_logits(model, whole, np.ones_like(whole))
    read, found = (), []
    for token, scores in zip(row, logits[len(PROMPT[0]) - 1 :], strict=False):
        may = sorted({each[len(read)] for each in spellings if each[: len(read)] == read and len(each) > len(read)})
        weights = np.exp(np.asarray(scores, np.float64)[may] / temperature)
        found.append(np.log(weights[may.index(token)] / weights.sum()) if token in may else -np.inf)
        read += (token,) if token in may else ()
    return np.array(found)


def rows_to_score(model: Any) -> list[list[int]]:
    """Every spelling of every text; and some with a token in the middle that must not come."""
    vocabulary, rows = characters().get_vocab(), [list(row) for row in sorted(spelled(model))]
    wrong = vocabulary["c"]
    return [*rows, *([row[0], wrong, *row[1:]] for row in rows[:3]), [wrong, *rows[0]]]


@pytest.mark.parametrize("constraint", [REGULAR, GRAMMAR], ids=["regular", "grammar"])
@pytest.mark.parametrize("strict", [None, STRICT], ids=["fast", "strict"])
def test_it_is_the_renormalised_distribution(model: Any, constraint: Any, strict: Any):
    rows = rows_to_score(model)
    ids, mask = padded([[*PROMPT[0], *row] for row in rows], "left", 1)
    options = {**OPTIONS, "constraint": constraint, "tokenizer": characters()}
    found = jaxgen.score_tokens(model, ids, 3, mask, strict=strict, batch_size=5, **options)
    for row, logprobs in zip(rows, found.logprobs, strict=True):
        np.testing.assert_allclose(logprobs[: len(row)], by_hand(model, row, spelled(model), 0.7), atol=1e-5)
    assert np.isneginf(found.logprobs).sum() == 4
    own = jaxgen.score_tokens(model, ids, 3, mask, **OPTIONS).model_logprobs
    np.testing.assert_allclose(found.model_logprobs, own, atol=1e-5)


def test_what_would_leave_too_few_tokens_for_the_end_is_not_in_it(model: Any):
    """With room for two tokens, a text begins only with what one of at most two tokens begins with."""
    short = {row for row in spelled(model) if len(row) - 1 <= 2}
    first = sorted({row[0] for row in spelled(model)})
    ids = [[*PROMPT[0], token] for token in first]
    options = {**OPTIONS, "max_new_tokens": 2, "constraint": REGULAR, "tokenizer": characters()}
    for strict in (None, STRICT):
        found = jaxgen.score_tokens(model, ids, 3, strict=strict, **options).logprobs[:, 0]
        np.testing.assert_allclose(found, [by_hand(model, [token], short, 0.7)[0] for token in first], atol=1e-5)
    assert 0 < np.isneginf(found).sum() < len(first)


def test_the_pure_function_and_its_gradient(model: Any):
    """Also behind the end, where nothing may come: no NaN."""
    rows = [row[:-1] for row in map(list, sorted(spelled(model)))]  # without the end token
    ids, mask = padded([[*PROMPT[0], *row] for row in rows], "right", 3)
    config = GenerationConfig(**OPTIONS, eos_token_id=None)
    graph, weights = nnx.split(model)
    # Without an end token: what some text goes on with.
    spellings = {row[:-1] for row in spelled(model)}

    @jax.jit
    def ours(weights: Any) -> Any:
        found = jaxgen.logprobs(
            nnx.merge(graph, weights), ids, mask, config, 3, constraint=REGULAR, tokenizer=characters()
        )
        return found.sum(), found

    def masked(row: list[int]) -> np.ndarray:
        may = np.full((len(row), model.config.vocab_size), -np.inf, np.float32)
        for place in range(len(row)):
            may[
                place, [each[place] for each in spellings if each[:place] == tuple(row[:place]) and len(each) > place]
            ] = 0
        return may

    @jax.jit
    def by_formula(weights: Any) -> Any:
        logits, total = nnx.merge(graph, weights)(ids, mask).logits, 0.0
        for index, row in enumerate(rows):
            terms = jax.nn.log_softmax(logits[index, 2 : 2 + len(row)] / 0.7 + masked(row))
            total += terms[np.arange(len(row)), np.array(row)].sum()
        return total

    (value, found), gradient = jax.value_and_grad(ours, has_aux=True)(weights)
    expected, wanted = jax.value_and_grad(by_formula)(weights)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-3)
    assert not np.asarray(found)[:, :3].any() and not np.asarray(found)[mask == 0].any()


# Strict: the program that generated.

PAIRS = {
    "regular": jaxgen.regex("(aab|st|op)+ ?b?"),
    "a list": [jaxgen.regex("a+b|at"), None],
    "grammar": jaxgen.grammar('start: item*\nitem: "a" | "s" item* "t"'),
    "a list with a grammar": [jaxgen.grammar('start: ("st" | "op")+'), jaxgen.regex("a+b")],
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    some_slow(
        [(kind, dtype) for kind in PAIRS for dtype in ("float32", "bfloat16")],
        lambda value: (value[0] == "a list") == (value[1] == "float32"),
    ),
)
def test_strict_scores_equal_what_generate_said_to_the_last_bit(kind: str, dtype: str):
    model, asked = tiny_model(jnp.dtype(dtype)), PAIRS[kind]
    options: dict[str, Any] = {**OPTIONS, "num_return_sequences": 2, "strict": STRICT, "tokenizer": characters()}
    for eos in (EOS, None) if dtype == "float32" else (EOS,):
        options["eos_token_id"] = eos
        out = model.generate(PROMPT, seed=1, return_dict_in_generate=True, constraint=asked, **options)
        rows = out.sequences, out.prompt_lengths, out.attention_mask
        with counted() as compilations:
            exact = jaxgen.score_tokens(model, *rows, constraint=asked, **options)
        assert not compilations
        assert exact.logprobs.tobytes() == out.logprobs.tobytes()
        assert exact.model_logprobs.tobytes() == out.model_logprobs.tobytes()
        assert (exact.logprobs > exact.model_logprobs).any()
        # Each row its own, in another order and another batch.
        order = [3, 0, 2]
        each = [asked[row // 2] for row in order] if isinstance(asked, list) else asked
        ids, starts, mask = (table[order] for table in rows)
        some = jaxgen.score_tokens(model, ids, starts, mask, constraint=each, **options)
        width = some.logprobs.shape[1]
        assert some.logprobs.tobytes() == np.ascontiguousarray(out.logprobs[order, :width]).tobytes()
        loosely: dict[str, Any] = {**options, "strict": None}
        fast = jaxgen.score_tokens(model, *rows, constraint=asked, **loosely)
        np.testing.assert_allclose(fast.logprobs, out.logprobs, atol=1e-4 if dtype == "float32" else 0.1)


@pytest.mark.parametrize("constraint", [REGULAR, GRAMMAR], ids=["regular", "grammar"])
@pytest.mark.parametrize("strict", [None, STRICT], ids=["fast", "strict"])
def test_behind_the_end_nothing_can_come(model: Any, constraint: Any, strict: Any):
    """Where the text can only be over, a token that was given all the same has -inf, and breaks nothing."""
    vocabulary = characters().get_vocab()
    row = [*PROMPT[0], vocabulary["a"], vocabulary["t"], vocabulary["a"], vocabulary["t"]]
    found = jaxgen.score_tokens(
        model, [row], 3, constraint=constraint, tokenizer=characters(), strict=strict, eos_token_id=None, **OPTIONS
    )
    assert np.isfinite(found.logprobs[0, :2]).all() and np.isneginf(found.logprobs[0, 2:]).all()
    assert np.isfinite(found.model_logprobs).all()


@pytest.mark.parametrize("strict", [None, STRICT], ids=["fast", "strict"])
def test_a_grammar_reads_given_tokens_as_a_pattern_of_the_same_texts_does(model: Any, strict: Any):
    """The prompt is none of it; an end token that says something must not come sooner; one that says nothing may."""
    vocabulary = characters().get_vocab()
    a, t = vocabulary["a"], vocabulary["t"]
    row = [1, t, a, t, a, EOS, a, EOS]  # a prompt of three
    options: dict[str, Any] = {**OPTIONS, "tokenizer": characters(), "strict": strict, "eos_token_id": [EOS, t]}
    pattern, grammar = (
        jaxgen.score_tokens(model, [row], 3, constraint=constraint, **options).logprobs[0]
        for constraint in (jaxgen.regex("(to?)?a+"), jaxgen.grammar('start: ("t" "o"?)? "a"+'))
    )
    np.testing.assert_allclose(grammar, pattern, atol=1e-5)
    assert np.isneginf(grammar).tolist() == [True, False, False, False, False]


def test_what_is_no_number_is_named(model: Any):
    """Also where only what the options make of the logits is none."""
    vocabulary = characters().get_vocab()
    rows = [[*PROMPT[0], vocabulary["a"], vocabulary["t"]]]
    broken = [lambda tokens, lengths, logits: jnp.where((lengths == 4)[:, None], jnp.nan, logits)]
    for constraint in (REGULAR, GRAMMAR, None):
        options: dict[str, Any] = {**OPTIONS, "constraint": constraint, "tokenizer": characters()}
        for strict in (None, STRICT):
            with pytest.raises(NonFiniteLogitsError, match="not finite in row 0 at step 1"):
                jaxgen.score_tokens(model, rows, 3, strict=strict, logits_processor=broken, **options)


def test_what_is_refused(model: Any):
    row = [[*PROMPT[0], 5]]
    for strict in (None, STRICT):
        with pytest.raises(JaxgenError, match="constraint needs tokenizer="):
            jaxgen.score_tokens(model, row, 3, constraint=REGULAR, strict=strict)
        with pytest.raises(JaxgenError, match=r"the shortest text of row 0 takes \d tokens"):
            long = jaxgen.choice(["aabaabaab"])
            jaxgen.score_tokens(model, row, 3, constraint=long, tokenizer=characters(), max_new_tokens=2, strict=strict)
        with pytest.raises(JaxgenError, match="a list of 2, and there are 1"):
            jaxgen.score_tokens(model, row, 3, constraint=[REGULAR] * 2, tokenizer=characters(), strict=strict)
    with pytest.raises(UnsupportedError, match=r"a grammar, which the host reads: .*use jaxgen\.score_tokens"):
        jaxgen.logprobs(model, jnp.array(row), constraint=GRAMMAR, tokenizer=characters())
