"""The header of a .gguf file: metadata, and where each tensor lies; every number is held against the file's length.

Source: the format's specification (ggml `docs/gguf.md`); versions 2 and 3, which differ in the order of bytes only.
"""

import math
import os
import struct
from pathlib import Path
from typing import IO, Any, NamedTuple

from jaxgen.errors import CheckpointError, UnsupportedError
from jaxgen.files import open_regular
from jaxgen.models.fields import MOST_LAYERS

_KINDS = dict(enumerate(
    "F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S "
    "IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16".split()
)) | {34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"}  # fmt: skip
# Weights to a block, and its bytes, of the kinds that jaxgen reads.
BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210),
}  # fmt: skip
_SCALARS = dict(enumerate("<B <b <H <h <I <i <f".split())) | {10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_ALIGNMENT = 32
_MOST_ENTRIES = 4_000_000  # several times those of the largest vocabularies
_MOST_TEXT = 100_000_000  # bytes of a string
_LONGEST_NAME = 65_535


class GgufTensor(NamedTuple):
    """A tensor as the file names it; `shape` in HF's order, `begin` and `end` are bytes of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


class GgufArray(NamedTuple):
    """An array of metadata, of which only the length is kept; of one of true and false, as layers have it, all."""

    count: int
    flags: tuple[bool, ...] = ()


def read_header(path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    """Metadata by name, and the tensors, in the file's order.

    Raises `CheckpointError` unless tensors follow one another up to the end of the file, and `UnsupportedError` for
    big-endian files and kinds of tensors that jaxgen does not read.
    """
    size = 0
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            return _Header(file, size, path.name).read()
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError | UnsupportedError):
            raise
        problem = f"{path.name} ({size} bytes) is truncated, damaged or not GGUF: {error}; download it again"
        raise CheckpointError(str(path.parent), [problem]) from error


class _Header:
    """Reads from the start of a file on; every method raises `ValueError` for what the format does not allow."""

    def __init__(self, file: IO[bytes], size: int, name: str):
        self._file, self._size, self._name = file, size, name
        self._place = self._entries = 0

    def read(self) -> tuple[dict[str, Any], list[GgufTensor]]:
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._number("<I")
        if version & 0xFFFF == 0:
            raise UnsupportedError(f"{self._name} is big-endian; jaxgen reads little-endian GGUF")
        if version not in (2, 3):
            raise ValueError(f"version {version} is neither 2 nor 3")
        tensors, fields = self._number("<Q"), self._number("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(fields):
            name = self._name_of("a field")
            if name in metadata:
                raise ValueError(f"{name:.80} is given twice")
            metadata[name] = self._value(self._number("<I"), name)
        listed = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment={alignment!r:.80} is not a power of two")
        return metadata, self._placed(listed, alignment)

    def _placed(self, listed: list[tuple[str, str, tuple[int, ...], int, int]], alignment: int) -> list[GgufTensor]:
        """The tensors with their bytes of the file, which they have to cover, but for the padding between them."""

        def aligned(place: int) -> int:
            return -(-place // alignment) * alignment

        start = end = aligned(self._place)
        tensors = []
        for name, kind, shape, offset, nbytes in listed:
            if start + offset != aligned(end):
                raise ValueError(f"{name!r:.80} begins at byte {start + offset} instead of {aligned(end)}")
            end = aligned(end) + nbytes
            tensors.append(GgufTensor(name, kind, shape, end - nbytes, end))
        if self._size not in (end, aligned(end)):
            raise ValueError(f"the last of {len(tensors)} tensors ends at byte {end}, and not where the file ends")
        return tensors

    def _tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        name = self._name_of("a tensor")
        dimensions = self._number("<I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{name!r:.80} has {dimensions} dimensions")
        shape = tuple(reversed([self._number("<Q") for _ in range(dimensions)]))
        code, offset = self._number("<I"), self._number("<Q")
        kind = _KINDS.get(code)
        if kind is None or 0 in shape:
            raise ValueError(f"{name!r:.80} has shape {list(shape)} and type {code}")
        if kind not in BLOCKS or (len(shape) == 1 and BLOCKS[kind][0] > 1):
            raise UnsupportedError(
                f"{self._name}: {name!r:.80} is of type {kind}; jaxgen reads {', '.join(BLOCKS)}, and vectors as "
                "floats. Take a Q4_K_M, Q4_0 or Q8_0 file of the model, or the original with load_in_4bit=True"
            )
        weights, nbytes = BLOCKS[kind]
        if shape[-1] % weights:
            raise ValueError(f"{name!r:.80} has rows of {shape[-1]} weights, and {kind} has blocks of {weights}")
        return name, kind, shape, offset, math.prod(shape) // weights * nbytes

    def _name_of(self, what: str) -> str:
        text = self._text(_LONGEST_NAME)
        if not (text.isascii() and text.isprintable() and text):
            raise ValueError(f"{what} is called {text!r:.80}")
        return text

    def _value(self, code: int, name: str) -> Any:
        if code in _SCALARS:
            return self._number(_SCALARS[code])
        if code == _BOOL:
            if (byte := self._bytes(1)) not in (b"\0", b"\1"):
                raise ValueError(f"{name:.80}={byte!r} is neither true nor false")
            return byte == b"\1"
        if code == _STRING:
            return self._text(_MOST_TEXT)
        if code != _ARRAY:
            raise ValueError(f"{name:.80} is of type {code}")
        code, count = self._number("<I"), self._number("<Q")
        if code == _STRING:
            for _ in range(count):
                self._skip(self._number("<Q"))
        elif code == _BOOL and count <= MOST_LAYERS:
            return GgufArray(count, tuple(self._value(_BOOL, name) for _ in range(count)))
        elif code in _SCALARS or code == _BOOL:
            self._skip(count * (1 if code == _BOOL else struct.calcsize(_SCALARS[code])))
        else:
            raise ValueError(f"{name:.80} is an array of type {code}")
        return GgufArray(count)

    def _text(self, most: int) -> str:
        count = self._number("<Q")
        if count > most:
            raise ValueError(f"a text of {count} bytes at byte {self._place} is longer than {most}")
        return self._bytes(count).decode()

    def _number(self, layout: str) -> Any:
        self._entries += 1
        if self._entries > _MOST_ENTRIES:
            raise ValueError(f"more than {_MOST_ENTRIES} entries of metadata")
        return struct.unpack(layout, self._bytes(struct.calcsize(layout)))[0]

    def _bytes(self, count: int) -> bytes:
        self._check(count)
        data = self._file.read(count)
        if len(data) < count:
            raise ValueError(f"the file ends {count - len(data)} bytes early; did it change?")
        return data

    def _skip(self, count: int) -> None:
        self._check(count)
        self._file.seek(count, 1)

    def _check(self, count: int) -> None:
        if count > self._size - self._place:
            raise ValueError(f"the file ends before {count} bytes at byte {self._place}")
        self._place += count
