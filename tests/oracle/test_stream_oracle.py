"""Streaming against transformers on torch: what a streamer is told, and the text that it shows."""

import asyncio
import threading

import numpy as np
import pytest
import torch
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer
from transformers import AutoModelForCausalLM as HFAutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from jaxgen import AutoModelForCausalLM, demo
from jaxgen.demo.train import HELICOPTERS, THUG
from jaxgen.text.stream import stream
from jaxgen.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.oracle

PROMPTS = ("A list of colors: red, blue", "Portugal is", "I am a cat.", "2 + 2 =", f"{HELICOPTERS} Reply as a thug.")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(demo.path())


@pytest.fixture(scope="module")
def ours():
    return AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")


@pytest.fixture(scope="module")
def theirs():
    return HFAutoModelForCausalLM.from_pretrained(demo.path(), dtype=torch.float32)


class Recorder(BaseStreamer):
    def __init__(self):
        self.told = []

    def put(self, value):
        self.told.append(np.asarray(value).tolist())

    def end(self):
        self.told.append("end")


def tensors(inputs) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(np.asarray(value)) for name, value in inputs.items()}


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("texts", [PROMPTS[:1], PROMPTS])
def test_a_streamer_is_told_the_same(ours, theirs, tokenizer, texts, chunk_size):
    inputs = tokenizer(list(texts), padding=True, return_tensors="np")
    mine, expected = Recorder(), Recorder()
    ids = ours.generate(**inputs, streamer=mine, chunk_size=chunk_size, max_new_tokens=40)
    theirs.generate(**tensors(inputs), streamer=expected, max_new_tokens=40)
    assert mine.told == expected.told
    np.testing.assert_array_equal(ids, ours.generate(**inputs, max_new_tokens=40))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_text_is_that_of_the_text_streamer_in_whole_words(ours, theirs, tokenizer, prompt):
    inputs = tokenizer([prompt], return_tensors="np")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    theirs.generate(**tensors(inputs), streamer=streamer, max_new_tokens=60)
    pieces = list(stream(ours, prompt, tokenizer=tokenizer, max_new_tokens=60))
    expected = "".join(streamer)  # where transformers cuts it depends on its version
    assert pieces and "".join(pieces) == expected
    assert all(piece[-1] in " \n" for piece in pieces[:-1])


def test_the_text_streamer_prints_the_same(ours, theirs, tokenizer, capsys):
    messages = [{"role": "system", "content": THUG}, {"role": "user", "content": HELICOPTERS}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="np", return_dict=True)
    theirs.generate(**tensors(inputs), streamer=TextStreamer(tokenizer), max_new_tokens=60)
    expected = capsys.readouterr().out
    ours.generate(**inputs, streamer=TextStreamer(tokenizer), max_new_tokens=60)
    assert capsys.readouterr().out == expected


def test_streamers_that_are_read_from_another_thread(ours, tokenizer):
    inputs = tokenizer([PROMPTS[0]], return_tensors="np")
    expected = ", green, yellow, orange, purple, pink,"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=ours.generate, kwargs={**inputs, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()

    async def read() -> str:
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(target=ours.generate, kwargs={**inputs, "streamer": streamer})
        thread.start()
        text = "".join([piece async for piece in streamer])
        thread.join()
        return text

    assert asyncio.run(read()) == expected


def test_a_batch_is_refused_by_the_streamer_itself(ours, theirs, tokenizer):
    inputs = tokenizer(list(PROMPTS[:2]), padding=True, return_tensors="np")
    for model, given in ((ours, inputs), (theirs, tensors(inputs))):
        with pytest.raises(ValueError, match="batch size 1"):
            model.generate(**given, streamer=TextStreamer(tokenizer))
