"""The pipeline against transformers' own on torch: the same structure and the same greedy text, option by option."""

import numpy as np
import pytest
import torch
import transformers

from jaxgen import demo
from jaxgen.demo.train import HELICOPTERS, THUG
from jaxgen.text.pipeline import pipeline

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),  # what transformers remarks is not what is compared
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]

COLORS, PORTUGAL = "A list of colors: red, blue", "Portugal is"
CHAT = [{"role": "system", "content": THUG}, {"role": "user", "content": HELICOPTERS}]
SMALL_TALK = [{"role": "user", "content": "Hello!"}]
PREFILL = [*SMALL_TALK, {"role": "assistant", "content": "Hello! How can"}]


@pytest.fixture(scope="module")
def both():
    ours = pipeline("text-generation", model=demo.path(), dtype="float32", do_sample=False, max_new_tokens=24)
    theirs = transformers.pipeline(
        "text-generation", model=str(demo.path()), dtype=torch.float32, do_sample=False, max_new_tokens=24
    )
    return ours, theirs


CALLS = {
    "text": (COLORS, {}),
    "empty text": ("", {}),
    "list of one text": ([COLORS], {}),
    "texts": ([COLORS, PORTUGAL], {}),
    "texts in a batch": ([COLORS, PORTUGAL, "1, 2, 3"], {"batch_size": 2}),
    "chat": (CHAT, {}),
    "chat as a tuple": (tuple(CHAT), {}),
    "chats": ([CHAT, SMALL_TALK], {}),
    "chats in a batch": ([CHAT, SMALL_TALK], {"batch_size": 2}),
    "chat that goes on": (PREFILL, {}),
    "chat that does not go on": (PREFILL, {"continue_final_message": False}),
    "only what is new": (COLORS, {"return_full_text": False}),
    "only what is new, chat": (CHAT, {"return_full_text": False}),
    "full text": ([COLORS], {"return_full_text": True}),
    "ids": (COLORS, {"return_tensors": True}),
    "ids in a batch": ([COLORS, PORTUGAL], {"return_tensors": True, "batch_size": 2}),
    "ids of a chat": (SMALL_TALK, {"return_tensors": True}),
    "text in so many words": (COLORS, {"return_text": True}),
    "special tokens": (SMALL_TALK, {"skip_special_tokens": False}),
    "clean up": (COLORS, {"clean_up_tokenization_spaces": True}),
    "prefix": (" red, blue", {"prefix": "A list of colors:"}),
    "prefix and max_length": (" red, blue", {"prefix": "A list of colors:", "max_new_tokens": None, "max_length": 20}),
    "max_length": (COLORS, {"max_new_tokens": None, "max_length": 20}),
    "max_new_tokens": (COLORS, {"max_new_tokens": 3}),
    "hole": ("1, 2, 3, 4, 5, 6, 7", {"handle_long_generation": "hole", "max_new_tokens": 500}),
    "hole that is not needed": (COLORS, {"handle_long_generation": "hole"}),
    "stop sequence": (COLORS, {"stop_sequence": "orange"}),
    "stop sequences": (COLORS, {"stop_sequence": ["pink", "yell"]}),
    "no special tokens": (COLORS, {"add_special_tokens": False}),
    "nothing at all": ("", {"add_special_tokens": False}),
    "nothing at all, ids": ("", {"add_special_tokens": False, "return_tensors": True}),
    "truncation": (COLORS, {"tokenizer_encode_kwargs": {"truncation": True, "max_length": 6}}),
    "padding": (COLORS, {"padding": "max_length", "tokenizer_encode_kwargs": {"max_length": 20}}),
    "template options": (SMALL_TALK, {"tokenizer_encode_kwargs": {"truncation": True, "max_length": 12}}),
    "tools": (SMALL_TALK, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    "an option of generate": ("I am a cat.", {"repetition_penalty": 1.3}),
    "beams": ("I am a cat.", {"num_beams": 3, "num_return_sequences": 2}),
}


def plain(value):
    return value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else value


@pytest.mark.parametrize("name", CALLS)
def test_the_same_call_gives_the_same(both, name):
    ours, theirs = both
    inputs, options = CALLS[name]
    assert ours(inputs, **options) == theirs(inputs, **options)


def test_defaults_given_when_it_is_made():
    options = {"return_full_text": False, "max_new_tokens": 5, "do_sample": False, "batch_size": 2}
    ours = pipeline(model=demo.path(), dtype="float32", **options)
    theirs = transformers.pipeline("text-generation", model=str(demo.path()), dtype=torch.float32, **options)
    for inputs, more in (
        ([COLORS, PORTUGAL], {}),
        ([CHAT, SMALL_TALK, CHAT], {"batch_size": 1}),
        (COLORS, {"max_new_tokens": 2}),
        (COLORS, {"return_tensors": True}),
        (COLORS, {"generation_config": transformers.GenerationConfig(max_new_tokens=3, do_sample=False)}),
    ):
        assert ours(inputs, **more) == theirs(inputs, **more)


def test_scores_are_handed_out(both):
    ours, theirs = both
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 4}
    [[mine]], [[expected]] = ours([COLORS], **options), theirs([COLORS], **options)
    assert mine.keys() == expected.keys()
    assert mine["generated_text"] == expected["generated_text"]
    for name in ("scores", "logits"):
        np.testing.assert_allclose(mine[name], expected[name], atol=2e-3, rtol=1e-4)


def test_generators_are_read_as_they_go(both):
    ours, theirs = both
    texts = [COLORS, PORTUGAL, "1, 2, 3"]
    assert list(ours(text for text in texts)) == list(theirs(text for text in texts))
    assert ours(message for message in CHAT) == theirs(message for message in CHAT)
    chats = [CHAT, SMALL_TALK]
    assert list(ours(chat for chat in chats)) == list(theirs(chat for chat in chats))


BAD = {
    "return_full_text and return_tensors": {"return_full_text": True, "return_tensors": True},
    "return_full_text and return_text": {"return_full_text": True, "return_text": True},
    "return_tensors and return_text": {"return_tensors": True, "return_text": True},
    "handle_long_generation": {"handle_long_generation": "fill"},
    "no room": {"handle_long_generation": "hole", "max_new_tokens": 600},
}


@pytest.mark.parametrize("name", BAD)
def test_what_transformers_refuses_is_refused(both, name):
    for pipe in both:
        with pytest.raises(ValueError):
            pipe(COLORS, **BAD[name])
