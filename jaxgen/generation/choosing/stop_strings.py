"""Stop strings inside the compiled loop: an automaton over bytes, lifted to the tokens of a vocabulary.

A row ends with the first token in which some stop string ends. The token may say more than the stop string does,
and the stop string may have begun in the prompt; one that lies wholly in the prompt does not count. That is what
transformers' `StopStringCriteria` decides, which compares each step's last tokens with every stop string. Here a row
carries one number, the automaton's state, and a step is two small look-ups, however many strings there are.

Tokens are compared as bytes, because a token may hold a part of a character. Where tokens hold whole characters,
that is the same as comparing characters: UTF-8 finds no character inside another one.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxgen.errors import JaxgenError, shown
from jaxgen.generation.choosing.vocabulary import SILENT, UNKNOWN, Vocabulary, lift, vocabulary_of
from jaxgen.generation.prompts.layout import bucket
from jaxgen.pytree import pytree

SMALLEST_TABLE = 1 << 14  # entries; most sets of stop strings need fewer, so they share one compiled loop
BUILDS_KEPT = 8
MOST_BYTES = 1 << 14  # of all stop strings together: each is a state


@pytree
@dataclasses.dataclass(frozen=True)
class StopStrings:
    """Stop strings for one vocabulary, ready for the loop. Other strings mean other numbers, rarely other shapes.

    Tokens that do the same to every state are of one kind, so the table has a column per kind: some dozens.
    """

    kinds: Int[Array, " V"]  # the kind of each token
    table: Int[Array, " E"]  # at state * width + kind: 2 * the next state + whether a stop string ended in the token
    width: Int[Array, ""]  # how many kinds there are
    longest: Int[Array, ""]  # bytes in the longest stop string

    @classmethod
    def of(cls, tokenizer: object, strings: object, vocab_size: int) -> "StopStrings":
        """The automaton of `strings` (a str or several) for a model with `vocab_size` tokens.

        `tokenizer` is one of transformers'. Building takes some tenths of a second the first time a large
        vocabulary is seen; what was built last is kept, until the tokenizer is given more tokens.

        Raises `JaxgenError` if the tokenizer is missing or of another library, if `strings` is not a non-empty str
        or a non-empty sequence of them, and if no token of the vocabulary can end any of them.
        """
        encoded = tuple(sorted({string.encode() for string in checked_strings(strings)}))
        return _build(vocabulary_of(tokenizer, "stop_strings"), encoded, vocab_size)

    def start(self, tokens: Int[Array, "R S"], lengths: Int[Array, " R"]) -> Int[Array, " R"]:
        """The state after each row's first `lengths` tokens; what stands in `tokens` behind them is not read.

        Stop strings that end in these tokens are not reported: they are the past.
        """
        slots = tokens.shape[1]
        kinds = jnp.where(jnp.arange(slots) < lengths[:, None], self.kinds[tokens], SILENT)
        speaks = kinds != SILENT
        # Each token that speaks adds a byte or more, and to the future no more than `longest - 1` bytes matter.
        # So only that many tokens are read, from slot `considered - 1` (the earliest) of the reversed row down to 0.
        followers = jnp.cumsum(speaks[:, ::-1], axis=1)[:, ::-1] - 1
        place = jnp.where(speaks, followers, slots)
        rows = jnp.arange(tokens.shape[0])
        backwards = jnp.full((slots, tokens.shape[0]), SILENT, jnp.int32)
        backwards = backwards.at[place, rows[:, None]].set(kinds, mode="drop")
        considered = jnp.minimum(self.longest - 1, slots)

        def follow(step: Int[Array, ""], state: Int[Array, " R"]) -> Int[Array, " R"]:
            return self.table[state * self.width + backwards[considered - 1 - step]] >> 1

        return jax.lax.fori_loop(0, considered, follow, jnp.zeros(tokens.shape[0], jnp.int32))

    def advance(self, state: Int[Array, " R"], token: Int[Array, " R"]) -> tuple[Int[Array, " R"], Bool[Array, " R"]]:
        """Each row's state after one more token, and whether a stop string ended in that token."""
        entry = self.table[state * self.width + self.kinds[token]]
        return entry >> 1, (entry & 1).astype(bool)


def checked_strings(strings: object) -> tuple[str, ...]:
    """`stop_strings` as the user passes it, as a tuple.

    Raises `JaxgenError`, naming the index and the value, unless it is a non-empty str or a non-empty sequence of
    non-empty strs that UTF-8 can express, of at most MOST_BYTES in all.
    """
    if isinstance(strings, str):
        strings = [strings]
    if not isinstance(strings, Sequence) or isinstance(strings, bytes):
        raise JaxgenError(f"stop_strings={shown(strings)} is not a str or a list of them")
    if not strings:
        raise JaxgenError("stop_strings is an empty list; leave it out (None) for no stop strings")
    for index, string in enumerate(strings):
        if not isinstance(string, str):
            raise JaxgenError(f"stop_strings[{index}]={shown(string)} is {type(string).__name__}; expected a str")
        if not string:
            raise JaxgenError(f"stop_strings[{index}] is empty: it would stop every row at once; remove it")
        try:
            string.encode()
        except UnicodeEncodeError as error:
            raise JaxgenError(
                f"stop_strings[{index}]={shown(string)} is half a character; no token says that"
            ) from error
    size = sum(len(string.encode()) for string in strings)
    if size > MOST_BYTES:
        raise JaxgenError(
            f"stop_strings: {len(strings)} strings of {size} bytes in all are more than {MOST_BYTES} bytes; "
            "for so many, write a stopping criterion"
        )
    return tuple(strings)


@functools.lru_cache(BUILDS_KEPT)
def _build(vocabulary: Vocabulary, strings: tuple[bytes, ...], vocab_size: int) -> StopStrings:
    kinds, functions = lift(_automaton(strings), vocabulary, "stop_strings")
    known = vocabulary.ids < vocab_size
    # Kinds that only occur half-way through a token, or in tokens that the model does not have, need no column.
    columns, renumbered = np.unique(np.concatenate([[SILENT, UNKNOWN], kinds[known]]), return_inverse=True)
    table = functions[columns].T
    if not (table & 1).any():
        texts = [string.decode() for string in strings]
        raise JaxgenError(
            f"stop_strings={shown(texts)}: no token ends any of them; are their characters in the vocabulary?"
        )
    by_id = np.full(vocab_size, UNKNOWN, np.int32)
    by_id[vocabulary.ids[known]] = renumbered[2:]
    flat = np.zeros(bucket(table.size, SMALLEST_TABLE), np.int32)
    flat[: table.size] = table.ravel()
    with jax.ensure_compile_time_eval():  # a caller's own jit must not leave its tracers in the cache
        return StopStrings(
            kinds=jnp.asarray(by_id),
            table=jnp.asarray(flat),
            width=jnp.asarray(table.shape[1], jnp.int32),
            longest=jnp.asarray(max(map(len, strings)), jnp.int32),
        )


def _automaton(strings: tuple[bytes, ...]) -> Int[np.ndarray, "N 256"]:
    """For each state and byte, 2 * the next state + whether a string ends there.

    State 0 knows nothing; the others stand for the non-empty prefixes of the strings, and mean: this prefix, and no
    longer one, is what the text ends with. Source: Aho and Corasick (1975).
    """
    children: list[dict[int, int]] = [{}]
    complete = set()
    for string in strings:
        state = 0
        for byte in string:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
            state = children[state][byte]
        complete.add(state)
    ends = np.isin(np.arange(len(children)), list(complete)).astype(np.int32)
    following = np.zeros((len(children), 256), np.int32)
    fallback = [0] * len(children)  # the state of the longest shorter prefix that the text ends with as well
    queue = deque([0])
    while queue:  # short prefixes first: a fallback is shorter, so it is complete when it is needed
        state = queue.popleft()
        if state:
            following[state] = following[fallback[state]]
        for byte, child in children[state].items():
            fallback[child] = int(following[state, byte])
            ends[child] |= ends[fallback[child]]
            following[state, byte] = child
            queue.append(child)
    return following * 2 + ends[following]
