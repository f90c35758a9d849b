"""The pipeline, where transformers is no reference: seeds, batches, defaults, loading, refusals."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from jaxgen import GenerationConfig, JaxgenError, MistralConfig, MistralForCausalLM, UnsupportedError, demo
from jaxgen.text.pipeline import TextGenerationPipeline, pipeline
from jaxgen.text.tokenizer import load_tokenizer
from tests.helpers import some_slow

COLORS = "A list of colors: red, blue"
COLORS_CONTINUED = ", green, yellow, orange, purple, pink,"
TEXTS = [COLORS, "I am a cat.", "1, 2, 3", "A, B, C, D, E", "Hello"]


@pytest.fixture(scope="module")
def generator() -> TextGenerationPipeline:
    return pipeline("text-generation", model=demo.path(), dtype="float32")


def test_what_is_new_is_the_text_of_generate(generator):
    assert generator(COLORS, do_sample=False, max_new_tokens=20) == [{"generated_text": COLORS + COLORS_CONTINUED}]
    assert generator([COLORS], do_sample=False, max_new_tokens=20, return_full_text=False) == [
        [{"generated_text": COLORS_CONTINUED}]
    ]
    assert generator([]) == []


def test_it_samples_by_default_and_a_seed_repeats_it(generator):
    texts = [generator("I am a cat.", seed=seed, max_new_tokens=40) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2] or texts[0] != texts[3]
    key = jax.random.key(5)
    assert generator("I am a cat.", key=key, max_new_tokens=9) == generator("I am a cat.", key=key, max_new_tokens=9)
    always = pipeline(model=generator.model, tokenizer=generator.tokenizer, seed=1, max_new_tokens=40)
    assert always("I am a cat.") == always("I am a cat.") == texts[0]
    assert always("I am a cat.", key=jax.random.key(1)) == texts[0]
    fresh = {generator("I am a cat.", max_new_tokens=60, temperature=3.0)[0]["generated_text"] for _ in range(3)}
    assert len(fresh) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", some_slow([7, None], lambda seed: seed is None))
def test_a_texts_result_does_not_depend_on_the_batch(generator, seed):
    options = {"temperature": 5.0, "max_new_tokens": 12, "num_return_sequences": 2}
    options |= {"seed": seed} if seed is not None else {"key": jax.random.key(3)}
    one_by_one = generator(TEXTS, **options)
    assert all(len({result["generated_text"] for result in results}) == 2 for results in one_by_one)
    for size in (2, 3, 8):
        assert generator(TEXTS, batch_size=size, **options) == one_by_one
    named = generator(TEXTS[2:], row_ids=[2, 3, 4], batch_size=2, **options)
    assert named == one_by_one[2:]


def test_defaults_are_filled_in_where_nobody_says_otherwise(generator, monkeypatch):
    seen = []
    model = generator.model
    monkeypatch.setattr(
        type(model), "generate", lambda self, ids, mask, **options: seen.append(options) or np.zeros((1, 9), np.int32)
    )

    def options(**given):
        generator("1, 2", **given)
        return {name: seen[-1].get(name) for name in ("do_sample", "temperature", "max_new_tokens", "pad_token_id")}

    assert options() == {"do_sample": True, "temperature": 0.7, "max_new_tokens": 256, "pad_token_id": None}
    assert options(do_sample=False)["temperature"] is None
    assert options(temperature=0.2)["temperature"] == 0.2
    assert options(max_length=30)["max_new_tokens"] is None
    assert options(max_new_tokens=3)["max_new_tokens"] == 3
    own = GenerationConfig(do_sample=False, max_length=50)
    assert options(generation_config=own) == dict.fromkeys(
        ("do_sample", "temperature", "max_new_tokens", "pad_token_id")
    )
    checkpoint = model.generation_config
    try:
        model.generation_config = GenerationConfig(do_sample=True, temperature=1.5, max_new_tokens=4)
        assert options() == {"do_sample": None, "temperature": None, "max_new_tokens": None, "pad_token_id": 2}
    finally:
        model.generation_config = checkpoint


@pytest.mark.slow
def test_a_long_prompt_gets_what_is_left_of_the_context(generator):
    long = "1, 2, 3, " * 44  # 400 tokens and a few, of 512
    ids = len(generator.tokenizer(long)["input_ids"])
    assert 256 < 512 - 10 > ids > 512 - 256
    [[one], [other]] = generator([long, "2 + 2 ="], do_sample=False, return_tensors=True, batch_size=2)
    assert ids < len(one["generated_token_ids"]) <= 512
    assert generator.tokenizer.decode(other["generated_token_ids"], skip_special_tokens=True) == "2 + 2 = 4"


def test_a_context_that_is_full_is_an_error_and_a_hole_helps(generator):
    long = "1, 2, 3, " * 100
    with pytest.raises(JaxgenError, match="context"):
        generator(long)
    [kept] = generator(long, handle_long_generation="hole", max_new_tokens=20, return_tensors=True, do_sample=False)
    assert len(kept["generated_token_ids"]) == 512
    with pytest.raises(JaxgenError, match="beside 600 new tokens in the context of 512"):
        generator(long, handle_long_generation="hole", max_new_tokens=600)
    with pytest.raises(JaxgenError, match="max_length=50"):
        generator(long, handle_long_generation="hole", max_length=50, truncation=False)


@pytest.mark.slow
def test_the_space_after_the_prompt_is_kept(llama_tokenizer):
    """Llama's tokenizers drop a space at the front of what they decode; transformers' pipeline then loses it."""
    config = MistralConfig(
        vocab_size=270, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    model = MistralForCausalLM(config, rngs=nnx.Rngs(0))
    generator = pipeline(model=model, tokenizer=llama_tokenizer)
    word = llama_tokenizer.convert_tokens_to_ids("▁word")
    assert llama_tokenizer.decode([word]) == "word"
    options = {"sequence_bias": [[[word], 1e4]], "max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    assert generator("word", **options) == [{"generated_text": "word word word"}]
    assert generator("word", return_full_text=False, **options) == [{"generated_text": " word word"}]


def test_loading(generator):
    tokenizer = load_tokenizer(demo.path())
    options = {"do_sample": False, "max_new_tokens": 20}
    expected = [{"generated_text": COLORS + COLORS_CONTINUED}]
    calls: tuple[dict[str, Any], ...] = (
        {"model": str(demo.path()), "device": "cpu", "torch_dtype": "float32"},
        {"model": demo.path(), "device": 0, "tokenizer": tokenizer, "dtype": "float32"},
        {"model": demo.path(), "device": -1, "tokenizer": demo.path(), "model_kwargs": {"dtype": "float32"}},
        {"model": generator.model, "tokenizer": tokenizer},
        {"task": "text-generation", "model": generator.model, "tokenizer": str(demo.path())},
    )
    for arguments in calls:
        assert pipeline(**arguments)(COLORS, **options) == expected
    assert repr(generator) == "<TextGenerationPipeline of a MistralForCausalLM>"


REFUSED = {
    "another task": (lambda model: pipeline("fill-mask", model=model), "task='fill-mask' is not supported"),
    "no model": (lambda model: pipeline("text-generation"), "model="),
    "remote code": (lambda model: pipeline(model=model, trust_remote_code=True), "trust_remote_code"),
    "a dtype for a loaded model": (
        lambda model: pipeline(model=model, dtype="float16"),
        "dtype='float16' is for loading",
    ),
    "two devices": (lambda model: pipeline(model=demo.path(), device=0, device_map="auto"), "device=0 and device_map"),
    "no such device": (lambda model: pipeline(model=demo.path(), device=99), "device=99"),
    "a typo": (lambda model: pipeline(model=model, tokenizer=load_tokenizer(demo.path()), temprature=1), "temprature"),
    "batch size": (lambda model: pipeline(model=model, batch_size=0), "batch_size=0"),
    "no such model": (lambda model: pipeline(model="./nowhere"), "./nowhere"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_made_is_refused(generator, name):
    make, message = REFUSED[name]
    with pytest.raises(JaxgenError, match=message):
        make(generator.model)
    if name in ("another task", "remote code"):
        with pytest.raises(UnsupportedError):
            make(generator.model)


BAD_CALLS = {
    "a number": ((3,), {}, "int is neither"),
    "a number in a list": ((["x", 3],), {}, "text 1: 3 is neither"),
    "half a message": (([{"role": "user", "content": "x"}, {"role": "user"}],), {}, "text 0: message 1"),
    "a role that the template refuses": (([{"role": "tool", "content": "x"}],), {}, "role 'tool' is none of"),
    "a typo": (("x",), {"temprature": 1}, "temprature"),
    "full text and ids": (("x",), {"return_full_text": True, "return_tensors": True}, "exclude each other"),
    "text and full text": (("x",), {"return_full_text": True, "return_text": True}, "exclude each other"),
    "long generation": (("x",), {"handle_long_generation": "fill"}, "handle_long_generation='fill'"),
    "return type": (("x",), {"return_type": 3}, "return_type=3"),
    "batch size": (("x",), {"batch_size": 1.5}, "batch_size=1.5"),
    "surrogates": (("\udcff",), {}, "text 0"),
    "several seeds": ((["x", "y"],), {"seed": [1, 2]}, "one seed or key for all texts"),
    "too many row ids": (("x",), {"row_ids": ["a", "b"]}, "row_ids"),
    "details without a dictionary": (("x",), {"top_logprobs": 3}, "top_logprobs"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(generator, name):
    arguments, options, message = BAD_CALLS[name]
    with pytest.raises(JaxgenError, match=message):
        generator(*arguments, **options)


def test_return_types_have_names(generator):
    options = {"do_sample": False, "max_new_tokens": 20}
    assert generator(COLORS, return_type="NEW_TEXT", **options) == [{"generated_text": COLORS_CONTINUED}]
    assert generator(COLORS, return_tensors=False, **options) == [{"generated_text": COLORS + COLORS_CONTINUED}]
