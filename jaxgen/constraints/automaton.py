"""From a regular expression to a finite automaton over the bytes of UTF-8, built by `outlines_core`."""

import base64
import dataclasses
import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Int

from jaxgen.bounded import Program
from jaxgen.errors import JaxgenError, shown

MOST_CHARACTERS = 1 << 17  # of a pattern
MOST_PLACES = 20_000  # of characters in a text that it tells apart, before it is built
MOST_STATES = 1 << 15  # 32 MB, while it is built
SECONDS = 10  # of a processor, for one pattern
DEAD = 0  # the state from which nothing matches
_LESS = (
    "\\w, \\d and . stand for much of Unicode, [a-z0-9] for less; and each place behind what repeats may double it, as "
    "in (a|b)*a(a|b){20}"
)
_IN_FRONT = re.compile(r"\A(\(\?[a-zA-Z]+\))?\^")
_PROGRAM = Program(Path(__file__).with_name("automaton_process.py"))
_ESCAPE = re.compile(r"\\(?:[xuUpP]\{[^}]*\}|.?)", re.DOTALL)  # what is in braces here is no count
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")


@dataclasses.dataclass(frozen=True, eq=False)  # equal only if the same: it is a key of a cache
class ByteAutomaton:
    """States and what each byte makes of them; state 0 is dead, state 1 the start."""

    step: Int[np.ndarray, "S 256"]
    final: Bool[np.ndarray, " S"]  # the text so far matches
    start: ClassVar[int] = DEAD + 1


@functools.lru_cache(16)
def byte_automaton(pattern: str) -> ByteAutomaton:
    """The smallest automaton of the texts that match a pattern from their first to their last character.

    Raises `JaxgenError` if `outlines_core` is missing, for a pattern that it cannot read, that no text matches, or that
    is too large. Some short ones are, such as `(a|b)*a(a|b){20}`, and only building them tells: in a program beside
    this one, for 10 seconds of a processor and in 1 GB of memory (on Linux).
    """
    if importlib.util.find_spec("outlines_core") is None:
        raise JaxgenError("constraint needs outlines-core: pip install outlines-core")
    places, begins = _places(pattern)
    if places > MOST_PLACES or len(pattern) > MOST_CHARACTERS:
        raise JaxgenError(
            f"constraint: the pattern {shown(pattern)} is of {places} places and {len(pattern)} characters; at most "
            f"{MOST_PLACES} and {MOST_CHARACTERS} fit"
        )
    if begins != [found.end() - 1 for found in _IN_FRONT.finditer(pattern)]:
        raise JaxgenError(f"constraint: the pattern {shown(pattern)} has a ^ that does not stand in front of all of it")
    inner = _IN_FRONT.sub(r"\1", pattern)
    if inner.endswith("$") and (len(inner) - len(inner[:-1].rstrip("\\"))) % 2 == 1:
        inner = inner[:-1]
    answer = _PROGRAM.ask({"pattern": inner, "states": MOST_STATES}, SECONDS)
    if "step" not in answer:
        raise _refused(pattern, answer)
    step = np.frombuffer(base64.b64decode(answer["step"]), np.int32).reshape(-1, 256)
    return ByteAutomaton(step, np.frombuffer(base64.b64decode(answer["final"]), bool))


def _refused(pattern: str, answer: Mapping[str, Any]) -> JaxgenError:
    """Why there is no automaton, in a line."""
    if "states" in answer:
        return JaxgenError(
            f"constraint: the pattern {shown(pattern)} has {answer['states']} states, more than {MOST_STATES}; {_LESS}"
        )
    if "error" in answer:
        return JaxgenError(f"constraint: the pattern {shown(pattern)} cannot be built: {answer['error']}; {_LESS}")
    reason = re.sub(r"\s+", " ", answer["refused"])
    if "no transitions from state" in reason:
        return JaxgenError(f"constraint: no text matches the pattern {shown(pattern)}")
    return JaxgenError(
        f"constraint: the pattern {shown(pattern)} cannot be built: {reason:.200}; the syntax is that of Rust's regex, "
        "which does not look around or back"
    )


def _places(pattern: str) -> tuple[int, list[int]]:
    """How many places for a character a pattern has when its counts are written out, and where it asks for a beginning.

    Raises `JaxgenError` for parentheses and brackets that do not match.
    """
    sizes, last, place, depth, begins = [0], 0, 0, [], []
    while place < len(pattern):
        letter = pattern[place]
        if letter == "^" or pattern.startswith("\\A", place):
            begins.append(place)
        if found := _ESCAPE.match(pattern, place):
            place, last = found.end(), 1
            sizes[-1] += 1
        elif letter == "[":
            place, last = _end_of_class(pattern, place), 1
            sizes[-1] += 1
        elif letter == "(":
            depth.append(place)
            sizes.append(0)
            place += 1
        elif letter == ")":
            if not depth:
                raise JaxgenError(f"constraint: the pattern {shown(pattern)} has a ) too many, at {place}")
            depth.pop()
            last = sizes.pop()
            sizes[-1] += last
            place += 1
        elif found := _COUNT.match(pattern, place):
            times = max(int(count[:9] or 1) for count in (found[1] or "1", found[2] or "1"))
            sizes[-1] += last * (times - 1)
            last, place = last * times, found.end()
        else:
            sizes[-1] += letter not in "*+?|"
            last = last if letter in "*+?" else 1
            place += 1
    if depth:
        raise JaxgenError(f"constraint: the pattern {shown(pattern)} has a ( without its ), at {depth[-1]}")
    return sizes[0], begins


def _end_of_class(pattern: str, place: int) -> int:
    """Where a `[` at `place` ends; classes may hold classes."""
    depth, first = 0, -1
    while place < len(pattern):
        letter = pattern[place]
        if letter == "\\":
            place += 2
            continue
        if letter == "[":
            depth, first = depth + 1, place + 1 + pattern.startswith("^", place + 1)
        elif letter == "]" and place != first:
            depth -= 1
            if depth == 0:
                return place + 1
        place += 1
    raise JaxgenError(f"constraint: the pattern {shown(pattern)} has a [ without its ]")
