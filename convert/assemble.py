"""One finished parameter, in host memory, from the HF tensors that make it up: as floats, or quantised."""

import logging
from collections.abc import Sequence

import numpy as np

from jaxgen.errors import CheckpointError
from jaxgen.models.tensors import EMBEDDING, Part
from jaxgen.quant import Quantization, Weight

from .adapter import Adapter
from .checkpoint import DTYPES, Checkpoint
from .formats import Format

logger = logging.getLogger("jaxgen")

_ROWS_AT_ONCE = 256  # that are looked at for NaN and infinity

_WEIGHTS_AT_ONCE = 1 << 22
_ALIGNMENT = 64  # XLA:CPU takes host memory with this alignment as its own, without a copy


class Assembler:
    """Parameters of a checkpoint, in `dtype`, or quantised where the file has them so or `quantization` wants it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: np.dtype,
        stored_as: Format | None = None,
        quantization: Quantization | None = None,
        adapter: Adapter | None = None,
        *,
        requantize: bool = False,
        low_cpu_memory: bool = False,
    ):
        self.checkpoint, self.dtype = checkpoint, dtype
        self.requantize, self.low_cpu_memory = requantize, low_cpu_memory
        self.stored_as, self.quantization, self.adapter = stored_as, quantization, adapter

    def parameter(self, parts: Sequence[Part], shape: tuple[int, ...]) -> np.ndarray | Weight:
        """The parameter that `parts` make up; holds no more than that and one part's tensors in memory."""
        if self.becomes_quantized(parts):
            first, *others = (self._quantized(part) for part in parts)
            weight = first.join(others, lambda arrays: _interleaved(parts, arrays, shape[0]))
            if weight is not None:
                return self._adapted(parts, weight.bounded() if self.low_cpu_memory else weight)
            names = ", ".join(part.name for part in parts[:3]) + (", ..." if len(parts) > 3 else "")
            logger.warning("%s are quantised in different ways; kept as %s instead", names, self.dtype.name)
        return self._dense(parts, shape)

    def becomes_quantized(self, parts: Sequence[Part]) -> bool:
        """Whether their parameter is a `Weight`, unless they turn out to be quantised in different ways."""
        return all(part.name != EMBEDDING and self._becomes_quantized(part) for part in parts)

    def sample(self, part: Part) -> Weight:
        """A weight like the one that a part becomes, but for its number of rows."""
        if self._stays(part):
            return self._stored(part)
        assert self.quantization is not None
        return self.quantization.quantize(np.ones((1, part.shape[1]), np.float32), repr(part.name))

    def stored_bytes(self, parts: Sequence[Part]) -> int:
        """Bytes that the tensors of `parts` take in the files."""
        stored = [self.stored_as.stored(part) if self.stored_as is not None else None for part in parts]
        names = [name for part, tensors in zip(parts, stored, strict=True) for name in tensors or [part.name]]
        return sum(self.checkpoint.tensors[name].nbytes for name in names)

    def _becomes_quantized(self, part: Part) -> bool:
        if self._is_stored_quantized(part):
            return True
        return self.quantization is not None and self.quantization.quantizes(part.name)

    def _is_stored_quantized(self, part: Part) -> bool:
        return self.stored_as is not None and self.stored_as.stored(part) is not None

    def _stays(self, part: Part) -> bool:
        """Whether the file has four bits that are kept."""
        return self._is_stored_quantized(part) and not self.requantize

    def _stored(self, part: Part) -> Weight:
        assert self.stored_as is not None
        return self.stored_as.weight(part)

    def _quantized(self, part: Part) -> Weight:
        if self._stays(part):
            return self._stored(part)
        assert self.quantization is not None
        return self.quantization.quantize(finite(self.checkpoint, part, self._exact(part)), repr(part.name))

    def _exact(self, part: Part) -> np.ndarray:
        """A tensor in the file's own dtype; in float32 if it is quantised there, or with the adapter's change."""
        adapter = self.adapter if self._adapts(part) else None
        if self._is_stored_quantized(part):
            tensor = _dequantized(self._stored(part))
        else:
            dtype = DTYPES[self.checkpoint.tensors[part.name].dtype] if adapter is None else np.float32
            tensor = np.empty(part.shape, dtype)
            self.checkpoint.read_into(part.name, tensor)
        if adapter is not None:
            adapter.merge_into(tensor, part)
        return tensor

    def _adapts(self, part: Part) -> bool:
        return self.adapter is not None and self.adapter.adapts(part)

    def _adapted(self, parts: Sequence[Part], weight: Weight) -> Weight:
        """`weight`, with the changes that are not merged into it: those of parts which the file quantises."""
        beside = [part for part in parts if self._adapts(part) and self._stays(part)]
        return self.adapter.beside(weight, beside, self.dtype) if self.adapter is not None and beside else weight

    def _dense(self, parts: Sequence[Part], shape: tuple[int, ...]) -> np.ndarray:
        buffer = empty(shape, self.dtype)
        for part in parts:
            views, computed = part.views(buffer), self._is_stored_quantized(part) or self._adapts(part)
            with np.errstate(over="ignore"):  # found below, for every pair of dtypes alike
                if computed:
                    part.put(buffer, self._exact(part))
                else:
                    self.checkpoint.read_into(part.name, *views)
            exact = not computed and self.checkpoint.tensors[part.name].dtype == "F16"
            if self.dtype == np.float16 and not exact and not all(np.isfinite(view).all() for view in views):
                problem = f"{part.name!r} has values beyond float16's 65504; load with dtype='bfloat16' or 'float32'"
                raise CheckpointError(str(self.checkpoint.directory), [problem])
        return buffer


def finite(checkpoint: Checkpoint, part: Part, weight: np.ndarray) -> np.ndarray:
    """All or some rows of a part that are to be quantised; raises `CheckpointError` where one is not finite.

    No scale is near to such a weight: its group would become zeros.
    """
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        if not np.isfinite(weight[start : start + _ROWS_AT_ONCE]).all():
            raise CheckpointError(str(checkpoint.directory), [f"{part.name!r} has weights that are not finite"])
    return weight


def _dequantized(weight: Weight) -> np.ndarray:
    """The values in float32; some rows at a time, because unpacking takes several times their memory."""
    values = np.empty(weight.shape, np.float32)
    step = max(1, _WEIGHTS_AT_ONCE // weight.shape[1])
    for start in range(0, len(values), step):
        chosen = slice(start, start + step)
        values[chosen] = weight.rows(chosen).dequantize()
    return values


def _interleaved(parts: Sequence[Part], arrays: Sequence[np.ndarray], rows: int) -> np.ndarray:
    """The rows of several arrays, one per part, as the parameter wants them."""
    joined = empty((rows, *arrays[0].shape[1:]), np.result_type(*arrays))
    for part, array in zip(parts, arrays, strict=True):
        part.put(joined, array)
    return joined


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that `jax.device_put` can adopt on CPU instead of copying."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)
