"""The texts of tokens: what each adds to the text before it, special tokens included.

Joined, they are exactly what the tokenizer's `decode` gives. Of a character that is spread over several tokens, the
last one has the text.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgen.errors import JaxgenError
from jaxgen.text.detokenize import Detokenizer
from jaxgen.text.tokenizer import load_tokenizer, tokenizer_for

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# What has no picture, changes the direction of the text around it, or cannot be written as UTF-8.
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


class Texts:
    """What ids stand for, by a tokenizer; without one, the ids themselves."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._names: dict[int, str] = {}

    @property
    def known(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    def whole(self, ids: Sequence[int]) -> str:
        """The text of a prompt."""
        if self._tokenizer is None:
            return "".join(f"{token} " for token in ids)
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def pieces(self, prompt: Sequence[int], new: Sequence[int]) -> list[str]:
        """What each new token adds to the text."""
        if self._tokenizer is None:
            return [f"{token} " for token in new]
        detokenizer = Detokenizer(self._tokenizer, prompt, skip_special_tokens=False)
        texts = []
        for token, following in zip(new, [*new, None][1:], strict=True):
            text = detokenizer.push([token])
            # A run of bytes is whole when it is over: its text is its own, not that of the token after it.
            if following is None or (detokenizer._is_byte(token) and not detokenizer._is_byte(following)):
                text += detokenizer.finish()
            texts.append(text)
        return texts

    def name(self, token: int) -> str:
        """The text of a token inside a text; if it is no whole characters, what the vocabulary calls it."""
        if self._tokenizer is None:
            return str(token)
        if token not in self._names:
            # After another one, so that a space in front is not lost.
            once, twice = (self.whole([token] * times) for times in (1, 2))
            text = twice[len(once) :] if twice.startswith(once) else once
            raw = self._tokenizer.convert_ids_to_tokens(token)
            self._names[token] = text if text and _UNFINISHED not in text else str(raw)
        return self._names[token]


def tokenizer_of(model: Any, tokenizer: Any = None) -> Any:
    """The tokenizer given, or that of the model's checkpoint; None if there is none."""
    if tokenizer is not None:
        return tokenizer_for(model, tokenizer)
    name = getattr(model, "name_or_path", None)
    if name is None or not Path(name).is_dir():
        return None
    try:
        return _loaded(str(name))
    except JaxgenError:
        return None


@functools.lru_cache(maxsize=4)
def _loaded(directory: str) -> Any:
    return load_tokenizer(Path(directory))


def texts_of(output: Any, tokenizer: Any = None) -> Texts:
    """The texts of an output's tokens, by the tokenizer given or that of the checkpoint."""
    return Texts(tokenizer_of(None if output.origin is None else output.origin.model, tokenizer))


def spelt(text: str) -> str:
    """Text with what cannot be seen as Python writes it: backslashes and numbers."""
    return INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
