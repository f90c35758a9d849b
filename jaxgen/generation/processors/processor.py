"""What a logits processor is: a step on the way from the model's logits to those that a token is drawn from.

It is made from the value of an option. Its numbers are traced and its settings are static, so the processors of two
calls that switch on the same options differ in numbers only, and share executables.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, dataclass_transform

import numpy as np
from jaxtyping import Array, Float, Int

from jaxgen.generation.prompts.layout import bucket, pad_to
from jaxgen.generation.prompts.rows import Rows
from jaxgen.pytree import pytree

Logits = Float[Array, "R V"]
# One for all rows, or, in an engine, one for each.
Number = Float[Array | np.ndarray, "*of_rows"]
Count = Int[Array | np.ndarray, "*of_rows"]
TokenIds = Int[Array | np.ndarray, " E"]  # filled up with -1


@dataclasses.dataclass(frozen=True)
class Call:
    """What a processor may know of the call that it is made for, besides the value of its own option."""

    options: Mapping[str, Any]  # every option of the call, by its name
    eos: tuple[int, ...]
    beams: bool = False

    @property
    def keep(self) -> int:
        """How many tokens a filter leaves at least: beams need one candidate more than there are ways to end."""
        return max(2, len(self.eos) + 1) if self.beams else 1


def static() -> Any:
    """A field of a processor that is part of the compiled program; all other fields are traced arrays."""
    return dataclasses.field(metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
class Processor:
    """A pure function of float32 logits [R, V] and the rows that they belong to.

    To add one takes a subclass here and a row in the table of options (`generation/options/table.py`). A subclass is a
    frozen dataclass and a pytree without further ado.
    """

    always: ClassVar[bool] = False  # made from the value at which it does nothing, too

    def __init_subclass__(cls) -> None:
        pytree(dataclasses.dataclass(frozen=True, eq=False)(cls))

    @classmethod
    def of(cls, value: Any, call: Call) -> "Processor | None":
        """Make it from the value of its option, or None where it has nothing to do in this call.

        As here where the value is its number. Raises `JaxgenError` for a value that makes no sense in this call.
        """
        numbers: Any = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        return cls(**{field.name: as_number(value) for field in numbers})  # one or none

    @staticmethod
    def tokens_in(value: object) -> Iterable[int]:
        """The token ids in the value of its option, which must be in the vocabulary."""
        return ()

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        """The logits that the next processor gets."""
        raise NotImplementedError


class Filter(Processor):
    """A processor that only sampling has, behind all others: it removes unlikely tokens by writing -inf."""


def as_number(value: float) -> Float[np.ndarray, ""]:
    """A traced float."""
    return np.array(value, np.float32)


def as_count(value: int) -> Int[np.ndarray, ""]:
    """A traced int."""
    return np.array(value, np.int32)


def as_ids(tokens: Iterable[int]) -> Int[np.ndarray, " E"]:
    """Traced token ids, in a bucket."""
    ids = np.array(tuple(tokens), np.int32)
    return pad_to(ids, (bucket(len(ids), 4),), fill=-1)


def several(value: "int | Iterable[int]") -> tuple[int, ...]:
    """One id or some."""
    return (value,) if isinstance(value, int) else tuple(value)
