"""Schemas that lead back to themselves: which do, and how they are read by who can read them."""

from collections.abc import Iterator, Mapping
from typing import Any

# What holds values, and no schemas; and schemas by a name of the user's, which is no keyword.
_VALUES = frozenset({"enum", "const", "default", "examples"})
_BY_NAME = frozenset({"properties", "patternProperties", "dependentSchemas"})
_ELSEWHERE = frozenset({"$defs", "definitions"})  # only what is referred to counts


def leads_back(root: Mapping[str, Any]) -> bool:
    """Whether a schema holds itself, by references within it."""
    done: set[str] = set()

    def circular(pointer: str, open_: tuple[str, ...]) -> bool:
        if pointer in open_:
            return True
        if pointer in done:
            return False
        found = any(circular(each, (*open_, pointer)) for each in _references(referred(root, pointer)))
        done.add(pointer)
        return found

    try:
        return circular("#", ())
    except RecursionError:
        return False


def referred(root: Any, pointer: str) -> Any:
    """What a reference within a schema points to; None if that is not there."""
    place = root
    for part in pointer[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(place, Mapping) or name not in place:
            return None
        place = place[name]
    return place


def closed(schema: Any, differ: Any, inside_all: bool = False) -> Any:
    """The schema as it is meant here: objects have no properties but those that are listed.

    And `oneOf` is `anyOf` where `differ(its schemas)` says that no value is valid by two of them.
    """
    if isinstance(schema, list):
        return [closed(each, differ, inside_all) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    result: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _VALUES:
            result[name] = value
        elif name in _BY_NAME | _ELSEWHERE and isinstance(value, Mapping):
            result[name] = {key: closed(each, differ, inside_all) for key, each in value.items()}
        elif name == "oneOf" and isinstance(value, list) and "anyOf" not in schema and differ(value):
            result["anyOf"] = closed(value, differ, inside_all)
        else:
            result[name] = closed(value, differ, inside_all or name == "allOf")
    beside = {"additionalProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "$ref"} & result.keys()
    if isinstance(result.get("properties"), Mapping) and not beside and not inside_all:
        result["additionalProperties"] = False
    return result


def _references(schema: Any) -> Iterator[str]:
    """The references in a schema, wherever in it."""
    if isinstance(schema, list):
        for each in schema:
            yield from _references(each)
    if not isinstance(schema, Mapping):
        return
    for name, value in schema.items():
        if name == "$ref":
            if isinstance(value, str) and value.startswith("#"):
                yield value
        elif name in _BY_NAME and isinstance(value, Mapping):
            for each in value.values():
                yield from _references(each)
        elif name not in _VALUES | _ELSEWHERE:
            yield from _references(value)
