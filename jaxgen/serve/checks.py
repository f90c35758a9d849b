"""What a field of a request may hold: checks that refuse, each with the JSON schema of what it lets through."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, NoReturn

from jaxgen.errors import shown
from jaxgen.generation.options import checks as options
from jaxgen.serve.refusal import Refusal

Schema = dict[str, Any]
Test = Callable[[str, Any], Any]


@dataclasses.dataclass(frozen=True)
class Check:
    """Takes a field's name and what was sent, and gives what it means. Raises `JaxgenError`.

    `says` gives the JSON schema, which may let through more than the check, and never less; `example` a value that
    the check might give.
    """

    test: Test
    says: Callable[[], Schema]
    example: Callable[[], Any]

    def __call__(self, name: str, value: Any) -> Any:
        """The value."""
        return self.test(name, value)


def check(example: Any, /, **schema: Any) -> Callable[[Test], Check]:
    """What makes a function a check, with the schema that is given in words of JSON schema."""
    return lambda test: Check(test, lambda: schema, lambda: example)


def bad(name: str, value: Any, expected: str) -> NoReturn:
    """Refuse a field's value."""
    raise Refusal(f"{name}={shown(value)} must be {expected}", param=name)


@check("", type="string")
def text(name: str, value: Any) -> str:
    """A string."""
    return value if isinstance(value, str) else bad(name, value, "a string")


@check({}, type="object")
def mapping(name: str, value: Any) -> dict[str, Any]:
    """An object."""
    return value if isinstance(value, dict) else bad(name, value, "an object")


@check(0, type="integer")
def whole(name: str, value: Any) -> int:
    """An int of any size."""
    return value if isinstance(value, int) and not isinstance(value, bool) else bad(name, value, "an int")


@check({}, type=["object", "string"], description="A JSON schema, or its text.")
def json_schema(name: str, value: Any) -> Any:
    """A schema, or its text."""
    return value if isinstance(value, dict | str) else bad(name, value, "a JSON schema")


flag = Check(options.flag, lambda: {"type": "boolean"}, lambda: False)


@functools.cache  # as those below that requests ask for by a constant
def integer(minimum: int) -> Check:
    """An int of 32 bits, of at least `minimum`."""
    schema = {"type": "integer", "minimum": minimum, "maximum": (1 << 31) - 1}
    return Check(options.integer(minimum), lambda: schema, lambda: minimum)


@functools.cache
def number(interval: str) -> Check:
    """A number inside an interval written as in mathematics."""

    def says() -> Schema:
        low, high = map(float, interval[1:-1].split(","))
        bounds = {"minimum" if interval[0] == "[" else "exclusiveMinimum": low}
        if high != float("inf"):
            bounds["maximum" if interval[-1] == "]" else "exclusiveMaximum"] = high
        return {"type": "number", **bounds}

    return Check(options.number(interval), says, lambda: float(interval[1:-1].rsplit(",", maxsplit=1)[-1]))


def each(item: Check, least: int = 0) -> Check:
    """A list, of at least so many, each of which passes a check."""

    def test(name: str, value: Any) -> list[Any]:
        if not isinstance(value, list):
            bad(name, value, "a list")
        if len(value) < least:
            raise Refusal(f"{name}: an empty list", param=name)
        return [item(f"{name}[{place}]", one) for place, one in enumerate(value)]

    def says() -> Schema:
        return {"type": "array", "items": item.says(), **({"minItems": least} if least else {})}

    return Check(test, says, lambda: [item.example()] * least)


@functools.cache
def ids(size: int) -> Check:
    """A list of ids of `size` tokens. There may be a million, and the event loop waits: `each` would take seconds."""

    def test(name: str, value: Any) -> list[int]:
        if not isinstance(value, list):
            bad(name, value, "a list")
        for place, one in enumerate(value):
            if type(one) is not int or not 0 <= one < size:
                raise Refusal(f"{name}[{place}]={shown(one)} is no id of the {size} tokens", param=name)
        return value

    one = {"type": "integer", "minimum": 0, "maximum": size - 1}
    return Check(test, lambda: {"type": "array", "items": one}, list)


def unchanged(inner: Check) -> Check:
    """What passes a check, as it was sent."""

    def test(name: str, value: Any) -> Any:
        inner(name, value)
        return value

    return Check(test, inner.says, inner.example)


def only(*values: Any, why: str = "") -> Check:
    """One of a few values, all of which mean what the server does anyway."""

    def test(name: str, value: Any) -> Any:
        if not any(type(value) is type(known) and value == known for known in values):
            said = " or ".join(dict.fromkeys(json.dumps(known) for known in values))
            raise Refusal(f"{name}={shown(value)}: {why or 'not in this server'}; only {said} is", param=name)
        return value

    return Check(test, lambda: {"enum": [*values]}, lambda: values[0])


@functools.cache
def one_of(*words: str) -> Check:
    """One of a few words."""

    def test(name: str, value: Any) -> str:
        if value not in words:
            raise Refusal(f"{name}={shown(value)}: expected {', '.join(words)}", param=name)
        return value

    return Check(test, lambda: {"enum": [*words]}, lambda: words[0])
