"""What the packed formats of linear layers share: which modules are packed, and that file and config agree on it."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, ClassVar

import numpy as np

from jaxgen.errors import CheckpointError, JaxgenError, UnsupportedError
from jaxgen.models.tensors import EMBEDDING, Part
from jaxgen.quant import Int4
from jaxgen.quant.config import WHOLE_ROWS, check_group

from ..checkpoint import Checkpoint, Wanted
from .packing import column_order

# What config.json says of a module by its HF name without ".weight"; None where it leaves the module as it was.
Settings = Callable[[str], Mapping[str, Any] | None]

_READ = (
    "compressed-tensors (pack-quantized), GPTQ, AWQ (GEMM), AutoRound (in the layouts of these two), "
    "bitsandbytes (NF4, FP4), MLX and GGUF, of 4 bits each, and fp8"
)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the weights of a module are stored: weights per scale, -1 for whole rows, and whether zero is always 8.

    `permuted`: columns belong to groups in any order, so the file must say to which.
    """

    group_size: int
    symmetric: bool
    permuted: bool = False

    def __str__(self) -> str:
        groups = "whole rows" if self.group_size == WHOLE_ROWS else f"group {self.group_size}"
        return f"{'symmetric' if self.symmetric else 'asymmetric'}, {groups}"

    def groups(self, part: Part) -> int:
        """Scales of a row. Raises `UnsupportedError` where groups or bytes do not come out even."""
        try:
            return part.shape[1] // check_group(part.shape, self.group_size, repr(part.name))
        except JaxgenError as error:
            raise UnsupportedError(str(error)) from error


class PackedModules(ABC):
    """A format in which the tensors `module.suffix` take the place of `module.weight`."""

    packed: ClassVar[str]  # the suffix that every packed module has, and no other

    def __init__(self, name: str, checkpoint: Checkpoint, settings: Settings):
        self.name, self.checkpoint, self._settings = name, checkpoint, cache(settings)

    def stored(self, part: Part) -> dict[str, Wanted] | None:
        """The tensors that hold the weight; None if it is an ordinary tensor. Source: `formats.Format`.

        Raises `CheckpointError` for a packed module that config.json calls unquantised.
        """
        module = part.name.removesuffix(".weight")
        if len(part.shape) != 2 or part.name == EMBEDDING:
            return None
        scheme, is_packed = self._scheme_of(module), self._has(f"{module}.{self.packed}")
        if scheme is None and is_packed:
            problem = f"config.json says that {module!r} is not quantised, but there is '{module}.{self.packed}'"
            raise CheckpointError(str(self.checkpoint.directory), [problem])
        if scheme is None or (not is_packed and self._has(part.name)):
            return None
        wanted = self._tensors(part, scheme)
        if self._has(f"{module}.bias") and not part.has_bias:  # else it is a tensor of the model, like others
            wanted["bias"] = Wanted((part.shape[0],))
        return {f"{module}.{suffix}": tensor for suffix, tensor in wanted.items()}

    def weight(self, part: Part) -> Int4:
        """The weight as the file has it: the same codes, scales of the same precision. Source: `formats.Format`."""
        module = part.name.removesuffix(".weight")
        scheme = self._scheme_of(module)
        assert scheme is not None  # or `stored` is None
        bias = None if part.has_bias else self._optional(f"{module}.bias")
        if bias is not None and bias.any():
            raise UnsupportedError(f"{module}.bias is not zero; the model that config.json describes has no bias there")
        return self._int4(module, part.shape, scheme)

    @abstractmethod
    def _scheme(self, module: str, settings: Mapping[str, Any]) -> Scheme:
        """Checks the settings of a module; raises `JaxgenError` or `UnsupportedError`."""

    @abstractmethod
    def _tensors(self, part: Part, scheme: Scheme) -> dict[str, Wanted]:
        """The tensors by suffix."""

    @abstractmethod
    def _int4(self, module: str, shape: tuple[int, ...], scheme: Scheme) -> Int4:
        """The weight of shape `(out, in)`, from tensors that have passed the check of `_tensors`."""

    def _scheme_of(self, module: str) -> Scheme | None:
        settings = self._settings(module)
        return None if settings is None else self._scheme(module, settings)

    def _has(self, name: str) -> bool:
        return name in self.checkpoint.tensors or name in self.checkpoint.unreadable

    def _optional(self, name: str) -> np.ndarray | None:
        return self.checkpoint.read(name) if name in self.checkpoint.tensors else None

    def _permutation(self, name: str, group_of_column: np.ndarray, groups: int) -> np.ndarray | None:
        """`Int4.permutation` of a tensor that gives the group of each column; raises `CheckpointError`."""
        try:
            return column_order(group_of_column, groups)
        except ValueError as error:
            raise self._damaged(name, str(error)) from error

    def _damaged(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(str(self.checkpoint.directory), [f"{name!r} {problem}"])


def unsupported(what: str) -> UnsupportedError:
    """The error for a kind of quantisation that jaxgen does not read."""
    return UnsupportedError(
        f"config.json: {what} is not supported; jaxgen reads {_READ}. Take the checkpoint that is not quantised, and "
        "load it with load_in_4bit=True"
    )


def setting(fields: Mapping[str, Any], name: str, default: Any, where: str = "") -> Any:
    """A field of the quantisation config, of the type of `default`, which stands for an absent field and for null.

    Raises `JaxgenError` for another type.
    """
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not type(default):
        wanted = {bool: "true or false", int: "an integer", str: "a text", list: "a list", dict: "an object"}
        raise JaxgenError(
            f"config.json: {name}={value!r:.80} of the quantisation{where and ' of '}{where} must be "
            f"{wanted[type(default)]}"
        )
    return value


def texts(fields: Mapping[str, Any], name: str) -> list[str]:
    """A field of the quantisation config that is a list of texts; raises `JaxgenError` for any other."""
    entries = setting(fields, name, [])
    if not all(isinstance(entry, str) for entry in entries):
        raise JaxgenError(f"config.json: {name}={entries!r:.80} of the quantisation must hold texts only")
    return entries


def almost(name: str, wanted: Iterable[str]) -> str | None:
    """The one of the `wanted` names from which `name` differs by one letter: changed, lost or added."""
    for other in wanted:
        if name == other or abs(len(name) - len(other)) > 1:
            continue
        short, long = sorted((name, other), key=len)
        same = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
        if short[same + (len(short) == len(long)) :] == long[same + 1 :]:
            return other
    return None


def check_bits(label: str, module: str, bits: int) -> None:
    """Raises `UnsupportedError` unless they are 4."""
    if bits != 4:
        raise unsupported(f"{label} with {bits} bits ({module})")


def group_size(fields: Mapping[str, Any], default: int, where: str) -> int:
    """The field `group_size`: positive, or -1 for whole rows. Raises `JaxgenError`."""
    size = setting(fields, "group_size", default, where)
    if size != WHOLE_ROWS and size < 1:
        raise JaxgenError(f"config.json: group_size={size} of {where} must be positive, or -1 for whole rows")
    return size
