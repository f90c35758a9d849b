"""Checks of what a user gives for an option.

A check takes the option's name and the user's value, and returns it as plain, hashable Python, or raises.
"""

import functools
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxgen.errors import JaxgenError, UnsupportedError, shown

SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_INT32_MAX = np.iinfo(np.int32).max
Check = Callable[[str, Any], Any]


def plain(value: Any) -> Any:
    """Python's own numbers for numpy and jax scalars and lists."""
    if getattr(value, "ndim", None) is not None and not isinstance(value, list | tuple):
        value = value.tolist()
    return tuple(plain(item) for item in value) if isinstance(value, list | tuple) else value


@functools.cache
def integer(minimum: int) -> Check:
    """An int of at least `minimum` that fits 32 bits."""

    def check(name: str, value: object) -> int:
        if isinstance(value, int | np.integer) and value > _INT32_MAX:
            raise JaxgenError(f"{name}={shown(value)} must be an int of at most {_INT32_MAX}")
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < minimum:
            raise JaxgenError(f"{name}={shown(value)} must be an int of at least {minimum}")
        return int(value)

    return check


@functools.cache
def number(interval: str) -> Check:
    """A finite number inside an interval written as in mathematics, such as '(0, 1]'."""
    low, high = map(float, interval[1:-1].split(","))

    def check(name: str, value: Any) -> float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if fits and value != 0 and low < value < high and not SMALLEST <= abs(value) <= LARGEST:
            size = f"at most {LARGEST:.4g}" if abs(value) > LARGEST else f"at least {SMALLEST:.4g}"
            zero = " or 0" if low < 0 or interval.startswith("[0") else ""
            raise JaxgenError(f"{name}={shown(value)} must be {size} in size{zero}, as numbers of float32 are")
        at_open_end = (value == low and interval.startswith("(")) or (value == high and interval.endswith(")"))
        if not fits or not low <= value <= high or at_open_end:
            hint = "; use do_sample=False for greedy search" if name == "temperature" and value == 0 else ""
            raise JaxgenError(f"{name}={shown(value)} must be a number in {interval}{hint}")
        return float(value)

    return check


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise JaxgenError(f"{name}={shown(value)} must be True or False")
    return value


def token_ids(name: str, value: object) -> int | tuple[int, ...]:
    """One token id, or several."""
    return id_list(name, value) if isinstance(value, tuple) else integer(0)(name, value)


def id_list(name: str, value: object) -> tuple[int, ...]:
    """Token ids."""
    if not isinstance(value, tuple):
        raise JaxgenError(f"{name}={shown(value)} must be a list of token ids")
    return tuple(integer(0)(name, item) for item in value)


def id_lists(name: str, value: object) -> tuple[tuple[int, ...], ...]:
    """Non-empty sequences of token ids."""
    if not isinstance(value, tuple) or not all(isinstance(item, tuple) and item for item in value):
        raise JaxgenError(f"{name}={shown(value)} must be a list of non-empty lists of token ids")
    return tuple(id_list(name, item) for item in value)


def biases(name: str, value: object) -> tuple[tuple[tuple[int, ...], float], ...]:
    """HF's two forms of `sequence_bias`: `{(id, ...): bias}`, or `[[[id, ...], bias], ...]`."""
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise JaxgenError(f"{name}={shown(value)} must be {{(id, ...): bias}} or [[[id, ...], bias], ...]")
    ids = id_lists(name, tuple(plain(pair[0]) for pair in pairs))
    bias = number("(-inf, inf)")
    return tuple((sequence, bias(name, pair[1])) for sequence, pair in zip(ids, pairs, strict=True))


def decay(name: str, value: object) -> tuple[int, float]:
    """HF's `(start, factor)`."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise JaxgenError(f"{name}={shown(value)} must be (start, factor)")
    return integer(0)(name, value[0]), number("(0, inf)")(name, value[1])


def choice(*values: object) -> Check:
    """One of a few values."""

    def check(name: str, value: object) -> Any:
        if not any(type(value) is type(known) and value == known for known in values):
            raise UnsupportedError(
                f"{name}={shown(value)} is not supported; choose from {', '.join(map(repr, values))}"
            )
        return value

    return check
