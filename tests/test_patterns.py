"""Regular expressions of files: Python's answers, in bounded time, or a refusal that says why."""

import random
import re

import pytest

from jaxgen.convert.patterns import Patterns
from jaxgen.errors import CheckpointError

NAMES = ["", "lm_head", "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "aab.ba_", "AaB"]
HOWS = ("match", "fullmatch", "search")
WRITTEN = [
    "", "lm_head", ".*lm_head", r"model\.layers\.\d+\..*(q|k|v)_proj$", r"^(?!.*(vision|head)).*_proj", r"(?i)MODEL.*",
    r"(.*\.)?(mlp.(up|down)_proj)$", r"(?<=mlp\.)down", r"(?<!self_attn\.)q_proj", r"\bmlp\b",
    r"[^.]+\.[a-l]*\.\d{1,2}",
    r"(?s:.)+?\Z", r"\Amodel", r"\w+\W\w+", r"a{2}b", r"(a|b|\.)*", r"(?:a?){3,}", r"[^\d_]*", "(?x) a a  b # spaces",
    "(?!)", r"(?i:a)ab", r"(?i)[^b]+", r"\B.", "()", "(a|)*b?", r"(?=.*_proj)(?=.*mlp).*", "a{0}", "a{,2}",
]  # fmt: skip


def compare(pattern: str, name: str, how: str) -> None:
    expected = getattr(re, how)(pattern, name) is not None
    assert getattr(Patterns("f"), how)(pattern, name) == expected, (pattern, name, how)


@pytest.mark.parametrize("how", HOWS)
def test_answers_are_those_of_re(how):
    for pattern in WRITTEN:
        for name in NAMES:
            compare(pattern, name, how)


def written(draw: random.Random, depth: int) -> str:
    """A pattern of small parts, at random."""
    if depth == 0:
        return draw.choice(["a", "b", ".", r"\.", r"\w", "[ab]", "[^a]", "^", "$", r"\b", "_", "(?i:A)", ""])
    first, second = written(draw, depth - 1), written(draw, depth - 1)
    return draw.choice(
        [first + second, f"(?:{first}|{second})", f"(?:{first})*", f"(?:{first})+?", f"(?:{first}){{1,2}}",
         f"(?={first}){second}", f"(?!{first}){second}", f"({first})?{second}"]
    )  # fmt: skip


def test_answers_about_patterns_made_at_random():
    draw = random.Random(0)
    for _ in range(3000):
        name = "".join(draw.choice("aabB._") for _ in range(draw.randrange(7)))
        compare(written(draw, draw.randrange(4)), name, draw.choice(HOWS))


BOMBS = [
    "(a+)+$",
    "(.*)*(.*)*(.*)*_nothing",
    "(a|a)*" * 20 + "x",
    "(((((a*)*)*)*)*)*x",
    "(?=(a+)+$)x" * 9,
    "(a?){60}" * 9 + "x",
]


@pytest.mark.parametrize("pattern", BOMBS)
def test_what_backtracks_for_ever_in_re(pattern):
    assert not Patterns("f").fullmatch(pattern, "a" * 60 + "!")


@pytest.mark.parametrize(
    "pattern, why",
    [
        ("(", "missing \\)"),
        ("a{99999999999999999999}", "too large"),
        ("a(?i)b", "global flags not at the start"),
        (r"(a)\1", "jaxgen does not match groupref"),
        ("(?>a)b", "jaxgen does not match atomic group"),
        ("x(?:a++)", "jaxgen does not match possessive repeat"),
        ("(" * 3000 + "a" + ")" * 3000, "recursion"),
        ("a" * 10_001, "10001 characters, more than 10000"),
        ("(?L)a", "bad inline flags"),
        ("(?=(.*){99})" * 800 + "(" * 60 + "a" + "*)" * 60, "take too long"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(monkeypatch, pattern, why):
    monkeypatch.setattr("jaxgen.convert.patterns._MOST_STEPS", 50_000)
    with pytest.raises(CheckpointError, match=rf"adapter\.json: .* cannot be used as a regular expression: .*{why}"):
        Patterns("adapter.json").search(pattern, "a" * 80)


def test_what_a_file_may_take_is_counted_over_all_its_patterns(monkeypatch):
    monkeypatch.setattr("jaxgen.convert.patterns._MOST_STEPS", 10_000)
    patterns = Patterns("f")
    with pytest.raises(CheckpointError, match="take too long"):
        for number in range(1000):
            patterns.search(f"mlp.{number}", "a" * 60)
