"""Makes the fixtures of tests/test_formats_tables.py with the formats' own libraries; run by hand.

    pip install torch==2.13.0 bitsandbytes==0.50.2 mlx[cpu]==0.32.4 gguf==0.19.0
    python -m tests.formats.make_tables

Each file holds, for every variant, the tensors that a checkpoint would, and as `VARIANT.expected` what the library
dequantises them to: of bitsandbytes' larger ones, only the rows `VARIANT.rows`.
"""

from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.numpy import save_file

HERE = Path(__file__).parent
BITSANDBYTES = {  # shape, kind, double quantisation, block, storage
    "nf4": ((4, 128), "nf4", False, 64, torch.uint8),
    "fp4": ((4, 128), "fp4", False, 64, torch.uint8),
    "nf4_double": ((68, 256), "nf4", True, 64, torch.uint8),  # 272 blocks: more than one block of scales
    "fp4_double": ((68, 256), "fp4", True, 64, torch.uint8),
    "nf4_float_storage": ((4, 128), "nf4", False, 64, torch.float32),
    "nf4_large_blocks": ((4, 256), "nf4", False, 128, torch.uint8),
    "nf4_across_rows": ((4, 96), "nf4", False, 64, torch.uint8),
}
MLX = {f"{dtype}_{group}": (dtype, group) for dtype in ("float16", "bfloat16", "float32") for group in (32, 64, 128)}
GGML = ("Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q8_0")


def bitsandbytes_tensors() -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    tensors = {}
    for variant, (shape, kind, double, block, storage) in BITSANDBYTES.items():
        weight = torch.randn(shape) * 0.02
        packed, state = quantize_4bit(
            weight, blocksize=block, compress_statistics=double, quant_type=kind, quant_storage=storage
        )
        tensors[f"{variant}.weight"] = packed.numpy()
        for name, tensor in state.as_dict(packed=True).items():
            tensors[f"{variant}.weight.{name}"] = tensor.numpy()
        rows = np.array([0, shape[0] // 2, shape[0] - 5, shape[0] - 1] if shape[0] > 4 else range(4), np.int32)
        tensors[f"{variant}.rows"] = rows
        tensors[f"{variant}.expected"] = dequantize_4bit(packed, state).numpy()[rows]
    return tensors


def mlx_tensors() -> dict[str, mx.array]:
    mx.random.seed(0)
    tensors = {}
    for variant, (dtype, group) in MLX.items():
        weight = mx.random.normal((4, 128)).astype(getattr(mx, dtype))
        packed, scales, biases = mx.quantize(weight, group_size=group, bits=4)
        tensors |= {f"{variant}.weight": packed, f"{variant}.scales": scales, f"{variant}.biases": biases}
        wide = (scales.astype(mx.float32), biases.astype(mx.float32))
        tensors[f"{variant}.expected"] = mx.dequantize(packed, *wide, group_size=group, bits=4)
    return tensors


def ggml_tensors() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    tensors = {}
    for name in GGML:
        kind = gguf.GGMLQuantizationType[name]
        weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
        if name.endswith("K"):  # which gguf cannot make: any bytes are such a block, if its halves are numbers
            rows = generator.integers(0, 256, (2, 512 // weights * nbytes), np.uint8)
            blocks = rows.reshape(-1, nbytes)
            for start in (0, 2) if name == "Q4_K" else (nbytes - 2,):
                halves = generator.normal(0, 0.01, len(blocks)).astype(np.float16)
                blocks[:, start : start + 2] = halves.view(np.uint8).reshape(-1, 2)
        else:
            rows = gguf.quantize(generator.standard_normal((2, 512), np.float32), kind)
        tensors |= {f"{name}.rows": rows, f"{name}.expected": gguf.dequantize(rows, kind)}
    return tensors


def main() -> None:
    save_file(bitsandbytes_tensors(), HERE / "bitsandbytes.safetensors")
    mx.save_safetensors(str(HERE / "mlx.safetensors"), mlx_tensors())
    save_file(ggml_tensors(), HERE / "ggml_blocks.safetensors")


if __name__ == "__main__":
    main()
