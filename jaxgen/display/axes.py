"""The axes of a plot: their size, colours and legend, and the tokens along them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgen.display.rows import Row, rows_of
from jaxgen.display.texts import spelt, texts_of
from jaxgen.errors import JaxgenError

_MOST_LABELS = 80  # tokens that are named along an axis
_SHOWN_SPACE, _SHOWN_LINE = "␣", "↵"

# Without a background, in a grey that can be read on white and on black.
_INK = "#7a7a7a"
_ON_ANY_PAGE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color"), _INK),
    "ytick.color": _INK,
}


def axes(ax: Any, width: float, height: float = 3.0, most: float = 16) -> Any:
    """The user's axes, or new ones of this size in inches; raises `JaxgenError` if matplotlib is not installed."""
    if ax is not None:
        return ax
    try:
        import matplotlib as mpl
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise JaxgenError("jaxgen.plot needs a package: pip install matplotlib") from error
    plain = all(mpl.rcParams[name] == mpl.rcParamsDefault[name] for name in ("text.color", "figure.facecolor"))
    with plt.rc_context(_ON_ANY_PAGE if plain else {}):  # whoever chose a style has it
        return plt.subplots(figsize=(min(max(width, 6), most), height), layout="constrained")[1]


def legend(ax: Any) -> None:
    """Above the plot, where it covers nothing."""
    at = (0, 1)
    ax.legend(loc="lower left", bbox_to_anchor=at, ncols=3, frameon=False, borderaxespad=0.2, labelcolor=ink(ax))


def ink(ax: Any) -> Any:
    """What an axes is labelled with."""
    return ax.xaxis.label.get_color()


def tints() -> Any:
    """As in a notebook's text: orange, the stronger the less probable, over whatever the background is."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("jaxgen", [(0.94, 0.43, 0, 0.65), (0.94, 0.43, 0, 0)])


def row_of(output: Any, row: Any) -> Row:
    """The row that a user asks for by its index; raises `JaxgenError` if there is none."""
    rows = rows_of(output)
    if not isinstance(row, int | np.integer) or isinstance(row, bool) or not 0 <= row < len(rows):
        raise JaxgenError(f"row={row!r} must be an int from 0 to {len(rows) - 1}")
    return rows[row]


def new_labels(output: Any, row: Row, tokenizer: Any) -> list[str]:
    """A label for each new token of a row."""
    texts = texts_of(output, tokenizer)
    pieces = texts.pieces(row.prompt_ids, row.new_ids)
    return [label_of(text or texts.name(token)) for text, token in zip(pieces, row.new_ids, strict=True)]


def label_of(text: str) -> str:
    """The text of a token, with its spaces and line breaks marked."""
    return spelt(text).replace(" ", _SHOWN_SPACE).replace("\n", _SHOWN_LINE)


def name_tokens(ax: Any, places: Sequence[int] | np.ndarray, labels: list[str]) -> None:
    """Write the tokens along the axis, as many as can be read."""
    every = max(1, math.ceil(len(labels) / _MOST_LABELS))
    ax.set_xticks(
        places[::every], labels[::every], rotation=60, ha="right", rotation_mode="anchor", fontsize=8, parse_math=False
    )
    ax.margins(x=0.01)
    ax.spines[["top", "right"]].set_visible(False)
