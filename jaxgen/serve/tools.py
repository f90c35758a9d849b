"""The call of a function that `tool_choice` forces: the text is its arguments, and is sent as a call."""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgen.errors import shown
from jaxgen.serve.checks import Check, one_of, text
from jaxgen.serve.fields import Fields, inside
from jaxgen.serve.refusal import Refusal
from jaxgen.serve.shapes import Wanted, by_schema

_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclasses.dataclass(frozen=True)
class Forced:
    """The function that must be called, what its arguments must be, and OpenAI's word for a call that is complete."""

    name: str
    wanted: Wanted
    complete: str

    def call(self, arguments: str) -> dict[str, Any]:
        """A call, or the beginning of one."""
        function = {"name": self.name, "arguments": arguments}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def forced_by(choice: Any, tools: Sequence[Mapping[str, Any]] | None) -> Forced | None:
    """What a `tool_choice` forces, if anything. Raises `Refusal` unless it is one function."""
    if choice in (None, "auto", "none"):
        return None
    functions = {place: tool["function"] for place, tool in enumerate(tools or ())}
    found = [place for place in functions if choice in ("required", functions[place]["name"])]
    if len(found) != 1:
        said = f"tool_choice={shown(choice)}: {len(found)} of the tools are meant; it must be one, by its name"
        raise Refusal(said, param="tool_choice")
    function, where = functions[found[0]], f"tools[{found[0]}].function.parameters"
    wanted = by_schema(where, function.get("parameters") or _NOTHING)
    return Forced(function["name"], wanted, "tool_calls" if choice == "required" else "stop")


def _choice(name: str, value: Any) -> str:
    return _NAMED(name, value) if isinstance(value, dict) else _WORDS(name, value)


def _named(fields: Fields) -> str:
    fields.need("type", one_of("function"), "A function.")
    return fields.need("function", inside(lambda function: function.need("name", text, "Its name.")), "Which one.")


_WORDS, _NAMED = one_of("auto", "none", "required"), inside(_named)
CHOICE = Check(_choice, lambda: {"anyOf": [_WORDS.says(), _NAMED.says()]}, lambda: "auto")
