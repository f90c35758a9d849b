"""One finished parameter, in host memory, from the HF tensors that make it up: as floats, or quantised."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from jaxgen.errors import CheckpointError
from jaxgen.quant import Int4, Int4Config, Lookup4, quantize
from jaxgen.quant.adapted import Adapted

from .adapter import Adapter
from .checkpoint import DTYPES, Checkpoint
from .formats import Format
from .names import EMBEDDING, Part

logger = logging.getLogger("jaxgen")

_ROWS_AT_ONCE = 256  # that are looked at for NaN and infinity

_WEIGHTS_AT_ONCE = 1 << 22
_ALIGNMENT = 64  # XLA:CPU takes host memory with this alignment as its own, without a copy

Quantized = Int4 | Lookup4


class Assembler:
    """Parameters of a checkpoint, in `dtype`, or of four bits where the file has them or `quantization` wants them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: np.dtype,
        stored_as: Format | None = None,
        quantization: Int4Config | None = None,
        adapter: Adapter | None = None,
        *,
        requantize: bool = False,
        low_cpu_memory: bool = False,
    ):
        self.checkpoint, self.dtype = checkpoint, dtype
        self.requantize, self.low_cpu_memory = requantize, low_cpu_memory
        self.stored_as, self.quantization, self.adapter = stored_as, quantization, adapter

    def parameter(self, parts: Sequence[Part], shape: tuple[int, ...]) -> np.ndarray | Quantized | Adapted:
        """The parameter that `parts` make up; holds no more than that and one part's tensors in memory."""
        quantized = [part for part in parts if self._becomes_quantized(part)]
        if len(quantized) == len(parts) and all(part.name != EMBEDDING for part in parts):
            pieces = [self._quantized(part) for part in parts]
            if _alike(pieces):
                weight = _join(parts, pieces, shape)
                if isinstance(weight, Int4):
                    weight = dataclasses.replace(weight, low_cpu_memory=self.low_cpu_memory)
                return self._adapted(parts, weight)
            names = ", ".join(part.name for part in parts)
            logger.warning("%s are quantised in different ways; kept as %s instead", names, self.dtype.name)
        return self._dense(parts, shape)

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

    def _stored(self, part: Part) -> Quantized:
        assert self.stored_as is not None
        return self.stored_as.read(part)

    def _quantized(self, part: Part) -> Quantized:
        if self._stays(part):
            return self._stored(part)
        assert self.quantization is not None
        return rounded(self.checkpoint, part, self._exact(part), self.quantization.group_size)

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

    def _adapted(self, parts: Sequence[Part], weight: Quantized) -> Quantized | Adapted:
        """`weight`, with the changes that are not merged into it: those of parts which the file quantises."""
        beside = [part for part in parts if self._adapts(part) and self._stays(part)]
        return self.adapter.beside(weight, beside, self.dtype) if self.adapter is not None and beside else weight

    def _dense(self, parts: Sequence[Part], shape: tuple[int, ...]) -> np.ndarray:
        buffer = empty(shape, self.dtype)
        for part in parts:
            view = part.view(buffer)
            with np.errstate(over="ignore"):  # found below, for every pair of dtypes alike
                if self._is_stored_quantized(part) or self._adapts(part):
                    view[...] = self._exact(part).reshape(view.shape)
                    exact = False
                else:
                    self.checkpoint.read_into(part.name, view)
                    exact = self.checkpoint.tensors[part.name].dtype == "F16"
            if self.dtype == np.float16 and not exact and not np.isfinite(view).all():
                problem = f"{part.name!r} has values beyond float16's 65504; load with dtype='bfloat16' or 'float32'"
                raise CheckpointError(str(self.checkpoint.directory), [problem])
        return buffer


def rounded(checkpoint: Checkpoint, part: Part, weight: np.ndarray, group_size: int) -> Int4:
    """`quantize`, of all or some rows of a part; raises `CheckpointError` where a weight is not finite.

    No scale is near to such a weight: its group would become zeros.
    """
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        if not np.isfinite(weight[start : start + _ROWS_AT_ONCE]).all():
            raise CheckpointError(str(checkpoint.directory), [f"{part.name!r} has weights that are not finite"])
    return quantize(weight, group_size, name=repr(part.name))


def _dequantized(weight: Quantized) -> np.ndarray:
    """The values in float32; some rows at a time, because unpacking takes several times their memory."""
    values = np.empty(weight.shape, np.float32)
    step = max(1, _WEIGHTS_AT_ONCE // weight.shape[1])
    by_row = {name: getattr(weight, name, None) for name in ("packed", "scale", "offset")}
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        some = {name: array[rows] for name, array in by_row.items() if array is not None}
        values[rows] = dataclasses.replace(weight, **some).dequantize()
    return values


def _alike(pieces: Sequence[Quantized]) -> bool:
    """Whether the pieces can be rows of one weight."""
    first = pieces[0]
    for piece in pieces[1:]:
        if type(piece) is not type(first) or piece.group_size != first.group_size:
            return False
        if piece.scale.dtype != first.scale.dtype:
            return False
        if isinstance(piece, Lookup4) and isinstance(first, Lookup4) and not np.array_equal(piece.table, first.table):
            return False
        if isinstance(piece, Int4) and isinstance(first, Int4) and not _same(piece.permutation, first.permutation):
            return False
    return True


def _same(left: np.ndarray | None, right: np.ndarray | None) -> bool:
    return left is right or (left is not None and right is not None and np.array_equal(left, right))


def _join(parts: Sequence[Part], pieces: Sequence[Quantized], shape: tuple[int, ...]) -> Quantized:
    """The rows of several weights, interleaved as the parameter of `shape` wants them."""

    def rows(arrays: Sequence[np.ndarray]) -> np.ndarray:
        joined = empty((shape[0], arrays[0].shape[1]), np.result_type(*arrays))
        for part, array in zip(parts, arrays, strict=True):
            view = part.view(joined)
            view[...] = array.reshape(view.shape)
        return joined

    packed, scale = rows([piece.packed for piece in pieces]), rows([piece.scale for piece in pieces])
    first = pieces[0]
    if isinstance(first, Lookup4):
        return Lookup4(packed, scale, first.table)
    offsets = [piece.offset for piece in pieces if isinstance(piece, Int4)]
    offset = None
    if any(array is not None for array in offsets):
        zeros = [np.zeros_like(piece.scale) for piece in pieces]
        offset = rows([zero if array is None else array for zero, array in zip(zeros, offsets, strict=True)])
    return Int4(packed, scale, offset, first.permutation)


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that `jax.device_put` can adopt on CPU instead of copying."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)
