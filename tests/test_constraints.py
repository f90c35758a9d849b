"""Constraints: every text matches, by outside judges; nothing that may come is missing; nothing else changes."""

import functools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from scipy import stats

import jaxgen
from jaxgen import GenerationConfig, JaxgenError, MistralForCausalLM, UnsupportedError
from jaxgen.arguments import parser, settings_of
from jaxgen.constraints.automaton import ByteAutomaton, byte_automaton
from jaxgen.constraints.minimal import minimal
from jaxgen.constraints.numbers import integers_between
from jaxgen.constraints.patterns import Constraint, escaped
from jaxgen.generation.choosing.constrained import FREE, Automata
from jaxgen.generation.processors.regular import Asked
from jaxgen.records import check
from tests.constrained import (
    BOTH,
    EOS,
    PROMPT,
    THREE,
    all_of,
    random_pattern,
    random_schema,
    streamed_and_piped,
    texts_of,
    tiny_model,
)  # fmt: skip
from tests.helpers import counted, processed, real_logits, rows_of
from tests.tokenizers import SPECIAL, TOKENIZERS, VOCAB, alone, byte_level, characters

pytest.importorskip("outlines_core", reason="builds the automata, and has no wheel for this Python")

ROWS = 16
SAID = {**{name: functools.partial(alone, name) for name in TOKENIZERS}}


def eos_of(name: str) -> int:
    return TOKENIZERS[name]().get_vocab()["</s>"]


# Walks over the automata: whatever a model would want, this may come.


@jax.jit
def _allowed(automata: Automata, state: jax.Array, left: jax.Array) -> jax.Array:
    return automata.allowed(state, jnp.zeros(ROWS, jnp.int32), jnp.full(ROWS, left))


@jax.jit
def _advance(automata: Automata, state: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return automata.advance(state, jnp.zeros(ROWS, jnp.int32), token)


def walks(name: str, constraint: Constraint, budget: int, rng: np.random.Generator) -> list[bytes]:
    """The texts of rows that draw any token that may come, and have so many at most; all are whole at their end."""
    added = TOKENIZERS[name]().added_tokens_decoder.items()
    said = alone(name) | {index: str(token).encode() for index, token in added if not token.special}
    eos = eos_of(name)
    automata = Automata.of(constraint, TOKENIZERS[name](), 1, VOCAB, (eos,))
    state = automata.start(jnp.zeros(ROWS, jnp.int32))
    budget = max(budget, int(np.asarray(automata.distance)[np.asarray(automata.starts)[0]]))
    texts, running, whole = [b""] * ROWS, np.ones(ROWS, bool), np.zeros(ROWS, bool)
    for left in reversed(range(budget)):
        may = np.asarray(_allowed(automata, state, left))
        assert may[running].any(axis=1).all()
        token = (may * rng.random(may.shape)).argmax(axis=1).astype(np.int32)
        for row in np.flatnonzero(running):
            texts[row] += b"" if token[row] == eos else said[token[row]]
        state, is_whole, _ = _advance(automata, state, token)
        whole = np.where(running, np.asarray(is_whole), whole)
        running &= token != eos
    assert whole.all()
    return texts


def check_patterns(name: str, seed: int, count: int) -> None:
    rng = random.Random(f"{name} {seed}")
    for _ in range(count):
        pattern = random_pattern(rng, rng.choice([1, 2, 2, 3]))
        try:
            texts = walks(name, jaxgen.regex(pattern), rng.randint(1, 14), np.random.default_rng(seed))
        except JaxgenError as error:  # the other vocabularies have every byte
            assert name in ("characters", "demo"), pattern
            assert "cannot spell" in str(error)
            continue
        for text in texts:
            assert re.fullmatch(pattern, text.decode()), (pattern, text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_text_matches(name: str):
    check_patterns(name, 0, 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_text_of_many_patterns_matches(name: str):
    check_patterns(name, 1, 400)


CHOICES = {
    "one begins with the other": ["a", "ab", "aab", "abc"],
    "nothing at all": ["", "op"],
    "parts of characters": ["é", "日本", "日月", "😀"],
    "what patterns have a use for": ["c++", "(a|b)*", "[st]", "a.b", "x{2}", "^$", "a-b&&~#", "\\", '"', "\n"],
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_may_come_is_what_some_text_goes_on_with(name: str):
    texts, said, eos = [text.encode() for text in CHOICES[name]], alone("byte_level"), eos_of("byte_level")
    automata = Automata.of(jaxgen.choice(CHOICES[name]), byte_level(), 1, VOCAB, (eos,))
    front, seen = [(b"", np.asarray(automata.starts)[0])], set()
    while front:
        text, state = front.pop()
        if text in seen:
            continue
        seen.add(text)
        may = np.asarray(_allowed(automata, jnp.full(ROWS, state), 100))[0]
        expected = {token for token, more in said.items() if more and any(t.startswith(text + more) for t in texts)}
        expected |= {eos} if text in texts else set()
        assert {*np.flatnonzero(may).tolist()} == expected, text
        for token in expected - {eos}:
            after, whole, ends = _advance(automata, jnp.full(ROWS, state), jnp.full(ROWS, token))
            assert bool(whole[0]) == (text + said[token] in texts)
            assert not ends[0]  # an end token may follow
            front.append((text + said[token], int(after[0])))
    assert set(texts) <= seen


def test_the_end_comes_in_time_and_no_sooner_than_it_must():
    """With words of one letter: how many of them are left decides what may come."""
    tokenizer, said = characters(), alone("characters")
    automata = Automata.of(jaxgen.regex("a+(st)+"), tokenizer, 1, VOCAB, (EOS,))
    state = automata.start(jnp.zeros(ROWS, jnp.int32))
    for left, expected in [(0, set()), (1, {"a", "aa"}), (9, {"a", "aa"})]:
        may = np.asarray(_allowed(automata, state, left))[0]
        # With no time left for an end, what may come at all may come.
        assert {said[token].decode() for token in np.flatnonzero(may).tolist()} == (expected or {"a", "aa"})
    after, _, _ = _advance(automata, state, jnp.full(ROWS, tokenizer.get_vocab()["a"]))
    may = {
        left: {said[t].decode() for t in np.flatnonzero(np.asarray(_allowed(automata, after, left))[0]).tolist()}
        for left in (0, 1)
    }
    assert may == {0: {"st"}, 1: {"a", "aa", "s", "st"}}


# JSON schemas, with jsonschema as the judge.


def regular(schema: Any) -> Constraint:
    found = jaxgen.json_schema(schema)
    assert isinstance(found, Constraint)
    return found


def check_schemas(seed: int, count: int) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        schema = random_schema(rng) | {"$defs": {"word": {"type": "string", "maxLength": 3}}}
        judge = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
        for text in walks("byte_level", regular(schema), rng.choice([30, 60]), np.random.default_rng(seed)):
            judge.validate(json.loads(text.decode()))


def test_every_json_is_valid():
    check_schemas(0, 10)


@pytest.mark.slow
def test_every_json_of_many_schemas_is_valid():
    check_schemas(1, 150)


def test_a_schema_may_be_text_or_a_pydantic_model():
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    model = type("Model", (), {"model_json_schema": classmethod(lambda cls: schema)})  # pydantic's one method
    assert jaxgen.json_schema(json.dumps(schema)) == jaxgen.json_schema(model) == jaxgen.json_schema(schema)


def test_tags_that_differ_make_one_of_several():
    def tagged(tag: str) -> dict[str, Any]:
        return {"type": "object", "properties": {"kind": {"const": tag}}, "required": ["kind"]}

    schema = {"oneOf": [{"$ref": "#/$defs/a"}, tagged("b")], "$defs": {"a": tagged("a")}}
    assert re.fullmatch(regular(schema).pattern, '{"kind": "b"}')
    assert jaxgen.json_schema({"oneOf": [{"type": "null"}, {"type": "boolean"}]})
    with pytest.raises(UnsupportedError, match=r"#/oneOf: .*: they may overlap"):
        jaxgen.json_schema({"oneOf": [tagged("a"), tagged("a")]})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({}, "#: {}: any value of JSON"),
        (True, "True is no schema"),
        ("{", "the text is no JSON"),
        ({"type": "text"}, "#/type: 'text' is none of"),
        ({"type": "array"}, "an array needs items"),
        ({"type": "object"}, "an object needs properties"),
        ({"type": "array", "items": {"type": "null"}, "uniqueItems": True}, "#/uniqueItems: True: this keyword"),
        ({"type": "integer", "multipleOf": 3}, "#/multipleOf: 3: this keyword is not supported"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "no integer lies between 5 and 4"),
        ({"type": "number", "minimum": 2}, "#/minimum: 2"),
        ({"type": "string", "pattern": 'a"b'}, "#/pattern: "),
        ({"type": "string", "pattern": "^.$"}, "#/pattern: "),
        ({"type": "string", "format": "email"}, "#/format: 'email': of formats there are date"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength=3 is more than maxLength=2"),
        ({"not": {"type": "null"}}, "any value of JSON"),
        ({"allOf": [{"type": "null"}, {"type": "null"}]}, "#/allOf: [{"),
        ({"$ref": "#/$defs/x"}, "'#/$defs/x' is not in the schema"),
        ({"$ref": "other.json"}, "only references within the schema"),
        ({"type": "object", "properties": {}, "required": ["a"]}, "#/required: 'a'"),
        ({"type": "object", "properties": {"a": {"type": "null"}}, "required": [["a"]]}, "#/required: ['a']"),
        ({"type": "string", "minLength": None, "maxLength": 2}, "#/minLength: None is no count"),
        ({"enum": ["a", 1], "type": "string"}, "#/type: "),
        ({"enum": []}, "#/enum: "),
        ({"enum": [float("nan")]}, "is no JSON"),
        ({"anyOf": []}, "#/anyOf: "),
        ({"anyOf": [{"type": "null"}], "type": "null"}, "#/type: 'null': not beside anyOf"),
    ],
)  # fmt: skip
def test_what_a_schema_cannot_say_is_refused_by_name(schema: Any, message: str):
    with pytest.raises(JaxgenError, match=re.escape(message)):
        jaxgen.json_schema(schema)


def test_a_reference_that_comes_again_and_again_is_read_once():
    """40 schemas, each of which has the next one twice: 2**40 parts, if each were written out."""
    parts = {
        f"d{level}": {"type": "object", "properties": {name: {"$ref": f"#/$defs/d{level + 1}"} for name in "ab"}}
        for level in range(40)
    }
    schema = {"$defs": {**parts, "d40": {"type": "null"}}, "$ref": "#/$defs/d0"}
    with pytest.raises(JaxgenError, match=r"its pattern has \d+ characters, more than 131072"):
        jaxgen.json_schema(schema)


def test_ranges_of_integers():
    rng = random.Random(0)
    for _ in range(200):
        least, most = sorted(rng.randint(-1200, 1200) for _ in range(2))
        low, high = rng.choice([None, least]), rng.choice([None, most])
        pattern = re.compile(integers_between(low, high) or "")
        for value in [least, most, least - 1, most + 1, 0, *(rng.randint(-3000, 3000) for _ in range(20))]:
            inside = (low is None or value >= low) and (high is None or value <= high)
            assert bool(pattern.fullmatch(str(value))) == inside, (low, high, value)
    assert integers_between(3, 2) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jaxgen.regex(3), "pattern=3 is int, not a str"),  # type: ignore[arg-type]
        (lambda: jaxgen.regex("\ud83d"), "is half a character"),
        (lambda: jaxgen.choice([]), "choice: an empty list"),
        (lambda: jaxgen.choice("ab"), "choice: 'ab' is not a list of texts"),
        (lambda: jaxgen.choice(["a", 3]), r"choice: texts\[1\]=3 is int"),  # type: ignore[list-item]
        (lambda: byte_automaton("a("), r"has a \( without its \), at 1"),
        (lambda: byte_automaton("a)(b"), r"has a \) too many, at 1"),
        (lambda: byte_automaton("[a"), r"has a \[ without its \]"),
        (lambda: byte_automaton("a(?=b)"), "cannot be built"),
        (lambda: byte_automaton(r"\ba"), "cannot be built"),
        (lambda: byte_automaton("^a$|^b$"), r"a \^ that does not stand in front"),
        (lambda: byte_automaton("[a&&b]"), "no text matches"),
        (lambda: byte_automaton("(x{300}){300}"), "90000 places"),
        (lambda: byte_automaton("x{99999999999}"), "at most 20000"),
    ],
)  # fmt: skip
def test_patterns_that_are_refused(make: Any, message: str):
    with pytest.raises(JaxgenError, match=message):
        make()


def test_a_pattern_of_too_many_states_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxgen.constraints.automaton.MOST_STATES", 50)
    with pytest.raises(JaxgenError, match="has 129 states, more than 50"):
        byte_automaton("(a|b)*a(a|b){6}")


@pytest.mark.parametrize("seed", range(20))
def test_the_smallest_automaton_has_a_state_for_each_set_of_texts(seed: int):
    """Told apart by all texts, which no algorithm of minimisation needs to be asked for."""
    rng = np.random.default_rng(seed)
    states, step = int(rng.integers(2, 9)), np.zeros((9, 256), np.int32)
    step[1:states, :2] = rng.integers(0, states, (states - 1, 2))
    final = (np.arange(9) < states) & (rng.random(9) < 0.4)
    final[[0, 1]] = False, final[1] | ~final.any()
    large = ByteAutomaton(step[:states], final[:states])

    def matches(automaton: ByteAutomaton, state: int):
        """Which of the texts of up to 8 letters, of which at most 8 states need no more, lead to an end."""
        now, found = np.array([state]), []
        for _ in range(9):
            found.append(automaton.final[now])
            now = automaton.step[now, :2].reshape(-1)
        return np.concatenate(found).tobytes()

    small = minimal(large)
    behind = [matches(large, state) for state in range(states)]
    if behind[1] == behind[0]:
        assert small is large  # nothing matches
        return
    assert [matches(small, state) for state in range(len(small.step))] == [*dict.fromkeys(behind)]


EXPLODING = "(a|b)*a(a|b){20}"
FURTHER = {r"\w{20000}": "1024 MB of memory", ".{0,1000}x.{0,1000}": "10 seconds"}


def test_a_pattern_that_explodes_is_refused_while_it_is_built(monkeypatch: pytest.MonkeyPatch):
    """By name, alone or in a schema; and the next one is built."""
    monkeypatch.setattr("jaxgen.constraints.automaton.SECONDS", 0.3)
    for pattern in (EXPLODING, regular({"type": "string", "pattern": EXPLODING}).pattern):
        asked = re.escape(f"constraint: the pattern {pattern!r} cannot be built: it takes more than 0.3 seconds")
        with pytest.raises(JaxgenError, match=asked):
            byte_automaton(pattern)
    assert byte_automaton("aa").final.tolist() == [False, False, False, True]


# In a process of its own, whose only child is the program that builds: the memory of children is told together.
REFUSED = """
import resource, sys
from jaxgen import JaxgenError
from jaxgen.constraints.automaton import byte_automaton

try:
    byte_automaton(sys.argv[1])
except JaxgenError as error:
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, error)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows does not say how much memory a program took")
@pytest.mark.parametrize("pattern", [EXPLODING, *FURTHER])
def test_patterns_that_explode_take_no_more_than_they_may(pattern: str):
    done = subprocess.run([sys.executable, "-c", REFUSED, pattern], capture_output=True, text=True, check=True)
    kilobytes, said = done.stdout.split(" ", 1)
    assert f"takes more than {FURTHER.get(pattern, '10 seconds')}" in said
    assert int(kilobytes) < 1200 << 10


def test_without_the_library_that_builds_a_constraint_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    with pytest.raises(JaxgenError, match="constraint needs outlines-core: pip install outlines-core"):
        byte_automaton("a pattern that nobody has built")


def test_anchors_around_a_pattern_are_there_anyway():
    for pattern in ("^ab$", "ab", "(?i)^AB$", "a[b]$"):
        automaton = byte_automaton(pattern)
        assert automaton.final[automaton.step[automaton.step[automaton.start, ord("a")], ord("b")]]
    dollar = byte_automaton(r"a\$")
    assert dollar.final[dollar.step[dollar.step[dollar.start, ord("a")], ord("$")]]
    assert re.fullmatch(escaped("a.b-c&#~"), "a.b-c&#~")
    wide = byte_automaton(r"\x{30001}\u{41}")  # no counts
    assert len(wide.step) == len("\U00030001A".encode()) + 2


def test_a_schema_on_the_command_line_is_a_file(tmp_path: Path):
    file = tmp_path / "schema.json"
    file.write_text('{"enum": [1, "a"]}')
    given = parser().parse_args(["generate", "x", "--json-schema", str(file)])
    assert settings_of(given) == {"constraint": jaxgen.json_schema({"enum": [1, "a"]})}
    file.write_text("[]")
    with pytest.raises(JaxgenError, match="holds list, not a JSON object"):
        settings_of(given)


# In generation, on a model so small that all it could say can be listed.


@pytest.fixture(scope="module")
def model() -> MistralForCausalLM:
    return tiny_model()


def test_another_constraint_compiles_nothing(model):
    out = model.generate(PROMPT, constraint=jaxgen.choice(["stop", "sad"]), **BOTH)
    assert set(texts_of(out)) <= {"stop", "sad"}
    assert out.finish_reason == ["eos", "eos"]
    with counted() as compilations:
        out = model.generate(PROMPT, constraint=jaxgen.regex("(st|op)+b"), **BOTH)
    assert compilations == []
    assert all(re.fullmatch("(st|op)+b", text) for text in texts_of(out))


@pytest.mark.slow
def test_a_list_gives_each_prompt_its_own(model):
    own = [jaxgen.choice(["aab"]), None, jaxgen.choice(["st"])]
    three = [*PROMPT, [1, 3, 3]]
    free = model.generate(three, **BOTH)
    out = model.generate(three, constraint=own, **BOTH)
    assert texts_of(out)[0::2] == ["aab", "st"]
    assert out.sequences[1].tolist() == free.sequences[1].tolist()  # nothing is asked of it
    assert out.finish_reason[1] == free.finish_reason[1]
    np.testing.assert_array_equal(out.logprobs[1], free.logprobs[1])
    assert b"".join(_streamed(model, three, own)).decode() == "aab"


def _streamed(model: MistralForCausalLM, prompts: Any, constraint: Any) -> list[bytes]:
    """What a streamer is given of the first row."""

    class Listener:
        def __init__(self):
            self.tokens: list[int] = []

        def put(self, value: Any) -> None:
            value = np.asarray(value)
            self.tokens += [int(value[0])] if value.ndim == 1 else []

        def end(self) -> None:
            pass

    listener = Listener()
    model.generate(prompts, constraint=constraint, tokenizer=characters(), streamer=listener, chunk_size=2)
    return [alone("characters")[token] for token in listener.tokens if token not in (EOS, 0)]


@pytest.mark.slow
def test_where_a_constraint_never_binds_it_changes_nothing(model):
    anything = jaxgen.regex(r"(?s).*")
    free, bound = model.generate(PROMPT, **BOTH), model.generate(PROMPT, constraint=anything, **BOTH)
    assert free.sequences.tolist() == bound.sequences.tolist()
    np.testing.assert_allclose(free.logprobs, bound.logprobs, rtol=1e-5)


def test_a_row_that_may_not_end_otherwise_is_complete(model):
    out = model.generate(PROMPT, constraint=jaxgen.regex("(aab){2}|stop"), eos_token_id=None, **BOTH)
    assert set(texts_of(out)) <= {"aabaab", "stop"}
    assert out.finish_reason == ["complete"] * 2  # nothing could follow
    out = model.generate(PROMPT, constraint=jaxgen.regex("[a-t]{5,}"), max_new_tokens=5, **BOTH)
    assert all(re.fullmatch("[a-t]{5,}", text) for text in texts_of(out))
    assert set(out.finish_reason) <= {"complete", "eos"}


@pytest.mark.parametrize("temperature", [1.0])
def test_samples_have_the_renormalised_distribution(model, temperature: float):
    texts, many = ["aab", "ab", "at"], 2000
    known = all_of(model, texts, PROMPT[0])
    expected = {}
    for row, logits in known.items():
        probability = 1.0
        for place, token in enumerate(row):
            may = sorted({other[place] for other in known if other[:place] == row[:place]})
            weights = np.exp(np.asarray(logits[place])[may].astype(np.float64) / temperature)
            probability *= weights[may.index(token)] / weights.sum()
        expected[row] = probability
    assert sum(expected.values()) == pytest.approx(1)
    out = model.generate(
        PROMPT[:1], constraint=jaxgen.choice(texts), do_sample=True, top_k=0, seed=5, num_return_sequences=many,
        temperature=temperature, **BOTH,
    )  # fmt: skip
    counts = dict.fromkeys(expected, 0)
    logprobs = {}
    for row, count, terms in zip(out.sequences[:, 3:].tolist(), out.lengths, out.logprobs, strict=True):
        counts[tuple(row[:count])] += 1
        logprobs[tuple(row[:count])] = float(terms.sum())
    assert stats.chisquare(list(counts.values()), np.array(list(expected.values())) * many).pvalue > 1e-3
    # And `logprobs` are of that distribution.
    assert all(value == pytest.approx(np.log(expected[row]), abs=1e-4) for row, value in logprobs.items())


@pytest.mark.slow
def test_beams_find_the_best_texts(model):
    texts = ["aab", "ab", "at"]
    out = model.generate(
        PROMPT, constraint=jaxgen.choice(texts), num_beams=8, num_return_sequences=3, length_penalty=0.0, **BOTH
    )
    for number, prompt in enumerate(PROMPT):
        terms = {
            row: sum(float(jax.nn.log_softmax(step)[token]) for step, token in zip(logits, row, strict=True))
            for row, logits in all_of(model, texts, prompt).items()
        }
        best = sorted(terms, key=terms.__getitem__, reverse=True)[:3]
        mine = slice(3 * number, 3 * number + 3)
        found = zip(out.sequences[mine, 3:].tolist(), out.lengths[mine], strict=True)
        assert [tuple(row[:count]) for row, count in found] == best
        np.testing.assert_allclose(out.sequences_scores[mine], [terms[row] for row in best], rtol=1e-4)


@pytest.mark.slow
def test_speculation_changes_no_token(model):
    constraint = jaxgen.regex("(aab|st|op)+ ?b?")
    plain = model.generate(PROMPT, constraint=constraint, **BOTH)
    looked_up = model.generate(PROMPT, constraint=constraint, prompt_lookup_num_tokens=3, **BOTH)
    assert looked_up.sequences.tolist() == plain.sequences.tolist()
    assert looked_up.finish_reason == plain.finish_reason


@pytest.mark.slow
def test_an_assistant_and_strict_change_no_token(model):
    options: dict[str, Any] = {"strict": jaxgen.Strict(rows=4, tokens=32), "do_sample": True, "seed": 3}
    constraint = jaxgen.regex("(aab|st|op)+ ?b?")
    plain = model.generate(PROMPT, constraint=constraint, **BOTH, **options)
    alone_ = model.generate(PROMPT[1:], constraint=constraint, row_ids=[1], **BOTH, **options)
    assert alone_.sequences[0, : alone_.lengths[0] + 3].tolist() == plain.sequences[1, : plain.lengths[1] + 3].tolist()
    drafted = model.generate(PROMPT, constraint=constraint, assistant_model=model, **BOTH, **options)
    assert drafted.sequences.tolist() == plain.sequences.tolist()
    assert (drafted.accepted > 0).all()  # the assistant is constrained, too


@pytest.mark.slow
def test_the_pure_function_under_jit_and_vmap(model):
    constraint = jaxgen.choice(["stop", "sad", "aab"])
    config = GenerationConfig(do_sample=True, max_new_tokens=8, top_k=0)
    keys = jax.random.split(jax.random.key(1), 3)

    @jax.jit
    def of_key(key: jax.Array) -> Any:
        return jaxgen.generate(
            model, jnp.array(PROMPT), None, key, config, constraint=constraint, tokenizer=characters()
        )

    found = np.asarray(jax.vmap(of_key)(keys))
    for key, rows in zip(keys, found, strict=True):
        out = model.generate(PROMPT, constraint=constraint, key=key, do_sample=True, top_k=0, **BOTH)
        width = out.sequences.shape[1]
        assert rows[:, :width].tolist() == out.sequences.tolist()


def test_the_constraint_comes_after_all_but_the_filters_and_has_the_last_word():
    automata = Automata.of(jaxgen.choice(["a", "st"]), characters(), 1, VOCAB, (EOS,))
    vocabulary = characters().get_vocab()
    may = {vocabulary["a"], vocabulary["s"], vocabulary["st"]}
    rows = rows_of([[1]] * 2)
    rows.constrained = automata.start(rows.prompts * 0)
    logits = np.linspace(3, -3, VOCAB)[None].repeat(2, axis=0)
    wild = [lambda tokens, lengths, logits: (0 * logits).at[0].set(-jnp.inf).at[1, 30].set(99.0)]
    scores = np.array(processed({"do_sample": True, "top_k": 1}, logits, rows, user=wild, constraint=Asked(automata)))
    left = [set(np.flatnonzero(np.isfinite(row))) for row in scores]
    assert left[0] == may  # nothing was left: evenly among what may come
    assert left[1] == {30}  # and the filters choose among that


def test_log_probabilities_of_the_model_are_before_the_mask(model):
    out = model.generate(PROMPT, constraint=jaxgen.choice(["aab", "st"]), **BOTH)
    logits = real_logits(model, out.sequences, np.ones_like(out.sequences))
    for row, (count, terms) in enumerate(zip(out.lengths, out.model_logprobs, strict=True)):
        places = range(len(PROMPT[0]), len(PROMPT[0]) + count)
        expected = [float(jax.nn.log_softmax(logits[row][p - 1])[out.sequences[row, p]]) for p in places]
        np.testing.assert_allclose(terms[:count], expected, rtol=1e-4)
    assert (out.logprobs >= out.model_logprobs - 1e-6).all()


@pytest.mark.parametrize(
    ("constraint", "options", "message"),
    [
        ("[0-9]+", {}, "constraint='\\[0-9\\]\\+' is none; use jaxgen.regex"),
        ([jaxgen.regex("a")], {}, "constraint is a list of 1, and there are 2 prompts"),
        ([jaxgen.regex("a"), "b"], {}, r"constraint\[1\]='b' is none"),
        (jaxgen.regex("a"), {"tokenizer": None}, "constraint needs tokenizer="),
        (jaxgen.regex("a{9}"), {"max_new_tokens": 4}, "shortest text of row 0 takes 5 tokens, and there is room for 4"),
        (jaxgen.choice([""]), {"eos_token_id": None}, "only the empty text matches, and there is no end token"),
        (jaxgen.regex("ю+"), {}, "the tokens of this model cannot spell any text"),
        (jaxgen.regex("a("), {}, r"has a \( without its \)"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_compiled(model, constraint: Any, options: dict[str, Any], message: str):
    Automata.of(jaxgen.regex("a"), characters(), 2, model.config.vocab_size, (EOS,))  # which lies on the device
    with counted() as compilations, pytest.raises(JaxgenError, match=message):
        model.generate(PROMPT, constraint=constraint, **{**BOTH, **options})
    assert compilations == []


def test_special_tokens_never_come_inside_and_free_rows_are_never_complete():
    tokenizer = byte_level()
    automata = Automata.of([jaxgen.regex("(?s).*"), None], tokenizer, 2, VOCAB, (eos_of("byte_level"),))
    table, states = np.asarray(automata.table), np.asarray(automata.starts)
    bound, free = (table[state, kinds] >= 0 for state, kinds in zip(states, np.asarray(automata.classes), strict=True))
    specials = [tokenizer.get_vocab()[token] for token in SPECIAL]
    assert {token for token in specials if bound[token]} == {eos_of("byte_level")}
    assert bound[tokenizer.convert_tokens_to_ids(["a", "st", "topper"])].all()
    assert free.all()
    assert np.asarray(automata.distance)[states[1]] == FREE


def test_end_tokens_that_say_something_end_a_whole_text():
    vocabulary = byte_level().get_vocab()
    full_stop, letter = vocabulary["."], vocabulary["a"]
    automata = Automata.of(jaxgen.regex(r"a+\.?"), byte_level(), 1, VOCAB, (full_stop, letter))
    state = automata.start(jnp.zeros(ROWS, jnp.int32))
    assert not np.asarray(_allowed(automata, state, 9))[0, full_stop]
    assert np.asarray(_allowed(automata, state, 9))[0, letter]


def test_a_record_holds_patterns_and_runs_again(model):
    constraint = jaxgen.choice(["stop", "sad"])
    out = model.generate(PROMPT, constraint=constraint, **BOTH)
    fields = json.loads(out.record.to_json())
    jsonschema.validate(fields, json.loads((Path(check.__file__).parent / "record.schema.json").read_text()))
    [entry] = fields["generations"]
    assert entry["constraint"]["patterns"] == [constraint.pattern]
    assert jaxgen.replay(out.record, model, tokenizer=characters()).message == "identical"
    entry["constraint"]["sha256"] = "0" * 64
    again = jaxgen.replay(jaxgen.Record.from_json(json.dumps(fields)), model, tokenizer=characters())
    assert again.message.startswith("same tokens and log-probabilities, but constraint.sha256: recorded")
    entry["constraint"]["patterns"] *= 3
    with pytest.raises(JaxgenError, match=r"generations\[0\].constraint.patterns has 3 entries for 2 prompts"):
        jaxgen.Record.from_json(json.dumps(fields))


@pytest.mark.slow
def test_pipelines_and_streams_give_what_generate_gives():
    own = [jaxgen.regex("(, [0-9]){3}"), jaxgen.choice([" in", " a cat"]), None]
    told, generator = streamed_and_piped(own)
    for constraint, found in zip(own, told, strict=True):
        assert constraint is None or re.fullmatch(constraint.pattern, found)
    with pytest.raises(JaxgenError, match="constraint is a list of 1, and this is text 1"):
        generator(THREE, constraint=own[:1], max_new_tokens=12)
