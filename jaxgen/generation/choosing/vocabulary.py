"""What each token of a vocabulary says, as bytes, and automata over bytes lifted to automata over its tokens.

Bytes, because a token may hold a part of a character.
"""

import dataclasses
import functools
import hashlib
import json
import re
import weakref
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxgen.errors import JaxgenError

MOST_ENTRIES = 1 << 24  # states times kinds of tokens, 64 MB
# Kinds of tokens: one that says nothing leaves the state alone, one that the tokenizer does not know resets it.
SILENT, UNKNOWN = 0, 1
# A tokenizer may drop a space at the start of a text, so tokens are decoded behind this one, as in transformers.
BEFORE = "abcdef"
BYTE_TOKEN = re.compile(r"<0x([0-9a-fA-F]{2})>")


def lift(
    step: Int[np.ndarray, "N 256"], vocabulary: "Vocabulary", name: str
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, "kinds N"]]:
    """What each token does to each state: the kind of each token of the vocabulary, and per kind a function.

    An entry of `step` is 2 * the next state + a mark, which stays on what follows in the token; a function is a row
    of such entries. All tokens are read at once, byte by byte, and what matters of the bytes read so far is only their
    function. There are few functions, so what a byte makes of each is worked out once. Raises `JaxgenError` for the
    option `name` if this is more than fits.
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
                        f"{name}: {len(step) - 1} states times {len(functions)} kinds of tokens are a table of more "
                        f"than {MOST_ENTRIES} entries; ask for less, or for something shorter"
                    )
        kinds[:longer] = moves.ravel()[pairs]
    return kinds, np.stack(functions)


@dataclasses.dataclass(frozen=True, eq=False)  # equal only if the same: it is a key of the cache
class Vocabulary:
    """The bytes that each token stands for; the longest tokens come first."""

    size: int  # of the tokenizer when it was read
    ids: np.ndarray
    text: np.ndarray  # uint8: all tokens, one after the other
    starts: np.ndarray  # where in `text` each begins
    longer: np.ndarray  # how many tokens have more than 0, 1, 2... bytes

    @functools.cached_property
    def sha256(self) -> str:
        """Of what each token says."""
        numbers = (np.ascontiguousarray(x).astype("<i8").tobytes() for x in (self.ids, self.starts, self.longer))
        return hashlib.sha256(b"".join((*numbers, self.text.tobytes()))).hexdigest()

    def texts(self) -> dict[int, bytes]:
        """The bytes of each token, by its id."""
        # The longest come first, so of the first `longer[n]` all have more than n bytes.
        lengths = np.searchsorted(-self.longer, -np.arange(1, len(self.ids) + 1), side="right")
        whole = self.text.tobytes()
        return {
            index: whole[start : start + length]
            for index, start, length in zip(self.ids.tolist(), self.starts.tolist(), lengths.tolist(), strict=True)
        }


_vocabularies: "weakref.WeakKeyDictionary[Any, Vocabulary]" = weakref.WeakKeyDictionary()


def vocabulary_of(tokenizer: Any, name: str) -> Vocabulary:
    """The tokenizer's vocabulary, read once, and again when tokens were added.

    Raises `JaxgenError` for the option `name` if `tokenizer` is none of transformers', or what its tokens say is not
    known.
    """
    if tokenizer is None:
        raise JaxgenError(f"{name} needs tokenizer=: the tokenizer says what text each token stands for")
    if not (hasattr(tokenizer, "get_vocab") and hasattr(tokenizer, "convert_tokens_to_string")):
        raise JaxgenError(f"tokenizer is {type(tokenizer).__name__}; {name} needs a tokenizer of transformers")
    known = _vocabularies.get(tokenizer)
    if known is None or known.size != len(tokenizer):
        known = _vocabularies[tokenizer] = _read_vocabulary(tokenizer, name)
    return known


def _read_vocabulary(tokenizer: Any, name: str) -> Vocabulary:
    vocabulary = tokenizer.get_vocab()
    texts = _texts(tokenizer, list(vocabulary), name)
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    order = np.argsort(-lengths, kind="stable")
    return Vocabulary(
        size=len(tokenizer),
        ids=np.fromiter(vocabulary.values(), np.int64, len(texts))[order],
        text=np.frombuffer(b"".join(texts), np.uint8),
        starts=(np.cumsum(lengths) - lengths)[order],
        longer=np.cumsum(np.bincount(lengths)[::-1])[::-1][1:],
    )


def _texts(tokenizer: Any, tokens: list[str], name: str) -> list[bytes]:
    """The bytes that each token adds to a text, special tokens included (they stand for their names).

    Source: `clean_tokenizer_vocab` of transformers' `StopStringCriteria`, which treats these tokenizers likewise.
    """
    kinds = _decoder_kinds(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
    spelled = _byte_token if "ByteFallback" in kinds else _byte_level if "ByteLevel" in kinds else lambda token: None
    texts = {token: text for token in tokens if (text := spelled(token)) is not None}
    if rest := [token for token in tokens if token not in texts]:
        before = tokenizer.convert_ids_to_tokens(tokenizer(BEFORE, add_special_tokens=False)["input_ids"])
        texts.update((token, _decoded(tokenizer, before, token, name)) for token in rest)
    return [texts[token] for token in tokens]


def _decoded(tokenizer: Any, before: list[str], token: str, name: str) -> bytes:
    """What the token adds to the text of the tokens `before`, which stand for `BEFORE`."""
    text = tokenizer.convert_tokens_to_string([*before, token])
    _, found, added = text.partition(BEFORE)
    if not found:
        raise JaxgenError(
            f"{name}: the tokenizer makes {text!r} of {BEFORE!r} and the token {token!r}, so what the token "
            f"adds to a text is not known; without {name} this tokenizer can be used"
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
