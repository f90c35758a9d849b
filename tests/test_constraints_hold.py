"""Texts that models draw under constraints, judged from outside: `re`, `regex` and `jsonschema`."""

import json
import random
import re
from typing import Any

import jax
import jsonschema
import pytest
import regex  # which transformers brings; it knows the beginnings of texts that match, and Unicode's classes by name
from flax import nnx

import jaxgen
from jaxgen import JaxgenError, MistralConfig, MistralForCausalLM
from jaxgen.constraints.patterns import Constraint
from jaxgen.generation.choosing.constrained import Automata
from tests.constrained import random_pattern, random_schema
from tests.helpers import SOAK, counted
from tests.tokenizers import TOKENIZERS, VOCAB, alone

pytest.importorskip("outlines_core", reason="builds the automata, and has no wheel for this Python")

ROWS, NEW = 16, 48
# Pieces in which Rust's syntax and Python's differ: what they mean by the names of Unicode.
DIFFER = {
    r"\w": r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]",
    r"\d": r"\p{Nd}",
    r"\s": r"\p{White_Space}",
    r"[a-z&&[^s-t]]": "[a-ru-z]",
    r"[a[0-9]]": "[a0-9]",
    r"\x{E9}": "é",
}
Case = tuple[Constraint, Any]  # and its judge: a pattern of `regex`, or a validator


def a_regex(rng: random.Random) -> Case:
    pattern = ours = random_pattern(rng, rng.choice([1, 2, 2, 3]))
    if rng.random() < 0.5:
        piece = rng.choice([*DIFFER, "(?i:St)", "(?s:.)", "(?:)", "[^\\n\\r]", "(?P<name>ab|a)"])
        end = rng.choice(["", "?", "+", "{1,2}"])
        pattern, ours = f"(?:{pattern}){piece}{end}", f"(?:{pattern}){DIFFER.get(piece, piece)}{end}"
    return jaxgen.regex(pattern), regex.compile(ours)


def a_choice(rng: random.Random) -> Case:
    texts = ["".join(rng.choice(["a", "st", "é", "日本", "\\", "(", ".*", "😀", " ", "\n", "-&&~#"]) for _ in range(3))]
    texts += [texts[0][: rng.randint(0, 3)], "stop", "opera"]
    return jaxgen.choice(texts), regex.compile("|".join(map(re.escape, texts)))


def a_schema(rng: random.Random) -> Case:
    schema = random_schema(rng) | {"$defs": {"word": {"type": "string", "maxLength": 3}}}
    found = jaxgen.json_schema(schema)
    assert isinstance(found, Constraint)
    return found, jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)


def judge(case: Case, text: str, whole: bool) -> None:
    constraint, by = case
    if not whole:
        pattern = regex.compile(constraint.pattern) if isinstance(by, jsonschema.Draft202012Validator) else by
        assert pattern.fullmatch(text, partial=True), (case, text)
    elif isinstance(by, jsonschema.Draft202012Validator):
        by.validate(json.loads(text))
    else:
        assert by.fullmatch(text), (case, text)
        if by.pattern == constraint.pattern:  # both read it
            assert re.fullmatch(by.pattern, text), (case, text)


def a_model(seed: int) -> MistralForCausalLM:
    """A model of its own taste: some of its tokens are a thousand times likelier than others."""
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, sliding_window=None,
    )  # fmt: skip
    model = MistralForCausalLM(config, rngs=nnx.Rngs(seed))
    weights = nnx.state(model)
    nnx.update(model, jax.tree.map(lambda x: x * (20.0 if x.shape[0] == VOCAB else 1.0), weights))
    return model


def texts_of(
    rng: random.Random, name: str, model: Any, cases: list[Case], seed: int
) -> tuple[list[Any], Any, list[str]]:
    """What the model says under each constraint, and whether that is all of it; what that may compile, and what it did.

    Other cases replace those that find no room; what was compiled to find that out does not count.
    """
    tokenizer = TOKENIZERS[name]()
    added = tokenizer.added_tokens_decoder.items()
    said = alone(name) | {index: str(token).encode() for index, token in added if not token.special}
    eos = tokenizer.get_vocab()["</s>"]
    stops: dict[str, Any] = {"stop_strings": ["t"]} if rng.random() < 0.3 else {}
    while True:
        try:
            with counted() as compilations:
                out = model.generate(
                    [[5, 9]] * ROWS,
                    constraint=[constraint for constraint, _ in cases],
                    tokenizer=tokenizer,
                    eos_token_id=eos,
                    pad_token_id=0,
                    do_sample=True,
                    top_k=0,
                    temperature=rng.choice([1.0, 3.0, 50.0]),
                    max_new_tokens=NEW,
                    seed=seed,
                    return_dict_in_generate=True,
                    **stops,
                )
            break
        except JaxgenError as error:
            found = re.search(r"shortest text of row (\d+)", str(error))
            if found is None:
                raise
            cases[int(found[1])] = a_regex(rng)
    new = [row[2:][:count] for row, count in zip(out.sequences.tolist(), out.lengths, strict=True)]
    texts = [b"".join(said[token] for token in row if token != eos) for row in new]
    assert set(out.finish_reason) <= {"eos", "complete"} | ({"stop_string"} if stops else set())
    whole = [reason != "stop_string" for reason in out.finish_reason]
    told = [text.decode(errors="strict" if is_all else "ignore") for text, is_all in zip(texts, whole, strict=True)]
    automata = Automata.of([constraint for constraint, _ in cases], tokenizer, ROWS, VOCAB, (eos,))
    return (
        list(zip(told, whole, strict=True)),
        (automata.table.shape, automata.classes.shape, name, bool(stops)),
        compilations,
    )


def check(seed: int, batches: int) -> None:
    """Constraints, models, tokenizers and temperatures change; the loop is compiled once for each size of table."""
    rng, sizes = random.Random(seed), set()
    models = [a_model(number) for number in range(3)]
    for batch in range(batches):
        cases = [rng.choice([a_regex, a_regex, a_choice, a_schema])(rng) for _ in range(ROWS)]
        name, model = rng.choice(["byte_level", "byte_fallback"]), models[batch % len(models)]
        found, size, compilations = texts_of(rng, name, model, cases, batch)
        assert size not in sizes or not compilations
        sizes.add(size)
        for case, (text, whole) in zip(cases, found, strict=True):
            judge(case, text, whole)


@pytest.mark.parametrize(
    ("seed", "texts"),
    [
        pytest.param(0, 64),
        pytest.param(1, 250, marks=pytest.mark.slow),
        *(pytest.param(seed, 2_500, marks=SOAK) for seed in (2, 3, 4, 5)),  # 10,000, which workers share
    ],
)
def test_texts_match_what_they_were_asked(seed: int, texts: int):
    check(seed, -(-texts // ROWS))
