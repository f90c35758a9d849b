"""The fields of a request's body: each is taken with a check, and what nobody takes is refused by its name."""

import asyncio
import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

from starlette.requests import ClientDisconnect, Request

from jaxgen.errors import JaxgenError, shown
from jaxgen.serve.checks import Check, Schema
from jaxgen.serve.refusal import Refusal

Result = TypeVar("Result")


class Fields:
    """A JSON object that was sent; null is as good as not given. Raises `Refusal` for what is no object."""

    def __init__(self, body: Any, where: str = ""):
        if not isinstance(body, dict):
            raise Refusal(f"{where or 'the body'} must be a JSON object", param=where or None)
        self.where = where
        self._left = {name: value for name, value in body.items() if value is not None}
        self._known: set[str] = set()

    def full(self, name: str) -> str:
        """A field's name, with those of the objects around it."""
        return f"{self.where}.{name}" if self.where else name

    def take(self, name: str, check: Check, says: str, default: Any = None) -> Any:
        """A field's value, checked; `says` is what the field means. Raises `Refusal` that names it."""
        self._known.add(name)
        if name not in self._left:
            return default
        try:
            return check(self.full(name), self._left.pop(name))
        except Refusal:
            raise
        except JaxgenError as error:
            raise Refusal(str(error), param=self.full(name)) from error

    def need(self, name: str, check: Check, says: str) -> Any:
        """The same of a field that must be there."""
        if (value := self.take(name, check, says)) is None:
            self.missing(name)
        return value

    def missing(self, name: str) -> None:
        """Say that a field must be there. Raises `Refusal`."""
        raise Refusal(f"{self.full(name)} is missing", param=self.full(name), code="missing_field")

    def one(self, kinds: Mapping[str, tuple[Check, str]]) -> tuple[str, Any]:
        """The one of some fields that is there, and its value. Raises `Refusal` unless it is exactly one."""
        given = {kind: value for kind, read in kinds.items() if (value := self.take(kind, *read)) is not None}
        if len(given) != 1:
            said = f"{self.where or 'the body'}: one of {', '.join(kinds)}, and {len(given)} were given"
            raise Refusal(said, param=self.where or None)
        return next(iter(given.items()))

    def either(self, ways: "Mapping[str, Callable[[Fields], Result]]") -> Result:
        """Read in the way of the first of some fields that is there, of which one must be."""
        for name, read in ways.items():
            if name in self._left:
                return read(self)
        raise Refusal(
            f"{' or '.join(map(self.full, ways))} is missing", param=self.full(next(iter(ways))), code="missing_field"
        )

    def end(self, ignored: Iterable[str] = ()) -> None:
        """Refuse what is left, unless it may be ignored."""
        for name in self._left:
            if name not in ignored:
                near = difflib.get_close_matches(name, self._known, n=1, cutoff=0.8)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                full = self.full(name)
                raise Refusal(f"{shown(full)}: no such field here{hint}", param=full[:80], code="unknown_field")


class Asked(Fields):
    """No object, but what is asked for where one is read: its JSON schema. Fields that may be missing are."""

    def __init__(self):
        super().__init__({})
        self._schema: Schema = {"type": "object", "properties": {}}

    def take(self, name: str, check: Check, says: str, default: Any = None) -> Any:
        """Note a field that may be there."""
        self._schema["properties"][name] = {"description": says, "anyOf": [check.says(), {"type": "null"}]}
        return default

    def need(self, name: str, check: Check, says: str) -> Any:
        """Note a field that must be there, and give an example."""
        self._schema["properties"][name] = {**check.says(), "description": says}
        self._schema.setdefault("required", []).append(name)
        return check.example()

    def missing(self, name: str) -> None:
        """A field that must be there where others are not, which a schema does not say."""

    def one(self, kinds: Mapping[str, tuple[Check, str]]) -> tuple[str, Any]:
        """Note all of them."""
        for kind, read in kinds.items():
            self.take(kind, *read)
        return "", None

    def either(self, ways: Mapping[str, Callable[[Fields], Result]]) -> Result:
        """Note all the ways, and go the first."""
        self._schema = {"anyOf": [schema_of(read) for read in ways.values()]}
        return next(iter(ways.values()))(Asked())

    def end(self, ignored: Iterable[str] = ()) -> None:
        """Note that nothing else may be there, unless it is null."""
        ignored = {name: {"description": "Ignored."} for name in sorted(ignored)}
        self._schema["properties"] |= ignored
        self._schema["additionalProperties"] = {"type": "null"}


def schema_of(read: Callable[[Fields], Any]) -> Schema:
    """The JSON schema of the objects that a function reads."""
    asked = Asked()
    read(asked)
    return asked._schema


def inside(read: Callable[[Fields], Any]) -> Check:
    """An object, which a function reads."""
    return Check(lambda name, value: read(Fields(value, name)), lambda: schema_of(read), lambda: read(Asked()))


async def body_of(request: Request, most: int, seconds: float) -> Any:
    """The JSON that a request brings, of at most so many bytes, within so many seconds. Raises `Refusal`."""
    too_large = Refusal(f"the body is longer than {most} bytes", status=413, code="body_too_large")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                data += chunk
                if len(data) > most:
                    raise too_large
    except TimeoutError as error:
        raise Refusal(f"the body did not come within {seconds:g} s", status=408) from error
    except ClientDisconnect as error:
        raise Refusal("the client went away", status=400) from error
    return parsed(bytes(data))


def parsed(data: bytes) -> Any:
    """What JSON says. Raises `Refusal` for what is none, for numbers that are none, and for half characters."""

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number of JSON")

    try:
        value = json.loads(data.decode(), parse_constant=constant)
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode()  # halves of a pair
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body cannot be read as JSON: {error!s:.200}", code="bad_json") from error
    return value
