"""What a server counts, in Prometheus' text format."""

import bisect
import collections
import threading
from collections.abc import Iterator, Mapping

from jaxgen.engine.handle import Handle

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Histogram:
    """How often a value was at most each of some bounds."""

    def __init__(self, name: str, says: str, bounds: tuple[float, ...]):
        self._name, self._says, self._bounds = name, says, bounds
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self) -> Iterator[str]:
        """As Prometheus reads it."""
        yield from _head(self._name, self._says, "histogram")
        total = 0
        for bound, count in zip([*self._bounds, "+Inf"], self._counts, strict=True):
            total += count
            yield f'{self._name}_bucket{{le="{bound}"}} {total}'
        yield f"{self._name}_sum {self._sum:.6f}"
        yield f"{self._name}_count {total}"


class Metrics:
    """Times of the requests that were answered, and how often one was refused."""

    def __init__(self):
        self._lock = threading.Lock()
        self._first = Histogram(
            "jaxgen_time_to_first_token_seconds", "From a request to its first token, waiting included.", _SECONDS
        )
        self._token = Histogram(
            "jaxgen_time_per_token_seconds", "Between the tokens of an answer, on average.", _TOKEN_SECONDS
        )
        self._whole = Histogram("jaxgen_request_seconds", "From a request to its last token.", _SECONDS)
        self._refused = collections.Counter[int]()

    def observe(self, handle: Handle, tokens: int) -> None:
        """Count a request that has ended, with so many new tokens."""
        if handle.first_token is None or handle.finished is None:
            return
        with self._lock:
            self._first.add(handle.first_token - handle.submitted)
            self._whole.add(handle.finished - handle.submitted)
            if tokens > 1:
                self._token.add((handle.finished - handle.first_token) / (tokens - 1))

    def refused(self, status: int) -> None:
        """Count a request that was not carried out."""
        with self._lock:
            self._refused[status] += 1

    def text(self, stats: Mapping[str, int], connections: int) -> str:
        """All of it; `stats` are the engine's."""
        lines: list[str] = []
        for name, says in _GAUGES.items():
            lines += [*_head(f"jaxgen_{name}", says, "gauge"), f"jaxgen_{name} {stats.get(name, 0)}"]
        lines += [*_head("jaxgen_connections", "Requests that are being answered.", "gauge")]
        lines += [f"jaxgen_connections {connections}"]
        for name, says in _COUNTERS.items():
            lines += [*_head(f"jaxgen_{name}_total", says, "counter"), f"jaxgen_{name}_total {stats.get(name, 0)}"]
        with self._lock:
            lines += _head("jaxgen_refused_total", "Requests that were refused, by HTTP's status.", "counter")
            lines += [f'jaxgen_refused_total{{status="{status}"}} {n}' for status, n in sorted(self._refused.items())]
            for histogram in (self._first, self._token, self._whole):
                lines += histogram.lines()
        return "\n".join(lines) + "\n"


_GAUGES = {
    "queue": "Requests that wait for a row.",
    "rows": "Rows of the batch.",
    "busy": "Rows that have a request.",
}
_COUNTERS = {
    "requests": "Requests that were taken.",
    "tokens": "Tokens that were generated.",
    "steps": "Decode steps.",
    "row_steps": "Decode steps times rows: what is no token of these was idle.",
    "prefix_tokens": "Tokens of prompts that were not read, since a row had them.",
}


def _head(name: str, says: str, kind: str) -> list[str]:
    return [f"# HELP {name} {says}", f"# TYPE {name} {kind}"]
