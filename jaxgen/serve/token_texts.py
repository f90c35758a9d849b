"""What single tokens say, as texts and as bytes: a token may hold a part of a character."""

from typing import Any

import numpy as np

from jaxgen.engine.handle import Tokens
from jaxgen.errors import JaxgenError
from jaxgen.generation.choosing.vocabulary import vocabulary_of

LEAST = -9999.0  # what OpenAI writes for a log-probability of minus infinity


class TokenTexts:
    """The bytes of each token of a tokenizer; special ones stand for their names."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._bytes = tokenizer, None

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text; nothing for an id that the tokenizer does not have."""
        if self._bytes is None:
            self._bytes = _all_bytes(self._tokenizer)
        return self._bytes.get(token, b"")

    def text_of(self, token: int) -> str:
        """The same as a text, in which parts of characters are replacement characters."""
        return self.bytes_of(token).decode(errors="replace")

    def chat(self, tokens: Tokens, best: int) -> list[dict[str, Any]]:
        """OpenAI's entries of tokens in a chat, each with the `best` most likely ones of its step."""
        top = _top(tokens, best)
        return [
            {
                **self._entry(token, logprob),
                "top_logprobs": [self._entry(*other) for other in others],
            }
            for token, logprob, others in zip(tokens.ids.tolist(), tokens.model_logprobs.tolist(), top, strict=True)
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        said = self.bytes_of(token)
        return {"token": said.decode(errors="replace"), "logprob": max(logprob, LEAST), "bytes": [*said]}

    def completion(self, tokens: Tokens, best: int, offset: int = 0) -> dict[str, Any]:
        """OpenAI's lists of the tokens of a completion, whose text has `offset` characters before them.

        The dictionaries of the most likely tokens have the chosen one besides.
        """
        ids = tokens.ids.tolist()
        texts = [self.text_of(token) for token in ids]
        logprobs = [max(logprob, LEAST) for logprob in tokens.model_logprobs.tolist()]
        tops: list[dict[str, float]] = []
        for said, logprob, others in zip(texts, logprobs, _top(tokens, best), strict=True):
            top: dict[str, float] = {}
            for other, value in others:
                top.setdefault(self.text_of(other), max(value, LEAST))
            tops.append({**top, said: max(logprob, top.get(said, LEAST))})
        lengths = np.cumsum([0, *map(len, texts)])[:-1] if texts else np.zeros(0, int)
        return {
            "tokens": texts,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": (lengths + offset).tolist(),
        }


def _top(tokens: Tokens, best: int) -> list[list[tuple[int, float]]]:
    """The most likely tokens of each step, with their log-probabilities; the chosen one has one only, its own."""
    if not best or tokens.top_ids is None or tokens.top_logprobs is None:
        return [[] for _ in tokens.ids]
    tables = tokens.ids, tokens.model_logprobs, tokens.top_ids, tokens.top_logprobs
    rows = zip(*(table.tolist() for table in tables), strict=True)
    return [
        [(token, own if token == chosen else value) for token, value in zip(ids[:best], values[:best], strict=True)]
        for chosen, own, ids, values in rows
    ]


def _all_bytes(tokenizer: Any) -> dict[int, bytes]:
    try:
        known = vocabulary_of(tokenizer, "logprobs")
    except JaxgenError:  # a tokenizer of its own kind: as good as it can say
        return {token: tokenizer.decode([token]).encode() for token in range(len(tokenizer))}
    places = np.arange(len(known.ids))
    # `longer[k]` tokens, the first ones, have more than k bytes.
    lengths = len(known.longer) - np.searchsorted(known.longer[::-1], places, side="right")
    text = known.text.tobytes()
    spans = zip(known.ids.tolist(), known.starts.tolist(), lengths.tolist(), strict=True)
    return {token: text[start : start + length] for token, start, length in spans}
