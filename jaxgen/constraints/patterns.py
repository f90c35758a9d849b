"""The constraints that a user writes down: a regular expression, a few texts to choose from, a JSON schema."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, no_type_check

from jaxgen.constraints.grammars import Grammar, as_grammar
from jaxgen.constraints.recursion import closed, leads_back
from jaxgen.constraints.schema import differ, pattern_of, read_schema
from jaxgen.errors import JaxgenError, shown

# Rust's regular expressions have these to escape, and Python's `re.escape` escapes some that they do not know.
_SPECIAL = re.compile(r"([\\.+*?()|\[\]{}^$#&\-~])")


@no_type_check
@dataclasses.dataclass(frozen=True)
class Constraint:
    """What `generate(..., constraint=)` takes: the whole of the new text matches `pattern`.

    Made by `jaxgen.regex`, `jaxgen.choice` and `jaxgen.json_schema`. `pattern` is a regular expression in the syntax of
    Rust's `regex`. Raises `JaxgenError` for what is no text.
    """

    pattern: str

    def __post_init__(self):
        if not isinstance(self.pattern, str):
            raise JaxgenError(f"constraint: pattern={shown(self.pattern)} is {type(self.pattern).__name__}, not a str")
        _checked_text(self.pattern, "constraint: pattern")


@no_type_check  # their own checks say what is wrong
def regex(pattern: str) -> Constraint:
    """A text that matches a regular expression from its first character to its last, as `re.fullmatch` asks.

    The syntax is that of Rust's `regex` crate: Python's, without looking around and back, and with `\\z` for the end.
    A `^` in front and a `$` behind are there anyway. Raises `JaxgenError` for what is no str; a pattern that cannot be
    read is refused by `generate`.

    >>> regex(r"[0-9]{4}-[0-9]{2}")
    Constraint(pattern='[0-9]{4}-[0-9]{2}')
    """
    return Constraint(pattern)


@no_type_check
def choice(texts: Iterable[str]) -> Constraint:
    """One of these texts. Raises `JaxgenError` for none, and for what is no str.

    >>> choice(["yes", "no", "c++"]).pattern
    'yes|no|c\\\\+\\\\+'
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise JaxgenError(f"choice: {shown(texts)} is not a list of texts")
    texts = list(texts)
    if not texts:
        raise JaxgenError("choice: an empty list leaves nothing to choose from")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise JaxgenError(f"choice: texts[{index}]={shown(text)} is {type(text).__name__}; expected a str")
        _checked_text(text, f"choice: texts[{index}]")
    return Constraint("|".join(map(escaped, dict.fromkeys(texts))))


@no_type_check
def json_schema(schema: "Mapping[str, Any] | str | type") -> Constraint | Grammar:
    """JSON that is valid by a schema: a dict, its JSON text, or a pydantic model (a class).

    Properties come in the schema's order, with at most a space between parts. Raises `JaxgenError` for what is no
    schema, and `UnsupportedError`, naming keyword and place, for what no regular expression or this translation says:
    `uniqueItems`, `allOf` and the like. Nothing in a schema is passed over that would matter. A schema that leads back
    to itself is no regular expression but a `Grammar`, which `generate` reads, or refuses, by `llguidance`.

    >>> json_schema({"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2}).pattern
    '\\\\[ ?(?:(?:1|2)(?: ?, ?(?:1|2)){0,1})? ?\\\\]'
    """
    root = read_schema(schema)
    if leads_back(root):
        return as_grammar(closed(root, lambda schemas: differ(schemas, root)))
    return Constraint(pattern_of(root, escaped))


def escaped(text: str) -> str:
    """A pattern that only this text matches."""
    return _SPECIAL.sub(r"\\\1", text)


def _checked_text(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise JaxgenError(f"{name}={shown(text)} is half a character; no token says that") from error
