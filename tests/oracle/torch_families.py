"""Models of the families in transformers, with random weights, and the same in jaxgen; prompts; how near both are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import jaxgen
from tests.families import CONFIGS

LENGTHS = (3, 30, 17)


def prompts() -> list[list[int]]:
    generator = np.random.default_rng(7)
    return [generator.integers(3, 97, length).tolist() for length in LENGTHS]


def torch_model(name: str, directory: Path, **sizes: int) -> Any:
    """A model of transformers with random weights, biases and norms; its checkpoint is in `directory`."""
    given = json.loads(json.dumps(CONFIGS[name] | sizes))
    config = transformers.AutoConfig.for_model(**given)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.3 if "norm" in key or "bias" in key else 0.12)
    model.generation_config.eos_token_id = None  # rows end by length: the longest comparison
    model.save_pretrained(directory)
    # As people have it: the file that the hub holds, in the spelling of the case.
    saved = json.loads((directory / "config.json").read_text())
    spelled = {key: value for key, value in saved.items() if key not in ("rope_parameters", "layer_types")}
    (directory / "config.json").write_text(json.dumps(spelled | CONFIGS[name] | sizes))
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def ours(directory: Path, **options: Any) -> Any:
    return jaxgen.AutoModelForCausalLM.from_pretrained(directory, dtype="float32", device_map="cpu", **options)


def logits_of(model: Any, ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """Each row's at its real tokens."""
    logits = np.asarray(model(ids, mask).logits)
    return [row[real == 1] for row, real in zip(logits, mask, strict=True)]


def assert_close(actual: list[np.ndarray], expected: list[np.ndarray], atol: float = 1e-4) -> None:
    for row, (one, other) in enumerate(zip(actual, expected, strict=True)):
        np.testing.assert_allclose(one, other, atol=atol, rtol=0, err_msg=f"row {row}")
