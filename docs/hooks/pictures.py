"""What a result and its plots look like: the code of howto/looking.md, run when the site is built."""

import contextlib
import functools
import importlib.util
import io
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "howto" / "looking.md"
INK = "#123456"  # of text and axes; becomes the page's own colour, light or dark


@functools.cache
def _run_page() -> tuple[dict[str, Any], list[str]]:
    """The names that the page's code defines, and its figures as SVG. Without matplotlib or pandas, neither."""
    if not all(map(importlib.util.find_spec, ("matplotlib", "pandas"))):
        return {}, []
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    names: dict[str, Any] = {}
    colours = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with mpl.rc_context(colours | {"svg.hashsalt": "jaxgen", "backend": "agg"}):
        plt.close("all")
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S):
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block, str(PAGE), "exec"), names)
        drawn = [_svg(plt.figure(number)) for number in plt.get_fignums()]
        plt.close("all")
    return names, drawn


def result() -> str:
    """An output as a notebook shows it."""
    names, _ = _run_page()
    return f"<div>{names['out']._repr_html_()}</div>" if names else ""


def plots() -> str:
    """The page's plots, each below the name of its function."""
    called = re.findall(r"jaxgen\.plot\.(\w+)\(", PAGE.read_text(encoding="utf-8"))
    _, drawn = _run_page()
    if not drawn:
        return ""
    return "\n\n".join(
        f'`{name}`\n\n<div class="jaxgen-plot" role="img" aria-label="{name}">{svg}</div>'
        for name, svg in zip(called, drawn, strict=True)
    )


def _svg(figure: Any) -> str:
    """A figure as SVG inside a page, without a background of its own or anything that changes from build to build."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    return re.sub(r"\n\s*", "\n", svg).strip().replace(INK, "currentColor")
