"""Rows of several outputs as lines of tokens, one below the other."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxgen.display.axes import new_labels
from jaxgen.display.rows import rows_of
from jaxgen.errors import JaxgenError

_MOST_CHARACTERS = 150  # across a grid of tokens


@dataclasses.dataclass(frozen=True)
class Line:
    """A row in a grid of tokens."""

    label: str
    prompt: tuple[int, ...]
    ids: list[int]
    labels: list[str]
    logprobs: np.ndarray


def lines_of(outputs: Any, tokenizer: Any) -> list[Line]:
    """Every row of every output."""
    if isinstance(outputs, Mapping):
        named = [(str(label), output) for label, output in outputs.items()]
    else:
        several = outputs if isinstance(outputs, Sequence) else [outputs]
        named = [(None, output) for output in several]
    if not named:
        raise JaxgenError("seeds: there are no outputs")
    lines = []
    for label, output in named:
        rows = rows_of(output)
        for row in rows:
            seed = row.seed if label is None and (len(named) > 1 or isinstance(output.seed, tuple)) else None
            names = [label] if label is not None else [] if seed is None else [f"seed {seed}"]
            own_seed = isinstance(output.seed, tuple) and len(output.seed) == len(rows)
            if not names or (len(rows) > 1 and not own_seed):
                names.append(f"row {row.index}")
            lines.append(
                Line(
                    ", ".join(names),
                    tuple(row.prompt_ids),
                    row.new_ids,
                    new_labels(output, row, tokenizer),
                    output.logprobs[row.index],
                )
            )
    return lines


def shared_with_first(line: Line, lines: list[Line]) -> int | None:
    """How many tokens a row has in common with the first row that continues its prompt; None for that row itself."""
    first = next(other for other in lines if other.prompt == line.prompt)
    if first is line:
        return None
    pairs = zip(line.ids, first.ids, strict=False)
    differs = (step for step, (ours, its) in enumerate(pairs) if ours != its)
    return next(differs, min(len(line.ids), len(first.ids)))


def column_widths(lines: list[Line]) -> list[int]:
    """Characters for each step that fits, and one to spare."""
    widths: list[int] = []
    for step in range(max(len(line.labels) for line in lines)):
        widths.append(1 + max(len(line.labels[step]) for line in lines if step < len(line.labels)))
        if len(widths) > 1 and sum(widths) > _MOST_CHARACTERS:
            return widths[:-1]
    return widths
