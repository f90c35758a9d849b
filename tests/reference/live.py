"""transformers on torch, run live: the only module of the reference that needs torch."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from packaging.version import Version
from transformers.generation import logits_process

from tests.reference.cases import Run, left_padded
from tests.reference.filters import EOS, Inputs
from tests.reference.weights import write_checkpoint

# One thread: the models are tiny, and torch's waiting threads starve whatever else the machine runs.
torch.set_num_threads(1)


def versions() -> dict[str, str]:
    """What computed the reference."""
    return {"transformers": transformers.__version__, "torch": torch.__version__}


def hf_model(config: Mapping[str, Any], seed: int) -> transformers.PreTrainedModel:
    """The checkpoint of `config` and `seed` as transformers loads it from disk: float32, eager attention, CPU."""
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), config, seed)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
    return model.eval()


@torch.no_grad()
def prefill_logits(model: transformers.PreTrainedModel, prompts: list[list[int]]) -> list[np.ndarray]:
    """Logits `[length, V]` of each prompt, computed in one left-padded batch."""
    ids, mask = (torch.from_numpy(x).long() for x in left_padded(prompts))
    # `generate` derives positions from the mask; a plain forward pass counts the padding unless told.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.numpy()
    return [row[-len(prompt) :] for row, prompt in zip(logits, prompts, strict=True)]


@torch.no_grad()
def generate(model: transformers.PreTrainedModel, prompts: list[list[int]], run: Run) -> tuple[np.ndarray, np.ndarray]:
    """New tokens `[B, steps]` and processed scores `[B, steps, V]` of HF's greedy `generate`."""
    if len(prompts) > 1 and "repetition_penalty" in run.options and Version(transformers.__version__) < Version("5.24"):
        return _each_alone(model, prompts, run)  # it penalises the padding of a batch
    ids, mask = (torch.from_numpy(x).long() for x in left_padded(prompts))
    # With a window of 1, HF's cache keeps the last `-1 + 1 = -0` tokens, which is all of them (transformers 5.23,
    # DynamicSlidingWindowLayer.update); without a cache the window is right.
    cache = {"use_cache": False} if getattr(model.config, "sliding_window", None) == 1 else {}
    result = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **run.arguments(), **cache
    )
    new = result.sequences[:, ids.shape[1] :].numpy()
    return new, torch.stack(result.scores, dim=1).numpy()


def _each_alone(
    model: transformers.PreTrainedModel, prompts: list[list[int]], run: Run
) -> tuple[np.ndarray, np.ndarray]:
    """As `generate`; a row that ended early is filled as a batch would be."""
    rows = [generate(model, [prompt], run) for prompt in prompts]
    steps = max(new.shape[1] for new, _ in rows)
    filler = run.arguments()["pad_token_id"]
    new = np.full((len(rows), steps), filler, rows[0][0].dtype)
    scores = np.zeros((len(rows), steps, rows[0][1].shape[2]), np.float32)
    for row, (own, its) in enumerate(rows):
        new[row, : own.shape[1]], scores[row, : its.shape[1]] = own[0], its[0]
    return new, scores


def smallest_lead(scores: np.ndarray, new: np.ndarray, eos: list[int]) -> float:
    """How far the best score leads the second one in the closest decision of unfinished rows.

    Greedy tokens are a fair reference only where this is far above float32 noise.
    """
    top = np.sort(scores, axis=-1)[..., -2:]
    ended = np.isin(new, eos)
    unfinished = np.cumsum(ended, axis=1) - ended == 0
    return float((top[..., 1] - top[..., 0])[unfinished].min())


def log_probs(scores: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Float32 `[B, steps]`: log-probability of each chosen token under the processed scores."""
    normalised = torch.log_softmax(torch.from_numpy(scores), dim=-1)
    return normalised.gather(-1, torch.from_numpy(new)[..., None])[..., 0].numpy()


def filtered(batch: Inputs, settings: Mapping[str, float | int]) -> np.ndarray:
    """Float32 `[B, V]`: HF's processors in HF's order, each row alone and without its padding."""
    rows = []
    for row, logits in enumerate(batch.logits):
        history = torch.from_numpy(batch.history(row)).long()[None]
        processors = transformers.LogitsProcessorList()
        if "repetition_penalty" in settings:
            processors.append(logits_process.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
        if "min_new_tokens" in settings:
            prompt = history.shape[1] - int(batch.new_tokens[row])
            least = settings["min_new_tokens"]
            processors.append(logits_process.MinNewTokensLengthLogitsProcessor(prompt, least, list(EOS), "cpu"))
        if "temperature" in settings:
            processors.append(logits_process.TemperatureLogitsWarper(settings["temperature"]))
        if "top_k" in settings:
            processors.append(logits_process.TopKLogitsWarper(settings["top_k"]))
        if "top_p" in settings:
            processors.append(logits_process.TopPLogitsWarper(settings["top_p"]))
        if "min_p" in settings:
            processors.append(logits_process.MinPLogitsWarper(settings["min_p"]))
        rows.append(processors(history, torch.from_numpy(logits)[None])[0].numpy())
    return np.stack(rows)
