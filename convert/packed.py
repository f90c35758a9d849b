"""Int4 weights as compressed-tensors writes them, format "pack-quantized": what transformers and vLLM read.

Source: compressed-tensors 0.20, `PackedQuantizationCompressor` and `QuantizationConfig`.
"""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from jaxgen.errors import JaxgenError
from jaxgen.models.tensors import Part
from jaxgen.quant import Int4
from jaxgen.quant.config import WHOLE_ROWS, check_group

from .formats.packing import from_words
from .writer import Planned

_PER_WORD = 8  # codes in an int32


def planned(part: Part, group_size: int) -> dict[str, Planned]:
    """The tensors that hold a weight; raises `JaxgenError` for rows that do not fill whole words and groups."""
    size = check_group(part.shape, group_size, repr(part.name))
    rows, width = part.shape
    if width % _PER_WORD:
        raise JaxgenError(f"{part.name!r} has rows of {width} weights; compressed-tensors packs {_PER_WORD} to a word")
    return {
        f"{part.name}_packed": Planned("I32", (rows, width // _PER_WORD)),
        f"{part.name}_scale": Planned("BF16", (rows, width // size)),
        f"{part.name}_shape": Planned("I64", (2,)),
    }


def encode(name: str, rows: Int4) -> dict[str, np.ndarray]:
    """Some rows of a weight, as pieces of its packed and scale tensors: codes from 0 to 15, the first one lowest."""
    packed = np.ascontiguousarray(rows.packed) ^ np.uint8(0x88)
    return {f"{name}_packed": packed.view("<i4"), f"{name}_scale": np.asarray(rows.scale)}


def shape_of(part: Part) -> dict[str, np.ndarray]:
    """The tensor that gives a packed weight's shape."""
    return {f"{part.name}_shape": np.array(part.shape, "<i8")}


def decode(name: str, file: Path) -> Int4:
    """The weight of `encode`, read back from a file."""
    with safe_open(str(file), framework="numpy") as tensors:
        words, scale = tensors.get_tensor(f"{name}_packed"), tensors.get_tensor(f"{name}_scale")
    return Int4(from_words(words), scale)


def quantization_config(group_size: int, ignored: list[str]) -> dict[str, Any]:
    """The field of this name in config.json, every key as the library writes it; `ignored`: modules as they were."""
    whole_rows = group_size == WHOLE_ROWS
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if whole_rows else "group",
        "group_size": None if whole_rows else group_size,
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "moe_sparsity_config": None,
        "version": "0.20.0",
    }
