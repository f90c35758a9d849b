"""What `generate` returns: ids laid out as HF does, and the optional details."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxgen.errors import NonFiniteLogitsError
from jaxgen.generation.config import GenerationConfig
from jaxgen.generation.loop import DecodeState
from jaxgen.generation.prompt import generated
from jaxgen.generation.request import Request


@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """The result of `generate(..., return_dict_in_generate=True)`. R rows, N new tokens in the longest row."""

    sequences: Int[np.ndarray, "R total"]  # the input's columns, then the new tokens, then pad
    logprobs: Float[np.ndarray, "R N"]  # of each new token where it was drawn, after processors; 0 after the end
    model_logprobs: Float[np.ndarray, "R N"]  # the model's own, before processors; 0 after the end
    lengths: Int[np.ndarray, " R"]  # new tokens per row
    finish_reason: list[str]  # "eos" or "length", per row
    generation_config: GenerationConfig  # the values in effect
    seed: int | None  # the seed in effect; None when a key was given

    def __getitem__(self, name: str):
        """`output["sequences"]`, as HF's outputs allow."""
        return getattr(self, name)


def collect(state: DecodeState, request: Request) -> "np.ndarray | GenerateOutput":
    """Fetch a finished state and lay it out; raises `NonFiniteLogitsError` if a row ran into NaN."""
    config, samples = request.config, request.plan.samples
    rows = request.input_ids.shape[0] * samples
    wanted = {"tokens", "lengths", "prompt_lengths", "broken"}
    if config.return_dict_in_generate:
        wanted |= {"logprobs", "model_logprobs"}
    arrays = jax.device_get({name: getattr(state, name) for name in wanted})
    arrays = {name: array[:rows] for name, array in arrays.items()}
    lengths, prompt_lengths = arrays["lengths"], arrays["prompt_lengths"]
    counts = lengths - prompt_lengths
    if arrays["broken"].any():
        broken = np.flatnonzero(arrays["broken"])
        raise NonFiniteLogitsError(broken.tolist(), counts[broken].tolist())

    width = int(counts.max())

    def new(name: str, fill: float) -> np.ndarray:
        return generated(arrays[name], prompt_lengths, lengths, width, arrays[name].dtype.type(fill))

    tokens = new("tokens", config.filler_id)
    prompt = np.repeat(request.input_ids, samples, axis=0)
    sequences = np.concatenate([prompt, tokens], axis=1)
    if not config.return_dict_in_generate:
        return sequences
    last = tokens[np.arange(rows), counts - 1]
    return GenerateOutput(
        sequences=sequences,
        logprobs=new("logprobs", 0.0),
        model_logprobs=new("model_logprobs", 0.0),
        lengths=counts,
        finish_reason=["eos" if token in config.eos_token_ids else "length" for token in last.tolist()],
        generation_config=config,
        seed=request.seed,
    )
