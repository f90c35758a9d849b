"""Stop strings as an automaton: cases worked out by hand, and the text itself as the judge of random ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.core import Tracer
from tokenizers import Tokenizer, decoders, models

from jaxgen.errors import JaxgenError
from jaxgen.generation.choosing.stop_strings import StopStrings, checked_strings
from tests.helpers import SLOTS, decisions
from tests.tokenizers import (
    TOKENIZERS,
    VOCAB,
    alone,
    byte_fallback,
    byte_level,
    characters,
    fast,
    ids_of,
)

NO, YES = False, True
CASES = {
    "whole": ("stop", [], [b"a", b"stop", b"a"], [NO, YES, NO]),
    "three tokens": ("stop", [], [b"s", b"to", b"p"], [NO, NO, YES]),
    "overhang behind": ("stop", [], [b"st", b"opera", b"tion"], [NO, YES, NO]),
    "overhang in front": ("stop", [], [b"las", b"topper"], [NO, YES]),
    "inside one token": ("op", [], [b"topper", b"at"], [YES, NO]),
    "broken off": ("stop", [], [b"st", b"a", b"op"], [NO, NO, NO]),
    "begun again": ("stop", [], [b"s", b"st", b"op"], [NO, NO, YES]),
    "overlap": ("aab", [], [b"a", b"a", b"a", b"b"], [NO, NO, NO, YES]),
    "overlap across tokens": ("aab", [], [b"aa", b"ab", b"aab"], [NO, YES, YES]),
    "twice, sharing a letter": ("aba", [], [b"ab", b"ab", b"a"], [NO, YES, YES]),
    "a suffix ends with it": (["she", "he"], [], [b"s", b"h", b"e", b"h", b"e"], [NO, NO, YES, NO, YES]),
    "a suffix ends inside": (["shers", "he"], [], [b"sh", b"e", b"r", b"s"], [NO, YES, NO, YES]),
    "a prefix ends first": (["sto", "stopper"], [], [b"st", b"o", b"pper"], [NO, YES, YES]),
    "same string twice": (["op", "op"], [], [b"st", b"op"], [NO, YES]),
    "begins in the prompt": ("stop", [b"a", b"st"], [b"op"], [YES]),
    "begins far back in the prompt": ("stop", [b"s", b"t", b"o"], [b"p"], [YES]),
    "within the prompt": ("stop", [b"stop"], [b"a", b"p"], [NO, NO]),
    "within the prompt, then new": ("stop", [b"a", b"stop"], [b"stop"], [YES]),
    "the prompt shares a letter": ("sts", [b"st", b"s"], [b"t", b"s"], [NO, YES]),
    "a long prompt": ("stop", [b"op"] * 15 + [b"s", b"to"], [b"p", b"stop"], [YES, YES]),
    "one character": ("p", [b"p"], [b"a", b"op", b"p"], [NO, YES, YES]),
    "a character in two tokens": ("é", [], [b"\xc3", b"\xa9", b"\xa9"], [NO, YES, NO]),
    "half a character overhangs": ("stop", [], [b"st", b"op\xc3", b"\xa9a"], [NO, YES, NO]),
    "half a character in front": ("éa", [], [b"op\xc3", b"\xa9a"], [NO, YES]),
    "four tokens for a character": ("😀", [], [b"\xf0", b"\x9f", b"\x98", b"\x80"], [NO, NO, NO, YES]),
    "another character": ("😀", [], [b"\xf0", b"\x9f", b"\x98", b"\x81"], [NO, NO, NO, NO]),
    "a special token's name": ("</s>", [], [b"a", "</s>"], [NO, YES]),
    "part of a special token": ("s>a", [], ["</s>", b"aab"], [NO, YES]),
    "spelled out like a special token": ("</s>", [], [b"<", b"/", b"s", b">"], [NO, NO, NO, YES]),
    "a name that bytes do not spell": ("é end|", [], ["<|é end|>"], [YES]),
    "an id the tokenizer lacks": ("stop", [], [b"st", VOCAB - 1, b"op", b"stop"], [NO, NO, NO, YES]),
    "a prompt id the tokenizer lacks": ("stop", [b"st", VOCAB - 1], [b"op"], [NO]),
    "silence in between": ("stop", [], [b"st", *[b""] * 8, b"op", b""], [NO] * 9 + [YES, NO]),
    "silence in the prompt": ("stop", [b"a", b"st", *[b""] * 8], [b"", b"op"], [NO, YES]),
}


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name: str):
    strings, prompt, new, expected = CASES[name]
    ids = ids_of(byte_level(), *prompt, *new)
    assert decisions(StopStrings.of(byte_level(), strings, VOCAB), ids, len(prompt)) == expected


@pytest.mark.parametrize(
    ("strings", "tokens", "expected"),
    [
        ("\n\n", ["▁a", "<0x0A>", "\n"], [NO, NO, YES]),
        (" stop", ["▁stop", "stop"], [YES, NO]),
        ("é", ["<0xC3>", "<0xA9>", "é"], [NO, YES, YES]),
        ("日本a", ["<0xE6>", "<0x97>", "<0xA5>", "<0xE6>", "<0x9C>", "<0xAC>", "▁a", "日本", "aa"], [NO] * 8 + [YES]),
        ("<0x0A>", ["<0x0A>"], [NO]),  # a byte's name is not what it says
        ("s> st", ["</s>", "▁st"], [NO, YES]),
    ],
)
def test_byte_fallback_by_hand(strings: str, tokens: list[str], expected: list[bool]):
    stop = StopStrings.of(byte_fallback(), strings, VOCAB)
    assert decisions(stop, ids_of(byte_fallback(), *tokens), 0) == expected


@pytest.mark.slow
def test_rows_know_nothing_of_each_other_or_of_what_lies_behind_their_end():
    stop = StopStrings.of(byte_level(), ["stop", "aab"], VOCAB)
    rows = [([b"s", b"to"], b"p"), ([b"a", b"a", b"a"], b"b"), ([b"p"], b"p"), ([b"stop"], b"b")]
    tokens = np.full((4, SLOTS), ids_of(byte_level(), b"st")[0], np.int32)
    for row, (prompt, _) in enumerate(rows):
        tokens[row, : len(prompt)] = ids_of(byte_level(), *prompt)
    state = stop.start(jnp.asarray(tokens), jnp.array([len(prompt) for prompt, _ in rows]))
    _, ended = stop.advance(state, jnp.array(ids_of(byte_level(), *(token for _, token in rows))))
    assert ended.tolist() == [YES, YES, NO, NO]


@st.composite
def situations(draw: st.DrawFn, name: str) -> tuple[list[str], list[int], int]:
    """Stop strings cut from a text, a row with that text in it, and how much of the row is the prompt.

    Few tokens, and few different ones, so that they repeat and overlap.
    """
    some = draw(st.lists(st.sampled_from(sorted(alone(name))), min_size=1, max_size=4))
    ids = draw(st.lists(st.sampled_from(some), min_size=2, max_size=SLOTS))
    text = b"".join(alone(name)[index] for index in ids).decode(errors="ignore")
    strings = []
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(text)))
        strings.append(text[begin : begin + draw(st.integers(1, 7))] or "ab")
    return strings, ids, draw(st.integers(0, len(ids) - 1))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data())
def test_a_stop_string_ends_in_the_token_or_it_does_not(name: str, data: st.DataObject):
    strings, ids, prompt = data.draw(situations(name))
    try:
        stop = StopStrings.of(TOKENIZERS[name](), strings, VOCAB)
    except JaxgenError:  # no token ends any of them
        assert name in ("byte_fallback", "characters")
        return
    expected = []
    for count in range(prompt + 1, len(ids) + 1):
        before = len(b"".join(alone(name)[index] for index in ids[: count - 1]))
        text = b"".join(alone(name)[index] for index in ids[:count])
        ends = (
            end
            for string in strings
            for end in range(before + 1, len(text) + 1)
            if text[:end].endswith(string.encode())
        )
        expected.append(any(True for _ in ends))
    assert decisions(stop, ids, prompt) == expected


def test_other_strings_compile_nothing():
    advance = jax.jit(lambda stop, state, token: stop.advance(state, token))
    state = token = jnp.zeros(2, jnp.int32)
    for strings in ("a", ["stop", "\n\nQ:", "</s>"], "a rather long stop string, longer than one would want"):
        advance(StopStrings.of(byte_level(), strings, VOCAB), state, token)
    assert advance._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_builds_are_kept_until_the_tokenizer_changes():
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate("abcdef")}, merges=[]))
    backend.decoder = decoders.Fuse()
    tokenizer = fast(backend)
    first = StopStrings.of(tokenizer, ["a", "bc"], 20)
    assert StopStrings.of(tokenizer, ("bc", "a"), 20) is first
    assert StopStrings.of(tokenizer, ["a", "bc"], 21) is not first
    new = len(tokenizer)
    tokenizer.add_tokens(["xbcx"])
    assert StopStrings.of(tokenizer, ["a", "bc"], 20).advance(jnp.array([0]), jnp.array([new]))[1].tolist() == [YES]
    assert first.advance(jnp.array([0]), jnp.array([new]))[1].tolist() == [NO]


def test_built_inside_a_jit_it_can_be_used_outside():
    strings = "only here, so not built before: stop"

    @jax.jit
    def inside(token):
        return StopStrings.of(byte_level(), strings, VOCAB).advance(jnp.zeros(1, jnp.int32), token)[1]

    assert inside(jnp.array(ids_of(byte_level(), b"stop"))).tolist() == [NO]
    stop = StopStrings.of(byte_level(), strings, VOCAB)
    assert not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(stop))


def test_a_model_with_fewer_tokens_than_the_tokenizer():
    ids = ids_of(byte_level(), b"s", b"t", b"o", b"p")
    assert max(ids) < 256 < len(byte_level())
    assert decisions(StopStrings.of(byte_level(), "stop", 256), ids, 1) == [NO, NO, YES]
    last = ids[-1]
    assert decisions(StopStrings.of(byte_level(), "p", last + 1), [last], 0) == [YES]
    with pytest.raises(JaxgenError, match="no token ends any of them"):
        StopStrings.of(byte_level(), "p", min(ids))


@pytest.mark.parametrize(
    ("strings", "message"),
    [
        ("", r"stop_strings\[0\] is empty"),
        (["a", ""], r"stop_strings\[1\] is empty"),
        ([], "empty list"),
        (["a", 3], r"stop_strings\[1\]=3 is int"),
        (b"a", "not a str"),
        (7, "stop_strings=7 is not a str"),
        ({"a"}, "is not a str or a list"),
        (["a\ud83d"], r"stop_strings\[0\].*half a character"),
    ],
)
def test_strings_that_are_none(strings: object, message: str):
    with pytest.raises(JaxgenError, match=message):
        StopStrings.of(byte_level(), strings, VOCAB)


def test_tokenizers_that_do_not_do():
    with pytest.raises(JaxgenError, match="stop_strings needs tokenizer="):
        StopStrings.of(None, "a", VOCAB)
    with pytest.raises(JaxgenError, match="tokenizer is Tokenizer"):
        StopStrings.of(byte_level().backend_tokenizer, "a", VOCAB)
    with pytest.raises(JaxgenError, match="no token ends any of them"):
        StopStrings.of(characters(), ["ю", "я"], VOCAB)
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "x": 1}, unk_token="<unk>"))
    with pytest.raises(JaxgenError, match=r"makes .* of 'abcdef' and the token"):
        StopStrings.of(fast(backend), "x", VOCAB)


def test_checked_strings():
    assert checked_strings("stop") == ("stop",)
    assert checked_strings(("b", "a", "b")) == ("b", "a", "b")
