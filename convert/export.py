"""From a Flax NNX module to a Hugging Face checkpoint, one parameter at a time."""

import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.generation.programs.structure import split
from jaxgen.models.tensors import Part, parameter_parts
from jaxgen.paths import as_path
from jaxgen.quant import Weight

from .atomic import new_directory
from .checkpoint import DTYPES as CODES
from .checkpoint import INDEX
from .leftovers import MODEL_FILES
from .placement import DTYPES, as_dtype
from .writer import Layout, Planned, ShardWriter, index_of, json_bytes, plan_shards, shard_bytes

# Options of transformers' save_pretrained, with the value that says what is done here anyway.
_INERT = {
    "is_main_process": True,
    "push_to_hub": False,
    "safe_serialization": True,
    "save_function": None,
    "save_original_format": True,
    "save_peft_format": True,
    "state_dict": None,
    "token": None,
    "variant": None,
}


def save_pretrained(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = 5_000_000_000,
    dtype: Any = None,
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Write `model` as a Hugging Face checkpoint, for transformers and jaxgen to load.

    `max_shard_size`: bytes of tensors per file, an int or HF's "5GB"; a larger tensor gets its own file.
    `dtype`: that of the written weights; when None the model's own, and then bit for bit. The directory appears
    complete or not at all. It must hold no model, unless `overwrite`: then that is replaced. Other files in it (a
    tokenizer's) stay, also those that others write meanwhile, and so does its mode. Host memory holds one parameter
    at a time.

    Raises `JaxgenError` if the directory is in the way or cannot be written, `UnsupportedError` if the model
    has parameters other than its config's, and for other options of transformers unless their value changes nothing
    (`push_to_hub=False`, `safe_serialization=True`). Source: transformers `PreTrainedModel.save_pretrained`.
    """
    _refuse(options)
    target = as_path(directory, "save_pretrained: directory")
    limit = shard_bytes(max_shard_size)
    weights = _Weights(model, None if dtype is None else as_dtype(dtype))
    config = {**model.config.to_hf(), "dtype": weights.dtype.name, "torch_dtype": weights.dtype.name}
    shards = plan_shards(weights.parts, weights.nbytes, limit)
    with new_directory(target, owned=MODEL_FILES, overwrite=overwrite) as place:
        (place / "config.json").write_bytes(json_bytes(config))
        # An empty file would tell transformers that there is no eos; without one it asks config.json.
        if generation := model.generation_config.to_hf():
            (place / "generation_config.json").write_bytes(json_bytes(generation))
        for name, parts in shards.items():
            layout = Layout({part.name: Planned(weights.code, part.shape) for part in parts})
            with ShardWriter(place / name, layout) as shard:
                for part, tensor in weights.tensors(parts):
                    shard.append(part.name, tensor)
        if len(shards) > 1:
            weight_map = {part.name: name for name, parts in shards.items() for part in parts}
            total = sum(map(weights.nbytes, weights.parts))
            (place / INDEX).write_bytes(json_bytes(index_of(weight_map, total, total // weights.dtype.itemsize)))


def _refuse(options: dict[str, Any]) -> None:
    """Raise for every option of a call that would change what is written."""
    for name, value in options.items():
        if name not in _INERT:
            raise JaxgenError(f"save_pretrained: there is no option {name!r:.80}")
        if value is not None and value is not _INERT[name]:
            instead = "; upload the directory with `hf upload`" if name == "push_to_hub" else ""
            raise UnsupportedError(f"save_pretrained: {name}={value!r:.80}: not supported{instead}")


class _Weights:
    """The model's parameters as HF tensors: `parts` in HF's order, `dtype` (safetensors' `code`) as written."""

    def __init__(self, model: Any, dtype: np.dtype | None):
        variables = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}
        if kinds := {weight.describe() for weight in split(model)[1] if isinstance(weight, Weight)}:
            raise UnsupportedError(
                f"save_pretrained: the model has quantised weights ({'; '.join(sorted(kinds))}); "
                "`jaxgen convert SRC DST` writes int4, from the original checkpoint"
            )
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
        self.code = next(code for code, dtype in CODES.items() if dtype == self.dtype)
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
                tensor = np.ascontiguousarray(part.take(parameter), dtype=self.dtype).reshape(part.shape)
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
