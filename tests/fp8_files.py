"""Checkpoints in 8-bit floats, and what they stand for."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxgen.models.families import config_from_hf
from tests.families import CONFIGS
from tests.family_files import tensors_of
from tests.hf_files import write_hf

FIELDS = CONFIGS["ministral3"] | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}


def rounded(tensors: dict[str, np.ndarray], block: Any, scale_dtype: Any) -> tuple[Any, Any]:
    """What a file holds, and what that stands for in float32: all matrices of layers in 8 bits."""
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        if ".layers." not in name or tensor.ndim != 2:
            stored[name] = meant[name] = tensor
            continue
        height, width = block or tensor.shape
        grid = [-(-n // size) for n, size in zip(tensor.shape, (height, width), strict=True)]
        scales = np.empty(grid, np.float32)
        for row, column in np.ndindex(*grid):
            part = tensor[row * height : (row + 1) * height, column * width : (column + 1) * width]
            scales[row, column] = np.abs(part).max() / 448
        scales = scales.astype(scale_dtype)
        whole = scales.astype(np.float32).repeat(height, 0).repeat(width, 1)[: tensor.shape[0], : tensor.shape[1]]
        stored[name] = (tensor / whole).astype(ml_dtypes.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales[0, 0] if block is None else scales
        stored[name.replace(".weight", ".activation_scale")] = np.float32(0.5)
        meant[name] = stored[name].astype(np.float32) * whole
    return {name: np.asarray(x) for name, x in stored.items()}, meant


def quantization(block: Any, **fields: Any) -> dict[str, Any]:
    kind = {"quant_method": "fp8", "weight_block_size": block and list(block), "activation_scheme": "static"}
    return {"quantization_config": kind | fields}


def written(
    tmp_path: Path, block: Any = (32, 32), scale_dtype: Any = np.float32, fields: Any = FIELDS
) -> tuple[Path, Path]:
    """The checkpoint in 8 bits, and what it stands for as an ordinary one."""
    stored, meant = rounded(tensors_of(config_from_hf(fields)), block, scale_dtype)
    write_hf(tmp_path / "fp8", fields | quantization(block), stored, shards=2)
    write_hf(tmp_path / "plain", fields, meant)
    return tmp_path / "fp8", tmp_path / "plain"
