"""Numbers that Python holds and the device does not, and sizes that no machine has: an error that names the option."""

import multiprocessing
import os

import numpy as np
import pytest
from flax import nnx

from jaxgen import GenerationConfig, JaxgenError, MistralConfig, MistralForCausalLM, Strict
from jaxgen.generation.choosing.stop_strings import MOST_BYTES
from jaxgen.generation.options.table import OPTIONS
from tests.helpers import some_slow

IDS = np.array([[1, 2, 3, 1, 2]])
GIVEN = {"do_sample": True, "seed": 1, "max_new_tokens": 4, "eos_token_id": 49, "return_dict_in_generate": True}
# The forms in which options take numbers; each option takes some of them.
FORMS = (
    lambda n: n,
    lambda n: (n,),
    lambda n: ((n,),),
    lambda n: (((n,), 0.5),),
    lambda n: (((3,), n),),
    lambda n: (n, 0.5),
    lambda n: (3, n),
    lambda n: {"context_width": n},
    lambda n: {"hashing_key": n},
    lambda n: {"bias": n},
)


def takes(name: str, value: object) -> bool:
    try:
        OPTIONS[name].check(name, value)
    except JaxgenError:
        return False
    return True


NUMERIC = [(name, form) for name in OPTIONS for form in FORMS if takes(name, form(3)) or takes(name, form(0.5))]
NAMES = [f"{name}-{FORMS.index(form)}" for name, form in NUMERIC]
# What no int32, and no float32 but 0 or infinity, stands for. Python does not even print the last one.
NO_COUNT = [2**31, 2**63, 2**64, -(2**64), 10**400, 10**5000]
NO_REAL = [10**400, -(10**400), 1e300, 5e-324, float("nan"), float("inf"), 10**5000]
LARGEST = 2**31 - 1
SHOWN_BELOW = ("no_repeat_ngram_size", "max_matching_ngram_size", "prompt_lookup_num_tokens", "num_assistant_tokens")


@pytest.fixture(scope="module")
def model() -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return MistralForCausalLM(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("name", "form"), NUMERIC, ids=NAMES)
def test_what_32_bits_do_not_hold_is_refused_by_name(name: str, form):
    any_int = "hashing_key" in form(3) if isinstance(form(3), dict) else False  # counts modulo 2**64
    for number in () if any_int else NO_REAL if takes(name, form(0.5)) else NO_COUNT:
        with pytest.raises(JaxgenError, match=name) as caught:
            OPTIONS[name].check(name, form(number))
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)


COMPILED = [(n, form) for n, form in NUMERIC if takes(n, form(LARGEST)) and n not in SHOWN_BELOW]
BY_DEFAULT = ("repetition_penalty", "top_k", "max_time", "temperature", "min_new_tokens")


@pytest.mark.parametrize(("name", "form"), some_slow(COMPILED, soak=lambda case: case[0] not in BY_DEFAULT))
def test_the_largest_number_is_carried_out_or_refused(name: str, form, model):
    try:
        output = model.generate(IDS, **GIVEN | {name: form(LARGEST)})
    except JaxgenError as error:
        assert name in str(error) or "memory" in str(error) or "GB" in str(error)
    else:
        assert output.sequences.shape[1] <= IDS.shape[1] + GIVEN["max_new_tokens"]


NGRAMS = ["no_repeat_ngram_size", "max_matching_ngram_size"]


@pytest.mark.slow
@pytest.mark.parametrize("name", some_slow(NGRAMS, NGRAMS[1].__eq__))
def test_an_ngram_longer_than_the_row_costs_nothing(name: str, model):
    """It does what one of the row's length does."""
    lookup = {"prompt_lookup_num_tokens": 3} if name == "max_matching_ngram_size" else {}
    options = {"max_new_tokens": 8} | lookup
    expected = model.generate(IDS, **options, **{name: 40})
    np.testing.assert_array_equal(model.generate(IDS, **options, **{name: LARGEST}), expected)


DRAFTS = ["prompt_lookup_num_tokens", "num_assistant_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("option", some_slow(DRAFTS, DRAFTS[1].__eq__))
def test_drafts_are_no_more_than_the_tokens_wanted(option: str, model):
    drafter = {"assistant_model": model} if option == "num_assistant_tokens" else {}
    ids = model.generate(IDS, max_new_tokens=4, **drafter, **{option: 10**6})
    np.testing.assert_array_equal(ids, model.generate(IDS, max_new_tokens=4))


def test_a_batch_that_no_host_holds_is_refused_before_it_is_made(model):
    with pytest.raises(JaxgenError, match=r"rows of 512 tokens .* GB"):
        model.generate(IDS, max_new_tokens=4, strict=Strict(rows=2**30))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_new_tokens": LARGEST}, "min_new_tokens=2147483647 asks more of row 0"),
        ({"min_length": LARGEST}, "min_length=2147483647 asks more of row 0"),
        ({"max_cache_len": LARGEST}, "max_cache_len=2147483647 is more than the model's context of 64"),
        ({"row_ids": ["\ud800"]}, r"row_ids\[0\]='.ud800' cannot be hashed"),
        ({"seed": 10**5000}, "seed=.* cannot be hashed"),
        ({"temperature": 10**400}, r"temperature=1000.*must be at most 3\.403e\+38 in size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_number(options: dict, message: str, model):
    with pytest.raises(JaxgenError, match=message):
        model.generate(IDS, **GIVEN | options)


def test_a_masked_array_is_refused_because_its_mask_would_be_lost(model):
    masked = np.ma.masked_array(IDS, mask=IDS == 1)
    for prompt in (masked, [masked[0]], list(masked)):
        with pytest.raises(JaxgenError, match="input_ids is a masked array"):
            model.generate(prompt)
    with pytest.raises(JaxgenError, match="attention_mask is a masked array"):
        model.generate(IDS, masked)


@pytest.mark.parametrize("strings", [[f"stop {i}" for i in range(100_000)], ["x" * 1_000_000]])
def test_stop_strings_beyond_measure(strings: list[str]):
    with pytest.raises(JaxgenError, match=rf"stop_strings: .* more than {MOST_BYTES} bytes") as caught:
        GenerationConfig(stop_strings=strings)
    assert len(str(caught.value)) < 400


def _child(model: MistralForCausalLM, answers) -> None:
    try:
        model.generate(IDS, max_new_tokens=2)
    except JaxgenError as error:
        answers.put(str(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
def test_a_forked_child_hears_why_it_cannot_generate(model):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_child, args=(model, answers))
    child.start()
    try:
        assert "does not survive a fork" in answers.get(timeout=60)
    finally:
        child.join(10)
        child.kill()
