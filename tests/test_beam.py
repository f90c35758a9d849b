"""Beam search: cases worked out by hand, a search in plain Python, enumerated draws, and independence of rows.

The model is a table: what comes next depends on all tokens before, and it reads them from its cache, so a beam
whose cache did not follow it goes astray.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen.cache import LayerCache, to_int8
from jaxgen.errors import NonFiniteLogitsError
from jaxgen.generation.choosing.sample import row_id_words
from jaxgen.generation.choosing.stop import CRITERION
from jaxgen.generation.execute import advance, out_of_time, program_for
from jaxgen.generation.execute import prefill as first_token
from jaxgen.generation.options.config import GenerationConfig, resolve
from jaxgen.generation.options.table import Extras
from jaxgen.generation.prepare import prepare
from jaxgen.generation.programs.inputs import BatchLayout, static_options, traced_options
from jaxgen.generation.prompts.prefill import Prompts
from jaxgen.generation.results.output import GenerateOutput, collect
from jaxgen.generation.searches import beam, beam_cache, beam_trace
from jaxgen.generation.searches.beam_cache import reordered
from tests.helpers import padded, some_slow

EOS = 1
WIDEST, TOTAL = 4, 12


@dataclasses.dataclass
class Table:
    """A model whose logits are the row of `logits` that (sum of (position + 1) * token) % rows points at."""

    logits_of: Any  # [M, V]

    def _logits(self, cache: list[LayerCache], lengths: Any) -> Any:
        held = jnp.asarray(cache[0].keys)[:, 0, :, 0]
        position = jnp.arange(held.shape[1])
        index = (jnp.where(position < lengths[:, None], held, 0) * (position + 1)).sum(axis=1).astype(jnp.int32)
        return jnp.asarray(self.logits_of)[index % len(self.logits_of)]

    def prefill(self, tokens: Any, lengths: Any, slots: Any, int8: bool = False) -> Any:
        held = jnp.pad(tokens, ((0, 0), (0, slots - tokens.shape[1]))).astype(jnp.float32)[:, None, :, None]
        cache = [LayerCache(held, held)]
        return self._logits(cache, lengths), cache

    def step(self, tokens: Any, positions: Any, cache: list[LayerCache]) -> Any:
        new = tokens.astype(jnp.float32)[:, None, None]
        cache = [cache[0].write(new, new, positions)]
        return self._logits(cache, positions + 1), cache

    def extend(self, tokens: Any, starts: Any, counts: Any, cache: Any) -> Any:
        raise NotImplementedError

    def logits(self, hidden: Any) -> Any:
        raise NotImplementedError

    def empty_cache(self, rows: int, slots: Any, int8: bool = False) -> Any:
        raise NotImplementedError

    def after(self, tokens: tuple[int, ...]) -> list[float]:
        """Log-probabilities of the next token, in Python."""
        row = self.logits_of[sum((p + 1) * t for p, t in enumerate(tokens)) % len(self.logits_of)]
        total = math.log(sum(math.exp(x) for x in row))
        return [float(x) - total for x in row]


@functools.partial(jax.jit, static_argnums=4)
def prefill(table: Any, *arguments: Any) -> Any:
    return beam.prefill(Table(table), *arguments)


@functools.partial(jax.jit, static_argnums=4)
def decode(table: Any, *arguments: Any) -> Any:
    return beam.decode(Table(table), *arguments)


def search(
    model: Table,
    prompts: list[list[int]],
    row_ids: Any = None,
    cut: tuple[int, ...] = (),
    criterion: Any = None,
    **options: Any,
) -> beam_trace.Sequences:
    """`best_sequences` of a search with these options, left and entered again at every length in `cut`."""
    config = resolve({"eos_token_id": EOS, "pad_token_id": 0, **options}, None, GenerationConfig())
    vocab = model.logits_of.shape[1]
    static, traced = static_options(config), traced_options(config, vocab, Extras(stopping_criteria=criterion))
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), WIDEST), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    read = Prompts(
        tokens=tokens,
        lengths=lengths,
        max_lengths=lengths + np.int32(config.max_new_tokens or 0),
        row_ids=row_id_words(row_ids, len(prompts)),
        idle=np.zeros(len(prompts), bool),
    )
    layout = BatchLayout(static, static.num_beams, TOTAL, TOTAL)
    state = prefill(model.logits_of, read, jax.random.key(3), traced, layout)
    for until in (*cut, TOTAL):
        state = decode(model.logits_of, state, np.int32(until), traced, static)
    assert not state.running.any()
    returned = config.sequences_per_prompt
    return beam_trace.best_sequences(state, len(prompts), static.num_beams, returned, float(traced.length_penalty))


def found(result: beam_trace.Sequences) -> list[tuple[int, ...]]:
    rows = zip(result.tokens, result.lengths, strict=True)
    return [tuple(tokens[:count].tolist()) for tokens, count in rows]


def never(tokens: tuple[int, ...]) -> bool:
    return False


def by_hand(
    model: Table, prompt: list[int], beams: int, limit: int, penalty: float, early: Any, stop: Any = never
) -> list[tuple[float, tuple[int, ...]]]:
    """Beam search over tuples: [(score, new tokens)], best first."""
    running, done = [(0.0, ())], []
    for length in range(1, limit + 1):
        options = [
            (score + logp, (*new, token))
            for score, new in running
            for token, logp in enumerate(model.after((*prompt, *new)))
        ]
        options.sort(key=lambda option: -option[0])
        options = options[: 2 * beams]
        ends = [new[-1] == EOS or length == limit or stop((*prompt, *new)) for _, new in options]
        done += [
            (score / length**penalty, new) for (score, new), end in zip(options[:beams], ends, strict=False) if end
        ]
        done = sorted(done, key=lambda option: -option[0])[:beams]
        running = [option for option, end in zip(options, ends, strict=True) if not end][:beams]
        if not running or (early is True and len(done) == beams):
            break
        possible = running[0][0] / (limit if early == "never" and penalty > 0 else length) ** penalty
        if len(done) == beams and possible <= done[-1][0]:
            break
    return done


def likelihoods(**rows: dict[int, float]) -> Table:
    """A model of one-token prompts (token 0) over four tokens; `after_2_3={2: 0.9}` is what follows tokens 2, 3."""
    table = np.full((40, 4), -9.0)
    for name, probabilities in rows.items():
        tokens = [int(token) for token in name.split("_")[1:]]
        index = sum((p + 2) * token for p, token in enumerate(tokens)) % 40
        table[index] = [math.log(probabilities.get(token, 1e-9)) for token in range(4)]
    return Table(table.astype(np.float32))


# The likeliest first token, 2, leads to a dead end: 0.5 * 0.4 = 0.2 against 0.4 * 0.9 = 0.36.
DETOUR = likelihoods(after={2: 0.5, 3: 0.4, 0: 0.1}, after_2={2: 0.4, 3: 0.3, 0: 0.3}, after_3={3: 0.9, 2: 0.1})


def test_a_detour_that_greedy_search_does_not_take():
    result = search(DETOUR, [[0]], num_beams=2, num_return_sequences=2, max_new_tokens=2, length_penalty=0.0)
    assert found(result) == [(3, 3), (2, 2)]
    np.testing.assert_allclose(np.exp(result.scores), [0.36, 0.2], rtol=1e-5)
    np.testing.assert_allclose(np.exp(result.logprobs), [[0.4, 0.9], [0.5, 0.4]], rtol=1e-5)
    # Row 0 held token 2 after the first step, row 1 token 3.
    assert result.beam_indices.tolist() == [[0, 1], [0, 0]]


def test_the_length_penalty_chooses_between_short_and_long():
    # "1" ends at 0.4; "2 1" at 0.5 * 0.5 = 0.25: log 0.4 = -0.916, log 0.25 = -1.386, half of it -0.693.
    model = likelihoods(after={EOS: 0.4, 2: 0.5, 3: 0.1}, after_2={EOS: 0.5, 2: 0.3, 3: 0.2}, after_3={EOS: 1.0})
    for penalty, expected, score in ((0.0, (EOS,), -0.9163), (1.0, (2, EOS), -0.6931)):
        result = search(model, [[0]], num_beams=2, max_new_tokens=2, length_penalty=penalty)
        assert found(result) == [expected]
        assert result.scores[0] == pytest.approx(score, abs=1e-4)


def test_candidates_behind_the_beams_may_go_on_but_not_end():
    """Of the four candidates only the first two may end, even if the third is an end and nothing else has ended."""
    model = likelihoods(
        after={2: 0.5, 3: 0.3, EOS: 0.2},
        after_2={2: 0.5, 3: 0.4, 0: 0.1},
        after_3={3: 1.0},
        after_2_2={EOS: 0.7, 2: 0.3},
        after_3_3={EOS: 0.6, 2: 0.4},
    )
    result = search(model, [[0]], num_beams=2, num_return_sequences=2, max_new_tokens=3, length_penalty=0.0)
    assert found(result) == [(3, 3, EOS), (2, 2, EOS)]
    np.testing.assert_allclose(np.exp(result.scores), [0.18, 0.175], rtol=1e-5)


def test_no_more_of_the_cache_moves_than_must(monkeypatch: pytest.MonkeyPatch):
    """Slot by slot, for prompts of different lengths: a slot too few, at either end, and beams go astray."""
    monkeypatch.setattr(beam_cache, "_BLOCK", 1)
    rng = np.random.default_rng(6)
    model = Table(np.float32(rng.normal(size=(29, 6))))  # a shape of its own: nothing compiled before fits
    prompts = [rng.integers(0, 6, size).tolist() for size in (*[2] * 11, 4)]
    result = search(model, prompts, num_beams=3, max_new_tokens=7)
    assert found(result) == [by_hand(model, prompt, 3, 7, 1.0, False)[0][1] for prompt in prompts]


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("beams", some_slow([2, 3], lambda beams: beams == 3))
def test_random_tables_against_a_search_in_python(beams: int, early: Any):
    rng = np.random.default_rng(beams)
    ends = 0
    for penalty in (-1.0, 0.0, 1.0, 2.0):
        model = Table(np.float32(rng.normal(size=(31, 6)) * 1.5))
        prompts = [rng.integers(0, 6, size).tolist() for size in rng.integers(1, 5, 12)]
        result = search(
            model, prompts, num_beams=beams, num_return_sequences=beams, max_new_tokens=7, length_penalty=penalty,
            early_stopping=early,
        )  # fmt: skip
        for index, prompt in enumerate(prompts):
            expected = by_hand(model, prompt, beams, 7, penalty, early)
            rows = slice(index * beams, index * beams + beams)
            assert found(result)[rows] == [new for _, new in expected]
            np.testing.assert_allclose(result.scores[rows], [score for score, _ in expected], atol=1e-4)
        np.testing.assert_allclose(result.logprobs.sum(1) / result.lengths**penalty, result.scores, atol=1e-4)
        ends += (result.lengths < 7).sum()
    assert ends > 20


def test_a_criterion_ends_candidates_one_by_one():
    model = Table(np.float32(np.random.default_rng(4).normal(size=(31, 6))))
    prompts = [[int(n)] for n in np.random.default_rng(5).integers(0, 6, 12)]

    def lucky(tokens: Any, lengths: Any, scores: Any) -> Any:
        assert scores.shape == (len(tokens), 6)
        return jnp.where(jnp.arange(TOTAL) < lengths[:, None], tokens, 0).sum(axis=1) % 7 == 6

    result = search(model, prompts, criterion=lucky, num_beams=2, max_new_tokens=7)
    for index, prompt in enumerate(prompts):
        score, new = by_hand(model, prompt, 2, 7, 1.0, False, stop=lambda tokens: sum(tokens) % 7 == 6)[0]
        assert found(result)[index] == new
        assert result.scores[index] == pytest.approx(score, abs=1e-4)
        meets = sum(prompt) + sum(new) if new[-1] != EOS else 0
        assert (result.status[index] == CRITERION) == (meets % 7 == 6)
    assert (result.status == CRITERION).any()


def test_nan_is_reported_by_the_prompt_that_met_it():
    table = np.array(DETOUR.logits_of)
    table[3 * 2] = np.nan  # after token 3; the prompt of row 0 leads elsewhere
    with pytest.raises(NonFiniteLogitsError) as caught:
        search(Table(table), [[1], [0]], num_beams=2, num_return_sequences=2, max_new_tokens=2, length_penalty=0.0)
    assert "1" in str(caught.value)
    assert caught.value.rows == [1]


def test_rows_know_nothing_of_each_other():
    """Order, neighbours and interruptions change nothing, also where beams are drawn."""
    rng = np.random.default_rng(5)
    model = Table(np.float32(rng.normal(size=(31, 6))))
    prompts = [rng.integers(0, 6, size).tolist() for size in (1, 4, 2, 3)]
    for options in ({}, {"do_sample": True, "temperature": 1.4}):
        options |= {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 7}
        whole = search(model, prompts, list("abcd"), **options)
        order = [2, 0, 3, 1]
        moved = search(model, [prompts[i] for i in order], ["abcd"[i] for i in order], cut=(2, 3), **options)
        for name in ("tokens", "lengths", "scores", "logprobs", "status"):
            by_prompt = getattr(whole, name).reshape(4, 2, -1)
            np.testing.assert_array_equal(getattr(moved, name).reshape(4, 2, -1), by_prompt[order], err_msg=name)


def drawn(weights: list[float], count: int):
    """Every order in which `count` of the options may be drawn without replacement, and its probability."""
    for order in itertools.permutations([i for i, weight in enumerate(weights) if weight > 0], count):
        probability, left = 1.0, sum(weights)
        for option in order:
            probability *= weights[option] / left
            left -= weights[option]
        yield order, probability


@pytest.mark.slow
def test_beam_sample_has_the_distribution_of_drawing_without_replacement():
    """The whole search of two steps, enumerated, against 20,000 prompts that differ in their ids only."""
    temperature, prompts, vocab, beams = 1.5, 20_000, 6, 2
    model = Table(np.float32(np.random.default_rng(9).normal(size=(11, vocab))))

    @functools.cache
    def terms(new: tuple[int, ...]) -> list[float]:
        return [x / temperature for x in model.after((2, *new))]

    exact: dict[tuple[int, ...], float] = {}
    for first, p_first in drawn([math.exp(x) for x in terms(())], 4):
        done = [(terms(())[EOS], (EOS,))] if EOS in first[:beams] else []
        running = sorted(((terms(())[t], (t,)) for t in first if t != EOS), reverse=True)[:beams]
        options = [(s + x, (*new, t)) for s, new in running for t, x in enumerate(terms(new))]
        # Its first `beams` end, for there is no room for more; the best of them and of what has ended counts.
        for second, p_second in drawn([math.exp(score) for score, _ in options], beams):
            best = max([*done, *((options[i][0] / 2, options[i][1]) for i in second)])
            exact[best[1]] = exact.get(best[1], 0.0) + p_first * p_second
    assert sum(exact.values()) == pytest.approx(1.0)

    result = search(
        model, [[2]] * prompts, num_beams=beams, do_sample=True, temperature=temperature, top_k=0, max_new_tokens=2
    )
    counts = dict.fromkeys(exact, 0)
    for new in found(result):
        counts[new] += 1
    observed, expected = np.array(list(counts.values())), np.array(list(exact.values())) * prompts
    common = expected > 5
    chi_square = float((((observed - expected) ** 2) / expected)[common].sum())
    degrees = int(common.sum()) - 1
    assert degrees > 5
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.sampled_from([8, 40, 64, 75]), st.data())
def test_a_reordered_cache_is_the_whole_cache_taken_by_row(slots: int, data: Any):
    rows, rng = 6, np.random.default_rng(slots)
    last = data.draw(st.integers(0, slots + 9))
    first = data.draw(st.integers(0, last))
    parents = data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))
    values = rng.normal(size=(rows, 2, slots, 3)).astype(np.float32)
    if last < slots:  # all rows are alike before `first`, and nobody looks behind `last`
        values[:, :, :first] = values[:1, :, :first]
    cache = [LayerCache(jnp.asarray(values), to_int8(jnp.asarray(values)))]
    result = jax.jit(reordered)(cache, jnp.array(parents), jnp.int32(first), jnp.int32(last))
    for before, after in zip(jax.tree.leaves(cache), jax.tree.leaves(result), strict=True):
        used = slice(None) if last >= slots else slice(0, last + 1)
        np.testing.assert_array_equal(np.asarray(after)[:, :, used], np.asarray(before)[parents][:, :, used])


@pytest.mark.parametrize("slots", [40, 64])
def test_a_cache_stays_where_it_is_if_no_beam_moves(slots: int):
    values = jnp.arange(2 * slots, dtype=jnp.float32).reshape(2, 1, slots, 1)
    nobody = jnp.int32(np.iinfo(np.int32).max)
    result = reordered([LayerCache(values, values)], jnp.array([1, 0]), nobody, jnp.int32(0))
    np.testing.assert_array_equal(result[0].keys, values)


OPTIONS = {
    "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 9, "eos_token_id": 7, "pad_token_id": 0,
    "return_dict_in_generate": True, "output_scores": True, "seed": 3, "repetition_penalty": 1.2,
}  # fmt: skip
PROMPTS = [[5, 1, 4], [9, 30, 8, 2, 7, 61, 12, 44, 3, 21, 80], [11], [3, 3, 3, 9, 9]]


@pytest.fixture(scope="module")
def model(reference_model):
    return reference_model("window_8")  # the ring turns


@pytest.mark.slow
@pytest.mark.parametrize("sample", [False, True])
def test_padding_order_and_neighbours_change_nothing_in_a_real_model(model, sample: bool):
    options = OPTIONS | {"do_sample": sample}
    names, order = list("abcd"), [3, 1, 0, 2]
    whole = model.generate(*padded(PROMPTS, "left", 0), row_ids=names, **options)
    ids, mask = padded([PROMPTS[i] for i in order], "holes", 7, filler=9)
    moved = model.generate(ids, mask, row_ids=[names[i] for i in order], **options)
    alone = model.generate(*padded(PROMPTS[1:2], "left", 0), row_ids=["b"], **options)
    for name in ("lengths", "sequences_scores", "logprobs", "model_logprobs"):
        by_prompt = getattr(whole, name).reshape(4, 2, -1)
        np.testing.assert_array_equal(getattr(moved, name).reshape(4, 2, -1), by_prompt[order], err_msg=name)
        own = getattr(alone, name).reshape(1, 2, -1)[0]
        np.testing.assert_allclose(own, by_prompt[1][:, : own.shape[1]], atol=1e-4, err_msg=name)
    width = min(alone.beam_indices.shape[1], whole.beam_indices.shape[1])
    new = whole.sequences[:, 11:].reshape(4, 2, -1)
    np.testing.assert_array_equal(moved.sequences[:, ids.shape[1] :].reshape(4, 2, -1), new[order])
    np.testing.assert_array_equal(alone.sequences[:, 11 : 11 + width], new[1][:, :width])
    assert whole.past_key_values is None


@pytest.mark.slow
def test_each_token_scores_what_the_row_it_came_from_says(model):
    result = model.generate(*padded(PROMPTS, "left", 0), top_logprobs=3, **OPTIONS)
    for row in range(8):
        for step in range(result.lengths[row]):
            token, source = result.sequences[row, 11 + step], result.beam_indices[row, step]
            assert result.scores[step][source, token] == result.logprobs[row, step]
            best = np.flatnonzero(result.top_ids[row, step] == token)
            if best.size:
                assert result.top_logprobs[row, step, best[0]] == pytest.approx(result.model_logprobs[row, step])
        assert (result.beam_indices[row, result.lengths[row] :] == -1).all()
        assert result.finish_reason[row] == ("eos" if 7 in result.sequences[row, 11:] else "length")
    total = result.logprobs.sum(axis=1) / result.lengths
    np.testing.assert_allclose(result.sequences_scores, total, atol=1e-5)


def test_a_clock_changes_nothing_until_time_is_up(model):
    ids, mask = padded(PROMPTS, "left", 0)
    plain = model.generate(ids, mask, **OPTIONS)
    timed = model.generate(ids, mask, max_time=600.0, **OPTIONS)
    np.testing.assert_array_equal(timed.sequences, plain.sequences)
    np.testing.assert_array_equal(timed.logprobs, plain.logprobs)


def test_when_time_is_up_the_running_beams_are_the_result(model):
    ids, mask = padded(PROMPTS, "left", 0)
    fields = {name: value for name, value in OPTIONS.items() if name != "seed"} | {"eos_token_id": None}
    config = resolve(fields, None, model.generation_config)
    request = prepare(model, ids, mask, config)
    program = program_for(model, request)
    state: Any = out_of_time(advance(program, request, first_token(program, request), 4))
    scores = np.asarray(state.scores)[: 4 * 3].reshape(4, 3)
    result = collect(model, request, state)
    assert isinstance(result, GenerateOutput) and result.sequences_scores is not None
    assert result.finish_reason == ["time"] * 8
    assert (result.lengths == 4).all()
    np.testing.assert_allclose(result.sequences_scores, (scores[:, :2] / 4).reshape(-1), rtol=1e-6)
    tokens = np.asarray(state.tokens)
    for row, prompt in enumerate(PROMPTS):
        held = tokens[3 * row, len(prompt) : len(prompt) + 4]
        np.testing.assert_array_equal(result.sequences[2 * row, 11:], held)


@pytest.mark.slow
def test_int8_caches_move_with_their_beams(model):
    """Eight bits change little; a scale that stayed behind would change much."""
    ids, mask = padded(PROMPTS, "left", 0)
    exact = model.generate(ids, mask, **OPTIONS)
    small = model.generate(ids, mask, cache_implementation="quantized", **OPTIONS)
    np.testing.assert_allclose(small.sequences_scores, exact.sequences_scores, atol=0.05)


@pytest.mark.slow
def test_guided_beams_take_their_negative_rows_along(model):
    """Each token's score, from scratch: prompt and negative prompt with the tokens before it, read anew."""
    scale, negative = 1.7, [8, 15, 16, 23, 42]
    options = OPTIONS | {"repetition_penalty": 1.0, "eos_token_id": None, "output_scores": False}
    result = model.generate(
        *padded(PROMPTS, "left", 0), guidance_scale=scale, negative_prompt_ids=[negative], **options
    )

    def log_probs(prefixes: list[list[int]]) -> Any:
        ids, _ = padded(prefixes, "right", 0)
        logits, _ = model.prefill(jnp.asarray(ids, jnp.int32), jnp.array([*map(len, prefixes)], jnp.int32), 32)
        return jax.nn.log_softmax(logits, axis=1)

    assert len({tuple(row) for row in (result.beam_indices % 3).tolist()}) > 1  # beams did move
    for row in (0, 1, 3):
        new = result.sequences[row, 11:].tolist()
        begun = [new[:step] for step in range(len(new))]
        own = log_probs([PROMPTS[row // 2] + tokens for tokens in begun])
        other = log_probs([negative + tokens for tokens in begun])
        guided = scale * (own - other) + other
        np.testing.assert_allclose(result.logprobs[row], guided[jnp.arange(len(new)), jnp.array(new)], atol=1e-3)
