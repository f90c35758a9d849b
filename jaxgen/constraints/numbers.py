"""Integers in a range as regular expressions."""

_ANY = "-?(?:0|[1-9][0-9]*)"


def integers_between(least: int | None, most: int | None) -> str | None:
    """The integers from `least` to `most`, both among them, as JSON writes them; None stands for no bound.

    None if there are no such integers.

    >>> integers_between(8, 123)
    '(?:[8-9]|[1-9][0-9]|1[0-1][0-9]|12[0-3])'
    """
    if least is None and most is None:
        return _ANY
    if least is not None and most is not None and least > most:
        return None
    parts = []
    if least is None or least < 0:
        # -a to -b is what b to a is, behind a sign.
        low = 1 if most is None or most >= 0 else -most
        parts += [f"-{part}" for part in _naturals(low, None if least is None else -least)]
    if most is None or most >= 0:
        parts += _naturals(max(least, 0) if least is not None else 0, most)
    return f"(?:{'|'.join(parts)})"


def _naturals(least: int, most: int | None) -> list[str]:
    """Patterns of `least` to `most`, neither of them negative."""
    digits = len(str(least))
    if most is None:
        return [*_naturals(least, 10**digits - 1), f"[1-9][0-9]{{{digits},}}"]
    parts = []
    while len(str(most)) > digits:  # one length after the other
        parts += _same_length(str(least), "9" * digits)
        least, digits = 10**digits, digits + 1
    return parts + _same_length(str(least), str(most))


def _same_length(low: str, high: str) -> list[str]:
    """Patterns of the numbers between two of as many digits."""
    if not low:
        return [""]
    if low[0] == high[0]:
        return [low[0] + rest for rest in _same_length(low[1:], high[1:])]
    zeros, nines = "0" * (len(low) - 1), "9" * (len(low) - 1)
    first, last, parts = int(low[0]), int(high[0]), []
    if low[1:] != zeros:
        parts += [low[0] + rest for rest in _same_length(low[1:], nines)]
        first += 1
    whole = last if high[1:] == nines else last - 1
    if first <= whole:
        parts.append(f"[{first}-{whole}]" + (f"[0-9]{{{len(zeros)}}}" if len(zeros) > 1 else "[0-9]" * len(zeros)))
    if whole < last:
        parts += [high[0] + rest for rest in _same_length(zeros, high[1:])]
    return parts
