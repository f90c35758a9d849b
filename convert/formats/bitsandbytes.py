"""bitsandbytes' NF4 and FP4: codes into a table of 16 values, scaled by blocks, whose scales may be quantised again.

Source: QLoRA (arXiv 2305.14314); bitsandbytes `QuantState`.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxgen.errors import CheckpointError, UnsupportedError
from jaxgen.models.tensors import Part
from jaxgen.quant import Lookup4

from ..checkpoint import Checkpoint, Wanted
from .modules import unsupported

_STATE = ".quant_state.bitsandbytes__"  # and "nf4" or "fp4": the name of a tensor that holds JSON
_MAX_STATE_BYTES = 10_000
_BLOCKS = tuple(1 << power for power in range(5, 13))
_STORAGE = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}  # bytes of each dtype that packed codes may pass for


class _State(NamedTuple):
    """What a quantised tensor says of itself; `nested` is the (block, offset) of scales that are quantised too."""

    kind: str
    block: int
    shape: tuple[int, ...]
    nested: tuple[int, float] | None


def open_bitsandbytes(fields: Mapping[str, Any], checkpoint: Checkpoint) -> "BitsAndBytes":
    """The format of a checkpoint whose quantization_config is `fields`.

    Raises `UnsupportedError` for LLM.int8, and for the tensor names of GPTQModel's export.
    """
    if fields.get("load_in_8bit") or fields.get("_load_in_8bit"):
        raise unsupported("bitsandbytes LLM.int8 (load_in_8bit=true)")
    if strange := next((name for name in checkpoint.tensors if name.endswith(".weight_quant_state")), None):
        raise unsupported(f"GPTQModel's own spelling of bitsandbytes ({strange!r})")
    return BitsAndBytes(checkpoint)


class BitsAndBytes:
    """A `Format`: which tensors are quantised, and in which blocks, is what the tensors say.

    Raises `CheckpointError` if the first of them says nothing that can be.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._read_states: dict[str, _State] = {}
        self.name = self._described()

    def _described(self) -> str:
        """For example "bitsandbytes NF4, double quantised, block 64"."""
        name = next((name for name in self._checkpoint.tensors if _STATE in name), None)
        if name is None:
            return "bitsandbytes, of which nothing is quantised"
        state = self._state(name)
        return f"bitsandbytes {state.kind.upper()}{', double quantised' if state.nested else ''}, block {state.block}"

    def stored(self, part: Part) -> dict[str, Wanted] | None:
        """As `Format.stored`; also reads the few bytes in which a tensor describes itself."""
        names = [f"{part.name}{_STATE}{kind}" for kind in ("nf4", "fp4")]
        name = next((name for name in names if name in self._checkpoint.tensors), None)
        if name is None:
            return None
        state = self._state(name)
        self._check(part, state)
        count = math.prod(part.shape)
        blocks = count // state.block
        weight = self._checkpoint.tensors.get(part.name)
        storage = weight.dtype if weight is not None and weight.dtype in _STORAGE else "U8"
        wanted = {
            part.name: Wanted((count // 2 // _STORAGE[storage], 1), (storage,)),
            f"{part.name}.absmax": Wanted((blocks,), ("U8",) if state.nested else ("F32",)),
            f"{part.name}.quant_map": Wanted((16,), ("F32",)),
            name: Wanted(self._checkpoint.tensors[name].shape, ("U8",)),
        }
        if state.nested:
            outer = -(-blocks // state.nested[0])
            wanted[f"{part.name}.nested_absmax"] = Wanted((outer,), ("F32",))
            wanted[f"{part.name}.nested_quant_map"] = Wanted((256,), ("F32",))
        return wanted

    def weight(self, part: Part) -> Lookup4:
        """As `Format.weight`."""
        read, tensors = self._checkpoint.read, self._checkpoint.tensors
        state = next(self._state(name) for name in tensors if name.startswith(part.name + _STATE))
        packed = read(part.name).reshape(-1).view(np.uint8)
        packed = (packed << 4) | (packed >> 4)  # the even column is in the high nibble
        scale = read(f"{part.name}.absmax")
        if state.nested:
            block, offset = state.nested
            outer = np.repeat(read(f"{part.name}.nested_absmax"), block)[: len(scale)]
            scale = read(f"{part.name}.nested_quant_map")[scale] * outer + np.float32(offset)
        rows = part.shape[0]
        return Lookup4(packed.reshape(rows, -1), scale.reshape(rows, -1), read(f"{part.name}.quant_map"))

    def _check(self, part: Part, state: _State) -> None:
        if state.shape != part.shape:
            problem = f"{part.name!r} was {list(state.shape)}, but config.json implies {list(part.shape)}"
            raise CheckpointError(str(self._checkpoint.directory), [problem])
        if part.shape[-1] % state.block:
            raise UnsupportedError(
                f"{part.name!r} has rows of {part.shape[-1]} weights and blocks of {state.block}, which run across "
                "rows; jaxgen reads blocks that divide the rows. Load the original model with load_in_4bit=True"
            )

    def _state(self, name: str) -> _State:
        if name not in self._read_states:
            info = self._checkpoint.tensors[name]
            try:
                if info.nbytes > _MAX_STATE_BYTES:
                    raise ValueError(f"{info.nbytes} bytes")
                self._read_states[name] = _parse(name.split(_STATE)[1], self._checkpoint.read_bytes(name).tobytes())
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                if isinstance(error, CheckpointError):
                    raise
                problem = f"{name!r} does not describe a bitsandbytes tensor ({error!r:.200})"
                raise CheckpointError(str(self._checkpoint.directory), [problem]) from error
        return self._read_states[name]


def _parse(kind: str, text: bytes) -> _State:
    """The state in a tensor's JSON; raises `ValueError`, `KeyError` or `TypeError` for anything else."""
    fields = json.loads(text)
    shape, block = tuple(fields["shape"]), fields["blocksize"]
    nested = (fields["nested_blocksize"], float(fields["nested_offset"])) if "nested_blocksize" in fields else None
    if fields["quant_type"] != kind or block not in _BLOCKS or (nested and nested[0] not in _BLOCKS):
        raise ValueError(f"{fields['quant_type']!r} in blocks of {block!r}")
    if nested and not (math.isfinite(nested[1]) and fields["nested_dtype"] == "float32"):
        raise ValueError(f"nested_offset={nested[1]} of {fields['nested_dtype']!r}")
    return _State(kind, int(block), shape, nested)
