"""The constraints that no regular expression says: grammars, which are read on the host by `llguidance`."""

import dataclasses
import json
from typing import Any, no_type_check

from jaxgen.errors import JaxgenError, shown

SYNTAXES = ("lark", "gbnf", "json_schema")
MOST_CHARACTERS = 1 << 20  # of a grammar
# As the schemas that are regular: at most a space between parts, and no keyword is passed over.
_JSON = {"whitespace_pattern": " ?", "lenient": False, "coerce_one_of": False}
# Otherwise only one spelling may come of a text that must: that of the tokenizer, which is not asked.
_ANY_SPELLING = '\n%llguidance {"no_forcing": true}\n'


@no_type_check  # its own checks say what is wrong
@dataclasses.dataclass(frozen=True)
class Grammar:
    """What `generate(..., constraint=)` takes too: the new text is one that a context-free grammar makes.

    Made by `jaxgen.grammar`, and by `jaxgen.json_schema` of a schema that leads back to itself. `syntax` is "lark",
    "gbnf" or "json_schema". Raises `JaxgenError` for what is no text, another syntax, and more than 2^20 characters.
    """

    text: str
    syntax: str = "lark"

    def __post_init__(self):
        if not isinstance(self.text, str):
            raise JaxgenError(f"grammar: text={shown(self.text)} is {type(self.text).__name__}, not a str")
        if self.syntax not in SYNTAXES:
            raise JaxgenError(f"grammar: syntax={shown(self.syntax)} is none of {', '.join(SYNTAXES)}")
        if len(self.text) > MOST_CHARACTERS:
            raise JaxgenError(f"grammar: a text of {len(self.text)} characters; at most {MOST_CHARACTERS} are read")
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise JaxgenError(f"grammar: text={shown(self.text)} holds half a character") from error


@no_type_check
def grammar(text: str, syntax: str = "lark") -> Grammar:
    """A text that a context-free grammar makes from its `start` (Lark) or `root` (GBNF).

    `syntax`: "lark", as `llguidance` reads it (its documentation has the differences to Lark); "gbnf", that of
    llama.cpp; or "json_schema", for what `jaxgen.json_schema` refuses because no regular expression says it. A special
    token may come where a Lark grammar names it, as in `start: <tool_call> object`. Raises `JaxgenError` for what is no
    text or no known syntax; a grammar that cannot be read is refused by `generate`.

    >>> grammar('start: "(" start ")" | "x"')
    Grammar(text='start: "(" start ")" | "x"', syntax='lark')
    """
    return Grammar(text, syntax)


def as_lark(grammar: Grammar) -> str:
    """The grammar in Lark's syntax, as `llguidance` reads it; raises `JaxgenError` for GBNF or JSON that is none."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        lark = {"lark": str, "gbnf": gbnf_to_lark, "json_schema": _json_in_lark}[grammar.syntax](grammar.text)
    except Exception as error:  # its reader of GBNF raises what it meets
        raise refused(grammar, str(error) or type(error).__name__) from error
    return lark + _ANY_SPELLING


def _json_in_lark(text: str) -> str:
    schema = json.loads(text)
    if not isinstance(schema, dict):
        raise ValueError("it is no JSON object")
    return f"start: %json {json.dumps(schema | {'x-guidance': _JSON})}"


def refused(grammar: Grammar, reason: str) -> JaxgenError:
    """What was wrong with a grammar, in a line."""
    named = "the schema" if grammar.syntax == "json_schema" else f"the {grammar.syntax} grammar"
    return JaxgenError(f"constraint: {named} {shown(grammar.text)} cannot be used: {' '.join(reason.split()):.300}")


def as_grammar(schema: Any) -> Grammar:
    """A schema that leads back to itself."""
    try:
        return Grammar(json.dumps(schema, ensure_ascii=False, allow_nan=False), "json_schema")
    except (TypeError, ValueError, RecursionError) as error:
        raise JaxgenError(f"json_schema: {shown(schema)} is no JSON: {error}") from error
