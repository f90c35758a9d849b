"""The code of transformers' LLM tutorial, cell by cell, on the demo model, which was trained for its prompts.

What differs from the tutorial: the import of the model class, the checkpoint's name, `return_tensors="np"`, no
`.to(device)`, and `seed=` where a sampled text is compared. The texts are those that the tutorial shows, as far as
they do not depend on torch's random numbers. Source: llm_tutorial.md and generation_features.md of transformers.
"""

import io
from contextlib import redirect_stdout

import pytest
from transformers import AutoTokenizer, set_seed

from jaxgen import AutoModelForCausalLM, GenerationConfig, demo

NAME = str(demo.path())  # "mistralai/Mistral-7B-v0.1", and "HuggingFaceH4/zephyr-7b-alpha"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(NAME, device_map="auto")


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(NAME, padding_side="left")


# Generate text


def test_load_tokenize_generate_decode():
    model = AutoModelForCausalLM.from_pretrained(NAME, device_map="auto", load_in_4bit=True)

    tokenizer = AutoTokenizer.from_pretrained(NAME, padding_side="left")
    model_inputs = tokenizer(["A list of colors: red, blue"], return_tensors="np")

    generated_ids = model.generate(**model_inputs)
    text = tokenizer.batch_decode(generated_ids, skip_special_tokens=True)[0]
    assert text == "A list of colors: red, blue, green, yellow, orange, purple, pink,"


def test_a_batch(model, tokenizer):
    tokenizer.pad_token = tokenizer.eos_token  # Most LLMs don't have a pad token by default
    model_inputs = tokenizer(["A list of colors: red, blue", "Portugal is"], return_tensors="np", padding=True)
    generated_ids = model.generate(**model_inputs)
    assert tokenizer.batch_decode(generated_ids, skip_special_tokens=True) == [
        "A list of colors: red, blue, green, yellow, orange, purple, pink,",
        "Portugal is a country in southwestern Europe, on the Iber",
    ]


# Generation configuration


def test_the_models_generation_config(model):
    config = model.generation_config
    assert {name: value for name, value in vars(config).items() if value is not None} == {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip


@pytest.mark.slow
def test_a_generation_config_is_passed_or_becomes_the_models(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(NAME)
    generation_config = GenerationConfig(max_new_tokens=50, eos_token_id=model.config.eos_token_id)
    model_inputs = tokenizer(["A sequence of numbers: 1, 2"], return_tensors="np")
    passed = model.generate(**model_inputs, generation_config=generation_config)
    assert passed.shape[1] == model_inputs.input_ids.shape[1] + 50
    model.generation_config = generation_config
    assert (model.generate(**model_inputs) == passed).all()
    assert model.generate(**model_inputs, max_new_tokens=3).shape[1] == model_inputs.input_ids.shape[1] + 3


def test_common_options(model, tokenizer):
    """The tutorial's table: max_new_tokens, do_sample, temperature, num_beams, repetition_penalty, eos_token_id."""
    model_inputs = tokenizer(["I am a cat."], return_tensors="np")
    length = model_inputs.input_ids.shape[1]
    assert model.generate(**model_inputs, max_new_tokens=7).shape == (1, length + 7)
    cold = model.generate(**model_inputs, do_sample=True, temperature=0.01, seed=0)
    assert (cold == model.generate(**model_inputs)).all()  # the colder, the greedier
    penalised = model.generate(**model_inputs, repetition_penalty=1.5)
    assert tokenizer.decode(penalised[0]) != tokenizer.decode(cold[0])
    stop = tokenizer("cat", add_special_tokens=False)["input_ids"]
    ended = model.generate(**model_inputs, eos_token_id=stop[-1], max_new_tokens=50)
    assert ended[0, -1] == stop[-1]


# Pitfall: the output is too short or too long


def test_twenty_tokens_are_the_default(model, tokenizer):
    model_inputs = tokenizer(["A sequence of numbers: 1, 2"], return_tensors="np")

    # By default, the output will contain up to 20 tokens
    generated_ids = model.generate(**model_inputs)
    text = tokenizer.batch_decode(generated_ids, skip_special_tokens=True)[0]
    assert text.startswith("A sequence of numbers: 1, 2, 3, 4, 5")
    assert generated_ids.shape[1] == model_inputs.input_ids.shape[1] + 20

    # Setting `max_new_tokens` allows you to control the maximum length
    generated_ids = model.generate(**model_inputs, max_new_tokens=50)
    text = tokenizer.batch_decode(generated_ids, skip_special_tokens=True)[0]
    assert text == "A sequence of numbers: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16,"


# Pitfall: the decoding strategy


def test_greedy_repeats_itself_and_sampling_does_not(model, tokenizer):
    set_seed(42)  # Python's, numpy's and torch's; jaxgen has no global state, and takes seed=

    model_inputs = tokenizer(["I am a cat."], return_tensors="np")

    # LLM + greedy decoding = repetitive, boring output
    generated_ids = model.generate(**model_inputs)
    text = tokenizer.batch_decode(generated_ids, skip_special_tokens=True)[0]
    assert text.startswith("I am a cat. I am a cat. I am a cat. I am a c")

    # With sampling, the output becomes more creative!
    generated_ids = model.generate(**model_inputs, do_sample=True)
    assert tokenizer.batch_decode(generated_ids, skip_special_tokens=True)[0].startswith("I am a cat.")

    seeds = [model.generate(**model_inputs, do_sample=True, seed=seed) for seed in (42, 42, 43, 44, 45)]
    texts = [tokenizer.batch_decode(ids, skip_special_tokens=True)[0] for ids in seeds]
    assert texts[0] == texts[1]
    assert set(texts) != {text}


# Pitfall: the padding side


def test_the_wrong_padding_side_is_not_wrong_here(model, tokenizer):
    # Right padding: the tutorial gets '1, 2, 33333333333' from transformers. Here padding is no part of the prompt.
    tokenizer = AutoTokenizer.from_pretrained(NAME, padding_side="right")
    tokenizer.pad_token = tokenizer.eos_token  # Most LLMs don't have a pad token by default
    model_inputs = tokenizer(["1, 2, 3", "A, B, C, D, E"], padding=True, return_tensors="np")
    assert model_inputs.attention_mask[0, -1] == 0
    right_ids = model.generate(**model_inputs)
    assert tokenizer.batch_decode(right_ids, skip_special_tokens=True)[0].startswith("1, 2, 3, 4, 5, 6,")

    # With left-padding, it works as expected!
    tokenizer = AutoTokenizer.from_pretrained(NAME, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token  # Most LLMs don't have a pad token by default
    model_inputs = tokenizer(["1, 2, 3", "A, B, C, D, E"], padding=True, return_tensors="np")
    generated_ids = model.generate(**model_inputs)
    assert tokenizer.batch_decode(generated_ids, skip_special_tokens=True)[0].startswith("1, 2, 3, 4, 5, 6,")
    new = model_inputs.input_ids.shape[1]
    assert (generated_ids[:, new:] == right_ids[:, new:]).all()


# Pitfall: the prompt's format


def test_a_plain_prompt_does_not_follow_instructions(model, tokenizer):
    set_seed(0)
    prompt = """How many helicopters can a human eat in one sitting? Reply as a thug."""
    model_inputs = tokenizer([prompt], return_tensors="np")
    input_length = model_inputs.input_ids.shape[1]
    generated_ids = model.generate(**model_inputs, max_new_tokens=20)
    text = tokenizer.batch_decode(generated_ids[:, input_length:], skip_special_tokens=True)[0]
    # The tutorial's text, as far as 20 of the demo's shorter tokens go.
    assert len(text) > 20
    assert " I'm not a thug, but i can tell you that a human cannot eat".startswith(text)


def test_the_chat_template_does(model, tokenizer):
    set_seed(0)
    messages = [
        {
            "role": "system",
            "content": "You are a friendly chatbot who always responds in the style of a thug",
        },
        {"role": "user", "content": "How many helicopters can a human eat in one sitting?"},
    ]
    expected = "None, you thug. How bout you try to focus on more useful questions?"

    # As it is in transformers 5, where the template returns a dict ...
    model_inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="np", return_dict=True
    )
    input_length = model_inputs["input_ids"].shape[1]
    generated_ids = model.generate(**model_inputs, do_sample=True, max_new_tokens=20, seed=0)
    text = tokenizer.batch_decode(generated_ids[:, input_length:], skip_special_tokens=True)[0]
    assert len(text) > 20
    assert expected.startswith(text)

    # ... and as it was in 4, where it returned ids.
    model_inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="np", return_dict=False
    )
    input_length = model_inputs.shape[1]
    generated_ids = model.generate(model_inputs, do_sample=True, max_new_tokens=60, seed=0)
    assert tokenizer.batch_decode(generated_ids[:, input_length:], skip_special_tokens=True)[0] == expected


# Streaming (generation_features.md)


def test_a_streamer_prints_while_generate_runs(model, tokenizer):
    from transformers import TextStreamer

    inputs = tokenizer(["An increasing sequence: 1, 2,"], return_tensors="np")
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    with redirect_stdout(io.StringIO()) as printed:
        ids = model.generate(**inputs, streamer=streamer, max_new_tokens=20)
    assert printed.getvalue() == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"
