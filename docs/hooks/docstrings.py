"""Griffe extension: the house style of docstrings, as mkdocstrings' Markdown wants it."""

import re
from typing import Any

import griffe

_FIXTURE = "getfixture("  # the line that asks the tests for a model


def fenced(text: str) -> str:
    r"""A docstring whose examples are fenced code.

    >>> fenced("Twice.\n\n>>> double(1)  # doctest: +ELLIPSIS\n2\n\nMore.")
    'Twice.\n\n```pycon\n>>> double(1)\n2\n```\n\nMore.'
    """
    paragraphs = text.split("\n\n")
    for index, paragraph in enumerate(paragraphs):
        if paragraph.startswith(">>>"):
            lines = [re.sub(r"\s*# doctest:.*", "", x) for x in paragraph.split("\n") if _FIXTURE not in x]
            paragraphs[index] = "```pycon\n" + "\n".join(lines) + "\n```"
    return "\n\n".join(paragraphs)


class HouseStyle(griffe.Extension):
    """See the module."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite a docstring when griffe has read it."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
