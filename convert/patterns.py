"""Regular expressions that files hold, matched against names of modules in bounded time.

Python's `re` may try a pattern in exponentially many ways. Here all ways are tried at once: what a part of a pattern
does is a function from the positions where it may begin to those where it may end, each set of them the bits of an
int. Whether a pattern matches does not depend on the order in which the ways are tried, so the answer is `re`'s.
"""

import re
import warnings
from collections.abc import Iterator
from re import _constants as c  # pyright: ignore[reportAttributeAccessIssue]  (Python's own parser has no public name)
from re import _parser as parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any, TypeAlias, no_type_check

from jaxgen.errors import CheckpointError

_MOST_CHARACTERS = 10_000  # of a pattern
_MOST_STEPS = 5_000_000  # of a file's patterns together: seconds, and many times what real files take

_Items: TypeAlias = Any  # a parsed pattern: pairs of a kind of part, and what that kind needs

_CATEGORIES = {
    c.CATEGORY_DIGIT: str.isdecimal,
    c.CATEGORY_SPACE: str.isspace,
    c.CATEGORY_WORD: lambda letter: letter.isalnum() or letter == "_",
}
_OPPOSITES = {
    c.CATEGORY_NOT_DIGIT: c.CATEGORY_DIGIT,
    c.CATEGORY_NOT_SPACE: c.CATEGORY_SPACE,
    c.CATEGORY_NOT_WORD: c.CATEGORY_WORD,
}
_LETTERS = (c.LITERAL, c.NOT_LITERAL, c.IN, c.ANY)
_REPEATS = (c.MAX_REPEAT, c.MIN_REPEAT)
_LOOKS = (c.ASSERT, c.ASSERT_NOT)
_KNOWN = {*_LETTERS, *_REPEATS, *_LOOKS, c.SUBPATTERN, c.BRANCH, c.AT, c.FAILURE}


class Patterns:
    """The regular expressions of one file, `where`, which is named in errors; `re`'s answers about names of modules.

    Names are ASCII and have no line breaks. All methods raise `CheckpointError` for a pattern that is none, that
    needs what this cannot do (references back to groups, atomic groups), or that is too long or takes too long.

    >>> Patterns("config.json").match(r"(.*)*_proj", "self_attn.q_proj")
    True
    """

    def __init__(self, where: str):
        self._where, self._parsed, self._steps = where, {}, 0

    def check(self, pattern: str) -> None:
        """Raise if the pattern cannot be used."""
        self._ends(pattern, "", 1)

    def match(self, pattern: str, name: str) -> bool:
        """Whether the pattern matches a beginning of the name, as `re.match`."""
        return self._ends(pattern, name, 1) != 0

    def fullmatch(self, pattern: str, name: str) -> bool:
        """Whether the pattern matches the whole name, as `re.fullmatch`."""
        return self._ends(pattern, name, 1) >> len(name) != 0

    def search(self, pattern: str, name: str) -> bool:
        """Whether the pattern matches somewhere in the name, as `re.search`."""
        return self._ends(pattern, name, (2 << len(name)) - 1) != 0

    def _ends(self, pattern: str, name: str, starts: int) -> int:
        match = _Match(name, _MOST_STEPS - self._steps)
        try:
            if pattern not in self._parsed:
                self._steps += len(pattern)
                self._parsed[pattern] = _parse(pattern)
            tree = self._parsed[pattern]
            return match.sequence(tree, starts, tree.state.flags)
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            problem = f"{pattern!r:.80} cannot be used as a regular expression: {error}"
            raise CheckpointError(self._where, [problem]) from error
        finally:
            self._steps += match.steps


@no_type_check  # in tests, where every step would be
class _Match:
    """One name against one pattern; sets of positions in the name are ints, position p being bit p."""

    def __init__(self, name: str, most_steps: int):
        self.name, self.steps, self._most_steps = name, len(name), most_steps
        self._every = (2 << len(name)) - 1
        self._places_of = {}
        for position, letter in enumerate(name):
            self._places_of[letter] = self._places_of.get(letter, 0) | 1 << position

    def sequence(self, items: _Items, starts: int, flags: int) -> int:
        """Where the items may end, one after the other, if they begin at one of `starts`."""
        for kind, value in items:
            if not starts:
                break
            self._spend()
            starts = self._item(kind, value, starts, flags)
        return starts

    def _spend(self, steps: int = 1) -> None:
        self.steps += steps
        if self.steps > self._most_steps:
            raise ValueError("the patterns of this file take too long")

    def _item(self, kind: Any, value: Any, starts: int, flags: int) -> int:
        if kind in _LETTERS:
            return (starts & self._letters(kind, value, flags)) << 1
        if kind is c.SUBPATTERN:
            _, added, removed, items = value
            return self.sequence(items, starts, (flags | added) & ~removed)
        if kind is c.BRANCH:
            ends = 0
            for items in value[1]:
                self._spend()
                ends |= self.sequence(items, starts, flags)
            return ends
        if kind in _REPEATS:
            return self._repeat(value, starts, flags)
        if kind in _LOOKS:
            return self._look(value, starts, flags, kind is c.ASSERT)
        return starts & self._places(value) if kind is c.AT else 0

    def _letters(self, kind: Any, value: Any, flags: int) -> int:
        """Where the name has a letter that a literal, a set or a dot takes."""
        ignoring_case, taken = flags & c.SRE_FLAG_IGNORECASE, 0
        if kind is c.LITERAL and not ignoring_case:
            return self._places_of.get(chr(value), 0)
        self._spend(len(value) if kind is c.IN else 1)
        for letter, places in self._places_of.items():
            # Case is ignored for what is listed: whether the list is negated comes after.
            if any(
                _takes(kind, value, case) for case in ((letter.lower(), letter.upper()) if ignoring_case else letter)
            ):
                taken |= places
        negated = kind is c.NOT_LITERAL or (kind is c.IN and value[0][0] is c.NEGATE)
        return self._every & ~(1 << len(self.name)) & ~taken if negated else taken

    def _repeat(self, value: Any, starts: int, flags: int) -> int:
        least, most, items = value
        # Positions only grow, so nothing is new after as many repetitions as the name has positions.
        for _ in range(min(least, len(self.name) + 1)):
            self._spend()
            starts = self.sequence(items, starts, flags)
        ends = fresh = starts
        for _ in range(min(most - least, len(self.name) + 1)):
            self._spend()
            fresh = self.sequence(items, fresh, flags) & ~ends
            if not fresh:
                break
            ends |= fresh
        return ends

    def _places(self, place: Any) -> int:
        if place in (c.AT_BEGINNING, c.AT_BEGINNING_STRING):
            return 1
        if place in (c.AT_END, c.AT_END_STRING):
            return 1 << len(self.name)
        self._spend(len(self.name))
        in_word = [_CATEGORIES[c.CATEGORY_WORD](letter) for letter in self.name]
        pairs = zip([False, *in_word], [*in_word, False], strict=True)
        boundaries = sum((before != after) << position for position, (before, after) in enumerate(pairs))
        return boundaries if place is c.AT_BOUNDARY else self._every & ~boundaries

    def _look(self, value: Any, starts: int, flags: int, wanted: bool) -> int:
        """The starts at which what is ahead, or behind, matches or not, as wanted."""
        direction, items = value
        width = items.getwidth()[0]  # of what is behind, Python allows only one
        kept = 0
        for position in (position for position in range(len(self.name) + 1) if starts >> position & 1):
            self._spend()
            if direction > 0:
                found = self.sequence(items, 1 << position, flags) != 0
            else:
                begin = position - width
                found = begin >= 0 and bool(self.sequence(items, 1 << begin, flags) >> position & 1)
            kept |= (found == wanted) << position
        return kept


def _parse(pattern: str) -> Any:
    if len(pattern) > _MOST_CHARACTERS:
        raise ValueError(f"it has {len(pattern)} characters, more than {_MOST_CHARACTERS}")
    with warnings.catch_warnings(action="ignore"):  # of what another Python may understand otherwise
        tree = parser.parse(pattern)
    if strange := next((kind for kind in _kinds(tree) if kind not in _KNOWN), None):
        raise ValueError(f"jaxgen does not match {str(strange).lower().replace('_', ' ')}")
    return tree


def _kinds(items: _Items) -> Iterator[Any]:
    for kind, value in items:
        yield kind
        if kind is c.BRANCH:
            for inner in value[1]:
                yield from _kinds(inner)
        elif kind in (c.SUBPATTERN, *_REPEATS, *_LOOKS):
            yield from _kinds(value[-1])


@no_type_check
def _takes(kind: Any, value: Any, letter: str) -> bool:
    if kind is c.ANY:
        return True
    if kind is c.IN:
        return any(_takes(part, inner, letter) for part, inner in value if part is not c.NEGATE)
    if kind is c.RANGE:
        return value[0] <= ord(letter) <= value[1]
    if kind is c.CATEGORY:
        opposite = _OPPOSITES.get(value)
        return not _CATEGORIES[opposite](letter) if opposite else _CATEGORIES[value](letter)
    return value == ord(letter)
