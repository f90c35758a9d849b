"""Streaming: pieces that add up to the text of `generate`, at a cost that does not grow, through every interface."""

import asyncio
import io
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen import AutoModelForCausalLM, JaxgenError, demo
from jaxgen.text.detokenize import Detokenizer, Words
from jaxgen.text.stream import TextStream, stream
from jaxgen.text.streamers import check_streamer, feed
from jaxgen.text.tokenizer import continuation, load_tokenizer

COLORS = "A list of colors: red, blue"
COLORS_CONTINUED = ", green, yellow, orange, purple, pink,"
WILD = {"do_sample": True, "temperature": 50.0, "top_k": 0, "seed": 1, "max_new_tokens": 200, "eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(demo.path())


# From ids to text.


def pieces(tokenizer, prompt: list[int], new: list[int], sizes: list[int], skip: bool) -> Iterator[str]:
    detokenizer, start = Detokenizer(tokenizer, prompt, skip), 0
    for size in sizes * len(new):
        if start >= len(new):
            break
        yield detokenizer.push(new[start : start + size])
        start += size
    yield detokenizer.finish()


def ids_of(size: int, bytes_from: int, favourites: tuple[int, ...] = ()) -> st.SearchStrategy[list[int]]:
    """Any ids, and runs of bytes that are text."""
    text = st.text(st.characters(codec="utf-8"), max_size=6).map(lambda text: [bytes_from + b for b in text.encode()])
    one = st.one_of(st.integers(0, size - 1), st.sampled_from(favourites or (0,))).map(lambda token: [token])
    return st.lists(st.one_of(one, text, one), max_size=60).map(
        lambda parts: [token for part in parts for token in part]
    )


@settings(deadline=None, derandomize=True, max_examples=300)
@given(new=ids_of(640, 3), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), skip=st.booleans())
def test_pieces_of_a_byte_level_tokenizer_are_its_text(tokenizer, new, sizes, skip):
    prompt = tokenizer("Où est 世")["input_ids"]
    assert "".join(pieces(tokenizer, prompt, new, sizes, skip)) == continuation(
        tokenizer, prompt, new, skip_special_tokens=skip
    )


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    prompt=st.lists(st.integers(259, 269), max_size=20),
    new=ids_of(270, 3, tuple(range(259, 270))),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    skip=st.booleans(),
)
def test_pieces_of_a_llama_tokenizer_are_its_text(llama_tokenizer, prompt, new, sizes, skip):
    prompt = [1, *prompt]
    assert "".join(pieces(llama_tokenizer, prompt, new, sizes, skip)) == continuation(
        llama_tokenizer, prompt, new, skip_special_tokens=skip
    )


def test_a_space_at_the_front_of_a_piece_is_kept(llama_tokenizer):
    words = llama_tokenizer.convert_tokens_to_ids
    detokenizer = Detokenizer(llama_tokenizer, [1, words("▁word")])
    assert [detokenizer.push([words(word)]) for word in ("▁a", "b", "▁a", "\n", "▁a")] == [" a", "b", " a", "\n", " a"]
    alone = Detokenizer(llama_tokenizer, [1])
    assert [alone.push([words(word)]) for word in ("▁a", "▁a")] == ["a", " a"]


def test_the_first_bytes_of_a_character_wait_for_the_others(tokenizer, llama_tokenizer):
    snow = "☃".encode()
    byte_level = [tokenizer(chr(256 + 0x20 + 0), add_special_tokens=False)["input_ids"]]
    assert len(byte_level[0]) == 2
    detokenizer = Detokenizer(tokenizer, tokenizer("Hi")["input_ids"])
    assert [detokenizer.push([token]) for token in byte_level[0]] == ["", "Ġ"]
    detokenizer = Detokenizer(llama_tokenizer, [1, 263])
    assert [detokenizer.push([3 + byte]) for byte in snow] == ["", "", ""]
    assert detokenizer.push([263]) == "☃b"


class Counting:
    """A tokenizer that counts how many ids it was given to decode."""

    def __init__(self, tokenizer):
        self._tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids, **options):
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, **options)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize("kind", ["words", "spaces", "bytes that are no text", "a character that never ends"])
def test_the_cost_of_decoding_is_not_quadratic(tokenizer, llama_tokenizer, kind):
    words = llama_tokenizer.convert_tokens_to_ids
    length, halves = 3000, [token for token in range(640) if tokenizer.decode([token]) == "�"]
    which, new = {
        "words": (tokenizer, tokenizer("one, two, 3 " * length)["input_ids"][1 : length + 1]),
        "spaces": (llama_tokenizer, [words("▁")] * length),
        "bytes that are no text": (llama_tokenizer, [3 + 0xFF] * (length - 1) + [words("▁a")]),
        "a character that never ends": (tokenizer, [halves[0]] * length),
    }[kind]  # fmt: skip
    counting = Counting(which)
    text = "".join(pieces(counting, [1, 263], new, [1], skip=True))
    assert counting.decoded < 150 * length  # whole decoding: 1500 * length
    assert text == continuation(which, [1, 263], new)


# From text to pieces of whole words.


def test_words_are_whole_lines_flush_and_some_scripts_have_no_spaces():
    words = Words()
    shown = [words.push(text) for text in ("It", " is", " a", "\n", "世", "界", "ab", " ", "カ", "ภา", "ษา")]
    assert shown == ["", "It ", "is ", "a\n", "世", "界", "", "ab ", "カ", "ภา", "ษา"]
    assert words.finish("end") == "end"


@pytest.mark.parametrize(
    ("texts", "shown"),
    [
        (["one END two"], "one "),
        (["one E", "N", "D two", " three"], "one "),
        (["one E", "NOUGH", " E", "ND"], "one ENOUGH "),
        (["one EN"], "one EN"),  # never completed: text like any other
        (["STOP END"], ""),
        (["x ST", "OP"], "x "),
        (["x TURN ", "IT", " ", "OFF y"], "x "),
        (["x TURN ", "IT", " ", "ON y"], "x TURN IT ON y"),
        (["one\n", "\ntwo"], "one"),
    ],
)
def test_text_ends_before_a_stop_string(texts, shown):
    words = Words(["END", "STOP", "TURN IT OFF", "\n\n"])
    assert "".join(words.push(text) for text in texts) + words.finish() == shown


# Whole generations.


def test_pieces_of_one_text(model, tokenizer):
    for chunk_size in (1, 3, 100):
        shown = list(stream(model, COLORS, tokenizer=tokenizer, chunk_size=chunk_size))
        assert "".join(shown) == COLORS_CONTINUED
        assert all(piece.endswith(" ") for piece in shown[:-1])
        assert len(shown) == {1: 6, 3: 6, 100: 1}[chunk_size]


@pytest.mark.parametrize("chunk_size", [1, 7])
def test_rows_of_a_batch(model, tokenizer, chunk_size):
    texts = [COLORS, "2 + 2 =", [{"role": "user", "content": "Hello!"}], "I am a cat."]
    options = {"max_new_tokens": 30, "do_sample": True, "num_return_sequences": 2, "seed": 3}
    shown = stream(model, texts, tokenizer=tokenizer, chunk_size=chunk_size, **options)
    assert shown.seed == 3
    rows = [""] * 8
    for row, piece in shown:
        rows[row] += piece
    inputs = [tokenizer(text)["input_ids"] for text in texts[:2]]
    inputs.append(tokenizer.apply_chat_template(texts[2], add_generation_prompt=True, return_dict=True)["input_ids"])
    inputs.append(tokenizer(texts[3])["input_ids"])
    for row, ids in enumerate(inputs):  # one by one: a row's text is its own
        alone = model.generate([ids], row_ids=[row], **options)
        assert rows[2 * row : 2 * row + 2] == tokenizer.batch_decode(alone[:, len(ids) :], skip_special_tokens=True)
    assert len(set(rows[6:])) == 2


@pytest.mark.slow
def test_half_a_character_waits_for_its_rest(model, tokenizer):
    """A model whose tokens are bytes at random: the pieces are the text, broken characters included."""
    shown = list(stream(model, COLORS, tokenizer=tokenizer, **WILD))
    ids = model.generate(**tokenizer([COLORS], return_tensors="np"), **WILD)
    text = tokenizer.batch_decode(ids, skip_special_tokens=True)[0]
    assert COLORS + "".join(shown) == text
    assert "�" in text  # some are never completed
    assert len(shown) > 20
    with_special = stream(model, COLORS, tokenizer=tokenizer, skip_special_tokens=False, **WILD)
    assert "<s>" + COLORS + "".join(with_special) == tokenizer.decode(ids[0])


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [1, 50])
def test_a_stop_string_ends_the_text_with_it_or_before_it(model, tokenizer, chunk_size):
    def text(**options) -> str:
        options |= {"stop_strings": ["low, or"], "max_new_tokens": 50, "chunk_size": chunk_size}
        return "".join(stream(model, COLORS, tokenizer=tokenizer, **options))

    # The token that completes the stop string may go on: "or" may be the beginning of "oran".
    assert text().startswith(", green, yellow, or")
    assert len(text()) < len(", green, yellow, orange,")
    assert text(include_stop_str_in_output=False) == ", green, yel"


def test_errors_are_raised_before_anything_runs(model, tokenizer):
    bad: tuple[tuple[dict[str, Any], str], ...] = (
        ({"temprature": 1}, "temprature"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"do_sample": True, "num_return_sequences": 2}, r"num_return_sequences=2: pass \[text\]"),
        ({"num_beams": 2}, "num_beams=2: beam search has no text to show"),
    )
    for options, message in bad:
        with pytest.raises(JaxgenError, match=message):
            stream(model, COLORS, tokenizer=tokenizer, **options)
    for texts, message in (([], "no texts"), (3, "int is neither"), ([COLORS, 3], "text 1"), ("\udcff", "text 0")):
        with pytest.raises(JaxgenError, match=message):
            stream(model, texts, tokenizer=tokenizer)


def test_closing_stops_generating(model, tokenizer, monkeypatch):
    from jaxgen.generation import execute

    steps = []
    advance = execute.advance
    monkeypatch.setattr(execute, "advance", lambda *args: steps.append(1) or advance(*args))
    shown = stream(model, COLORS, tokenizer=tokenizer)
    assert next(shown) == ", "
    shown.close()
    assert list(shown) == []
    assert len(steps) < 6


def test_the_model_knows_its_tokenizer(model, tokenizer, monkeypatch):
    from flax import nnx

    from jaxgen import MistralConfig, MistralForCausalLM

    assert "".join(stream(model, COLORS, tokenizer=str(demo.path()))) == COLORS_CONTINUED
    assert "".join(stream(model, COLORS)) == COLORS_CONTINUED  # that of the checkpoint it was loaded from
    config = MistralConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    with pytest.raises(JaxgenError, match="tokenizer="):
        stream(MistralForCausalLM(config, rngs=nnx.Rngs(0)), COLORS)


def test_a_notebook_shows_one_display_that_grows(model, tokenizer, monkeypatch):
    shown = []

    class Handle:
        def update(self, bundle, raw):
            assert raw
            shown.append(bundle["text/plain"])

    def display(bundle, raw, display_id):
        assert raw
        assert display_id
        shown.append(bundle["text/plain"])
        return Handle()

    fake = types.ModuleType("IPython.display")
    monkeypatch.setattr(fake, "display", display, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    text = stream(model, COLORS, tokenizer=tokenizer)
    text._ipython_display_()
    assert shown[0] == ""
    assert shown[1:3] == [", ", ", green, "]
    assert shown[-1] == COLORS_CONTINUED
    text._ipython_display_()  # again: it is there already
    assert shown[-1] == COLORS_CONTINUED
    shown.clear()
    stream(model, [COLORS, "2 + 2 ="], tokenizer=tokenizer)._ipython_display_()
    assert shown[-1] == f"[0] {COLORS_CONTINUED}\n[1]  4"


def test_it_is_its_own_iterator(model, tokenizer):
    text = stream(model, COLORS, tokenizer=tokenizer)
    assert isinstance(text, TextStream)
    assert iter(text) is text


# transformers' streamers.


class Recorder:
    def __init__(self, fail_at: int = -1):
        self.told, self.fail_at = [], fail_at

    def put(self, value):
        if len(self.told) == self.fail_at:
            raise RuntimeError("the disk is full")
        self.told.append(value)

    def end(self):
        self.told.append("end")


def chunk(*new: list[int]):
    return types.SimpleNamespace(new=[np.array(ids, np.int32) for ids in new])


def test_a_streamer_is_told_every_step_and_what_fills_up_a_row():
    recorder = Recorder()
    feed(recorder, np.array([[1, 2], [3, 4]]), iter([chunk([5], [6]), chunk([7, 8], [9]), chunk([10], [])]), filler=0)
    assert recorder.told.pop() == "end"
    assert [told.tolist() for told in recorder.told] == [[[1, 2], [3, 4]], [5, 6], [7, 9], [8, 0], [10, 0]]


def test_a_streamer_hears_of_the_end_even_after_an_error():
    def broken():
        yield chunk([5])
        raise JaxgenError("NaN")

    recorder = Recorder()
    with pytest.raises(JaxgenError, match="NaN"):
        feed(recorder, np.array([[1]]), broken(), filler=0)
    assert recorder.told[-1] == "end"
    recorder = Recorder(fail_at=1)
    with pytest.raises(RuntimeError, match="disk"):
        feed(recorder, np.array([[1]]), iter([chunk([5]), chunk([6])]), filler=0)
    assert recorder.told[-1] == "end"


def test_what_is_no_streamer_is_refused():
    check_streamer(Recorder())
    with pytest.raises(JaxgenError, match="no method 'put'"):
        feed(object(), np.array([[1]]), iter([]), 0)


def steps_of(tokenizer, text: str) -> Iterator[types.SimpleNamespace]:
    return (chunk([token]) for token in tokenizer(text, add_special_tokens=False)["input_ids"])


def test_transformers_streamers_work_as_they_are(tokenizer):
    from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer

    prompt = tokenizer([COLORS], return_tensors="np")["input_ids"]
    printed = io.StringIO()
    with redirect_stdout(printed):
        feed(TextStreamer(tokenizer), prompt, steps_of(tokenizer, COLORS_CONTINUED), 2)
    assert printed.getvalue() == "<s>" + COLORS + COLORS_CONTINUED + "\n"

    queue = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10)
    thread = threading.Thread(target=feed, args=(queue, prompt, steps_of(tokenizer, COLORS_CONTINUED), 2))
    thread.start()
    assert "".join(queue) == COLORS_CONTINUED
    thread.join()

    async def read() -> str:
        queue = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10)
        arguments = (queue, prompt, steps_of(tokenizer, COLORS_CONTINUED), 2)
        thread = threading.Thread(target=feed, args=arguments)
        thread.start()
        text = "".join([piece async for piece in queue])
        thread.join()
        return text

    assert asyncio.run(read()) == COLORS_CONTINUED


def test_transformers_text_streamer_refuses_a_batch_itself(tokenizer):
    from transformers import TextStreamer

    with redirect_stdout(io.StringIO()), pytest.raises(ValueError, match="batch size 1"):
        feed(TextStreamer(tokenizer), np.array([[1], [1]]), iter([]), 2)
