"""Checkpoints of bitsandbytes and MLX, their weights written out from the formats' descriptions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.hf_files import CONFIG, hf_tensors, write_hf

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
MLX = {"group_size": 32, "bits": 4, "mode": "affine"}
# Rows that blocks of 32 and 64 divide.
SHAPE = CONFIG | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 1}


def bnb_tensors(name: str, shape: tuple[int, int], seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A weight as bitsandbytes stores it, written out from the format's description, and its values."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 16, shape, np.uint8)
    table = np.linspace(-1, 1, 16, dtype=np.float32)
    absmax = generator.uniform(0.05, 0.1, shape[0] * shape[1] // 64).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": shape}
    tensors = {
        name: (codes[:, ::2] << 4 | codes[:, 1::2]).reshape(-1, 1),
        f"{name}.absmax": absmax,
        f"{name}.quant_map": table,
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    return tensors, table[codes] * np.repeat(absmax, 64).reshape(shape)


def mlx_tensors(name: str, shape: tuple[int, int], seed: int, group: int = 32) -> tuple[dict[str, np.ndarray], np.ndarray]:  # fmt: skip  # noqa: E501
    """A weight as MLX stores it, and its values."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 16, shape, np.uint32)
    scales = generator.choice([-0.01, 0.01, 0.02], (shape[0], shape[1] // group)).astype(np.float16)
    biases = generator.normal(0, 0.05, scales.shape).astype(np.float16)
    words = sum(codes[:, place::8] << np.uint32(4 * place) for place in range(8))
    path = name.removesuffix(".weight")
    tensors = {name: np.asarray(words, np.uint32), f"{path}.scales": scales, f"{path}.biases": biases}
    wide = [np.repeat(array.astype(np.float32), group, axis=1) for array in (scales, biases)]
    return tensors, codes.astype(np.float32) * wide[0] + wide[1]


def write_both(tmp_path: Path, field: dict[str, Any], encode: Any, chosen: Any, **changes: Any) -> tuple[Path, Path]:
    """Two checkpoints of one model: weights for which `chosen(name)` in 4 bits, and those values as floats."""
    config = SHAPE | changes
    packed, plain = {}, hf_tensors(config)
    for seed, (name, tensor) in enumerate(plain.items()):
        if tensor.ndim == 2 and chosen(name):
            tensors, plain[name] = encode(name, tensor.shape, seed)
            packed |= tensors
        else:
            packed[name] = tensor
    write_hf(tmp_path / "plain", config, plain)
    write_hf(tmp_path / "packed", config | field, {})
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in packed.items()},
              tmp_path / "packed" / "model.safetensors")  # fmt: skip
    return tmp_path / "packed", tmp_path / "plain"


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")
