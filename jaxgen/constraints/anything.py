"""Any JSON object at all, to a bounded depth: beyond it, brackets that match are no regular expression."""

import functools

from jaxgen.constraints.patterns import Constraint
from jaxgen.constraints.schema import NUMBER, SPACE, comma
from jaxgen.constraints.strings import STRING

DEPTH = 4  # of objects and lists within each other: some 600 states


@functools.cache
def any_object(depth: int = DEPTH) -> Constraint:
    """A JSON object whose values are anything, objects and lists nested `depth` deep at most, itself counted.

    >>> import re
    >>> [bool(re.fullmatch(any_object(2).pattern, text)) for text in ('{"a": [1, null]}', '{"a": [{}]}', "[]")]
    [True, False, False]
    """
    value = f"(?:{STRING}|-?{NUMBER}|true|false|null)"
    for _ in range(depth - 1):
        value = f"(?:{value}|{_list_of(value)}|{_object_of(value)})"
    return Constraint(_object_of(value))


def _list_of(value: str) -> str:
    return rf"\[{SPACE}(?:{value}(?:{comma()}{value})*)?{SPACE}\]"


def _object_of(value: str) -> str:
    pair = f"{STRING}{SPACE}:{SPACE}{value}"
    return rf"\{{{SPACE}(?:{pair}(?:{comma()}{pair})*)?{SPACE}\}}"
