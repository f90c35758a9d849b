"""What of transformers' `generate` is supported, as a table: `python -m jaxgen.generation.options.support`."""

import sys
from collections.abc import Mapping

from jaxgen.generation.options.refused import METADATA, REFUSED
from jaxgen.generation.options.table import ARGUMENTS, OPTIONS

STREAMER = {"streamer": "an object that is given texts as they come"}  # of `generate` itself


def table(shown_by: Mapping[str, str] | None = None) -> str:
    """One line per option, in Markdown: what it does or why it is refused, and the test that shows it, if given."""
    does = {name: option.says for name, option in (OPTIONS | ARGUMENTS).items()} | STREAMER
    rows = [(name, "supported", said) for name, said in sorted(does.items())]
    rows += [(name, "refused", refused.reason) for name, refused in sorted(REFUSED.items())]
    lines = ["| option | | |", "|---|---|---|"] if shown_by else ["| option | |", "|---|---|"]
    for name, kind, said in rows:
        lines.append(f"| `{name}` | {kind}: {said} |" + (f" `{shown_by[name]}` |" if shown_by else ""))
    return "\n".join(lines)


def unknown(names: set[str]) -> set[str]:
    """Those of transformers' fields that the table does not know."""
    return names - OPTIONS.keys() - REFUSED.keys() - METADATA


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
