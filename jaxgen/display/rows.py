"""The rows of an output, without padding."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of an output: which prompt it continues, with what, and where its new tokens begin."""

    index: int
    prompt: int  # the index of the prompt in the call
    sample: int  # which of the rows that continue it
    prompt_ids: list[int]  # real ones only
    new_ids: list[int]
    seed: int | None


def rows_of(output: Any) -> list[Row]:
    """The rows of a `GenerateOutput`, without padding."""
    new = output.sequences.shape[1] - output.logprobs.shape[1]
    origin = output.origin
    prompts = [row[:new] for row in output.sequences] if origin is None else _prompts(origin.request)
    samples = len(output.sequences) // len(prompts)
    seeds = output.seed if isinstance(output.seed, tuple) else (output.seed,) * len(prompts)
    return [
        Row(
            index=row,
            prompt=row // samples,
            sample=row % samples,
            prompt_ids=prompts[row // samples].tolist(),
            new_ids=sequence[new : new + length].tolist(),
            seed=seeds[row // samples],
        )
        for row, (sequence, length) in enumerate(zip(output.sequences, output.lengths.tolist(), strict=True))
    ]


def _prompts(request: Any) -> list[np.ndarray]:
    return [ids[real] for ids, real in zip(request.input_ids, request.attention_mask, strict=True)]


def step_logits(output: Any, row: int, step: int) -> Any:
    """The logits [V] from which a row's token was made; None if `output_logits` was not asked for."""
    if output.logits is None:
        return None
    beams = output.beam_indices
    return output.logits[step][row if beams is None else beams[row, step]]
