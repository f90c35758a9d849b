"""A constraint over the tokens of a vocabulary: which of them may come next, and how far the end is.

The automaton over bytes is lifted to tokens, whose text is its edges: a token may end in the middle of a character or
of a word. Tokens that do the same to every state are of one class, so the table has a column per class: some dozens.
States from which the vocabulary cannot spell an end are dead.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxgen.constraints.automaton import DEAD, byte_automaton
from jaxgen.constraints.grammars import Grammar
from jaxgen.constraints.patterns import Constraint
from jaxgen.errors import JaxgenError, shown
from jaxgen.generation.choosing.kept import Arrays, kept
from jaxgen.generation.choosing.vocabulary import SILENT, Vocabulary, lift, vocabulary_of
from jaxgen.generation.prompts.layout import bucket
from jaxgen.pytree import pytree

NO_WAY = -1  # where a token may not come
SMALLEST = 128  # states and classes: most constraints need fewer, so they share one compiled loop
MOST_CLASSES = np.iinfo(np.int16).max
FREE = -1  # the distance of a row that nothing is asked of: it may end, and never is complete
_FORM = 2  # of the arrays that are kept on disk
_FORBIDDEN = 0  # the class of tokens that may come nowhere


@pytree
@dataclasses.dataclass(frozen=True)
class Automata:
    """The automata of a call, one after the other in one table. Other constraints rarely mean other shapes.

    G constraints, S states, C classes, N: 1, or the prompts.
    """

    classes: Int[Array | np.ndarray, "G V"]  # of each token, by constraint
    table: Int[Array | np.ndarray, "S C"]  # the next state, or NO_WAY
    distance: Int[Array | np.ndarray, " S"]  # tokens that a text needs at least to be whole; 0: it is; or FREE
    ends: Bool[Array | np.ndarray, " S"]  # the text is whole, and nothing may come any more, not even an end token
    starts: Int[Array | np.ndarray, " N"]  # the state in front of each prompt's text
    which: Int[Array | np.ndarray, " N"]  # the constraint of each prompt

    @classmethod
    def of(cls, value: object, tokenizer: Any, prompts: int, vocab_size: int, eos: tuple[int, ...]) -> "Automata":
        """The automata of a `Constraint`, or of one per prompt (None, or a `Grammar`: nothing is asked of it here).

        Raises `JaxgenError` for what is none, a wrong number of them, patterns and tokenizers that cannot be used, and
        where no text that matches can be spelled in the model's tokens.
        """
        given = [one if isinstance(one, Constraint) else None for one in checked(value, prompts)]
        distinct = list(dict.fromkeys(given))
        built = [automaton_of(constraint, tokenizer, vocab_size, eos) for constraint in distinct]
        starts = np.cumsum([0] + [len(automaton.table) for automaton in built])
        which = np.array([distinct.index(constraint) for constraint in given], np.int32)
        states, classes = bucket(int(starts[-1]), SMALLEST), bucket(max(a.table.shape[1] for a in built), SMALLEST)
        table, distance = np.full((states, classes), NO_WAY, np.int32), np.zeros(states, np.int32)
        ends, by_token = np.zeros(states, bool), np.zeros((bucket(len(built)), vocab_size), np.int16)
        for index, (automaton, start) in enumerate(zip(built, starts[:-1], strict=True)):
            place = slice(start, start + len(automaton.table))
            table[place, : automaton.table.shape[1]] = np.where(automaton.table < 0, NO_WAY, automaton.table + start)
            distance[place], ends[place], by_token[index] = automaton.distance, automaton.ends, automaton.classes
        rows = bucket(len(given))
        first = np.resize(starts[which], rows).astype(np.int32)
        numbers = (by_token, table, distance, ends, first, np.resize(which, rows))
        with jax.ensure_compile_time_eval():  # on the device once, however often the loop is left
            return cls(*map(jnp.asarray, numbers))

    def start(self, prompts: Int[Array, " R"]) -> Int[Array, " R"]:
        """The state of rows that have only their prompt."""
        return self.starts[self._entry(prompts)]

    def advance(
        self, state: Int[Array, " R"], prompts: Int[Array, " R"], token: Int[Array, " R"]
    ) -> tuple[Int[Array, " R"], Bool[Array, " R"], Bool[Array, " R"]]:
        """Each row's state after one more token, whether its text is whole, and whether nothing may follow.

        After a token that must not come, which beams that are given up and given rows have, the state is as if it
        had not.
        """
        kind = self.classes[self.which[self._entry(prompts)], token].astype(jnp.int32)
        after = self.table[state, kind]
        after = jnp.where(after == NO_WAY, state, after)
        return after, self.distance[after] == 0, self.ends[after]

    def along(self, tokens: Int[Array, "R T"], starts: Int[Array, " R"]) -> Int[Array, "R T"]:
        """Each row's state in front of each slot, where the text of row i is that of prompt i, from `starts` on."""
        prompts = jnp.arange(len(tokens))

        def read(state: Array, slot: Array) -> tuple[Array, Array]:
            after, _, _ = self.advance(state, prompts, tokens[:, slot])
            return jnp.where(slot >= starts, after, state), state

        return jax.lax.scan(read, self.start(prompts), jnp.arange(tokens.shape[1]))[1].T

    def allowed(self, state: Int[Array, " R"], prompts: Int[Array, " R"], left: Int[Array, " R"]) -> Bool[Array, "R V"]:
        """Which tokens may come next, where `left` more may come after it.

        Of these only such after which the text can still become whole, as long as it can at all.
        """
        after = self.table[state]
        in_time = self.distance[after] <= left[:, None]
        can = (self.distance[state] <= left + 1)[:, None]
        may = (after != NO_WAY) & (in_time | ~can)
        if len(self.classes) == 1:
            return may[:, self.classes[0]]
        return jnp.take_along_axis(may, self.classes[self.which[self._entry(prompts)]].astype(jnp.int32), axis=1)

    def sha256(self) -> str:
        """Of all that decides which tokens may come."""
        parts = (np.ascontiguousarray(part) for part in vars(self).values())
        return hashlib.sha256(b"".join(part.astype("<i4").tobytes() for part in parts)).hexdigest()

    def check_room(self, room: Int[np.ndarray, " B"]) -> None:
        """Raise `JaxgenError` for a prompt whose shortest text needs more than the new tokens that it may get."""
        starts = np.asarray(self.starts)
        needed = np.asarray(self.distance)[np.resize(starts, max(len(room), len(starts)))[: len(room)]]
        if (short := np.flatnonzero(needed > room)).size:
            row = int(short[0])
            raise too_long(f" of row {row}", int(needed[row]), int(room[row]))

    def _entry(self, prompts: Int[Array, " R"]) -> Int[Array, " R"]:
        return jnp.minimum(prompts, len(self.starts) - 1)


@dataclasses.dataclass(frozen=True)
class Automaton:
    """One constraint, on the host."""

    classes: Int[np.ndarray, " V"]
    table: Int[np.ndarray, "S C"]  # state 0 is the start
    distance: Int[np.ndarray, " S"]
    ends: Bool[np.ndarray, " S"]

    @staticmethod
    def fits(arrays: Arrays, vocab_size: int) -> bool:
        """Whether arrays of a file are one over so many tokens."""
        if arrays.keys() != {"classes", "table", "distance", "ends"}:
            return False
        classes, table, distance, ends = (arrays[name] for name in ("classes", "table", "distance", "ends"))
        kinds = [each.dtype for each in (classes, table, distance, ends)]
        if kinds != [np.int16, np.int32, np.int32, bool] or table.ndim != 2 or table.size == 0:
            return False
        states, columns = table.shape
        inside = (
            (classes >= 0).all() and (classes < columns).all() and (table >= NO_WAY).all() and (table < states).all()
        )
        shapes = classes.shape == (vocab_size,) and distance.shape == ends.shape == (states,)
        return bool(inside and shapes and (distance >= 0).all())


def checked(value: object, prompts: int) -> list[Constraint | Grammar | None]:
    """What a call is constrained by: one for all prompts, or one for each; raises `JaxgenError` for anything else."""
    if isinstance(value, Constraint | Grammar):
        return [value]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise JaxgenError(f"constraint={shown(value)} is none; use jaxgen.regex, choice, json_schema or grammar")
    if len(value) != prompts:
        raise JaxgenError(f"constraint is a list of {len(value)}, and there are {prompts} prompts; pass one for each")
    for row, each in enumerate(value):
        if each is not None and not isinstance(each, Constraint | Grammar):
            raise JaxgenError(f"constraint[{row}]={shown(each)} is none, nor None; use jaxgen.regex or such")
    return list(value)


def has_grammar(value: object) -> bool:
    """Whether the constraint of a call is a `Grammar`, or one in it is."""
    return any(isinstance(one, Grammar) for one in (value if isinstance(value, Sequence) else [value]))


def specials_of(tokenizer: Any) -> frozenset[int]:
    """The ids of tokens that are no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}


def too_long(whose: str, needed: int, room: int) -> JaxgenError:
    """What is wrong where not even the shortest text fits."""
    return JaxgenError(
        f"constraint: the shortest text{whose} takes {needed} tokens, and there is room for {room}; "
        "raise max_new_tokens"
    )


def automaton_of(constraint: Constraint | None, tokenizer: Any, vocab_size: int, eos: tuple[int, ...]) -> Automaton:
    """The automaton of one constraint, or of None: everything may come. The newest are kept.

    Raises `JaxgenError` for patterns and tokenizers that cannot be used, and where no text can be spelled.
    """
    vocabulary = vocabulary_of(tokenizer, "constraint")
    return _automaton(constraint, vocabulary, specials_of(tokenizer), vocab_size, eos)


@functools.lru_cache(16)
def _automaton(
    constraint: Constraint | None,
    vocabulary: Vocabulary,
    specials: frozenset[int],
    vocab_size: int,
    eos: tuple[int, ...],
) -> Automaton:
    if constraint is None:  # one state, in which everything may come
        table, distance = np.array([[NO_WAY, 0]], np.int32), np.array([FREE], np.int32)
        return Automaton(np.ones(vocab_size, np.int16), table, distance, np.zeros(1, bool))
    asked = (_FORM, _library(), constraint.pattern, vocabulary.sha256, sorted(specials), vocab_size, eos)

    def build() -> Arrays:
        return vars(_built(constraint.pattern, vocabulary, specials, vocab_size, eos))

    def fits(arrays: Arrays) -> bool:
        return Automaton.fits(arrays, vocab_size)

    return Automaton(**kept(hashlib.sha256(repr(asked).encode()).hexdigest(), build, fits))


def _library() -> str:
    """The version of what builds automata, where it is installed: another one may read a pattern otherwise."""
    try:
        return importlib.metadata.version("outlines-core")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _built(
    pattern: str, vocabulary: Vocabulary, specials: frozenset[int], vocab_size: int, eos: tuple[int, ...]
) -> Automaton:
    name = f"constraint: the pattern {shown(pattern)}"
    over_bytes = byte_automaton(pattern)
    kinds, functions = lift(over_bytes.step * 2, vocabulary, name)
    moves = functions >> 1
    # Kinds: of text, and of end tokens, after which the text must be whole; anything else may come nowhere.
    text_of = np.full(vocab_size, -1)
    known = (vocabulary.ids < vocab_size) & (kinds != SILENT)
    text_of[vocabulary.ids[known]] = kinds[known]
    text_of[[token for token in specials if token < vocab_size]] = -1
    used, column = np.unique(text_of[text_of >= 0], return_inverse=True)
    columns, number = moves[used], text_of.copy()
    number[text_of >= 0] = column
    for token in eos:
        said = np.arange(len(over_bytes.step)) if text_of[token] < 0 else moves[text_of[token]]
        number[token] = len(columns)
        columns = np.concatenate([columns, np.where(over_bytes.final[said], said, DEAD)[None]])
    enders = np.arange(len(columns)) >= len(used)
    reachable = _reachable(columns[~enders], over_bytes.start)
    distance = _distances(columns[~enders], over_bytes.final & reachable)
    alive = reachable & (distance >= 0)
    alive[DEAD] = False
    if not alive[over_bytes.start]:
        raise JaxgenError(f"{name}: the tokens of this model cannot spell any text that matches it")
    # Only states that are alive, the start first; only classes that differ in these.
    kept = np.flatnonzero(alive)
    kept = np.concatenate([[over_bytes.start], kept[kept != over_bytes.start]])
    new = np.full(len(alive), NO_WAY)
    new[kept] = np.arange(len(kept))
    rows = np.concatenate([np.full((1, len(kept)), NO_WAY), new[columns[:, kept]]])
    distinct, classes = np.unique(rows, axis=0, return_inverse=True)
    classes = classes.reshape(-1)
    order = np.argsort(np.arange(len(distinct)) != classes[0], kind="stable")  # the forbidden one first
    place = np.argsort(order)[classes]
    if len(distinct) > MOST_CLASSES:
        raise JaxgenError(f"{name} tells {len(distinct)} classes of tokens apart, more than {MOST_CLASSES}")
    by_token = np.where(number >= 0, place[number + 1], _FORBIDDEN).astype(np.int16)
    table = distinct[order].T.astype(np.int32)
    ends = over_bytes.final[kept] & (table == NO_WAY).all(axis=1)
    if ends[0]:
        raise JaxgenError(f"{name}: only the empty text matches, and there is no end token to say so; set eos_token_id")
    return Automaton(by_token, table, distance[kept].astype(np.int32), ends)


def _reachable(columns: Int[np.ndarray, "C S"], start: int) -> Bool[np.ndarray, " S"]:
    """Which states some tokens lead to."""
    seen = np.zeros(columns.shape[1], bool)
    seen[start], front = True, np.array([start])
    while front.size:
        following = np.unique(columns[:, front])
        front = following[~seen[following]]
        seen[front] = True
    return seen


def _distances(columns: Int[np.ndarray, "C S"], final: Bool[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
    """How many tokens each state is from a final one at least; -1: it leads to none."""
    distance = np.where(final, 0, -1)
    for step in range(1, columns.shape[1] + 1):
        open_ = np.flatnonzero(distance < 0)
        closer = open_[(distance[columns[:, open_]] == step - 1).any(axis=0)]
        if not closer.size:
            break
        distance[closer] = step
    return distance
