"""Attentions and hidden states of a generation: the model processes the finished sequences once more.

One forward pass over a finished sequence computes what every step of its generation computed (in the model's dtype,
whatever that of the cache). So the loop carries none of it; the device holds one layer of it at a time, the host all.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxgen.errors import JaxgenError
from jaxgen.generation.prompts.layout import SMALLEST_PROMPT, bucket, pack, pad_to
from jaxgen.generation.prompts.memory import free_bytes
from jaxgen.lowering import own_rules

Steps = tuple[tuple[np.ndarray, ...], ...]


@own_rules()
def with_activations(model: Any, output: Any, request: Any) -> Any:
    """The output of a call with its `attentions` and `hidden_states`, those that were asked for, as HF lays them out.

    Per step and layer: step 0 covers the prompt's T columns, `[R, heads, T, T]` and `[R, T, D]`; each later one the
    token that was the input, `[R, heads, 1, columns so far]` and `[R, 1, D]`. Masked columns, and rows after their end,
    hold zeros.
    """
    config, width = request.config, request.input_ids.shape[1]
    if not (config.output_attentions or config.output_hidden_states):
        return output
    inputs = output.sequences[:, :-1]  # the newest token never was one
    steps, rows = output.sequences.shape[1] - width, len(inputs)
    prompt = np.repeat(request.attention_mask, rows // len(request.attention_mask), axis=0)
    new = np.arange(steps - 1) < output.lengths[:, None]
    hidden, attentions = _forward(model, inputs, np.concatenate([prompt, new], axis=1), bool(config.output_attentions))

    def by_step(layers: list[np.ndarray], axis: int) -> Steps:
        ends = [width, *range(width + 1, width + steps)]
        starts = [0, *ends[:-1]]
        return tuple(
            tuple(_columns(layer, start, end, axis) for layer in layers)
            for start, end in zip(starts, ends, strict=True)
        )

    return dataclasses.replace(
        output,
        hidden_states=by_step(hidden, 1) if config.output_hidden_states else None,
        attentions=by_step(attentions, 2) if config.output_attentions else None,
    )


def _columns(layer: np.ndarray, start: int, end: int, axis: int) -> np.ndarray:
    """What the columns `start` to `end` computed; of attentions, only up to `end`."""
    return layer[:, start:end] if axis == 1 else layer[:, :, start:end, :end]


def check_memory_of_activations(config: Any, rows: int, total: int, model: Any) -> None:
    """Raise before generating where the result would not fit."""
    if not (config.output_attentions or config.output_hidden_states):
        return
    c = model.config
    scores = 4 * rows * c.num_attention_heads * total * total if config.output_attentions else 0
    states = 4 * rows * total * c.hidden_size
    needs = (
        (model.device, 3 * scores + 2 * states),
        (jax.devices("cpu")[0], (c.num_hidden_layers + 1) * (scores + states)),
    )
    for device, needed in needs:
        free = free_bytes(device)
        if free is not None and needed > free:
            raise JaxgenError(
                f"output_attentions and output_hidden_states of {rows} rows of {total} tokens take {needed / 1e9:.2f} "
                f"GB, and {free / 1e9:.2f} GB are free on {device}; ask for fewer rows or tokens"
            )


def _forward(
    model: Any, sequences: np.ndarray, real: np.ndarray, with_attentions: bool
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    tokens, lengths = pack(sequences, real)
    rows, length = bucket(len(tokens)), bucket(tokens.shape[1], SMALLEST_PROMPT)
    columns = np.arange(length) < pad_to(lengths, (rows,), fill=1)[:, None]
    place = np.where(real, np.cumsum(real, axis=1) - 1, 0)  # where the row's tokens went
    both = real[:, :, None] & real[:, None, :]
    hidden, attentions = [], []
    for states, weights in model.activations(pad_to(tokens, (rows, length)), columns, with_attentions):
        moved = np.take_along_axis(np.asarray(states, np.float32)[: len(real)], place[..., None], axis=1)
        hidden.append(np.where(real[..., None], moved, 0))
        if weights is not None:
            moved = np.take_along_axis(np.asarray(weights, np.float32)[: len(real)], place[:, None, :, None], axis=2)
            moved = np.take_along_axis(moved, place[:, None, None, :], axis=3)
            attentions.append(np.where(both[:, None], moved, 0))
    return hidden, attentions
