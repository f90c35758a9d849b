"""Bytes from outside as text."""

import codecs

from jaxgen.errors import JaxgenError


def decode_utf8(data: bytes, source: str, first_line: int = 1) -> str:
    """The text, without a byte order mark; raises `JaxgenError` that names the line and the byte that are no UTF-8.

    `source` says where the bytes came from, and `first_line` the number of their first line there.

    >>> decode_utf8(b"one\\ntwo\\xff", "notes.txt")
    Traceback (most recent call last):
        ...
    jaxgen.errors.JaxgenError: notes.txt: line 2, byte 4 (0xff) is not UTF-8 text
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, byte = first_line + before.count(b"\n"), error.start - before.rfind(b"\n")
        raise JaxgenError(
            f"{source}: line {line}, byte {byte} (0x{data[error.start]:02x}) is not UTF-8 text"
        ) from error
