"""Grammars over the tokens of a vocabulary, read on the host: which tokens may come next, a bit for each.

A grammar has no table that fits a device, so one token is drawn at a time, and before each the host says what may come.
"""

import copy
import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxgen.constraints.grammars import Grammar, as_lark, refused
from jaxgen.errors import JaxgenError
from jaxgen.generation.choosing.constrained import checked, specials_of
from jaxgen.generation.choosing.stop import LENGTH, RUNNING
from jaxgen.generation.choosing.vocabulary import Vocabulary, vocabulary_of

_BITS = 32


class Grammars:
    """The grammars of a call, one per prompt, or one for all; None: nothing is asked of it here.

    `bits` [N, ceil(V / 32)] says what each prompt's text may begin with: bit j of word w stands for token 32 w + j.
    """

    def __init__(self, given: Sequence[Grammar | None], tokens: "_Tokens", eos: tuple[int, ...]):
        self.given, self._tokens, self._eos = given, tokens, eos
        self._kind = Walk
        self.bits = self.walk(range(len(given))).bits

    @classmethod
    def of(cls, value: object, tokenizer: Any, prompts: int, vocab_size: int, eos: tuple[int, ...]) -> "Grammars":
        """Those among the constraints of a call.

        Raises `JaxgenError` for grammars that cannot be read, or of which this vocabulary spells no text.
        """
        given = [one if isinstance(one, Grammar) else None for one in checked(value, prompts)]
        try:
            import llguidance  # noqa: F401
        except ImportError as error:
            raise JaxgenError("constraint: a grammar needs llguidance: pip install llguidance") from error
        tokens = _tokens(vocabulary_of(tokenizer, "constraint"), specials_of(tokenizer), vocab_size)
        return cls(given, tokens, eos)

    def walk(self, prompts: Iterable[int]) -> "Walk":
        """Rows at the beginning of the texts for these prompts."""
        return self._kind(self._of(prompts), self._tokens, self._eos)

    def _of(self, prompts: Iterable[int]) -> list[Grammar | None]:
        return [self.given[min(prompt, len(self.given) - 1)] for prompt in prompts]

    def of_given(self) -> "Grammars":
        """The same for rows whose tokens are given, and not drawn."""
        other = copy.copy(self)
        other._kind = WalkOfGiven
        return other

    def along(
        self, tokens: Int[np.ndarray, "R T"], starts: Int[np.ndarray, " R"], lengths: Int[np.ndarray, " R"]
    ) -> Int[np.ndarray, "R T W"]:
        """What may come in each slot of given rows, where the text of row i is that of prompt i, from `starts` on."""
        walk = WalkOfGiven(self._of(range(len(tokens))), self._tokens, self._eos)
        bits = np.full((*tokens.shape, walk.bits.shape[1]), -1, np.int32)
        for row, (start, end) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            for slot in range(start, end):
                bits[row, slot] = walk.bits[row]
                walk.read(row, int(tokens[row, slot]))
        return bits

    def sha256(self) -> str:
        """Of all that decides which tokens may come."""
        digest = hashlib.sha256(self._tokens.sha256().encode())
        for grammar in self.given:
            digest.update(f"{grammar and (grammar.syntax, grammar.text)}".encode())
        return digest.hexdigest()


class Walk:
    """Where each row is in its grammar, and in `bits` what may come next."""

    def __init__(self, grammars: Sequence[Grammar | None], tokens: "_Tokens", eos: tuple[int, ...]):
        self._grammars, self._tokens, self._eos = grammars, tokens, eos
        self._matchers = [None if grammar is None else _compiled(grammar, tokens).deep_copy() for grammar in grammars]
        self._taken = np.zeros(len(grammars), np.int32)  # new tokens of each row, as far as they were read
        self.bits = np.full((len(grammars), tokens.words), -1, np.int32)
        for row, matcher in enumerate(self._matchers):
            if matcher is not None and not self._look(row, matcher):
                raise refused(self._given(row), _why(matcher, "any text that it makes"))

    def take(
        self,
        tokens: Int[np.ndarray, "R S"],
        lengths: Int[np.ndarray, " R"],
        status: Int[np.ndarray, " R"],
        new: Int[np.ndarray, " R"],
    ) -> Bool[np.ndarray, " R"]:
        """Read the token that rows have been given since the last time; which rows are complete by it; `new` have they.

        Raises `JaxgenError` for a row to which nothing may come and whose text is not whole.
        """
        complete = np.zeros(len(status), bool)
        before, self._taken = self._taken, new
        for row, matcher in enumerate(self._matchers):
            if matcher is None or new[row] == before[row] or status[row] not in (RUNNING, LENGTH):
                continue
            token = int(tokens[row, lengths[row] - 1])
            if not matcher.consume_token(token):
                raise refused(self._given(row), f"row {row}: {matcher.get_error() or f'token {token} does not fit'}")
            if status[row] == LENGTH:
                complete[row] = matcher.is_accepting()
            elif not self._look(row, matcher):
                if not matcher.is_accepting():
                    raise refused(self._given(row), f"row {row}: {_why(matcher, 'how its text goes on')}")
                complete[row] = True
        return complete

    def may(self, row: int, token: int) -> bool:
        """Whether a token may come next."""
        return bool(self.bits[row, token // _BITS] >> token % _BITS & 1)

    def _look(self, row: int, matcher: Any) -> bool:
        """See what may come next in a row; whether anything may."""
        from llguidance.numpy import fill_next_token_bitmask

        known = np.zeros((1, self._tokens.reader_words), np.int32)
        fill_next_token_bitmask(matcher, known)
        bits, accepting = known[0, : self._tokens.words], matcher.is_accepting()
        if (beyond := self._tokens.vocab_size % _BITS) and len(bits) == self._tokens.words:
            bits[-1] &= (1 << beyond) - 1
        for token in self._eos:
            word, bit = token // _BITS, np.uint32(1 << token % _BITS).astype(np.int32)
            whole = bool(bits[word] & bit) and self._whole_with(matcher, token)
            whole |= accepting and not self._tokens.texts[token]
            bits[word] = bits[word] | bit if whole else bits[word] & ~bit
        self.bits[row] = bits
        return bool(bits.any())

    def _whole_with(self, matcher: Any, token: int) -> bool:
        """Whether the text is whole after an end token that says something, or that the grammar names."""
        ahead = matcher.deep_copy()
        return ahead.consume_token(token) and ahead.is_accepting()

    def _given(self, row: int) -> Grammar:
        grammar = self._grammars[row]
        assert grammar is not None
        return grammar


class WalkOfGiven(Walk):
    """Rows that are given their tokens: one that may not come is as if it had not, and nothing ends a row."""

    def take(
        self,
        tokens: Int[np.ndarray, "R S"],
        lengths: Int[np.ndarray, " R"],
        status: Int[np.ndarray, " R"],
        new: Int[np.ndarray, " R"],
    ) -> Bool[np.ndarray, " R"]:
        """Read the token that rows have been given since the last time, and end none."""
        before, self._taken = self._taken, new
        for row in np.flatnonzero(new > before):
            self.read(int(row), int(tokens[row, lengths[row] - 1]))
        return np.zeros(len(status), bool)

    def read(self, row: int, token: int) -> None:
        """Go on in one row."""
        matcher = self._matchers[row]
        if matcher is None or not self.may(row, token):
            return
        ahead = matcher.deep_copy()
        if ahead.consume_token(token):  # not so an end token of which the grammar knows nothing
            self._matchers[row] = ahead
            self._look(row, ahead)


def _why(matcher: Any, what: str) -> str:
    """Why nothing may come in a text that is not whole: for want of tokens, or because a limit was reached."""
    said = matcher.get_error()
    return f"the tokens of this model cannot spell {what}" if not said or "NoExtension" in said else said


@functools.lru_cache(64)
def _compiled(grammar: Grammar, tokens: "_Tokens") -> Any:
    """The `llguidance.LLMatcher` of a grammar at its beginning, which is copied; raises `JaxgenError` for none."""
    from llguidance import LLMatcher, LLParserLimits

    read = LLMatcher.grammar_from_lark(as_lark(grammar))
    matcher = LLMatcher(tokens.reader, read, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if matcher.is_error():
        raise refused(grammar, matcher.get_error())
    return matcher


class _Tokens:
    """A vocabulary as `llguidance` knows it: the bytes of each token, and behind them an end that no model has.

    What ends a text is a matter of the call, so the library is told of none of its end tokens.
    """

    def __init__(self, vocabulary: Vocabulary, specials: frozenset[int], vocab_size: int):
        from llguidance import LLTokenizer, TokenizerWrapper

        self.vocab_size = vocab_size
        self.words, self.reader_words = -(-vocab_size // _BITS), -(-(vocab_size + 1) // _BITS)
        said = vocabulary.texts()
        self.texts = [b"" if token in specials else said.get(token, b"") for token in range(vocab_size)]
        # The names of special tokens, by which a grammar may ask for them.
        named = [said.get(token, b"") if token in specials else text for token, text in enumerate(self.texts)]
        self.tokens = [*named, b"<end of the text>"]
        self.special_token_ids = [*sorted(token for token in specials if token < vocab_size), vocab_size]
        self.eos_token_id, self.bos_token_id = vocab_size, None
        self.reader = LLTokenizer(TokenizerWrapper(self), n_vocab=vocab_size + 1)

    def __call__(self, text: object) -> list[int]:
        """How a text is tokenized, which only matters for tokens that are forced; nobody asks for these."""
        return []

    def sha256(self) -> str:
        """Of what each token says."""
        parts = (f"{len(text)} ".encode() + text for text in self.tokens)
        return hashlib.sha256(b"".join(parts)).hexdigest()


@functools.lru_cache(4)
def _tokens(vocabulary: Vocabulary, specials: frozenset[int], vocab_size: int) -> _Tokens:
    return _Tokens(vocabulary, specials, vocab_size)
