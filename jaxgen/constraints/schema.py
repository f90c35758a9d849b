"""From a JSON schema to a regular expression all of whose texts are valid by it.

Not every valid text matches: properties come in the schema's order, no others than are listed, with at most a space
between parts. What would make a text invalid is never passed over: a keyword that is not understood is refused.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from jaxgen.constraints.automaton import MOST_CHARACTERS
from jaxgen.constraints.numbers import integers_between
from jaxgen.constraints.recursion import referred
from jaxgen.constraints.strings import FORMATS, STRING, quoted_pattern, string_of_length
from jaxgen.errors import JaxgenError, UnsupportedError, shown

ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator",
     "$schema", "$id", "$comment", "$defs", "definitions"}
)  # fmt: skip
SPACE = " ?"
NUMBER = r"(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?"
Schema = Mapping[str, Any]


def read_schema(schema: object) -> Schema:
    """A schema, of itself, its text or a pydantic model; raises `JaxgenError` for what is none."""
    model_schema = getattr(schema, "model_json_schema", None)
    if isinstance(schema, type) and callable(model_schema):
        schema = model_schema()
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise JaxgenError(f"json_schema: the text is no JSON: {error}") from error
    if not isinstance(schema, Mapping):
        raise JaxgenError(f"json_schema: {shown(schema)} is no schema; pass a dict, its JSON text, or a pydantic model")
    return schema


def pattern_of(schema: Schema, escape: Callable[[str], str]) -> str:
    """The pattern of a schema; `escape` makes a pattern of a text.

    Raises `JaxgenError` for what is no schema, `UnsupportedError` for what is not supported, by keyword and place.
    """
    try:
        return _Translation(schema, escape).of(schema, "#")
    except RecursionError as error:
        raise UnsupportedError("json_schema: the schema is nested too deeply") from error


class _Translation:
    """One schema on its way; `at` is where in it we are, as a JSON pointer."""

    def __init__(self, root: Schema, escape: Callable[[str], str]):
        self.root, self.escape = root, escape
        self.open: list[str] = []  # the references that lead here
        self.known: dict[str, str] = {}  # the patterns of references: schemas may refer to one again and again

    def of(self, schema: object, at: str) -> str:
        """The pattern of one schema, which stands for itself in any context."""
        pattern = self._of(schema, at)
        if len(pattern) > MOST_CHARACTERS:
            self.refuse(at, schema, f"its pattern has {len(pattern)} characters, more than {MOST_CHARACTERS}")
        return pattern

    def _of(self, schema: object, at: str) -> str:
        if not isinstance(schema, Mapping):
            if isinstance(schema, bool):
                self.refuse(at, schema, "any value, or none, is no regular expression; say which")
            raise JaxgenError(f"json_schema: {at}: {shown(schema)} is no schema")
        said = {name: value for name, value in schema.items() if name not in ANNOTATIONS}
        for name, read in (
            ("$ref", self._reference), ("const", lambda value, at: self._values([value], at)), ("enum", self._values),
            ("anyOf", self._any), ("oneOf", self._one), ("allOf", self._all),
        ):  # fmt: skip
            if name in said:
                value = said.pop(name)
                if name in ("const", "enum"):  # `type` says no more than they do, if it is true of them
                    self._check_type(value if name == "enum" else [value], said.pop("type", None), at)
                self.only(said, at, name)
                return read(value, f"{at}/{name}")
        kinds = said.pop("type", None)
        if isinstance(kinds, list) and kinds:
            return _either([self._typed(kind, _of_kind(kind, said), at) for kind in kinds])
        return self._typed(kinds, said, at)

    def _typed(self, kind: object, said: Schema, at: str) -> str:
        readers = {
            "string": self._string, "integer": self._integer, "number": self._number, "array": self._array,
            "object": self._object, "boolean": lambda said, at: self.only(said, at) or "(?:true|false)",
            "null": lambda said, at: self.only(said, at) or "null",
        }  # fmt: skip
        if kind is None:
            self.refuse(at, dict(said), "any value of JSON is no regular expression; say its type")
        if not isinstance(kind, str) or kind not in readers:
            raise JaxgenError(f"json_schema: {at}/type: {shown(kind)} is none of {', '.join(readers)}")
        return readers[kind](said, at)

    def _string(self, said: Schema, at: str) -> str:
        rest = dict(said)
        if "format" in rest:
            name = rest.pop("format")
            self.only(rest, at, "format")
            if not isinstance(name, str) or name not in FORMATS:
                self.refuse(f"{at}/format", name, f"of formats there are {', '.join(FORMATS)}")
            return f'"{FORMATS[name]}"'
        if "pattern" in rest:
            pattern = rest.pop("pattern")
            self.only(rest, at, "pattern")
            found = quoted_pattern(pattern)
            if found is None:
                self.refuse(
                    f"{at}/pattern",
                    pattern,
                    "letters, digits, their ranges in [], \\d, (), |, ?, *, + and {} are read",
                )
            return found
        least, most = self.counts(rest, "minLength", "maxLength", at)
        self.only(rest, at)
        return STRING if (least, most) == (0, None) else string_of_length(least, most)

    def _integer(self, said: Schema, at: str) -> str:
        rest, bounds = dict(said), {}
        for name, step in (("minimum", 0), ("exclusiveMinimum", 1), ("maximum", 0), ("exclusiveMaximum", -1)):
            if name in rest:
                value = rest.pop(name)
                if not isinstance(value, int) or isinstance(value, bool) or abs(value) > 10**18:
                    self.refuse(f"{at}/{name}", value, "bounds are ints of at most 18 digits")
                end = "most" if "max" in name.lower() else "least"
                bounds[end] = (min if end == "most" else max)(bounds.get(end, value + step), value + step)
        self.only(rest, at)
        pattern = integers_between(bounds.get("least"), bounds.get("most"))
        if pattern is None:
            raise JaxgenError(f"json_schema: {at}: no integer lies between {bounds['least']} and {bounds['most']}")
        return pattern

    def _number(self, said: Schema, at: str) -> str:
        rest = dict(said)
        positive = "minimum" in rest and rest["minimum"] == 0
        if positive:
            rest.pop("minimum")
        self.only(rest, at)
        return NUMBER if positive else f"-?{NUMBER}"

    def _array(self, said: Schema, at: str) -> str:
        rest = dict(said)
        if rest.get("uniqueItems") is False:
            rest.pop("uniqueItems")
        least, most = self.counts(rest, "minItems", "maxItems", at)
        if "prefixItems" in rest:
            parts = self.parts(rest.pop("prefixItems"), f"{at}/prefixItems")
            if rest.get("items") is False:
                rest.pop("items")
            self.only(rest, at)
            if not least <= len(parts) <= (len(parts) if most is None else most):
                self.refuse(at, said, "prefixItems, minItems and maxItems must agree")
            return rf"\[{SPACE}{comma().join(parts)}{SPACE}\]"
        if "items" not in rest:
            self.refuse(at, dict(said), "an array needs items, which say what is in it")
        item = self.of(rest.pop("items"), f"{at}/items")
        self.only(rest, at)
        if most == 0:
            return rf"\[{SPACE}\]"
        more = _repeated(f"(?:{comma()}{item})", max(least - 1, 0), None if most is None else most - 1)
        some = f"{item}{more}"
        return rf"\[{SPACE}{some if least else f'(?:{some})?'}{SPACE}\]"

    def _object(self, said: Schema, at: str) -> str:
        rest = dict(said)
        properties, others = rest.pop("properties", {}), rest.pop("additionalProperties", None)
        required = rest.pop("required", [])
        self.only(rest, at)
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise JaxgenError(f"json_schema: {at}: properties must be an object, and required a list")
        for name in required:
            if not isinstance(name, str) or name not in properties:
                self.refuse(f"{at}/required", name, "it is not among the properties")
        if not properties:
            if not isinstance(others, Mapping) or not others:
                if others is False:
                    return rf"\{{{SPACE}\}}"
                self.refuse(at, dict(said), "an object needs properties, or a schema of additionalProperties")
            pair = f"{STRING}{SPACE}:{SPACE}{self.of(others, f'{at}/additionalProperties')}"
            return rf"\{{{SPACE}(?:{pair}(?:{comma()}{pair})*)?{SPACE}\}}"
        pairs = []
        for name, value in properties.items():
            key = self.escape(json.dumps(name, ensure_ascii=False))
            pairs.append((f"{key}{SPACE}:{SPACE}{self.of(value, f'{at}/properties/{name}')}", name in required))
        return rf"\{{{SPACE}{_in_order(pairs)}{SPACE}\}}"

    def _reference(self, pointer: object, at: str) -> str:
        if not isinstance(pointer, str) or not pointer.startswith("#"):
            self.refuse(at, pointer, "only references within the schema, which begin with #, are followed")
        if pointer in self.open:
            self.refuse(at, pointer, "it leads back to itself, and a regular expression has no recursion")
        place = referred(self.root, pointer)
        if place is None:
            raise JaxgenError(f"json_schema: {at}: {shown(pointer)} is not in the schema")
        if pointer not in self.known:
            self.open.append(pointer)
            self.known[pointer] = self.of(place, pointer)
            self.open.pop()
        return self.known[pointer]

    def _values(self, values: object, at: str) -> str:
        if not isinstance(values, list) or not values:
            raise JaxgenError(f"json_schema: {at}: {shown(values)} is no list of values")
        try:
            texts = [json.dumps(value, ensure_ascii=False, allow_nan=False) for value in values]
        except (TypeError, ValueError) as error:
            raise JaxgenError(f"json_schema: {at}: {shown(values)} is no JSON: {error}") from error
        return _either([self.escape(text) for text in texts])

    def _check_type(self, values: object, kinds: object, at: str) -> None:
        if kinds is None or not isinstance(values, list):
            return
        known = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
        kinds = kinds if isinstance(kinds, list) else [kinds]
        for value in values:
            if not any(
                isinstance(kind, str)
                and isinstance(value, known.get(kind, ()))
                and (kind == "boolean") == isinstance(value, bool)
                for kind in kinds
            ):
                self.refuse(f"{at}/type", kinds, f"{shown(value)} is not of that type")

    def _any(self, schemas: object, at: str) -> str:
        return _either(self.parts(schemas, at))

    def _all(self, schemas: object, at: str) -> str:
        parts = self.parts(schemas, at)
        if len(parts) > 1:
            self.refuse(at, schemas, "more than one at once is no regular expression")
        return parts[0]

    def _one(self, schemas: object, at: str) -> str:
        parts = self.parts(schemas, at)
        if len(parts) > 1 and not differ(schemas, self.root):
            self.refuse(at, schemas, "they may overlap: use anyOf, or types or tags that differ")
        return _either(parts)

    def parts(self, schemas: object, at: str) -> list[str]:
        """The patterns of a list of schemas."""
        if not isinstance(schemas, list) or not schemas:
            raise JaxgenError(f"json_schema: {at}: {shown(schemas)} is no list of schemas")
        return [self.of(schema, f"{at}/{number}") for number, schema in enumerate(schemas)]

    def counts(self, rest: dict[str, Any], low: str, high: str, at: str) -> tuple[int, int | None]:
        """Two counts taken out of a schema: the least and the most."""
        for name in (low, high):
            value = rest.get(name, 0)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise JaxgenError(f"json_schema: {at}/{name}: {shown(value)} is no count")
        least, most = rest.pop(low, 0), rest.pop(high, None)
        if most is not None and most < least:
            raise JaxgenError(f"json_schema: {at}: {low}={least} is more than {high}={most}")
        return least, most

    def only(self, said: Schema, at: str, beside: str = "") -> None:
        """Refuse what is left of a schema."""
        for name, value in said.items():
            self.refuse(f"{at}/{name}", value, f"not beside {beside}" if beside else "this keyword is not supported")

    def refuse(self, at: str, value: object, why: str) -> NoReturn:
        """Raise."""
        raise UnsupportedError(f"json_schema: {at}: {shown(value)}: {why}")


def differ(schemas: Any, root: Schema) -> bool:
    """Whether no value is valid by two of them: by their types, or a required property with one value in each."""
    found = [_followed(schema, root) for schema in schemas]
    kinds = ["number" if schema.get("type") == "integer" else schema.get("type") for schema in found]
    if all(isinstance(kind, str) for kind in kinds) and len(set(kinds)) == len(kinds):
        return True
    needed = [_strings(schema.get("required")) for schema in found]
    for name in needed[0] if needed else ():
        tags = [_mapping(_mapping(schema.get("properties")).get(name)).get("const") for schema in found]
        required = all(name in names for names in needed) and all(kind == "object" for kind in kinds)
        if required and all(isinstance(tag, str) for tag in tags) and len(set(tags)) == len(tags):
            return True
    return False


def _followed(schema: Any, root: Schema) -> Schema:
    """A schema, or what it refers to; an empty one where there is none."""
    seen: list[Any] = []
    while isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str) and schema["$ref"] not in seen:
        seen.append(schema["$ref"])
        schema = referred(root, schema["$ref"])
    return _mapping(schema)


def _strings(value: Any) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _mapping(value: Any) -> Schema:
    return value if isinstance(value, Mapping) else {}


_BELONGS = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "object": ("properties", "required", "additionalProperties"),
}


def _of_kind(kind: object, said: Schema) -> Schema:
    """Of a schema with several types, what concerns this one: keywords of other types say nothing of it."""
    kind = "integer" if kind == "number" else kind
    others = {name for other, names in _BELONGS.items() if other != kind for name in names}
    return {name: value for name, value in said.items() if name not in others}


def _in_order(pairs: list[tuple[str, bool]]) -> str:
    """These, those that are not required with or without, and commas between them."""
    starts = []
    for first, (pair, required) in enumerate(pairs):
        rest = (f"(?:{comma()}{later}){'' if needed else '?'}" for later, needed in pairs[first + 1 :])
        starts.append(pair + "".join(rest))
        if required:
            return _either(starts)
    return f"{_either(starts)}?"


def _either(patterns: list[str]) -> str:
    return f"(?:{'|'.join(patterns)})"


def _repeated(pattern: str, least: int, most: int | None) -> str:
    if (least, most) == (0, None):
        return f"{pattern}*"
    return f"{pattern}{{{least},{'' if most is None else most}}}"


def comma() -> str:
    """Between parts."""
    return f"{SPACE},{SPACE}"
