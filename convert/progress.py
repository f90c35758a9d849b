"""The one progress bar, for loading and for converting."""

import time
from typing import Any

import jax

LARGE = 256 << 20  # bytes; less is read in a moment, unless something is computed from it
REAL_SECONDS, REAL_COMPUTING = 1.0, 10.0  # of work that is left, for a bar to be worth a line


class ProgressBar:
    """A tqdm bar of bytes that appears after a second, where work is left that is worth waiting for.

    For less than `LARGE` bytes only this process's own computing counts, whatever else keeps the machine busy. Nothing
    is shown where Hugging Face's bars are switched off, nor by any process of a job but the first.
    """

    def __init__(self, total: int, text: str):
        self._total, self._text, self._done, self._bar = total, text, 0, None
        large = total >= LARGE
        self._clock = time.monotonic if large else time.process_time
        self._worth = REAL_SECONDS if large else REAL_COMPUTING
        self._start = self._clock()

    def __enter__(self) -> "ProgressBar":
        return self

    def update(self, count: int) -> None:
        """Say that `count` more bytes are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._is_worth_it():
            self._bar = self._shown()

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def _is_worth_it(self) -> bool:
        seconds = self._clock() - self._start
        left = seconds * (self._total - self._done) / max(1, self._done)
        return seconds >= 1 and left >= self._worth

    def _shown(self) -> Any:
        from huggingface_hub.utils import are_progress_bars_disabled
        from tqdm.auto import tqdm

        off = are_progress_bars_disabled() or jax.process_index() != 0
        return tqdm(total=self._total, initial=self._done, desc=self._text, unit="B", unit_scale=True, disable=off)


def progress_bar(total: int, text: str) -> ProgressBar:
    """The bar of `total` bytes of work."""
    return ProgressBar(total, text)
