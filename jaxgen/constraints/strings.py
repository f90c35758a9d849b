"""Strings of JSON as regular expressions: of any content, of some length, of a format or by a simple pattern."""

import re

_CHARACTER = r'(?:[^"\\\x00-\x1F\x7F-\x9F]|\\["\\/bfnrt])'
STRING = f'"{_CHARACTER}*"'

_DATE = (
    "[12][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
}

# Pieces of a pattern of which no text needs escapes in JSON, and which mean the same in every dialect.
_PIECE = re.compile(
    r"""(?P<plain>[A-Za-z0-9 _:;,@%=!<>~'/#&-])
      | \\(?P<escaped>[d.+*?()|\[\]{}^$/-])
      | \[(?P<set>(?:[A-Za-z0-9 _:;,@%=!<>'/.+*?()|{}$]|[a-z]-[a-z]|[A-Z]-[A-Z]|[0-9]-[0-9]|\\[d.-])+-?\])
      | (?P<other>\(\?:|[()|*+?]|\{\d{1,4}(?:,\d{0,4})?\})""",
    re.VERBOSE,
)


def string_of_length(least: int, most: int | None) -> str:
    """A string of so many characters."""
    return f'"{_CHARACTER}{{{least},{"" if most is None else most}}}"'


def quoted_pattern(pattern: object) -> str | None:
    """A string whose whole content matches a pattern of plain pieces; None for any other pattern."""
    if not isinstance(pattern, str):
        return None
    inner = pattern.removeprefix("^")
    if inner.endswith("$") and not inner.endswith("\\$"):
        inner = inner[:-1]
    read, place = "", 0
    while place < len(inner):
        found = _PIECE.match(inner, place)
        if found is None:
            return None
        piece = found[0]
        if piece == "\\d":
            piece = "[0-9]"
        read += re.sub(r"[#&~]", r"\\\g<0>", piece.replace("\\d", "0-9").replace("\\/", "/"))
        place = found.end()
    try:
        re.compile(read)
    except (re.error, OverflowError):
        return None
    return f'"(?:{read})"'
