"""Keys and values that are used again, read in pieces, or kept in 8 bits: the tokens stay those of the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen import GenerateOutput, JaxgenError
from jaxgen.cache import Int8Slots, to_int8
from tests.helpers import counted, some_slow
from tests.reference.cases import CASES, NEW_TOKENS, PAD, left_padded, right_padded, with_holes
from tests.reference.read import read

# Full attention, one key-value head; a window that every row outgrows; one that only the longer rows do.
NAMES = ("gqa_4", "window_8", "window_32")
GREEDY = {"eos_token_id": None, "pad_token_id": PAD}


def grown(name: str, count: int) -> list[list[int]]:
    """The prompts of a case, with the first `count` tokens that transformers continued them with."""
    new = read().tokens[name][:, :count].tolist()
    return [[*prompt, *more] for prompt, more in zip(CASES[name].prompts(), new, strict=True)]


CHUNKS = [*(("window_8", size) for size in (1, 3, 16, 100)), ("gqa_4", 3), ("window_32", 16)]


@pytest.mark.parametrize(("name", "size"), some_slow(CHUNKS, lambda case: case != ("window_8", 3)))
def test_a_prompt_may_be_read_in_chunks(name: str, size: int, reference_model):
    for ids, mask in (left_padded(CASES[name].prompts()), with_holes(CASES[name].prompts(), junk=4)):
        new = reference_model(name).generate(ids, mask, prefill_chunk_size=size, max_new_tokens=NEW_TOKENS, **GREEDY)
        np.testing.assert_array_equal(new[:, ids.shape[1] :], read().tokens[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", some_slow(NAMES, lambda name: name != "window_8"))
def test_a_call_goes_on_from_an_earlier_one(name: str, reference_model):
    """In four calls, each with the past of the one before: the tokens of one call."""
    model, past, count = reference_model(name), None, 0
    for more in (9, 20, 1, 34):
        ids, mask = (left_padded if count % 2 else right_padded)(grown(name, count))
        out = model.generate(
            ids, mask, past_key_values=past, max_new_tokens=more, return_dict_in_generate=True, **GREEDY
        )
        np.testing.assert_array_equal(out.sequences[:, ids.shape[1] :], read().tokens[name][:, count : count + more])
        past, count = out.past_key_values, count + more
        assert past.get_seq_length() == max(CASES[name].lengths) + count - 1  # the newest token has not been read


@pytest.mark.slow
def test_both_names_of_the_past(reference_model):
    """transformers calls it `cache` since 5.24, as an argument and in the output."""
    model = reference_model("gqa_4")
    options = {"max_new_tokens": 1, "return_dict_in_generate": True} | GREEDY
    out = model.generate([[5, 6]], **options)
    assert out.cache is out["cache"] is out.past_key_values
    for name in ("cache", "past_key_values"):
        again = model.generate([[5, 6, 7]], **{name: out.cache}, **options)
        assert again.origin.request.extras.past_key_values is out.cache
    model.generate([[5, 6]], cache=None, past_key_values=None, **options)
    with pytest.raises(JaxgenError, match="both cache and past_key_values"):
        model.generate([[5, 6, 7]], cache=out.cache, past_key_values=out.cache, **options)


def spied(model):
    reads = []

    class Reader(type(model)):
        def prefill(self, tokens, *rest):
            reads.append(("prefill", tokens.shape))
            return super().prefill(tokens, *rest)

        def extend(self, tokens, *rest):
            reads.append(("extend", tokens.shape))
            return super().extend(tokens, *rest)

    structure, state = nnx.split(model)
    copy = nnx.merge(structure, state)
    copy.__class__ = Reader
    return copy, reads


def test_only_what_is_new_is_read(reference_model):
    model, reads = spied(reference_model("gqa_4"))
    prompts = [[3] * 100, [4] * 90]
    ids, mask = left_padded(prompts)
    first = model.generate(ids, mask, max_new_tokens=2, return_dict_in_generate=True, **GREEDY)
    assert reads == [("prefill", (2, 128))]
    del reads[:]
    ids, mask = left_padded([[*prompt, 5, 6, 7] for prompt in prompts])
    model.generate(ids, mask, max_new_tokens=2, past_key_values=first.past_key_values, **GREEDY)
    assert set(reads) == {("extend", (2, 16))}


@pytest.mark.slow
def test_a_shared_beginning_is_read_once(reference_model):
    model, reads = spied(reference_model("window_32"))
    beginning = list(range(3, 30))
    past = model.generate([beginning], max_new_tokens=1, return_dict_in_generate=True, **GREEDY).past_key_values
    ids, mask = left_padded([[*beginning, *end] for end in ([40], [41, 42, 43], [44] * 9)])
    expected = model.generate(ids, mask, max_new_tokens=12, **GREEDY)
    del reads[:]
    for _ in range(2):  # the past is not used up
        shared = model.generate(ids, mask, max_new_tokens=12, past_key_values=past, **GREEDY)
        np.testing.assert_array_equal(shared, expected)
    assert set(reads) == {("extend", (3, 16))}


@pytest.mark.slow
@pytest.mark.parametrize("name", some_slow(NAMES, lambda name: name != "window_8"))
def test_a_past_that_differs_costs_time_and_not_correctness(name: str, reference_model):
    """What the prompts share with it is used, wherever they part; beside a window perhaps nothing."""
    model = reference_model(name)
    for changed in (0, 4, 12):
        others = [[t + 1 if i == changed else t for i, t in enumerate(row)] for row in grown(name, 30)]
        ids, mask = left_padded(others)
        past = model.generate(ids, mask, max_new_tokens=3, return_dict_in_generate=True, **GREEDY).past_key_values
        ids, mask = left_padded(CASES[name].prompts())
        new = model.generate(ids, mask, past_key_values=past, max_new_tokens=20, **GREEDY)[:, ids.shape[1] :]
        np.testing.assert_array_equal(new, read().tokens[name][:, :20])


def test_a_past_that_does_not_fit_is_refused(reference_model):
    ids, mask = left_padded(CASES["gqa_4"].prompts())
    past = reference_model("gqa_4").generate(ids, mask, max_new_tokens=1, return_dict_in_generate=True).past_key_values
    with pytest.raises(JaxgenError, match="past_key_values holds 3 rows, input_ids has 2"):
        reference_model("gqa_4").generate(ids[:2], mask[:2], past_key_values=past)
    with pytest.raises(JaxgenError, match="comes from another model"):
        reference_model("gqa_1").generate(ids, mask, past_key_values=past)
    with pytest.raises(JaxgenError, match="exclude each other"):
        reference_model("gqa_4").generate(ids, mask, past_key_values=past, guidance_scale=2.0)


def test_max_cache_len_makes_room_for_later_calls(reference_model):
    model = reference_model("gqa_4")
    model.generate([[5, 6, 7]], max_new_tokens=5, max_cache_len=180, **GREEDY)
    with counted() as compilations:
        model.generate([[5, 6, 7]], max_new_tokens=160, max_cache_len=180, **GREEDY)
    assert not compilations


def test_int8_by_hand():
    # The largest magnitude, 254, becomes 127: the scale is 2. 3 / 2 = 1.5 rounds to the even 2, -5 / 2 to -2.
    slots = to_int8(jnp.array([[254.0, 3.0, -5.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert slots.scales.tolist() == [2, 0]
    assert slots.values.tolist() == [[127, 2, -2, 0], [0, 0, 0, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}])
@pytest.mark.parametrize("name", some_slow(NAMES, lambda name: name != "gqa_4"))
def test_int8_cache_changes_logits_a_little(name: str, options: dict, reference_model):
    """Against the spread of the logits, as long as a row has read the same tokens; and never not at all."""
    model = reference_model(name)
    ids, mask = left_padded(CASES[name].prompts())
    keep = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True, **GREEDY, **options}
    exact: GenerateOutput = model.generate(ids, mask, **keep)
    rounded: GenerateOutput = model.generate(ids, mask, cache_implementation="quantized", **keep)
    assert exact.logits is not None and rounded.logits is not None
    new = (exact.sequences == rounded.sequences)[:, ids.shape[1] :]
    comparable = np.cumprod(np.pad(new[:, :-1], ((0, 0), (1, 0)), constant_values=1), axis=1).astype(bool)
    comparable[:, 0] = bool(options)  # the first logits come from the prompt itself, unless it is read in chunks
    errors = np.abs(np.stack(exact.logits, 1) - np.stack(rounded.logits, 1))[comparable]
    assert len(errors) > 8
    assert 0 < np.sqrt(np.mean(errors**2)) < 0.05 * np.std(np.stack(exact.logits))


@pytest.mark.slow
def test_int8_cache_takes_the_memory_it_says(reference_model):
    model = reference_model("wide_heads")
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, **GREEDY}
    plain = model.generate([[5, 6]], **options).past_key_values.cache
    past = model.generate([[5, 6]], cache_implementation="quantized", **options).past_key_values
    assert isinstance(past.cache[0].keys, Int8Slots)

    def size(cache) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(cache))

    assert size(past.cache) / size(plain) == (16 + 4) / (16 * 4)  # 16 values of one byte and a float32 scale
    again = model.generate([[5, 6, 7, 8]], past_key_values=past, **options)  # goes on in 8 bits
    assert isinstance(again.past_key_values.cache[0].keys, Int8Slots)


def forgets_nothing_it_needs(model, past, sequence: list[int]) -> None:
    """Whatever the first tokens of the sequence are continued with: with the past and without it, the same logits."""
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    for length in range(1, len(sequence) + 1):
        ids, mask = left_padded([sequence[:length]] * len(past.lengths))
        fresh, reused = model.generate(ids, mask, **options), model.generate(ids, mask, past_key_values=past, **options)
        np.testing.assert_allclose(reused.logits[0], fresh.logits[0], atol=1e-4)


@pytest.mark.slow
def test_a_ring_that_a_row_went_on_writing_to_after_its_end(reference_model):
    """An ended row reads its newest token as long as its neighbour runs, over the oldest one of the ring."""
    model = reference_model("window_8")
    out = model.generate(
        [[5, 6, 7], [5, 6, 7]],
        max_new_tokens=40,
        stopping_criteria=lambda tokens, lengths, scores: (lengths == 24) & (jnp.arange(len(lengths)) == 0),
        return_dict_in_generate=True,
        **GREEDY,
    )
    assert out.lengths.tolist() == [21, 40]
    forgets_nothing_it_needs(model, out.past_key_values, out.sequences[0, :27].tolist())


DRAFTERS = ["prompt_lookup_num_tokens", "assistant_model"]


@pytest.mark.slow
@pytest.mark.parametrize("drafter", some_slow(DRAFTERS, DRAFTERS[0].__eq__))
def test_a_ring_with_rejected_drafts(drafter: str, reference_model):
    model = reference_model("window_8")
    stranger = nnx.merge(*nnx.split(type(model)(model.config, rngs=nnx.Rngs(3))))
    options = {drafter: 5} if drafter == "prompt_lookup_num_tokens" else {drafter: stranger, "num_assistant_tokens": 5}
    out = model.generate(
        [[5, 6, 7] * 4],
        max_new_tokens=60,
        stopping_criteria=lambda tokens, lengths, scores: lengths >= 26,
        assistant_confidence_threshold=0.0,
        return_dict_in_generate=True,
        **options,
        **GREEDY,
    )
    assert out.drafted[0] > out.accepted[0]
    forgets_nothing_it_needs(model, out.past_key_values, out.sequences[0].tolist())


@pytest.mark.slow
def test_a_past_of_a_model_that_has_changed_is_refused(reference_model):
    structure, state = nnx.split(reference_model("gqa_1"))
    model = nnx.merge(structure, jax.tree.map(jnp.copy, state))
    past = model.generate([[5, 6]], max_new_tokens=1, return_dict_in_generate=True, **GREEDY).past_key_values
    model.generate([[5, 6, 7]], max_new_tokens=1, past_key_values=past, **GREEDY)
    with pytest.raises(JaxgenError, match="'quantized', but past_key_values is not"):
        model.generate([[5, 6, 7]], past_key_values=past, cache_implementation="quantized")
    with pytest.raises(JaxgenError, match="past_key_values is a tuple"):
        model.generate([[5, 6, 7]], past_key_values=((1, 2),))
    model.lm_head.weight[...] = model.lm_head.weight[...] * 2
    with pytest.raises(JaxgenError, match="before its weights changed"):
        model.generate([[5, 6, 7]], past_key_values=past)


def test_training_frees_arrays_whose_places_later_ones_take(reference_model):
    """Another weight may lie where the first one did, and have its id."""
    structure, state = nnx.split(reference_model("gqa_1"))
    model = nnx.merge(structure, jax.tree.map(jnp.copy, state))
    past = model.generate([[5, 6]], max_new_tokens=1, return_dict_in_generate=True, **GREEDY).past_key_values
    parameter = model.lm_head.weight
    first = id(parameter[...])
    for _ in range(50):
        parameter[...] = jnp.negative(parameter[...])
        with pytest.raises(JaxgenError, match="before its weights changed"):
            model.generate([[5, 6, 7]], max_new_tokens=1, past_key_values=past, **GREEDY)
        if id(parameter[...]) == first:
            break
