"""Grammars: every text is one that they make, by recognisers of their own; nothing that may come is missing."""

import json
import random
import re
from pathlib import Path
from typing import Any

import jax
import jsonschema
import numpy as np
import pytest
from scipy import stats

import jaxgen
from jaxgen import GenerationConfig, JaxgenError, MistralForCausalLM, UnsupportedError
from jaxgen.arguments import parser, settings_of
from jaxgen.constraints.grammars import Grammar
from jaxgen.generation.choosing.grammars import Grammars
from jaxgen.generation.choosing.stop import LENGTH, RUNNING
from jaxgen.records import check
from tests.constrained import BOTH, PROMPT, all_of, streamed_and_piped, texts_of, tiny_model
from tests.helpers import counted
from tests.tokenizers import TOKENIZERS, VOCAB, alone, byte_level, characters

pytest.importorskip("llguidance", reason="reads the grammars")

NESTED = {
    "lark": 'start: item*\nitem: "a" | "é" | "s" item* "t"',
    "gbnf": 'root ::= item*\nitem ::= "a" | "é" | "s" item* "t"',
}


def nested(text: bytes) -> tuple[bool, bool]:
    """Whether a text is one of `NESTED`, and whether one begins with it: the tests' own reading."""
    half = text.endswith("é".encode()[:1])
    depth = 0
    for letter in (text[:-1] if half else text).replace("é".encode(), b"a"):
        depth += {ord("s"): 1, ord("t"): -1}.get(letter, 0)
        if letter not in b"ast" or depth < 0:
            return False, False
    return depth == 0 and not half, True


def grammars_of(grammar: Grammar, name: str, eos: tuple[int, ...]) -> Grammars:
    return Grammars.of(grammar, TOKENIZERS[name](), 1, VOCAB, eos)


def allowed(bits: np.ndarray) -> set[int]:
    return {token for token in range(32 * bits.shape[0]) if bits[token // 32] >> token % 32 & 1}


def walk(
    grammar: Grammar, name: str, most: int, rng: random.Random, prefer: bytes = b""
) -> list[tuple[bytes, set[int], bool]]:
    """A text of tokens that may come, any of them: what it was before each, what may come then, and whether it ended.

    `prefer`: tokens of these bytes are taken three times out of four, so that it does end.
    """
    said, eos = alone(name), TOKENIZERS[name]().get_vocab()["</s>"]
    rows, text, places = grammars_of(grammar, name, (eos,)).walk([0]), b"", []
    for count in range(1, most + 1):
        may = allowed(rows.bits[0])
        places.append((text, may, False))
        wanted = [token for token in may if token == eos or said[token] in (prefer[i : i + 1] for i in range(99))]
        token = rng.choice(sorted(wanted if wanted and rng.random() < 0.75 else may))
        if token == eos:
            places[-1] = (text, may, True)
            break
        text += said[token]
        rows.take(np.full((1, most), token), np.array([count]), np.array([RUNNING]), np.array([count]))
    return places


@pytest.mark.parametrize("syntax", NESTED)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_may_come_is_what_some_text_goes_on_with(name: str, syntax: str):
    said, eos = alone(name), TOKENIZERS[name]().get_vocab()["</s>"]
    for seed in range(3):
        for text, may, _ in walk(jaxgen.grammar(NESTED[syntax], syntax), name, 12, random.Random(seed)):
            whole, _ = nested(text)
            expected = {token for token, more in said.items() if more and nested(text + more)[1]}
            assert may == expected | ({eos} if whole else set()), text


TREE = {
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {"v": {"enum": [1, True, None]}, "sub": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
            "required": ["v"],
        }
    },
    "$ref": "#/$defs/tree",
}
EXPRESSION = {
    "$defs": {
        "e": {"oneOf": [{"$ref": "#/$defs/number"}, {"$ref": "#/$defs/sum"}]},
        "number": {"type": "object", "properties": {"k": {"const": "n"}, "n": {"type": "integer"}}, "required": ["k"]},
        "sum": {
            "type": "object",
            "properties": {"k": {"const": "s"}, "of": {"type": "array", "items": {"$ref": "#/$defs/e"}, "maxItems": 2}},
            "required": ["k", "of"],
        },
    },
    "$ref": "#/$defs/e",
}
LIST = {"type": ["array", "null"], "items": {"$ref": "#"}}


@pytest.mark.parametrize("schema", [TREE, EXPRESSION, LIST], ids=["tree", "expression", "list"])
def test_every_json_of_a_schema_that_leads_back_to_itself_is_valid(schema: dict[str, Any]):
    asked = jaxgen.json_schema(schema)
    assert isinstance(asked, Grammar)
    judge, ended = jsonschema.Draft202012Validator(schema), 0
    for seed in range(12):
        text, _, end = walk(asked, "byte_level", 300, random.Random(seed), prefer=b"]}")[-1]
        if end:
            ended += 1
            value = json.loads(text)
            judge.validate(value)
            assert not re.search(rb"[ ]{2}|[\n\t]", text)
            if isinstance(value, dict):
                assert value.keys() <= {"v", "sub", "k", "n", "of"}  # no others than are listed
    assert ended > 4


def test_only_schemas_that_lead_back_to_themselves_are_grammars():
    twice = {"type": "array", "items": {"$ref": "#/$defs/x"}, "minItems": 1, "$defs": {"x": {"type": "null"}}}
    named = {"type": "object", "properties": {"$ref": {"const": "#"}, "enum": {"$ref": "#/properties/$ref"}}}
    unused = {"type": "null", "$defs": {"loop": {"$ref": "#/$defs/loop"}}}
    for schema in (twice, named, unused, {"enum": [{"$ref": "#"}]}):
        assert isinstance(jaxgen.json_schema(schema), jaxgen.Constraint), schema
    with pytest.raises(JaxgenError, match="is not in the schema"):
        jaxgen.json_schema({"anyOf": [{"$ref": "#/nowhere"}]})


# In generation.


@pytest.fixture(scope="module")
def model() -> MistralForCausalLM:
    return tiny_model()


TEXTS = jaxgen.grammar('start: a b | "at"\na: "a"+\nb: "b"')  # aab, ab, at, and longer ones


def test_texts_are_those_of_the_grammar_in_batches_and_another_one_compiles_nothing(model):
    options: dict[str, Any] = {**BOTH, "do_sample": True, "top_k": 0, "temperature": 3.0, "max_new_tokens": 16}
    out = model.generate(PROMPT, constraint=jaxgen.grammar(NESTED["lark"]), seed=0, **options)
    with counted() as compilations:
        found = [
            (text, reason)
            for seed in range(6)
            for out in [model.generate(PROMPT, constraint=jaxgen.grammar(NESTED["lark"]), seed=seed, **options)]
            for text, reason in zip(texts_of(out), out.finish_reason, strict=True)
        ]
        out = model.generate(PROMPT, constraint=TEXTS, seed=0, **options)
    assert compilations == []
    assert all(re.fullmatch("a+b|at", text) for text in texts_of(out))
    assert {reason for _, reason in found} <= {"eos", "length", "complete"}
    for text, reason in found:
        whole, begun = nested(text.encode())
        assert begun
        assert whole or reason == "length"
    assert any("s" in text and reason == "eos" for text, reason in found)


def test_samples_have_the_renormalised_distribution(model):
    texts, many = ["aab", "ab", "at"], 1500
    known, expected = all_of(model, texts, PROMPT[0]), {}
    for row, logits in known.items():
        probability = 1.0
        for place, token in enumerate(row):
            may = sorted({other[place] for other in known if other[:place] == row[:place]})
            weights = np.exp(np.asarray(logits[place])[may].astype(np.float64))
            probability *= weights[may.index(token)] / weights.sum()
        expected[row] = probability
    out = model.generate(
        PROMPT[:1], constraint=jaxgen.grammar('start: "a" ("a"? "b" | "t")'), do_sample=True, top_k=0, seed=5,
        num_return_sequences=many, **BOTH,
    )  # fmt: skip
    counts = dict.fromkeys(expected, 0)
    for row, count, terms in zip(out.sequences[:, 3:].tolist(), out.lengths, out.logprobs, strict=True):
        counts[tuple(row[:count])] += 1
        assert float(terms.sum()) == pytest.approx(np.log(expected[tuple(row[:count])]), abs=1e-4)
    assert stats.chisquare(list(counts.values()), np.array(list(expected.values())) * many).pvalue > 1e-3


def test_a_list_gives_each_prompt_its_own_beside_regular_ones(model):
    three = [*PROMPT, [1, 3, 3]]
    free = model.generate(three, **BOTH)
    out = model.generate(three, constraint=[jaxgen.regex("aab"), None, jaxgen.grammar('start: "st" "op"')], **BOTH)
    assert texts_of(out)[0::2] == ["aab", "stop"]
    assert out.sequences[1].tolist() == free.sequences[1].tolist()  # nothing is asked of it
    np.testing.assert_array_equal(out.logprobs[1], free.logprobs[1])


def test_a_row_that_may_not_end_otherwise_is_complete(model):
    out = model.generate(PROMPT, constraint=jaxgen.grammar('start: "aab" "aab" | "stop"'), eos_token_id=None, **BOTH)
    assert set(texts_of(out)) <= {"aabaab", "stop"}
    assert out.finish_reason == ["complete"] * 2  # nothing could follow
    out = model.generate(
        PROMPT, constraint=jaxgen.grammar('start: "a" "a" "a" start?'), max_new_tokens=3, eos_token_id=None, **BOTH
    )
    for text, reason in zip(texts_of(out), out.finish_reason, strict=True):
        assert reason == ("complete" if len(text) % 3 == 0 else "length")


def test_end_tokens_that_say_something_end_a_whole_text():
    vocabulary = byte_level().get_vocab()
    stop, letter, end = vocabulary["."], vocabulary["a"], vocabulary["</s>"]
    grammars = Grammars.of(jaxgen.grammar('start: "a"+ "."?'), byte_level(), 1, VOCAB, (stop, letter, end))
    rows = grammars.walk([0])
    assert {stop, letter, end} & allowed(rows.bits[0]) == {letter}
    rows.take(np.array([[vocabulary["aa"]]]), np.array([1]), np.array([RUNNING]), np.array([1]))
    assert {stop, letter, end} <= allowed(rows.bits[0])
    assert rows.take(np.array([[0, letter]]), np.array([2]), np.array([LENGTH]), np.array([2])).all()


def test_a_special_token_comes_where_it_is_named():
    special = byte_level().get_vocab()["<s>"]
    rows = grammars_of(jaxgen.grammar('start: <s> "a"'), "byte_level", (eos_of_byte_level(),)).walk([0])
    assert allowed(rows.bits[0]) == {special}
    anything = grammars_of(jaxgen.grammar("start: /(?s:.)*/"), "byte_level", (eos_of_byte_level(),)).walk([0])
    known = allowed(anything.bits[0])
    assert special not in known
    assert eos_of_byte_level() in known
    assert known <= {*byte_level().get_vocab().values()}


def eos_of_byte_level() -> int:
    return byte_level().get_vocab()["</s>"]


def test_where_the_vocabulary_cannot_go_on_it_says_so(model):
    with pytest.raises(JaxgenError, match=r"row 0: the tokens of this model cannot spell how its text goes on"):
        model.generate(PROMPT[:1], constraint=jaxgen.grammar('start: "ab" "ю"'), **BOTH)


def test_it_holds_with_strict_and_goes_into_records(model):
    options: dict[str, Any] = {"strict": jaxgen.Strict(rows=4, tokens=32), "do_sample": True, "seed": 3, **BOTH}
    out = model.generate(PROMPT, constraint=TEXTS, **options)
    assert all(re.fullmatch("a+b|at", text) for text in texts_of(out))
    fields = json.loads(out.record.to_json())
    jsonschema.validate(fields, json.loads((Path(check.__file__).parent / "record.schema.json").read_text()))
    [entry] = fields["generations"]
    assert entry["constraint"]["patterns"] == [{"text": TEXTS.text, "syntax": "lark"}]
    assert jaxgen.replay(out.record, model, tokenizer=characters()).message == "identical"
    entry["constraint"]["patterns"][0]["syntax"] = "bnf"
    with pytest.raises(JaxgenError, match=r"patterns\[0\].syntax=\"bnf\" is none of lark, gbnf, json_schema"):
        jaxgen.Record.from_json(json.dumps(fields))


@pytest.mark.parametrize(
    ("constraint", "options", "error", "message"),
    [
        (TEXTS, {"num_beams": 2}, UnsupportedError, "a grammar with num_beams"),
        (TEXTS, {"prompt_lookup_num_tokens": 2}, UnsupportedError, "a grammar with prompt_lookup_num_tokens"),
        ([None, TEXTS], {"assistant_model": ...}, UnsupportedError, "a grammar with assistant_model"),
        (TEXTS, {"tokenizer": None}, JaxgenError, "constraint needs tokenizer="),
        ([TEXTS], {}, JaxgenError, "constraint is a list of 1, and there are 2 prompts"),
        (jaxgen.grammar('start: "a'), {}, JaxgenError, "the lark grammar .* cannot be used: 1.10.: lexer error"),
        (jaxgen.grammar('start: "a" foo'), {}, JaxgenError, 'unknown name: "foo"'),
        (jaxgen.grammar("root ::= foo", "gbnf"), {}, JaxgenError, "the gbnf grammar .* Rule 'foo' not found"),
        (jaxgen.grammar('{"not": {}}', "json_schema"), {}, JaxgenError, "the schema .* Unimplemented keys"),
        (jaxgen.grammar("[]", "json_schema"), {}, JaxgenError, "the schema '..' cannot be used: it is no JSON object"),
        (jaxgen.grammar('start: start "a"'), {}, JaxgenError, "cannot spell any text that it makes"),
        (jaxgen.grammar('start: "ю"'), {}, JaxgenError, "cannot spell any text that it makes"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_compiled(
    model, constraint: Any, options: dict[str, Any], error: type[Exception], message: str
):
    if "assistant_model" in options:
        options = {"assistant_model": model}
    with counted() as compilations, pytest.raises(error, match=message):
        model.generate(PROMPT, constraint=constraint, **{**BOTH, **options})
    assert compilations == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jaxgen.grammar(3), "text=3 is int, not a str"),  # type: ignore[arg-type]
        (lambda: jaxgen.grammar("a", "ebnf"), "syntax='ebnf' is none of lark, gbnf, json_schema"),
        (lambda: jaxgen.grammar("\ud83d"), "holds half a character"),
        (lambda: jaxgen.grammar("a" * (1 << 20) + "b"), "1048577 characters; at most 1048576"),
    ],
)
def test_what_is_no_grammar(make: Any, message: str):
    with pytest.raises(JaxgenError, match=message):
        make()


def test_inside_jit_it_is_refused_by_name(model):
    def call(key: jax.Array) -> Any:
        return jaxgen.generate(
            model, np.array(PROMPT), None, key, GenerationConfig(), constraint=TEXTS, tokenizer=characters()
        )

    with pytest.raises(UnsupportedError, match="constraint: a grammar, which the host reads"):
        jax.jit(call)(jax.random.key(0))


def test_a_grammar_on_the_command_line_is_a_file(tmp_path: Path):
    for syntax, text in NESTED.items():
        file = tmp_path / f"nested.{syntax}"
        file.write_text(text, encoding="utf-8")
        given = parser().parse_args(["generate", "x", "--grammar", str(file)])
        assert settings_of(given) == {"constraint": jaxgen.grammar(text, syntax)}
    for name, message in {"x.txt": "must end with .lark or .gbnf", "x.lark": "cannot be read"}.items():
        with pytest.raises(JaxgenError, match=message):
            settings_of(parser().parse_args(["generate", "x", "--grammar", str(tmp_path / name)]))


@pytest.mark.slow
def test_pipelines_and_streams_give_what_generate_gives():
    own = [jaxgen.grammar('start: (", " /[0-9]/)~2'), jaxgen.choice([" in", " a cat"]), None]
    told, _ = streamed_and_piped(own, chunk_size=2)
    assert re.fullmatch("(, [0-9]){2}", told[0])
