"""Whether JSON is a record: by `record.schema.json`, and by what a schema cannot say, that its parts fit together."""

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgen.errors import JaxgenError
from jaxgen.files import JsonObject
from jaxgen.generation.choosing.sample import random_key

# What Python's parser makes of JSON: a bool is no int here, and 1.0 is none either.
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float),
    "boolean": (bool,), "null": (type(None),),
}  # fmt: skip

_SURROGATE = re.compile("[\ud800-\udfff]")


def check(fields: JsonObject) -> None:
    """Raise `JaxgenError`, naming the field and its value, for what is no record, is damaged, or contradicts itself."""
    _match("", fields, _schema())
    for number, entry in enumerate(fields["generations"]):
        _fit_together(f"generations[{number}]", entry)


def logprobs_sha256(rows: Iterable[Any]) -> str:
    """The sha256 of log-probabilities as float32, row after row: equal for results that are equal to the last bit."""
    return hashlib.sha256(b"".join(np.asarray(row, "<f4").tobytes() for row in rows)).hexdigest()


def cut(value: object, most: int = 60) -> str:
    """A value in at most a line."""
    text = json.dumps(value) if isinstance(value, dict | list | str) else repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


@functools.cache
def _schema() -> JsonObject:
    return json.loads((Path(__file__).parent / "record.schema.json").read_text(encoding="utf-8"))


def _match(where: str, value: object, schema: JsonObject) -> None:
    """Raise for a value that the schema does not describe: what of JSON Schema `record.schema.json` uses."""
    if "$ref" in schema:
        schema = _schema()["$defs"][schema["$ref"].rpartition("/")[2]] | schema
    if "anyOf" in schema:  # something, or null
        if value is not None:
            _match(where, value, schema["anyOf"][0])
        return
    names = schema.get("type", [])
    names = [names] if isinstance(names, str) else names
    if names and not any(type(value) in _TYPES[name] for name in names):
        raise _no_record(where, value, f"is not {' or '.join(names)}")
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        raise _no_record(where, value, f"is none of {', '.join(map(str, schema.get('enum', [schema.get('const')])))}")
    if isinstance(value, dict):
        _match_object(where, value, schema)
    elif isinstance(value, list):
        _match_array(where, value, schema)
    elif isinstance(value, str):
        if "pattern" in schema and (re.search(schema["pattern"], value) is None or "\n" in value):
            raise _no_record(where, value, f"is not of the form {schema['pattern']}")
        if _SURROGATE.search(value):
            raise _no_record(where, value, "is no Unicode text")
    elif isinstance(value, int | float):
        _match_number(where, value, schema)


def _match_number(where: str, value: int | float, schema: JsonObject) -> None:
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    if not low <= value <= high or value in (math.inf, -math.inf):
        raise _no_record(where, value, f"is not between {low} and {high}")


def _match_object(where: str, value: JsonObject, schema: JsonObject) -> None:
    fields, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name in schema.get("required", []):
        if name not in value:
            raise JaxgenError(f"not a record: {_inside(where, name)} is missing")
    for name, item in value.items():
        if "propertyNames" in schema:
            _match(f"the name in {where}", name, schema["propertyNames"] | {"type": "string"})
        if name not in fields and others is False:
            raise JaxgenError(f"not a record: {_inside(where, name)} is no field of version 1")
        of = fields.get(name, others)
        _match(_inside(where, name), item, of if isinstance(of, dict) else {})


def _match_array(where: str, value: list[Any], schema: JsonObject) -> None:
    if len(value) < schema.get("minItems", 0):
        raise _no_record(where, value, f"has fewer than {schema['minItems']} items")
    items = schema.get("items", {})
    if _are_good_ints(value, items):  # the thousands of ids, at once
        return
    for index, item in enumerate(value):
        _match(f"{where}[{index}]", item, items)


def _are_good_ints(values: list[Any], schema: JsonObject) -> bool:
    known = schema.get("type") == "integer" and {*schema} <= {"type", "minimum", "maximum", "description"}
    if not known or not values or any(type(value) is not int for value in values):
        return False
    return schema.get("minimum", -math.inf) <= min(values) and max(values) <= schema.get("maximum", math.inf)


def _inside(where: str, name: str) -> str:
    name = cut(name)[1:-1]
    return f"{where}.{name}" if where else name


def _no_record(where: str, value: object, what: str) -> JaxgenError:
    return JaxgenError(f"not a record: {where}={cut(value)} {what}")


def _fit_together(where: str, entry: JsonObject) -> None:
    """Raise for an entry whose fields contradict each other."""
    prompts, rows = len(entry["prompt_ids"]), len(entry["output_ids"])
    samples = entry["config"].get("num_return_sequences", 1)
    if type(samples) is not int or rows != prompts * samples:
        raise JaxgenError(
            f"not a record: {where}: {rows} rows in output_ids, but {prompts} in prompt_ids times "
            f"num_return_sequences={cut(samples)}"
        )
    constraint = entry.get("constraint", {"patterns": [None]})["patterns"]
    if len(constraint) not in (1, prompts):
        raise JaxgenError(
            f"not a record: {where}.constraint.patterns has {len(constraint)} entries for {prompts} prompts"
        )
    counts = {"row_ids": prompts, "negative_prompt_ids": prompts, "logprobs": rows, "finish_reason": rows}
    if isinstance(entry["seed"], list):
        counts["seed"] = prompts
    if entry["key"]["data"] and isinstance(entry["key"]["data"][0], list):
        counts["key.data"] = prompts
    for name, expected in counts.items():
        value = entry["key"]["data"] if name == "key.data" else entry[name]
        if value is not None and len(value) != expected:
            raise JaxgenError(f"not a record: {where}.{name} has {len(value)} rows, expected {expected}")
    for row, (ids, logprobs) in enumerate(zip(entry["output_ids"], entry["logprobs"], strict=True)):
        if len(ids) != len(logprobs):
            raise JaxgenError(
                f"not a record: {where}: row {row} has {len(ids)} output_ids and {len(logprobs)} logprobs: "
                "different lengths"
            )
    if entry["seed"] is not None:
        data = np.asarray(jax.random.key_data(random_key(None, entry["seed"])[0])).tolist()
        if data != entry["key"]["data"]:
            raise JaxgenError(
                f"not a record: {where}.seed={cut(entry['seed'])} gives the key {cut(data)}, and not its key.data="
                f"{cut(entry['key']['data'])}: one of the two has been altered"
            )
    written = None if any(None in row for row in entry["logprobs"]) else logprobs_sha256(entry["logprobs"])
    if written not in (None, entry["logprobs_sha256"]):  # null stands for more than one value
        raise JaxgenError(
            f"not a record: {where}.logprobs_sha256={entry['logprobs_sha256'][:12]}... is not that of its logprobs, "
            f"{written[:12]}...: one of the two has been altered"
        )
