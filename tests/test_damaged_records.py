"""Records that were damaged: an error that names the field, or an answer; and never "identical" for what is not."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import jaxgen
from jaxgen import JaxgenError, Record, demo
from jaxgen.records import check, compare
from jaxgen.records import replay as replay_module
from jaxgen.records.replay import replay

REFERENCE = Path(__file__).parent / "reference" / "record_v1.json"
SCHEMA = json.loads((Path(check.__file__).parent / "record.schema.json").read_text())
MUTANTS = 1_500


def good(**fields: Any) -> dict[str, Any]:
    """A record as JSON has it, with other things in its only generation."""
    record = json.loads(REFERENCE.read_text(encoding="utf-8"))
    record["generations"][0] |= fields
    return record


DAMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "more rows than were generated": ({"finish_reason": ["length"] * 2, "output_ids": [[1]] * 3}, "output_ids"),
    "fewer log-probabilities": ({"logprobs": [[-0.5]] * 2}, "logprobs"),
    "a text for a list": ({"prompt_ids": "1, 35"}, r"generations\[0\]\.prompt_ids"),
    "a text for an id": ({"prompt_ids": [[1, "35"], [1]]}, r"prompt_ids\[0\]\[1\]"),
    "an id of 40 bits": ({"prompt_ids": [[1], [2**40]]}, r"prompt_ids\[1\]\[0\]"),
    "an empty prompt": ({"prompt_ids": [[1], []]}, r"prompt_ids\[1\]"),
    "a row id more": ({"row_ids": [0, 1, 2]}, "row_ids"),
    "a row id of 65 bits": ({"row_ids": [0, 2**64]}, r"row_ids\[1\]"),
    "a word of 33 bits": ({"key": {"impl": "threefry2x32", "data": [0, 2**32]}}, r"key\.data\[1\]"),
    "another seed": ({"seed": 418}, "seed"),
    "a seed for each of three": ({"seed": [1, 2, 3]}, "seed"),
    "a surrogate": ({"config": {"stop_strings": ["\ud800"]}}, r"config\.stop_strings\[0\]"),
    "a reason that is none": ({"finish_reason": ["length", "tired"]}, r"finish_reason\[1\]"),
    "strict without its shape": ({"strict": {"rows": 8}}, r"strict\.tokens"),
    "a function that replay does not take": ({"python": ["eval"]}, r"python\[0\]"),
    "a log-probability that no float32 holds": ({"logprobs": [[-1e39], [10**400]]}, r"logprobs\[0\]\[0\]"),
    "no number of JSON": ({"seconds": float("nan")}, "NaN"),
    "an unknown field": ({"temprature": 1}, "temprature"),
    "no number of samples": ({"config": {"num_return_sequences": "2"}}, "num_return_sequences"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_a_damaged_record_says(name):
    fields, said = DAMAGES[name]
    with pytest.raises(JaxgenError, match=said) as caught:
        Record.from_json(json.dumps(good(**fields)))
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [True, 1.0, "1", None, 0, 10**400])
def test_a_version_that_is_none(version):
    with pytest.raises(JaxgenError, match="version"):
        Record.from_json(json.dumps({**good(), "version": version}))


JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 2**31 - 1, 2**31, 2**32, 2**64, -(2**63), 10**400, 0.5, 1.0, -0.0, 1e39, 1e308,
    float("nan"), float("inf"), "", "a", "\x00", "\ud800", "length", "../x", "x" * 1000, [], [[]], [1], [[1]], [None],
    {}, {"a": 1}, {"rows": 1},
]  # fmt: skip


def place(record: Any, chance: random.Random) -> tuple[Any, Any]:
    """A container somewhere inside, and a key or an index of it; every depth has its share."""
    at = chance.choice(list(record) if isinstance(record, dict) else range(len(record)))
    deeper = isinstance(record[at], dict | list) and record[at] and chance.random() < 0.85
    return place(record[at], chance) if deeper else (record, at)


def mutant(record: dict[str, Any], chance: random.Random) -> str:
    """The text of a record in which one thing or two are others."""
    record = copy.deepcopy(record)
    for _ in range(chance.choice((1, 1, 2))):
        if not record.get("generations"):
            break
        inside, at = place(record if chance.random() < 0.3 else record["generations"], chance)
        old = inside[at]
        match chance.randrange(8):
            case 0:
                del inside[at]
            case 1 if isinstance(old, str) and old:  # a letter
                index = chance.randrange(len(old))
                inside[at] = old[:index] + chance.choice("0aZ/") + old[index + 1 :]
            case 1 | 2 if isinstance(old, int | float):  # by one, or by a bit
                inside[at] = chance.choice((old + 1, old - 1, -old, int(old) ^ (1 << chance.randrange(40))))
            case 3 if isinstance(inside, dict):  # another name
                inside[chance.choice((at + "s", at[:-1], "x"))] = inside.pop(at)
            case 4 if isinstance(inside, list):
                inside.insert(at, copy.deepcopy(old))
            case 5 if isinstance(old, list) and old:
                chance.shuffle(old)
            case _:
                inside[at] = copy.deepcopy(chance.choice(JUNK))
    text = json.dumps(record)
    if chance.random() < 0.1:  # a byte of the file
        index = chance.randrange(len(text))
        text = text[:index] + chr(chance.randrange(32, 127)) + text[index + 1 :]
    return text


BASES: dict[str, dict[str, Any]] = {
    "one seed": {},
    "a seed for each": {"seed": [1, 2], "key": {"impl": "threefry2x32", "data": [[0, 1], [0, 2]]}},
    "strict": {"strict": {"rows": 2, "tokens": 64, "chunk": 16}},
    "negative": {
        "negative_prompt_ids": [[1, 2], [3]],
        "seed": None,
        "config": {"guidance_scale": 2.0, "max_length": 32},
    },
    "greedy": {"config": {"max_new_tokens": 16, "max_time": 9.5, "sequence_bias": [[[5], 1.5]], "stop_strings": ["!"]}},
}


def stated(record: dict[str, Any]) -> Any:
    """What replay compares of a record: not where and when it was made, nor what it leaves out."""
    model = {k: v for k, v in record["model"].items() if k not in ("id", "revision", "files")}
    passed_over = {"started", "seconds", "helpers", "sampler_version", "config"}
    entries = []
    for entry in record["generations"]:
        fields = {k: v for k, v in entry.items() if k not in passed_over}
        fields["shapes"] = None if entry["helpers"] else fields["shapes"]
        entries.append([fields, {k: v for k, v in entry["config"].items() if k != "max_time"}])
    return model, entries


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_mutants(name, monkeypatch):
    """Each is read or refused by a `JaxgenError`, as the schema has it; and only what states the same is identical.

    What would be generated is known, so that nothing is: the call is prepared and checked as any other.
    """
    record = good(**BASES[name])
    [outcome] = record["generations"]
    model = jaxgen.AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")

    def prepared(self: Any, ids: Any, mask: Any, key: Any, row_ids: Any, **options: Any) -> None:
        self._prepare(ids, mask, None, key, None, row_ids, options)

    monkeypatch.setattr(type(model), "generate", prepared)
    monkeypatch.setattr(replay_module, "generation_of", lambda _: copy.deepcopy(outcome))
    monkeypatch.setattr(compare, "token_logprobs", lambda _, rows: np.zeros((1, len(rows[0]) - 1)))
    assert replay(Record.from_json(json.dumps(record)), model).status == "identical"

    chance = random.Random(name)
    schema = jsonschema.Draft202012Validator(SCHEMA)
    read = 0
    for _ in range(MUTANTS // len(BASES)):
        text = mutant(record, chance)
        try:
            found = Record.from_json(text)
        except JaxgenError as error:
            assert len(str(error)) < 400, text
            continue
        read += 1
        assert schema.is_valid(json.loads(text)), text
        if replay(found, model).status == "identical":
            facts, entries = stated(json.loads(text))  # an entry may be there twice
            known, [expected] = stated(record)
            for fields, config in entries:
                of_it = expected[0] | {name: None for name in ("shapes", "seed") if fields[name] is None}
                assert (facts, fields, config) == (known, of_it, expected[1]), text
    assert read > MUTANTS / len(BASES) / 20  # the errors do not hide what comes after
