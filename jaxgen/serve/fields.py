"""The fields of a request's body: each is taken with a check, and what nobody takes is refused by its name."""

import asyncio
import difflib
import json
from collections.abc import Callable, Container
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from jaxgen.errors import JaxgenError, shown
from jaxgen.serve.refusal import Refusal

Check = Callable[[str, Any], Any]


class Fields:
    """A JSON object that was sent; null is as good as not given. Raises `Refusal` for what is no object."""

    def __init__(self, body: Any, where: str = ""):
        if not isinstance(body, dict):
            raise Refusal(f"{where or 'the body'} must be a JSON object", param=where or None)
        self._where = f"{where}." if where else ""
        self._left = {name: value for name, value in body.items() if value is not None}
        self._known: set[str] = set()

    def take(self, name: str, check: Check, default: Any = None) -> Any:
        """A field's value, checked. Raises `Refusal` that names it."""
        self._known.add(name)
        if name not in self._left:
            return default
        try:
            return check(f"{self._where}{name}", self._left.pop(name))
        except Refusal:
            raise
        except JaxgenError as error:
            raise Refusal(str(error), param=f"{self._where}{name}") from error

    def need(self, name: str, check: Check) -> Any:
        """The same of a field that must be there."""
        if (value := self.take(name, check)) is None:
            raise Refusal(f"{self._where}{name} is missing", param=f"{self._where}{name}", code="missing_field")
        return value

    def end(self, ignored: Container[str] = ()) -> None:
        """Refuse what is left, unless it may be ignored."""
        for name in self._left:
            if name not in ignored:
                near = difflib.get_close_matches(name, self._known, n=1, cutoff=0.8)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                full = f"{self._where}{name}"
                raise Refusal(f"{shown(full)}: no such field here{hint}", param=full[:80], code="unknown_field")


def bad(name: str, value: Any, expected: str) -> NoReturn:
    """Refuse a field's value."""
    raise Refusal(f"{name}={shown(value)} must be {expected}", param=name)


def text(name: str, value: Any) -> str:
    """A string."""
    return value if isinstance(value, str) else bad(name, value, "a string")


def listed(name: str, value: Any) -> list[Any]:
    """A list."""
    return value if isinstance(value, list) else bad(name, value, "a list")


def mapping(name: str, value: Any) -> dict[str, Any]:
    """An object."""
    return value if isinstance(value, dict) else bad(name, value, "an object")


def whole(name: str, value: Any) -> int:
    """An int of any size."""
    return value if isinstance(value, int) and not isinstance(value, bool) else bad(name, value, "an int")


def only(*values: Any, why: str = "") -> Check:
    """One of a few values, all of which mean what the server does anyway."""

    def check(name: str, value: Any) -> Any:
        if not any(type(value) is type(known) and value == known for known in values):
            said = " or ".join(json.dumps(known) for known in values)
            raise Refusal(f"{name}={shown(value)}: {why or 'not in this server'}; only {said} is", param=name)
        return value

    return check


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
