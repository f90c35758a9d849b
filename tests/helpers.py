"""What several test files use."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def some_slow(values: Iterable[Any], slow: Callable[[Any], bool]) -> list[Any]:
    """Values of a parameter; those that are `slow` are not among the default tests."""
    return [pytest.param(value, marks=pytest.mark.slow) if slow(value) else value for value in values]
