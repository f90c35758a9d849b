"""Quantization and Int4Config: how a model is quantised while it loads."""

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, no_type_check

import numpy as np
from jaxtyping import Float

from jaxgen.errors import JaxgenError, UnsupportedError

if TYPE_CHECKING:
    from jaxgen.quant.int4 import Int4
    from jaxgen.quant.weight import Weight

_LINEAR = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")  # the latter are Mixtral's experts
GROUP_SIZES = (32, 64, 128)
WHOLE_ROWS = -1  # HF's spelling: one scale per output row


class Quantization(ABC):
    """What `from_pretrained` asks of its `quantization_config`: which weights it makes of floats, and how.

    `lm_head` and `low_cpu_memory` as of `Int4Config`.
    """

    lm_head: bool = False
    low_cpu_memory: bool = False

    def quantizes(self, name: str) -> bool:
        """Whether the HF tensor of this name is quantised: every linear layer's weight, and the head if asked."""
        return (name == "lm_head.weight" and self.lm_head) or name.endswith(_LINEAR)

    @abstractmethod
    def check(self, shape: tuple[int, ...], name: str) -> None:
        """Raise `JaxgenError`, which calls it `name`, for a weight that cannot be quantised so."""

    @abstractmethod
    def quantize(self, weight: Float[np.ndarray, "O I"], name: str) -> "Weight":
        """The weight that floats become; all are finite. Rows are quantised each for itself."""


@no_type_check  # __post_init__ says what is wrong
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4Config(Quantization):
    """What `from_pretrained(..., quantization_config=...)` does to the weights; `load_in_4bit=True` is `Int4Config()`.

    `group_size`: weights per scale along a row: 32, 64, 128, or -1 for whole rows. `lm_head`: whether the output head
    is quantised too; embeddings and norms never are. `method`: "rtn", round to nearest with searched scales (methods
    that need calibration text run offline: `jaxgen convert --method gptq`). `low_cpu_memory`: on CPU, unpack the
    weights a few rows at a time at each step, instead of keeping an unpacked copy while generating: slower, and
    within the memory of the packed weights. Raises `JaxgenError` for other values.

    >>> Int4Config(group_size=64).group_size
    64
    """

    group_size: int = 128
    lm_head: bool = False
    method: str = "rtn"
    low_cpu_memory: bool = False

    def __post_init__(self):
        if self.group_size not in (*GROUP_SIZES, WHOLE_ROWS) or isinstance(self.group_size, bool):
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise JaxgenError(f"Int4Config: group_size={self.group_size!r} must be {sizes}, or -1 for whole rows")
        for name in ("lm_head", "low_cpu_memory"):
            if not isinstance(getattr(self, name), bool):
                raise JaxgenError(f"Int4Config: {name}={getattr(self, name)!r} must be True or False")
        if self.method in ("gptq", "autoround"):
            raise UnsupportedError(
                f"Int4Config: method={self.method!r} needs calibration text and more than one look at the weights; "
                f"run `jaxgen convert SRC DST --method {self.method} --calibration FILE` once, and load DST"
            )
        if self.method != "rtn":
            raise JaxgenError(f"Int4Config: method={self.method!r} must be 'rtn' (offline: 'gptq', 'autoround')")

    def check(self, shape: tuple[int, ...], name: str) -> None:
        """Raise `JaxgenError` where groups do not come out even."""
        check_group(shape, self.group_size, name)

    def quantize(self, weight: Float[np.ndarray, "O I"], name: str) -> "Int4":
        """See `jaxgen.quant.quantize`."""
        from jaxgen.quant.int4 import quantize

        return quantize(weight, self.group_size, name=name)


def check_group(shape: tuple[int, ...], group_size: int, name: str = "weight") -> int:
    """The size of a group of a weight `[out, in]`; raises `JaxgenError` where groups or bytes do not come out even."""
    if len(shape) != 2:
        raise JaxgenError(f"{name} has shape {list(shape)}; int4 weights have two axes, [out, in]")
    width = shape[1]
    size = width if group_size == WHOLE_ROWS else group_size
    if width % 2:
        raise JaxgenError(f"{name} has rows of {width} weights; int4 packs two into a byte, so they must be even")
    if size < 2 or size % 2 or width % size:
        fitting = "".join(f"{size}, or " for size in GROUP_SIZES if width % size == 0)
        raise JaxgenError(
            f"{name} has rows of {width} weights, which groups of {group_size} do not divide; "
            f"choose group_size={fitting}-1 (whole rows)"
        )
    return size
