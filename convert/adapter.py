"""PEFT LoRA adapters: `W + scale * B @ A`, added to weights of floats, and kept beside quantised ones."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxgen.errors import CheckpointError, UnsupportedError
from jaxgen.models.tensors import EMBEDDING, Part
from jaxgen.quant import Weight
from jaxgen.quant.adapted import Adapted

from .adapter_config import CONFIG, MERGE, LoraConfig
from .checkpoint import DTYPES, Checkpoint
from .files import is_there

logger = logging.getLogger("jaxgen")

_WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, _WEIGHTS)  # all that jaxgen reads of an adapter

_PREFIX = "base_model.model."  # of peft's names
_WITHOUT = "peft's save_pretrained(..., save_embedding_layers=False) leaves out untrained embeddings and heads"
_CHUNK = 4 << 20  # elements of `B @ A` at a time
_SHOWN = 5


class Adapter:
    """The LoRA adapter in a directory; after `problems` came back empty, its parts can be read.

    Raises `UnsupportedError` and `CheckpointError` as `LoraConfig.read`, and `CheckpointError` where the weights are
    missing, pickled or damaged. Source: peft's checkpoint format.
    """

    def __init__(self, directory: Path):
        self._config = LoraConfig.read(directory)
        if not is_there(directory / _WEIGHTS):
            raise CheckpointError(
                str(directory),
                [
                    f"{_WEIGHTS} is missing. A pickled adapter_model.bin, which can run code when read, becomes one "
                    "when you load the adapter with peft's PeftModel.from_pretrained and write it with save_pretrained"
                ],
            )
        self._file = Checkpoint(directory, _WEIGHTS)

    def problems(self, parts: Sequence[Part]) -> list[str]:
        """What keeps the adapter from fitting the base that `parts` make up; reads headers only."""
        linear = {_module(part): part for part in parts if len(part.shape) == 2 and part.name != EMBEDDING}
        # A router and its experts are linear layers to adapters that were trained with transformers 4, and only there.
        targets = {
            module: part
            for module, part in linear.items()
            if self._config.targets(module) and (not part.routed or self.adapts(part))
        }
        problems = list(self._file.problems)
        if not targets:
            problems.append(f"target_modules={self._config.target_modules!r:.80} names no linear layer of the base")
        for name, keys in self._config.idle_patterns(targets).items():
            # One letter wrong in a name, and the scale of a layer is another: peft says so, too.
            logger.warning("%s: %s names no adapted layer in %s", CONFIG, name, ", ".join(map(repr, keys[:_SHOWN])))
        wanted = {}
        for module, part in targets.items():
            (rows, width), rank = part.shape, self._config.rank(module)
            wanted |= {_key(part, "A"): (rank, width), _key(part, "B"): (rows, rank)}
        wanted |= {name: part.shape for name, part in self._copies(parts).items() if _module(part) in targets}
        for name, shape in wanted.items():
            info = self._file.tensors.get(name)
            if info is None:
                problems.append(f"tensor {name!r} is missing")
                continue
            if info.shape != shape:
                problems.append(f"{name!r} has shape {list(info.shape)}; base and {CONFIG} imply {list(shape)}")
            if info.dtype not in DTYPES:
                problems.append(f"{name!r} has dtype {info.dtype}; jaxgen reads {', '.join(DTYPES)}")
        if unexpected := sorted(self._file.tensors.keys() - wanted.keys()):
            problems.append(_unexpected(unexpected))
        return [f"{_WEIGHTS}: {problem}" for problem in problems]

    def copy_problems(self, base: Checkpoint, parts: Sequence[Part]) -> list[str]:
        """Copies of the base's weights in the adapter that are not the base's; reads them, after `problems`.

        peft saves one of an adapted head, and would load it over the base's.
        """
        problems = []
        for name, part in self._copies(parts).items():
            info = base.tensors.get(part.name)
            if info is None or info.dtype not in DTYPES or info.shape != part.shape:
                problems.append(
                    f"{name!r}: the base holds this weight quantised, so that it cannot be compared; {_WITHOUT}"
                )
                continue
            # In the adapter's precision, and as integers, in which a NaN equals itself.
            dtype = DTYPES[self._file.tensors[name].dtype]
            ours, theirs = (np.empty(part.shape, dtype) for _ in range(2))
            with np.errstate(over="ignore"):
                base.read_into(part.name, ours)
            self._file.read_into(name, theirs)
            bits = f"u{dtype.itemsize}"
            if not np.array_equal(ours.view(bits), theirs.view(bits)):
                problems.append(f"{name!r} differs from the base's {part.name!r}: is this the base? If so, {MERGE}")
        return [f"{_WEIGHTS}: {problem}" for problem in problems]

    def _copies(self, parts: Sequence[Part]) -> dict[str, Part]:
        named = {f"{_PREFIX}{_module(part)}.base_layer.weight": part for part in parts if len(part.shape) == 2}
        return {name: part for name, part in named.items() if name in self._file.tensors}

    def adapts(self, part: Part) -> bool:
        """Whether the adapter changes `part`."""
        return _key(part, "A") in self._file.tensors

    def merge_into(self, weight: np.ndarray, part: Part) -> None:
        """Add the change to the float32 `weight` of `part`, a few rows at a time."""
        down, up = self._factors(part)
        step = max(1, _CHUNK // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            weight[rows] += up[rows] @ down

    def beside(self, base: Weight, parts: Sequence[Part], dtype: np.dtype) -> Adapted:
        """`base`, a parameter that `parts` are rows of, with their changes in `dtype` beside it.

        The parts' A lie under each other; B of each fills its own rows and columns, and the rest is zero. Raises
        `CheckpointError` for values beyond float16, and `UnsupportedError` for experts.
        """
        if parts[0].routed:
            raise UnsupportedError(
                f"{_WEIGHTS}: {_module(parts[0])!r}: changes of experts are not kept beside four bits; {MERGE}"
            )
        factors = [self._factors(part) for part in parts]
        downs = np.concatenate([down for down, _ in factors])
        ups = np.zeros((base.shape[0], len(downs)), np.float32)
        column = 0
        for part, (down, up) in zip(parts, factors, strict=True):
            part.put(ups, up, slice(column, column + len(down)))
            column += len(down)
        with np.errstate(over="ignore"):  # found below
            result = Adapted(base, downs.astype(dtype), ups.astype(dtype))
        if dtype == np.float16 and not (np.isfinite(result.down).all() and np.isfinite(result.up).all()):
            names = ", ".join(repr(_module(part)) for part in parts)
            problem = f"{_WEIGHTS}: {names}: values beyond float16's 65504; load with dtype='bfloat16' or 'float32'"
            raise CheckpointError(str(self._file.directory), [problem])
        return result

    def _factors(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """A `[r, in]`, and B `[out, r]` times the scale, both float32."""
        down, up = (self._file.read(_key(part, letter)).astype(np.float32) for letter in "AB")
        return down, up * np.float32(self._config.scale(_module(part)))


def _module(part: Part) -> str:
    return part.name.removesuffix(".weight")


def _key(part: Part, letter: str) -> str:
    return f"{_PREFIX}{_module(part)}.lora_{letter}.weight"


def _unexpected(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return (
        f"{shown}: no LoRA factor of a linear layer of the base that {CONFIG} targets (embeddings, biases and whole "
        f"modules are not supported). If this is the right base: {_WITHOUT}; for trained ones, {MERGE}"
    )
