"""From what the user passes to what the loop reads: checked ids, packed rows, bucketed shapes.

A row's real tokens are moved to the front, so that token p sits in slot p and its position is p. After that,
padding no longer exists: left, right or in the middle, it gives the same numbers.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxgen.errors import JaxgenError

SMALLEST_PROMPT = 16
SMALLEST_TOTAL = 64


def bucket(size: int, smallest: int = 1) -> int:
    """The next size of the form 2**k or 3 * 2**k: at most half too large, few enough to compile once each.

    >>> [bucket(n) for n in (1, 5, 7, 33)]
    [1, 6, 8, 48]
    """
    if size <= smallest:
        return smallest
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power


def largest_bucket(limit: int) -> int:
    """The largest bucket size that does not exceed `limit` (0 if there is none).

    >>> [largest_bucket(n) for n in (0, 7, 50)]
    [0, 6, 48]
    """
    power = 1 << limit.bit_length() >> 1
    return power * 3 // 2 if power >= 2 and limit >= power * 3 // 2 else power


def pack(ids: Int[Array | np.ndarray, "B T"], mask: Bool[Array | np.ndarray, "B T"], xp: Any = np) -> tuple[Any, Any]:
    """Move each row's real tokens to the front, in order: tokens [B, T] and lengths [B], int32.

    `xp` is numpy on the host and jax.numpy under jit.
    """
    order = xp.argsort(~mask, axis=1, stable=True)
    lengths = mask.sum(axis=1).astype(np.int32)
    packed = xp.where(xp.arange(ids.shape[1]) < lengths[:, None], xp.take_along_axis(ids, order, axis=1), 0)
    return packed.astype(np.int32), lengths


def pad_to(array: Any, shape: tuple[int, ...], fill: int = 0) -> Any:
    """Grow an array at its ends to `shape`; one that has it already, of numpy or under jit, is returned as it is."""
    if array.shape == shape:
        return array
    widths = [(0, wanted - size) for wanted, size in zip(shape, array.shape, strict=True)]
    return np.pad(array, widths, constant_values=fill)


def checked_prompt(
    input_ids: object, attention_mask: object, vocab_size: int, names: tuple[str, str] = ("input_ids", "attention_mask")
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Ids and mask as numpy arrays, after every check that needs no model.

    Raises `JaxgenError`, naming row, column and value, for ids that are not a non-empty [batch, length] table of
    ints inside the vocabulary, a mask of another shape or with other values than 0 and 1, and rows without a
    single real token.
    """
    if isinstance(input_ids, Mapping) or hasattr(input_ids, "input_ids"):
        raise JaxgenError("input_ids is a mapping; unpack the tokenizer's output: model.generate(**inputs)")
    ids_name, mask_name = names
    ids = _table(input_ids, ids_name)
    if ids.size == 0:
        raise JaxgenError(f"{ids_name} has shape {ids.shape}: an empty prompt; pass at least one token (such as BOS)")
    mask = np.ones(ids.shape, bool) if attention_mask is None else _mask(attention_mask, ids.shape, names)
    if (ids.astype(np.int32) != ids).any():
        row, column = np.argwhere(ids.astype(np.int32) != ids)[0]
        raise JaxgenError(f"{ids_name}[{row}, {column}]={ids[row, column]} is not a 32-bit int (masked or not)")
    outside = mask & ((ids < 0) | (ids >= vocab_size))
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise JaxgenError(
            f"{ids_name}[{row}, {column}]={ids[row, column]} is outside the model's vocabulary of {vocab_size} tokens; "
            "is this the tokenizer of this model?"
        )
    empty = np.flatnonzero(~mask.any(axis=1))
    if empty.size:
        raise JaxgenError(f"{mask_name}: row {empty[0]} has no real token; every prompt needs at least one")
    return ids.astype(np.int32), mask


def arrays_inside_jit(ids: Any, mask: Any) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Ids and which of them are real: what shapes and dtypes say of them is known inside jit too."""
    ids = ids if hasattr(ids, "dtype") else np.asarray(ids)
    shape, of_mask = ids.shape, ids.shape if mask is None else np.shape(mask)
    if len(shape) != 2 or 0 in shape:
        raise JaxgenError(f"input_ids has shape {shape}; expected [batch, length], neither of them 0")
    if of_mask != shape:
        raise JaxgenError(f"attention_mask has shape {of_mask}, input_ids has {shape}; they must agree")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise JaxgenError(f"input_ids has dtype {ids.dtype}; expected ints")
    # By explicit dtypes: a caller under x64 has 64-bit ids, which our rules do not know.
    ids = jnp.asarray(ids, jnp.int32)
    return ids, jnp.ones(ids.shape, bool) if mask is None else jnp.asarray(mask, jnp.int32) != 0


def _mask(attention_mask: object, shape: tuple[int, ...], names: tuple[str, str]) -> np.ndarray:
    ids_name, name = names
    mask = _table(attention_mask, name, allow_bool=True)
    if mask.shape != shape:
        raise JaxgenError(f"{name} has shape {mask.shape}, {ids_name} has {shape}; they must agree")
    if not np.isin(mask, (0, 1)).all():
        row, column = np.argwhere(~np.isin(mask, (0, 1)))[0]
        raise JaxgenError(f"{name}[{row}, {column}]={mask[row, column]} must be 0 or 1")
    return mask.astype(bool)


def _table(values: object, name: str, allow_bool: bool = False) -> np.ndarray:
    if isinstance(values, str) or (isinstance(values, list | tuple) and values and isinstance(values[0], str)):
        raise JaxgenError(
            f"{name} is a text; make ids of it: tokenizer(texts, padding=True, return_tensors='np'), or give the text "
            "to jaxgen.pipeline('text-generation', model=model)"
        )
    parts = [values, *values] if isinstance(values, list | tuple) else [values]
    if any(isinstance(part, np.ma.MaskedArray) for part in parts):
        raise JaxgenError(
            f"{name} is a masked array of numpy, whose mask would be lost; pass its .data, and what is real as 1 in "
            "attention_mask"
        )
    try:
        table = np.asarray(values)
    except ValueError as error:
        raise JaxgenError(
            f"{name} has rows of different lengths; pad them: tokenizer(texts, padding=True, return_tensors='np')"
        ) from error
    if table.ndim != 2:
        raise JaxgenError(f"{name} has shape {table.shape}; expected [batch, length], one row per prompt")
    if table.size and table.dtype.kind not in ("iub" if allow_bool else "iu"):
        raise JaxgenError(f"{name} has dtype {table.dtype}; expected ints")
    return table


def generated(tokens: Any, prompt_lengths: Any, lengths: Any, width: int, fill: Any, xp: Any = np) -> Any:
    """The `width` entries after each row's prompt, `fill` where a row has ended. Works under numpy and jit."""
    column = xp.arange(width)
    slot = xp.minimum(prompt_lengths[:, None] + column, tokens.shape[1] - 1)
    return xp.where(column < (lengths - prompt_lengths)[:, None], xp.take_along_axis(tokens, slot, axis=1), fill)
