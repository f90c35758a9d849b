"""LoRA adapters in peft's format, and a quantised base to put them beside, built by hand with numpy and json."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.convert.checkpoint import Checkpoint, Wanted
from jaxgen.convert.load import AutoModelForCausalLM
from jaxgen.models.tensors import Part
from jaxgen.quant import Int4
from jaxgen.quant.nibbles import pack
from tests.hf_files import CONFIG, DTYPES, hf_tensors, safetensors_bytes, write_hf

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.down_proj": ("down_proj",),
}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": list(LINEAR)}
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
IDS = jnp.array([[1, 5, 9, 2, 7, 10, 3]])
Scales = dict[str, tuple[int, float]]  # HF weight name to its rank and its scale, worked out by hand


def key(name: str, letter: str) -> str:
    return f"base_model.model.{name.removesuffix('weight')}lora_{letter}.weight"


def scales(hf: Mapping[str, Any], wanted: str = r".*_proj\.weight", rank: int = 2, scale: float = 3.0) -> Scales:
    return {name: (rank, scale) for name in hf if re.fullmatch(wanted, name)}


def adapter_tensors(hf: Mapping[str, np.ndarray], adapted: Scales, code: str = "F32") -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    tensors = {}
    for name, (rank, _) in adapted.items():
        rows, width = hf[name].shape
        tensors[key(name, "A")] = generator.standard_normal((rank, width), np.float32).astype(DTYPES[code])
        tensors[key(name, "B")] = generator.standard_normal((rows, rank), np.float32).astype(DTYPES[code])
    return tensors


def write_adapter(directory: Path, tensors: dict[str, np.ndarray], **fields: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(LORA | fields))
    (directory / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    return directory


def load(directory: Path, **options: Any):
    return AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", **options)


def linear(model: Any, path: str) -> Any:
    """The weight of a linear layer of the second block."""
    block, name = path.split(".")
    return getattr(getattr(model.model.layers[1], block), name).weight[...]


class Quarters:
    """A format whose int4 weights are quarters, stored as floats; of the layers that `pattern` names.

    Their columns are permuted, as by GPTQ with desc_act: the factors beside them are not.
    """

    name = "quarters"

    def __init__(self, checkpoint: Checkpoint, pattern: str):
        self.checkpoint, self.pattern = checkpoint, re.compile(pattern)

    def stored(self, part: Part) -> dict[str, Wanted] | None:
        return {part.name: Wanted(part.shape)} if self.pattern.fullmatch(part.name) else None

    def weight(self, part: Part) -> Int4:
        codes = (4 * self.checkpoint.read(part.name).astype(np.float32)).astype(np.int8)
        order = np.random.default_rng(0).permutation(part.shape[1]).astype(np.int32)
        return Int4(pack(codes[:, order]), np.full((part.shape[0], 1), 0.25, np.float32), permutation=order)


def write_quarters(directory: Path, code: str = "F32") -> dict[str, np.ndarray]:
    hf = hf_tensors(CONFIG, code)
    hf = {name: np.clip(np.round(4 * tensor), -8, 7) / DTYPES[code](4) for name, tensor in hf.items()}
    hf = {name: tensor.astype(DTYPES[code]) for name, tensor in hf.items()}
    write_hf(directory, CONFIG, hf)
    return hf


def use_quarters(monkeypatch: pytest.MonkeyPatch, pattern: str = r".*_proj\.weight") -> None:
    """From here on, every checkpoint is taken for one in that format."""
    monkeypatch.setattr(
        "jaxgen.convert.load.detect", lambda fields, checkpoint: (fields, Quarters(checkpoint, pattern))
    )
