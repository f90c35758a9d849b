"""What is used of transformers as it is: imported when it is asked for."""

from typing import Any


def transformers() -> Any:
    """The package; importing it takes seconds, and nothing but text needs it."""
    import transformers

    return transformers
