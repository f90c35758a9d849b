"""Small checkpoints of the families, with random weights, and the models loaded from them."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgen import AutoModelForCausalLM
from jaxgen.models.families import config_from_hf
from jaxgen.models.tensors import parameter_parts
from tests.families import CONFIGS
from tests.hf_files import write_hf


def tensors_of(config: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors under HF's names: matrices that keep a signal's size, norms near one, biases that show."""
    rng, tensors = np.random.default_rng(seed), {}
    for parts in parameter_parts(config).values():
        for part in parts:
            draws = rng.standard_normal(part.shape, np.float32)
            if len(part.shape) == 2:
                draws *= 2 * part.shape[1] ** -0.5
            elif part.name.endswith("bias"):
                draws *= 0.5
            else:
                draws = 1 + 0.2 * draws
            tensors[part.name] = draws.astype(np.float32)
    return tensors


def written(directory: Path, name: str, **sizes: int) -> Path:
    fields = CONFIGS[name] | sizes
    write_hf(directory, fields, tensors_of(config_from_hf(fields)))
    return directory


def load(place: Path, **options: Any) -> Any:
    options = {"dtype": "float32", "device_map": "cpu", **options}
    return AutoModelForCausalLM.from_pretrained(place, **options)


def logits(model: Any, ids: Any) -> np.ndarray:
    return np.asarray(model(jnp.asarray(ids)).logits)
