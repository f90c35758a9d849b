"""From a Flax NNX module to a Hugging Face checkpoint, one shard at a time."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxgen.errors import JaxgenError, UnsupportedError

from .atomic import new_directory
from .checkpoint import INDEX, WEIGHTS
from .names import Part, parameter_parts
from .placement import DTYPES, as_dtype

# What a saved model consists of: replaced by overwrite=True, while other files (the tokenizer's) stay.
_MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
_UNITS = {
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def save_pretrained(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = 5_000_000_000,
    dtype: Any = None,
    overwrite: bool = False,
) -> None:
    """Write `model` (a `MistralForCausalLM`) as a Hugging Face checkpoint, for transformers and jaxgen to load.

    `max_shard_size`: bytes of tensors per file, an int or HF's "5GB"; a larger tensor gets its own file.
    `dtype`: that of the written weights; when None the model's own, and then bit for bit. The directory appears
    complete or not at all. It must be absent or empty, unless `overwrite`: then the model in it is replaced,
    and other files (a tokenizer's) stay. At most one shard is in host memory at a time.

    Raises `JaxgenError` if the directory is in the way or cannot be written, `UnsupportedError` if the model
    has parameters other than a Mistral's. Source: transformers `PreTrainedModel.save_pretrained`.
    """
    limit = _shard_bytes(max_shard_size)
    weights = _Weights(model, None if dtype is None else as_dtype(dtype))
    config = {**model.config.to_hf(), "dtype": weights.dtype.name, "torch_dtype": weights.dtype.name}
    shards = _plan(weights, limit)
    with new_directory(Path(directory), replaceable=_MODEL_FILES if overwrite else None) as place:
        _write_json(place / "config.json", config)
        # An empty file would tell transformers that there is no eos; without one it asks config.json.
        if generation := model.generation_config.to_hf():
            _write_json(place / "generation_config.json", generation)
        for name, parts in shards.items():
            save_file({part.name: tensor for part, tensor in weights.tensors(parts)}, place / name, {"format": "pt"})
            shutil.copymode(place / "config.json", place / name)  # safetensors lets nobody else read its files
        if len(shards) > 1:
            _write_json(place / INDEX, _index(weights, shards))


class _Weights:
    """The model's parameters as HF tensors: `parts` in HF's order, `dtype` as written."""

    def __init__(self, model: Any, dtype: np.dtype | None):
        variables = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}
        table = parameter_parts(model.config)
        if variables.keys() != table.keys():
            strange = sorted(variables.keys() ^ table.keys())
            raise UnsupportedError(
                f"save_pretrained: the model's parameters are not those of its config: {', '.join(strange[:5])}"
            )
        self._variables = variables
        self.dtype = np.dtype(model.dtype if dtype is None else dtype)
        if self.dtype.name not in DTYPES:
            raise UnsupportedError(f"save_pretrained: dtype={self.dtype.name} is not one of {', '.join(DTYPES)}")
        self.parts = [part for group in table.values() for part in group]
        self._home = {part.name: name for name, group in table.items() for part in group}

    def nbytes(self, part: Part) -> int:
        """Bytes of one HF tensor as written."""
        return int(np.prod(part.shape)) * self.dtype.itemsize

    def tensors(self, parts: list[Part]) -> Iterator[tuple[Part, np.ndarray]]:
        """The HF tensors of `parts`; a parameter that several neighbours share is fetched once."""
        fetched, parameter = "", np.empty(0)
        for part in parts:
            if self._home[part.name] != fetched:
                fetched = self._home[part.name]
                parameter = _to_host(self._variables[fetched][...])
            with np.errstate(over="ignore"):  # found below, for every pair of dtypes alike
                tensor = np.ascontiguousarray(part.view(parameter), dtype=self.dtype).reshape(part.shape)
            if self.dtype == np.float16 != parameter.dtype and not np.isfinite(tensor).all():
                raise JaxgenError(f"save_pretrained: {part.name!r} has values beyond float16's 65504")
            yield part, tensor


def _to_host(array: jax.Array) -> np.ndarray:
    """A host copy that dies with its last use: `np.asarray` of an accelerator's array is cached in it."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out; then the cached copies cost host memory
        return np.asarray(array)
    return np.asarray(jax.device_put(array, cpu))


def _plan(weights: _Weights, limit: int) -> dict[str, list[Part]]:
    """File names and their parts: consecutive, each file at most `limit` bytes or a single tensor."""
    groups: list[list[Part]] = [[]]
    room = limit
    for part in weights.parts:
        size = weights.nbytes(part)
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(part)
        room -= size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _index(weights: _Weights, shards: dict[str, list[Part]]) -> dict[str, Any]:
    total = sum(weights.nbytes(part) for part in weights.parts)
    return {
        "metadata": {"total_parameters": total // weights.dtype.itemsize, "total_size": total},
        "weight_map": {part.name: shard for shard, parts in shards.items() for part in parts},
    }


def _shard_bytes(value: int | str) -> int:
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,9})\s*([KMGT]I?B)", value.strip().upper())
        size = int(match[1]) * _UNITS[match[2]] if match else 0
    else:
        size = value
    if isinstance(size, bool) or size <= 0:
        raise JaxgenError(f"max_shard_size={value!r} must be a positive number of bytes, or a text such as '5GB'")
    return size


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
