"""From a regular expression to a finite automaton over the bytes of UTF-8, built by `outlines_core`."""

import dataclasses
import functools
import re
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Int

from jaxgen.errors import JaxgenError, shown

MOST_CHARACTERS = 1 << 17  # of a pattern
MOST_PLACES = 20_000  # of characters in a text that it tells apart, before it is built
MOST_STATES = 1 << 15  # 32 MB, while it is built
DEAD = 0  # the state from which nothing matches
# Stands before every text: the automaton is built for places behind it, where a `^` is wrong and nothing else special.
_FRONT = 0x00
_IN_FRONT = re.compile(r"\A(\(\?[a-zA-Z]+\))?\^")
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")


@dataclasses.dataclass(frozen=True, eq=False)  # equal only if the same: it is a key of a cache
class ByteAutomaton:
    """States and what each byte makes of them; state 0 is dead, state 1 the start."""

    step: Int[np.ndarray, "S 256"]
    final: Bool[np.ndarray, " S"]  # the text so far matches
    start: ClassVar[int] = DEAD + 1


@functools.lru_cache(16)
def byte_automaton(pattern: str) -> ByteAutomaton:
    """The automaton of the texts that match a pattern from their first to their last character.

    Raises `JaxgenError` if `outlines_core` is missing, for a pattern that it cannot read, that no text matches, or that
    is too large. Some short patterns take long and much memory, such as `(a|b)*a(a|b){20}`.
    """
    try:
        from outlines_core import Index, Vocabulary
    except ImportError as error:
        raise JaxgenError("constraint needs outlines-core: pip install outlines-core") from error
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
    try:
        # A `\z` keeps the alternatives that come after one that matches already.
        index = Index(rf"\x{_FRONT:02X}(?:{inner})\z", Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)}))
    except ValueError as error:
        raise _refused(pattern, str(error)) from error
    moves, final = index.get_transitions(), index.get_final_states()
    if len(moves) > MOST_STATES:
        raise JaxgenError(
            f"constraint: the pattern {shown(pattern)} has {len(moves)} states, more than {MOST_STATES}; \\w, \\d and "
            ". stand for much of Unicode, [a-z0-9] for less"
        )
    # Numbered in the order in which the smallest bytes lead to them, which is the same every time.
    order = [moves[index.get_initial_state()][_FRONT]]
    number = {order[0]: DEAD + 1}
    for state in order:
        for _, following in sorted(moves.get(state, {}).items()):
            if following not in number:
                number[following] = len(order) + DEAD + 1
                order.append(following)
    step = np.zeros((len(order) + 1, 256), np.int32)
    for state in order:
        bytes_ = [byte for byte in moves.get(state, {}) if byte < 256]  # 256: the end
        step[number[state], bytes_] = [number[moves[state][byte]] for byte in bytes_]
    return ByteAutomaton(step, np.array([False, *(state in final for state in order)]))


def _refused(pattern: str, reason: str) -> JaxgenError:
    """What `outlines_core` said, in a line."""
    if "no transitions from state" in reason:
        return JaxgenError(f"constraint: no text matches the pattern {shown(pattern)}")
    reason = re.sub(r"\s+", " ", reason)
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
        if letter == "\\":
            place, last = place + 2, 1
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
