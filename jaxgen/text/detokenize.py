"""From ids to text piece by piece: only text that nothing can change any more, at a cost that does not grow.

Ids cannot be decoded one by one: a character may be spread over several, and whether a word has a space in front
depends on what precedes it. So a window of the latest ids is decoded again and again, and shortened where that can
be seen to change nothing.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how tokenizers show the first bytes of a character
_CONTEXT = 8  # ids that stay in the window: more than any character has bytes
_LONGEST = 32  # ids in a window before it is shortened
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # how Llama's tokenizers write a byte that is part of no token
# Scripts that put no spaces between words: Chinese, Japanese, Thai, Lao, Burmese, Khmer.
_NO_SPACES = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3000, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF), (0xFF00, 0xFFEF), (0x20000, 0x2A6DF), (0x2A700, 0x2CEAF), (0x2F800, 0x2FA1F),
)  # fmt: skip


class Detokenizer:
    """One row's text as its ids arrive; joined, it is `continuation(tokenizer, prompt, all ids)`.

    >>> _, tokenizer = getfixture("demo")
    >>> detokenizer = Detokenizer(tokenizer, prompt=tokenizer("Hi ")["input_ids"])
    >>> first, second = tokenizer("é", add_special_tokens=False)["input_ids"]
    >>> [detokenizer.push([first]), detokenizer.push([second]), detokenizer.finish()]
    ['', 'é', '']
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        added = getattr(tokenizer, "added_tokens_decoder", {}) if skip_special_tokens else {}
        self._hidden = frozenset(token for token, entry in added.items() if entry.special)
        visible = self._visible(prompt)
        start = self._character_start(visible, len(visible) - _CONTEXT)
        self._window = visible[start:]
        if not self._decode(self._window):  # no context at all: then the first space may be lost, or not
            self._window = visible
        self._given = len(self._decode(self._window))  # characters of the window's text that are given out

    def push(self, ids: Iterable[int]) -> str:
        """Take the next ids, and give the text that is certain now."""
        self._window += self._visible(ids)
        # A run of bytes is text or not as a whole: nothing is known before it ends.
        if not self._window or self._is_byte(self._window[-1]):
            return ""
        text = self._decode(self._window)
        settled = len(text) - text.endswith(_UNFINISHED)
        piece = text[self._given : settled]
        self._given = max(self._given, settled)
        if len(self._window) > _LONGEST:
            self._shorten(text)
        return piece

    def finish(self) -> str:
        """The rest, half a character at the end included."""
        text = self._decode(self._window)
        piece, self._given = text[self._given :], len(text)
        return piece

    def _shorten(self, text: str) -> None:
        """Drop the oldest ids, if the rest then means the same."""
        for cut in range(len(self._window) - _CONTEXT, len(self._window) - 2 * _CONTEXT, -1):
            start = self._character_start(self._window, cut)
            tail = self._decode(self._window[start:])
            complete = not text.endswith(_UNFINISHED)
            # An unfinished character may be what the text ends with for ever, if the model writes bytes at random.
            if not complete and len(self._window) > 4 * _LONGEST:
                complete = self._decode(self._window[:start]) + tail == text
            given = self._given - len(text) + len(tail)
            if complete and tail and text.endswith(tail) and given >= 0:
                self._window, self._given = self._window[start:], given
                return

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def _visible(self, ids: Iterable[int]) -> list[int]:
        return [token for token in ids if token not in self._hidden]

    def _is_byte(self, token: int) -> bool:
        return _BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or "") is not None

    def _character_start(self, ids: list[int], start: int) -> int:
        """The nearest position from `start` to the left that is not inside a run of byte tokens."""
        start = max(start, 0)
        while start > 0 and self._is_byte(ids[start]):
            start -= 1
        return start


class Words:
    """Holds back the last word until it is whole, and all that may be the beginning of a stop string.

    `stops`: strings at which the text ends; they are not part of it. Text is shown up to the last space or newline, and
    every character of scripts without spaces. Source: transformers' `TextStreamer` until 5.23; from 5.24 it shows the
    pieces of a word too, as they come.

    >>> words = Words()
    >>> [words.push("one, tw"), words.push("o, three"), words.finish("!")]
    ['one, ', 'two, ', 'three!']
    """

    def __init__(self, stops: Sequence[str] = ()):
        self._stops, self._held, self._stopped = tuple(stops), "", False

    def push(self, text: str) -> str:
        """Take more text, and give what can be shown."""
        return self._take(text, last=False)

    def finish(self, text: str = "") -> str:
        """Take the last text, and give all that was held back."""
        return self._take(text, last=True)

    def _take(self, text: str, last: bool) -> str:
        if self._stopped:
            return ""
        self._held += text
        starts = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        self._stopped = bool(starts)
        if starts:
            end = min(starts)
        elif last:
            end = len(self._held)
        else:
            end = min(_whole_words(self._held), len(self._held) - self._possible_stop())
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def _possible_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0


def _whole_words(text: str) -> int:
    """Where the last word that may go on begins."""
    for end in range(len(text), 0, -1):
        code = ord(text[end - 1])
        if text[end - 1] in " \n" or any(first <= code <= last for first, last in _NO_SPACES):
            return end
    return 0
