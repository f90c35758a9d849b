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
import json
import re
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxgen.errors import JaxgenError, shown
from jaxgen.generation.prompts.layout import bucket
from jaxgen.pytree import pytree

SMALLEST_TABLE = 1 << 14  # entries; most sets of stop strings need fewer, so they share one compiled loop
BUILDS_KEPT = 8
MOST_BYTES = 1 << 14  # of all stop strings together: each is a state
MOST_ENTRIES = 1 << 24  # states times kinds of tokens, 64 MB
# Kinds of tokens: one that says nothing leaves the state alone, one that the tokenizer does not know resets it.
SILENT, UNKNOWN = 0, 1
# A tokenizer may drop a space at the start of a text, so tokens are decoded behind this one, as in transformers.
BEFORE = "abcdef"
BYTE_TOKEN = re.compile(r"<0x([0-9a-fA-F]{2})>")


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
        if tokenizer is None:
            raise JaxgenError("stop_strings needs tokenizer=: the tokenizer says what text each token stands for")
        return _build(_vocabulary(tokenizer), encoded, vocab_size)

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
def _build(vocabulary: "_Vocabulary", strings: tuple[bytes, ...], vocab_size: int) -> StopStrings:
    kinds, functions = _lift(_automaton(strings), vocabulary)
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


def _lift(step: Int[np.ndarray, "N 256"], vocabulary: "_Vocabulary") -> tuple[np.ndarray, np.ndarray]:
    """What each token does to each state: the kind of each token of the vocabulary, and per kind a function.

    A function is a row of `states` entries, each as in `_automaton`. All tokens are read at once, byte by byte, and
    what matters of the bytes read so far is only their function. There are few functions, so what a byte makes of
    each is worked out once.
    """
    letters = np.flatnonzero((step > 0).any(axis=0))  # all other bytes lead to state 0
    letter_of = np.zeros(256, np.int64)
    letter_of[letters] = np.arange(1, len(letters) + 1)
    step = np.column_stack([np.zeros(len(step), np.int32), step[:, letters]])
    text = letter_of[vocabulary.text]

    states = np.arange(len(step), dtype=np.int32)
    functions = [states * 2, states * 0]  # SILENT, UNKNOWN
    number = {function.tobytes(): kind for kind, function in enumerate(functions)}
    moves = np.full((0, step.shape[1]), -1)  # the kind that a kind becomes through one more letter; -1: not asked yet
    kinds = np.full(len(vocabulary.ids), SILENT)
    for position, longer in enumerate(vocabulary.longer):
        moves = np.pad(moves, ((0, len(functions) - len(moves)), (0, 0)), constant_values=-1)
        pairs = kinds[:longer] * moves.shape[1] + text[vocabulary.starts[:longer] + position]
        for pair in np.unique(pairs[moves.ravel()[pairs] < 0]):
            kind, letter = divmod(int(pair), moves.shape[1])
            function = step[functions[kind] >> 1, letter] | functions[kind] & 1
            moves[kind, letter] = number.setdefault(function.tobytes(), len(functions))
            if moves[kind, letter] == len(functions):
                functions.append(function)
                if len(functions) * len(step) > MOST_ENTRIES:
                    raise JaxgenError(
                        f"stop_strings: {len(step) - 1} beginnings of strings times {len(functions)} kinds of tokens "
                        f"are a table of more than {MOST_ENTRIES} entries; pass fewer or shorter strings"
                    )
        kinds[:longer] = moves.ravel()[pairs]
    return kinds, np.stack(functions)


@dataclasses.dataclass(frozen=True, eq=False)  # equal only if the same: it is a key of the cache
class _Vocabulary:
    """The bytes that each token stands for; the longest tokens come first."""

    size: int  # of the tokenizer when it was read
    ids: np.ndarray
    text: np.ndarray  # uint8: all tokens, one after the other
    starts: np.ndarray  # where in `text` each begins
    longer: np.ndarray  # how many tokens have more than 0, 1, 2... bytes


_vocabularies: "weakref.WeakKeyDictionary[Any, _Vocabulary]" = weakref.WeakKeyDictionary()


def _vocabulary(tokenizer: Any) -> _Vocabulary:
    """The tokenizer's vocabulary, read once, and again when tokens were added."""
    if not (hasattr(tokenizer, "get_vocab") and hasattr(tokenizer, "convert_tokens_to_string")):
        raise JaxgenError(f"tokenizer is {type(tokenizer).__name__}; stop_strings needs a tokenizer of transformers")
    known = _vocabularies.get(tokenizer)
    if known is None or known.size != len(tokenizer):
        known = _vocabularies[tokenizer] = _read_vocabulary(tokenizer)
    return known


def _read_vocabulary(tokenizer: Any) -> _Vocabulary:
    vocabulary = tokenizer.get_vocab()
    texts = _texts(tokenizer, list(vocabulary))
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    order = np.argsort(-lengths, kind="stable")
    return _Vocabulary(
        size=len(tokenizer),
        ids=np.fromiter(vocabulary.values(), np.int64, len(texts))[order],
        text=np.frombuffer(b"".join(texts), np.uint8),
        starts=(np.cumsum(lengths) - lengths)[order],
        longer=np.cumsum(np.bincount(lengths)[::-1])[::-1][1:],
    )


def _texts(tokenizer: Any, tokens: list[str]) -> list[bytes]:
    """The bytes that each token adds to a text, special tokens included (they stand for their names).

    Source: `clean_tokenizer_vocab` of transformers' `StopStringCriteria`, which treats these tokenizers likewise.
    """
    kinds = _decoder_kinds(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
    spelled = _byte_token if "ByteFallback" in kinds else _byte_level if "ByteLevel" in kinds else lambda token: None
    texts = {token: text for token in tokens if (text := spelled(token)) is not None}
    if rest := [token for token in tokens if token not in texts]:
        before = tokenizer.convert_ids_to_tokens(tokenizer(BEFORE, add_special_tokens=False)["input_ids"])
        texts.update((token, _decoded(tokenizer, before, token)) for token in rest)
    return [texts[token] for token in tokens]


def _decoded(tokenizer: Any, before: list[str], token: str) -> bytes:
    """What the token adds to the text of the tokens `before`, which stand for `BEFORE`."""
    text = tokenizer.convert_tokens_to_string([*before, token])
    _, found, added = text.partition(BEFORE)
    if not found:
        raise JaxgenError(
            f"stop_strings: the tokenizer makes {text!r} of {BEFORE!r} and the token {token!r}, so what the token "
            "adds to a text is not known; without stop_strings this tokenizer can be used"
        )
    return added.encode()


def _decoder_kinds(decoder: object) -> set[str]:
    """The names of a `tokenizers` decoder and of those inside it; empty for None."""
    if decoder is None:
        return set()
    kinds, left = {type(decoder).__name__}, []
    if hasattr(decoder, "__getstate__") and isinstance(state := decoder.__getstate__(), bytes | str):
        left.append(json.loads(state))
    while left:
        part = left.pop()
        if isinstance(part, dict):
            kinds.update({part["type"]} if "type" in part else ())  # a pattern inside has none
            left.extend(part.values())
        elif isinstance(part, list):
            left.extend(part)
    return kinds


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies, as GPT-2 introduced them."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


def _byte_level(token: str) -> bytes | None:
    """The bytes of a byte-level token; None if it is not one (an added token with a space in it, for example)."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, token))
    except KeyError:
        return None


def _byte_token(token: str) -> bytes | None:
    """The byte that a token like <0x0A> stands for; None for other tokens."""
    found = BYTE_TOKEN.fullmatch(token)
    return bytes.fromhex(found[1]) if found else None
