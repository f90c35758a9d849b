"""Damaged LoRA adapters: read as they are, or one typed error; never anything else, and no lost layer."""

import json
import random
from pathlib import Path

import numpy as np

from jaxgen.convert.adapter import Adapter
from jaxgen.errors import CheckpointError, JaxgenError
from jaxgen.models.mistral import MistralConfig
from jaxgen.models.tensors import parameter_parts
from tests.hf_files import CONFIG, hf_tensors
from tests.lora_files import LORA, adapter_tensors, scales, write_adapter
from tests.mutate import mutate_bytes, mutate_json

PARTS = [part for parts in parameter_parts(MistralConfig.from_hf(CONFIG)).values() for part in parts]
FIELDS = LORA | {
    "rank_pattern": {"layers.0.mlp.(up|down)_proj": 2, "^model.*o_proj": 2}, "alpha_pattern": {"v_proj": 1.5},
    "exclude_modules": None, "layers_to_transform": [0, 1], "layers_pattern": "layers", "use_rslora": True,
    "lora_dropout": 0.05, "bias": "none", "base_model_name_or_path": "x/y", "init_lora_weights": True,
}  # fmt: skip


def adapted(directory: Path) -> set[str] | None:
    """The weights that the adapter changes, after all of them were; None for a typed error, and a short one."""
    try:
        adapter = Adapter(directory)
        if problems := adapter.problems(PARTS):
            raise CheckpointError(str(directory), problems)
        changed = {part.name for part in PARTS if adapter.adapts(part)}
        for part in PARTS:
            if part.name in changed:
                weight = np.zeros(part.shape, np.float32)
                adapter.merge_into(weight, part)
                assert np.isfinite(weight).all()
        return changed
    except JaxgenError as error:
        assert len(str(error)) < 20_000
        return None


def test_damaged_configs(tmp_path):
    tensors = adapter_tensors(hf_tensors(CONFIG), scales(hf_tensors(CONFIG)))
    write_adapter(tmp_path, tensors, **FIELDS)
    path, draw, everything = tmp_path / "adapter_config.json", random.Random(0), adapted(tmp_path)
    assert everything is not None and len(everything) == 14
    accepted = 0
    for _ in range(250):
        path.write_text(mutate_json(draw, json.loads(json.dumps(LORA | FIELDS))))
        changed = adapted(tmp_path)
        assert changed in (None, everything)
        accepted += changed is not None
    assert 50 < accepted < 220


def test_damaged_weights(tmp_path):
    write_adapter(tmp_path, adapter_tensors(hf_tensors(CONFIG), scales(hf_tensors(CONFIG))), **FIELDS)
    path, draw = tmp_path / "adapter_model.safetensors", random.Random(0)
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    for _ in range(200):
        path.write_bytes(mutate_bytes(draw, data[:length]) + data[length:])
        adapted(tmp_path)
