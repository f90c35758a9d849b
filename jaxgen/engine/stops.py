"""Stop strings of one request, on the host: the automaton of `StopStrings`, a token at a time."""

from typing import Any

import numpy as np

from jaxgen.generation.choosing.stop_strings import StopStrings
from jaxgen.generation.choosing.vocabulary import SILENT


class StopWatch:
    """Where a row is in its stop strings. Another one per row, since rows of one batch have different ones."""

    def __init__(self, stops: StopStrings, prompt: Any):
        self._kinds, self._table = np.asarray(stops.kinds), np.asarray(stops.table)
        self._width, self._state = int(stops.width), 0
        kinds = self._kinds[np.asarray(prompt, np.int32)]
        for kind in kinds[kinds != SILENT][1 - int(stops.longest) or len(kinds) :]:
            self._step(int(kind))

    def first(self, tokens: Any) -> int | None:
        """Take more tokens; the index of the first in which a stop string ends, behind which nothing counts."""
        for index, token in enumerate(tokens):
            if self._step(int(self._kinds[token])):
                return index
        return None

    def _step(self, kind: int) -> bool:
        entry = int(self._table[self._state * self._width + kind])
        self._state = entry >> 1
        return bool(entry & 1)
