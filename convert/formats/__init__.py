"""The 4-bit formats of the hub, one file each: their tensors are read as `Int4` or `Lookup4`, and never requantised."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from jaxgen.quant import Int4, Lookup4

from ..checkpoint import Checkpoint, Wanted
from ..names import Part


@runtime_checkable
class Format(Protocol):
    """How a checkpoint stores its quantised weights; made for one checkpoint by `detect`."""

    @property
    def name(self) -> str:
        """Format, variant and group size, for people to read: "GPTQ v1, symmetric, group 128"."""
        ...

    def stored(self, part: Part) -> dict[str, Wanted] | None:
        """The tensors that hold the HF weight `part.name`, by name; None if it is stored as an ordinary tensor.

        Looks at headers only. Names tensors that must be there, and optional ones if they are.
        """
        ...

    def read(self, part: Part) -> Int4 | Lookup4:
        """The weight, in HF's order of rows, as numpy arrays; only for parts that `stored` describes.

        Scales keep the precision of the file. Raises `CheckpointError` for contents that the format does not allow.
        """
        ...


# Where config.json says how it is quantised: HF's field, compressed-tensors' old one, and MLX's.
FIELDS = ("quantization_config", "compression_config", "quantization")

# HF's quant_method (or what we name a format that has none) to the function that makes its `Format`.
_Make = Callable[[Mapping[str, Any], Checkpoint], Format]


def _makers() -> dict[str, _Make]:
    return {}


def detect(fields: dict[str, Any], checkpoint: Checkpoint) -> tuple[dict[str, Any], Format | None]:
    """The fields of config.json without those about quantisation, and the checkpoint's format if it has one.

    Raises `UnsupportedError`, which names the format and says what to do, for one that jaxgen does not read.
    """
    plain = {name: value for name, value in fields.items() if name not in FIELDS}
    return plain, None
