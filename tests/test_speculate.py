"""Speculation changes no token: whoever drafts, a call gives what plain decoding gives, and faster."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxgen import AutoModelForCausalLM, GenerateOutput, JaxgenError, MistralConfig, MistralForCausalLM, demo
from jaxgen.cache import LayerCache
from jaxgen.convert.load import AutoModelForCausalLM as Loader
from jaxgen.generation import loop
from jaxgen.generation.choosing.sample import random_key, row_id_words
from jaxgen.generation.execute import Program, advance, prefill, program_for
from jaxgen.generation.options.config import resolve
from jaxgen.generation.options.table import Extras
from jaxgen.generation.prepare import Request, prepare
from jaxgen.generation.programs.inputs import BatchLayout, StaticOptions, TracedOptions
from jaxgen.generation.prompts.prefill import Prompts
from jaxgen.generation.searches import speculate
from jaxgen.generation.searches.speculate import NO_DRAFT, Pair, check_assistant, look_up
from tests.helpers import some_slow
from tests.reference.cases import CASES, left_padded
from tests.reference.weights import write_checkpoint

DRAFTERS = ("itself", "stranger", "prompt_lookup")
every_drafter = pytest.mark.parametrize(
    "drafter", some_slow(DRAFTERS, lambda drafter: drafter != "prompt_lookup", "stranger".__eq__)
)
GREEDY = {"do_sample": False, "repetition_penalty": 1.2, "min_new_tokens": 2, "eos_token_id": 7, "max_new_tokens": 16}
SAMPLED = GREEDY | {"do_sample": True, "temperature": 1.3, "top_k": 30, "top_p": 0.95}
BATCH = 4
prompts = st.lists(st.integers(0, 96), min_size=1, max_size=14)
batches = st.lists(prompts, min_size=BATCH, max_size=BATCH)
# Numbers that compile nothing: one bucket holds them all.
numbers = st.builds(
    lambda length, least, eos, penalty: {
        "max_new_tokens": length, "min_new_tokens": min(least, length), "eos_token_id": eos,
        "repetition_penalty": penalty,
    },
    st.integers(1, 16),
    st.integers(1, 12),
    st.lists(st.integers(0, 96), min_size=1, max_size=4, unique=True),
    st.floats(1.01, 2),
)  # fmt: skip
few = settings(max_examples=8, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def model(reference_model) -> MistralForCausalLM:
    return reference_model("window_8")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> MistralForCausalLM:
    """Other weights, and no window: its drafts are right by chance only."""
    config = {**CASES["window_8"].config, "sliding_window": None, "num_hidden_layers": 1}
    return Loader.from_pretrained(write_checkpoint(tmp_path_factory.mktemp("stranger"), config, 77), dtype="float32")


@pytest.fixture(scope="module")
def drafting(model, stranger):
    """The options that switch on one of `DRAFTERS`."""

    def options(drafter: str, drafts: int = 5, confidence: float = 0.05) -> dict[str, Any]:
        if drafter == "prompt_lookup":
            return {"prompt_lookup_num_tokens": drafts}
        assistant = {"itself": model, "stranger": stranger}[drafter]
        return {
            "assistant_model": assistant,
            "num_assistant_tokens": drafts,
            "assistant_confidence_threshold": confidence,
        }

    return options


def run_of(
    model: MistralForCausalLM, ids: Any, mask: Any = None, row_ids: Any = None, **options: Any
) -> tuple[Program, Request, Any]:
    """A call of `generate` after its prefill."""
    extras, fields = Extras.take(options)
    seed = fields.pop("seed", 0)
    config = resolve(fields, None, model.generation_config)
    request = prepare(model, ids, mask, config, seed=seed, row_ids=row_ids, extras=extras)
    program = program_for(model, request)
    return program, request, prefill(program, request)


def finished(model: MistralForCausalLM, *arguments: Any, **options: Any) -> Any:
    """The state at the end of a call."""
    return advance(*run_of(model, *arguments, **options))


def output_of(model: Any, ids: Any, mask: Any = None, **options: Any) -> GenerateOutput:
    output = model.generate(ids, mask, return_dict_in_generate=True, **options)
    assert isinstance(output, GenerateOutput)
    return output


def assert_same(actual: GenerateOutput, expected: GenerateOutput) -> None:
    np.testing.assert_array_equal(actual.sequences, expected.sequences)
    assert actual.finish_reason == expected.finish_reason
    # Several tokens at a time are summed in another order than one.
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=1e-4)
    np.testing.assert_allclose(actual.model_logprobs, expected.model_logprobs, atol=1e-4)


def counters(state: Any, rows: int) -> list[list[int]]:
    return np.stack([state.drafted, state.accepted, state.rounds], axis=1)[:rows].tolist()


class TestSameTokens:
    @every_drafter
    @few
    @given(batches, numbers)
    def test_greedy(self, model, drafting, drafter, rows, changed):
        ids, mask = left_padded(rows)
        expected = output_of(model, ids, mask, **GREEDY | changed)
        assert_same(output_of(model, ids, mask, **GREEDY | changed, **drafting(drafter)), expected)

    @pytest.mark.slow
    @every_drafter
    @few
    @given(batches, numbers, st.integers(0, 2**32), st.floats(0.3, 3))
    def test_sampled(self, model, drafting, drafter, rows, changed, seed, temperature):
        ids, mask = left_padded(rows)
        options = SAMPLED | changed | {"seed": seed, "temperature": temperature, "row_ids": ["a", "b", 7, -1]}
        expected = output_of(model, ids, mask, **options)
        assert_same(output_of(model, ids, mask, **options, **drafting(drafter)), expected)

    @pytest.mark.slow
    @every_drafter
    def test_more_drafts_than_the_window_holds(self, model, drafting, drafter):
        """Each round may write 21 tokens into rings of 8 + 21 slots, and take most of them back."""
        ids, mask = left_padded([*CASES["window_8"].prompts(), [5, 6, 5, 6, 5]])
        options: Any = {"max_new_tokens": 60, "eos_token_id": None}
        expected = output_of(model, ids, mask, **options)
        actual = output_of(model, ids, mask, **options, **drafting(drafter, drafts=20, confidence=0.0))
        assert_same(actual, expected)

    @pytest.mark.slow
    def test_several_samples_of_a_prompt(self, model, drafting):
        ids, mask = left_padded([[5, 6, 7], [8, 9]])
        options: Any = SAMPLED | {"num_return_sequences": 3, "seed": 5}
        expected = output_of(model, ids, mask, **options)
        assert len({tuple(row) for row in expected.sequences[:3].tolist()}) > 1
        assert_same(output_of(model, ids, mask, **options, **drafting("itself")), expected)

    @pytest.mark.slow
    def test_guidance(self, model, drafting):
        ids, mask = left_padded([[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]])
        options: Any = {
            "guidance_scale": 1.7, "negative_prompt_ids": [[7, 6, 5, 4], [1, 2, 3, 4]], "max_new_tokens": 20,
            "eos_token_id": None,
        }  # fmt: skip
        expected = output_of(model, ids, mask, **options)
        plain = model.generate(ids, mask, max_new_tokens=20, eos_token_id=None)
        assert (expected.sequences != plain).any()
        assert_same(output_of(model, ids, mask, **options, **drafting("itself")), expected)

    @pytest.mark.slow
    def test_what_is_recorded(self, model, drafting):
        ids, mask = left_padded([[5, 6, 7], [8, 9]])
        options: Any = GREEDY | {"output_scores": True, "output_logits": True, "top_logprobs": 3, "max_new_tokens": 9}
        expected = output_of(model, ids, mask, **options)
        actual = output_of(model, ids, mask, **options, **drafting("stranger"))
        for name in ("scores", "logits", "top_logprobs"):
            np.testing.assert_allclose(np.array(actual[name]), np.array(expected[name]), atol=1e-4)
        np.testing.assert_array_equal(actual.top_ids, expected.top_ids)

    @pytest.mark.slow
    @pytest.mark.parametrize("drafter", some_slow(["itself", "prompt_lookup"], "itself".__eq__))
    def test_a_call_that_goes_on_from_a_speculative_one(self, model, drafting, drafter):
        ids = np.array([[5, 6, 7, 8, 9, 10, 11, 12, 13]])
        options: Any = {"max_new_tokens": 12, "eos_token_id": None}
        speculation = drafting(drafter, confidence=0.0)
        first = output_of(model, ids, **options, **speculation)
        longer = np.concatenate([first.sequences, [[20, 21]]], axis=1)
        expected = model.generate(longer, **options)
        second = model.generate(longer, past_key_values=first.past_key_values, **options, **speculation)
        np.testing.assert_array_equal(second, expected)

    @pytest.mark.slow
    def test_an_8_bit_cache(self, model, drafting):
        """Rounded to 8 bits, close decisions may fall the other way: one row whose decisions are not close."""
        options: Any = {"max_new_tokens": 12, "eos_token_id": None, "cache_implementation": "quantized"}
        expected = model.generate([[5, 6, 7]], **options)
        actual = model.generate([[5, 6, 7]], **options, **drafting("itself", confidence=0.0))
        np.testing.assert_array_equal(actual, expected)

    @pytest.mark.slow
    def test_a_prompt_that_is_read_in_pieces(self, model, drafting):
        ids, mask = left_padded([list(range(5, 40)), [8, 9]])
        options: Any = {"max_new_tokens": 10, "eos_token_id": None}
        expected = model.generate(ids, mask, **options)
        actual = model.generate(ids, mask, prefill_chunk_size=16, **options, **drafting("itself"))
        np.testing.assert_array_equal(actual, expected)


class TestStates:
    @pytest.mark.slow
    @pytest.mark.parametrize("drafter", DRAFTERS)
    @few
    @given(batches, st.lists(st.integers(1, 16), max_size=4))
    def test_chunks_change_nothing(self, model, drafting, drafter, rows, stops):
        """Not even how often what was drafted and accepted."""
        options = SAMPLED | drafting(drafter)
        whole = finished(model, *left_padded(rows), **options)
        program, request, state = run_of(model, *left_padded(rows), **options)
        for until in sorted(stops):
            state = advance(program, request, state, until)
            assert (~state.running | (state.lengths - state.prompt_lengths >= until)).all()
        state = advance(program, request, state)
        for name in ("tokens", "lengths", "status", "logprobs"):
            np.testing.assert_array_equal(getattr(state, name), getattr(whole, name))
        assert counters(state, BATCH) == counters(whole, BATCH)

    @pytest.mark.slow
    @few
    @given(batches, batches, st.sampled_from(DRAFTERS))
    def test_neighbours_change_nothing(self, model, drafting, rows, others, drafter):
        options = SAMPLED | drafting(drafter)
        first = finished(model, *left_padded(rows), row_ids=[10, 11, 12, 13], **options)
        mixed = left_padded([rows[0], *others[1:]])
        second = finished(model, *mixed, row_ids=[10, 7, 8, 9], **options)
        assert first.tokens[0, : first.lengths[0]].tolist() == second.tokens[0, : second.lengths[0]].tolist()
        assert counters(first, 1) == counters(second, 1)

    @pytest.mark.slow
    def test_a_perfect_assistant_saves_rounds_and_a_stranger_none(self, model, drafting):
        ids, mask = left_padded([[5, 6, 7], [8, 9], [3], [4, 4, 4]])
        options: Any = {"max_new_tokens": 19, "eos_token_id": None}
        state = finished(model, ids, mask, **options, **drafting("itself", confidence=0.0))
        # The prefill gives one token, three rounds six each: five drafts and the one that follows them.
        assert counters(state, BATCH) == [[15, 15, 3]] * BATCH
        state = finished(model, ids, mask, **options, **drafting("stranger", confidence=0.0))
        for drafted, accepted, rounds in counters(state, BATCH):
            assert accepted + rounds == 18
            assert 0 <= accepted < 6
            assert drafted > 60

    @pytest.mark.slow
    def test_an_unsure_assistant_drafts_one_token_per_round(self, model, drafting):
        options: Any = {"max_new_tokens": 19, "eos_token_id": None}
        state = finished(model, [[5, 6, 7]], **options, **drafting("itself", confidence=1.0))
        assert counters(state, 1) == [[9, 9, 9]]

    @pytest.mark.parametrize("limit", [1, 2, 3, 7])
    def test_nothing_is_drafted_past_the_limit(self, model, drafting, limit):
        options: Any = {"max_new_tokens": limit, "eos_token_id": None}
        state = finished(model, [[5, 6, 7]], **options, **drafting("itself", confidence=0.0))
        expected = {1: [0, 0, 0], 2: [0, 0, 1], 3: [1, 1, 1], 7: [5, 5, 1]}[limit]
        assert counters(state, 1) == [expected]

    @pytest.mark.slow
    def test_nan_is_met_where_plain_decoding_meets_it(self, model, drafting):
        ids = np.array([[8, 9, 10, 11, 12]])
        tokens = model.generate(ids, max_new_tokens=6, eos_token_id=None)[0, 5:].tolist()
        assert tokens[2] not in tokens[:2]
        structure, weights = nnx.split(model)
        broken = nnx.merge(structure, jax.tree.map(jnp.copy, weights))
        embeddings = np.asarray(broken.model.embed_tokens.weight[...]).copy()
        embeddings[tokens[2]] = np.nan
        broken.model.embed_tokens.weight[...] = jnp.asarray(embeddings)
        with pytest.raises(JaxgenError, match="row 0 at step 3"):
            broken.generate(ids, max_new_tokens=6, eos_token_id=None, **drafting("itself", drafts=1, confidence=0.0))


@pytest.mark.slow
@pytest.mark.parametrize("drafter", some_slow(["fewer layers", "prompt_lookup"], "fewer layers".__eq__))
def test_text_with_stop_strings(drafter):
    """The demo counts; half of its layers and the text itself guess well what comes next."""
    model = AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")
    from jaxgen.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(demo.path())
    inputs = tokenizer(["1, 2, 3, 4,", "A list of colors: red, blue"], padding=True, return_tensors="np")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assistant = AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")
    assistant.model.layers = assistant.model.layers[:-1]
    assistant.config = dataclasses.replace(assistant.config, num_hidden_layers=len(assistant.model.layers))
    speculation: Any = {"prompt_lookup_num_tokens": 4} if drafter == "prompt_lookup" else {"assistant_model": assistant}
    for stop in (["7"], [", 9", "orange"], ["never"]):
        options: Any = {"max_new_tokens": 24, "stop_strings": stop, "tokenizer": tokenizer}
        expected = output_of(model, ids, mask, **options)
        assert ("stop_string" in expected.finish_reason) == (stop != ["never"])
        assert_same(output_of(model, ids, mask, **options, **speculation), expected)


class TestPromptLookup:
    @pytest.mark.parametrize(
        ("row", "ngram", "expected"),
        [
            ([5, 6, 7, 5, 6], 2, [7, 5, 6]),  # 5 6 stood at the beginning; 7 5 6 followed
            ([1, 2, 3, 1, 2, 4, 1, 2], 2, [3, 1, 2]),  # of two places, the first
            ([2, 9, 1, 2, 8, 1, 2], 2, [8, 1, 2]),  # the longer match counts, though the shorter one is earlier
            ([2, 9, 1, 2, 8, 1, 2], 1, [9, 1, 2]),
            ([9, 2, 8, 1, 2], 2, [8, 1, 2]),  # 1 2 stood nowhere, 2 did
            ([7, 7, 7], 2, [7, -1, -1]),  # 7 7 stood at 0; what follows ends with the row
            ([7, 7, 7, 7], 2, [7, 7, -1]),
            ([1, 2, 3], 2, [-1, -1, -1]),
            ([4], 2, [-1, -1, -1]),
            ([4, 4], 5, [4, -1, -1]),
        ],
    )
    def test_by_hand(self, row, ngram, expected):
        for junk in (0, row[0], row[-1]):  # what lies beyond the row is not looked at
            tokens = jnp.array([row + [junk] * (12 - len(row))])
            assert look_up(tokens, jnp.array([len(row)]), np.array(ngram), 3).tolist() == [expected]

    @given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=16), min_size=3, max_size=3), st.integers(1, 4))
    @settings(deadline=None, derandomize=True)
    def test_the_definition(self, rows, ngram):
        def drafts(row: list[int]) -> list[int]:
            for size in range(min(ngram, len(row) - 1), 0, -1):
                for start in range(len(row) - size):
                    if row[start : start + size] == row[-size:]:
                        return (row[start + size :] + [NO_DRAFT] * 3)[:3]
            return [NO_DRAFT] * 3

        lengths = np.array([len(row) for row in rows])
        tokens = np.array([row + [1] * (16 - len(row)) for row in rows])
        actual = jax.jit(look_up, static_argnums=3)(tokens, lengths, np.array(ngram), 3)
        assert actual.tolist() == [drafts(row) for row in rows]

    @pytest.mark.slow
    def test_accepted_where_a_text_repeats_itself(self, model):
        """A model that says its prompt again: 4 drafts and one more per round, from the first one on."""
        toy = Toy(np.where(np.arange(4)[None, None] == (np.arange(4)[None, :, None] + 1) % 4, 9.0, 0.0))
        state = toy_run(toy, 1, [0, 1, 2, 3, 0], new=11, static=StaticOptions(False, drafts=4, prompt_lookup=True))
        assert state.tokens[0, :16].tolist() == [0, 1, 2, 3] * 4
        # After 0 1 2 3 0 1: "0 1" was followed by 2 3 0 1, and so on in fives.
        assert counters(state, 1) == [[8, 8, 2]]


@dataclasses.dataclass
class Toy:
    """A language model of four tokens, whose logits are a table of the last two; the cache holds the tokens."""

    table: Any  # [previous, last, next]

    def prefill(self, tokens: Any, lengths: Any, slots: int, int8: bool = False) -> Any:
        hidden, cache = self.extend(tokens, jnp.zeros_like(lengths), lengths, self.empty_cache(len(tokens), slots))
        return hidden[jnp.arange(len(tokens)), lengths - 1], cache

    def step(self, tokens: Any, positions: Any, cache: Any) -> Any:
        hidden, cache = self.extend(tokens[:, None], positions, jnp.ones_like(tokens), cache)
        return hidden[:, 0], cache

    def extend(self, tokens: Any, starts: Any, counts: Any, cache: Any) -> Any:
        column = jnp.arange(tokens.shape[1])
        positions, real = starts[:, None] + column, column < counts[:, None]
        values = tokens[:, :, None, None].astype(jnp.float32)
        layer = cache[0].write_block(values, values, positions, real)
        before = jnp.maximum(positions - 1, 0)
        previous = jnp.take_along_axis(layer.keys[:, 0, :, 0], before, axis=1).astype(jnp.int32)
        return jnp.asarray(self.table, jnp.float32)[previous, tokens], [layer]

    def logits(self, hidden: Any) -> Any:
        return hidden

    def empty_cache(self, rows: int, slots: int, int8: bool = False) -> Any:
        return [LayerCache(jnp.zeros((rows, 1, slots, 1)), jnp.zeros((rows, 1, slots, 1)))]


def toy_run(models: Any, rows: int, prompt: list[int], new: int, static: StaticOptions, search: Any = speculate) -> Any:
    """Generation with a toy, or a pair of them: `rows` rows of one prompt, with row ids 0, 1, 2, ..."""
    length = len(prompt)
    traced = TracedOptions(
        processors=(), criteria=(), eos_ids=jnp.array([-1]), stop_strings=None, guidance_scale=None,
        length_penalty=jnp.ones(()), confidence=jnp.zeros(()), ngram=jnp.array(2),
    )  # fmt: skip
    batch = Prompts(
        tokens=jnp.tile(jnp.array([prompt]), (rows, 1)),
        lengths=jnp.full(rows, length),
        max_lengths=jnp.full(rows, length + new),
        row_ids=jnp.asarray(row_id_words(None, rows)),
        idle=jnp.zeros(rows, bool),
    )

    @jax.jit
    def run(key: Any) -> Any:
        state = search.prefill(models, batch, key, traced, BatchLayout(static, 1, length + new, length + new))
        return search.decode(models, state, jnp.int32(99), traced, static)

    return run(random_key(None, 8)[0])


class TestDistribution:
    RNG = np.random.default_rng(3)
    TARGET, DRAFTER = (Toy(1.5 * table) for table in RNG.normal(size=(2, 4, 4, 4)))

    def probabilities(self, toy: Toy) -> np.ndarray:
        """`[previous, last, next]`, in float64."""
        odds = np.exp(np.asarray(toy.table, np.float64))
        return odds / odds.sum(axis=-1, keepdims=True)

    @pytest.mark.slow
    def test_every_sequence_is_as_likely_as_the_model_says(self):
        rows, p = 30_000, self.probabilities(self.TARGET)
        static = StaticOptions(do_sample=True, drafts=2)
        state = toy_run(Pair(self.TARGET, self.DRAFTER), rows, [1, 2], new=4, static=static)
        sequences = list(itertools.product(range(4), repeat=4))
        expected = [p[1, 2, a] * p[2, a, b] * p[a, b, c] * p[b, c, d] for a, b, c, d in sequences]
        observed = np.bincount(np.asarray(state.tokens)[:, 2:] @ (64, 16, 4, 1), minlength=256)
        assert 0.3 < state.accepted.sum() / state.drafted.sum() < 0.9  # both outcomes are in it
        often = np.array(expected) * rows > 5
        observed = np.append(observed[often], observed[~often].sum())
        expected = np.append(np.array(expected)[often], np.array(expected)[~often].sum()) * rows
        assert len(observed) > 100
        assert stats.chisquare(observed, expected).pvalue > 1e-3
        plain = toy_run(self.TARGET, rows, [1, 2], new=4, static=dataclasses.replace(static, drafts=0), search=loop)
        np.testing.assert_array_equal(state.tokens, plain.tokens)

    @pytest.mark.slow
    def test_drafts_are_accepted_as_often_as_shared_noise_allows(self):
        """Two Gumbel-argmax draws with one noise agree with probability sum_i 1 / sum_j max(p_j/p_i, q_j/q_i)."""
        rows, p, q = 30_000, self.probabilities(self.TARGET), self.probabilities(self.DRAFTER)
        static = StaticOptions(do_sample=True, drafts=1)
        state = toy_run(Pair(self.TARGET, self.DRAFTER), rows, [1, 2], new=3, static=static)
        # The prefill draws `first`; the next token is drafted, and is the only one with room for a draft ...
        ratios = np.maximum(p[2, :, None, :] / p[2, :, :, None], q[2, :, None, :] / q[2, :, :, None])
        agree = (1 / ratios.sum(axis=-1)).sum(axis=-1)
        # ... in the first round: where it was rejected, one more token has to be drawn without.
        assert (state.drafted == 1).all()
        expected = (p[1, 2] * agree).sum()
        deviation = np.sqrt(expected * (1 - expected) / rows)
        assert abs(state.accepted.mean() - expected) < 4 * deviation
        # An independent draft would be right far less often.
        assert expected > (p[1, 2] * (p[2] * q[2]).sum(axis=-1)).sum() + 50 * deviation


class TestCheckAssistant:
    CONFIG = MistralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip

    def test_another_vocabulary(self, model):
        assistant = MistralForCausalLM(self.CONFIG, rngs=nnx.Rngs(0))
        with pytest.raises(JaxgenError, match="vocabulary of 50 tokens, the model one of 97"):
            check_assistant(model, assistant)

    def test_not_a_model(self, model):
        with pytest.raises(JaxgenError, match="assistant_model is a str"):
            check_assistant(model, "gpt2")

    def test_another_device(self, model):
        class Elsewhere(MistralForCausalLM):
            device = property(lambda self: "elsewhere")  # pyright: ignore[reportAssignmentType]

        with pytest.raises(JaxgenError, match="assistant_model is on elsewhere"):
            check_assistant(model, Elsewhere(model.config, rngs=nnx.Rngs(0)))

    def test_what_fits(self, model, stranger):
        check_assistant(model, model)
        check_assistant(model, stranger)
