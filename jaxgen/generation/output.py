"""What `generate` returns: ids laid out as HF does, and the optional details."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxgen.errors import JaxgenError
from jaxgen.generation.beam import best_sequences
from jaxgen.generation.config import GenerationConfig
from jaxgen.generation.past import PastKeyValues
from jaxgen.generation.prompt import generated
from jaxgen.generation.request import Request
from jaxgen.generation.stop import FINISH_REASON, raise_if_broken
from jaxgen.generation.weights import references, same_arrays, split


@dataclasses.dataclass(frozen=True)
class Origin:
    """What gave an output: the model, the call as it was read, and when it began (seconds since 1970)."""

    model: Any
    request: Request
    started: float
    weights: tuple[Any, ...] = ()  # references to the model's arrays, to see whether they have changed since

    def with_weights(self) -> "Origin":
        """The same, with references to the weights: for results that are kept, since it takes a walk over the model."""
        return dataclasses.replace(self, weights=references(split(self.model)[1]))

    def check(self) -> None:
        """Raise `JaxgenError` if the model has other weights by now than it generated with."""
        if not same_arrays(self.weights, split(self.model)[1]):
            raise JaxgenError("the model's weights have changed since; take the record before they do")


@dataclasses.dataclass(frozen=True, repr=False)
class GenerateOutput:
    """The result of `generate(..., return_dict_in_generate=True)`. R rows, N new tokens in the longest row.

    What was not asked for is None. With beams, `scores` and `logits` are those of num_beams rows per prompt.
    Source: transformers `GenerateDecoderOnlyOutput`, `GenerateBeamDecoderOnlyOutput`.
    """

    sequences: Int[np.ndarray, "R total"]  # the input's columns, then the new tokens, then pad
    logprobs: Float[np.ndarray, "R N"]  # of each new token where it was drawn, after processors; 0 after the end
    model_logprobs: Float[np.ndarray, "R N"]  # the model's own, before processors; 0 after the end
    lengths: Int[np.ndarray, " R"]  # new tokens per row
    finish_reason: list[str]  # "eos", "stop_string", "criterion", "length" or "time", per row
    generation_config: GenerationConfig  # the values in effect
    seed: int | tuple[int, ...] | None  # the seed in effect, or one per row; None when a key was given
    past_key_values: PastKeyValues | None = None  # for a call that goes on; None with beams; also called `cache`
    scores: tuple[Float[np.ndarray, "rows V"], ...] | None = None  # per step, after processors; 0 after a row's end
    logits: tuple[Float[np.ndarray, "rows V"], ...] | None = None  # per step, the model's own
    top_logprobs: Float[np.ndarray, "R N n"] | None = None  # per token, the model's n best log-probabilities ...
    top_ids: Int[np.ndarray, "R N n"] | None = None  # ... and whose they are
    attentions: tuple[tuple[Float[np.ndarray, "R heads _ _"], ...], ...] | None = None  # per step and layer
    hidden_states: tuple[tuple[Float[np.ndarray, "R _ D"], ...], ...] | None = None  # per step and layer
    sequences_scores: Float[np.ndarray, " R"] | None = None  # beams: log-probability / length**length_penalty
    beam_indices: Int[np.ndarray, "R N"] | None = None  # beams: the row of `scores` that gave each token; -1: none

    drafted: Int[np.ndarray, " R"] | None = None  # speculation: tokens drafted per row ...
    accepted: Int[np.ndarray, " R"] | None = None  # ... and those of them that the model drew too
    origin: Origin | None = None
    seconds: float = 0.0  # from the call to the last token, compilation included

    def __getitem__(self, name: str):
        """`output["sequences"]`, as HF's outputs allow."""
        return getattr(self, name)

    @property
    def cache(self) -> PastKeyValues | None:
        """`past_key_values`, under its name since transformers 5.24."""
        return self.past_key_values

    @property
    def record(self) -> Any:
        """A `jaxgen.Record`: everything that determined these tokens, and the tokens.

        >>> model, tokenizer = getfixture("demo")
        >>> out = model.generate(**tokenizer(["1, 2, 3"], return_tensors="np"), return_dict_in_generate=True)
        >>> out.record.generations[0]["output_ids"] == out.sequences[:, -20:].tolist()
        True
        """
        from jaxgen.records.record import Record

        return Record.of([self])

    def to_pandas(self) -> Any:
        """A pandas DataFrame with one line per new token: its text, ids and probabilities."""
        from jaxgen.text.show import to_pandas

        return to_pandas(self)

    def __repr__(self) -> str:
        from jaxgen.text.show import summary

        return summary(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: the tokens, coloured by their probability."""
        from jaxgen.text.show import html

        return html(self)


def collect(state: Any, origin: Origin) -> "np.ndarray | GenerateOutput":
    """Fetch a finished state and lay it out; raises `NonFiniteLogitsError` if a row ran into NaN."""
    request = origin.request
    if request.plan.recipe.num_beams > 1:
        return _collect_beams(state, origin)
    config, samples = request.config, request.plan.samples
    rows = request.input_ids.shape[0] * samples
    names = ["tokens", "lengths", "prompt_lengths", "status"]
    if config.return_dict_in_generate:
        names += ["logprobs", "model_logprobs"]
    arrays = {name: x[:rows] for name, x in jax.device_get({name: getattr(state, name) for name in names}).items()}
    lengths, prompt_lengths = arrays["lengths"], arrays["prompt_lengths"]
    counts = lengths - prompt_lengths
    raise_if_broken(arrays["status"], counts)
    width = int(counts.max())

    def new(name: str, fill: float) -> np.ndarray:
        return generated(arrays[name], prompt_lengths, lengths, width, arrays[name].dtype.type(fill))

    prompt = np.repeat(request.input_ids, samples, axis=0)
    sequences = np.concatenate([prompt, new("tokens", config.filler_id)], axis=1)
    if not config.return_dict_in_generate:
        return sequences
    drafting: dict[str, Any] = {
        name: np.asarray(getattr(state, name))[:rows] for name in ("drafted", "accepted") if hasattr(state, name)
    }
    return GenerateOutput(
        sequences=sequences,
        logprobs=new("logprobs", 0.0),
        model_logprobs=new("model_logprobs", 0.0),
        lengths=counts,
        finish_reason=[FINISH_REASON[int(code)] for code in arrays["status"]],
        generation_config=config,
        seed=request.seed,
        past_key_values=PastKeyValues(origin.model, state, rows, request.plan.recipe.drafts),
        origin=origin.with_weights(),
        seconds=time.time() - origin.started,
        **steps_kept(state.kept, rows, width),
        **drafting,
    )


def _collect_beams(state: Any, origin: Origin) -> "np.ndarray | GenerateOutput":
    """The best sequences of each prompt; what was recorded per step is of the rows, as in HF."""
    request = origin.request
    config, samples, prompts = request.config, request.plan.samples, len(request.input_ids)
    returned = config.num_return_sequences or 1
    best = best_sequences(state, prompts, samples, returned, float(request.controls.length_penalty))
    inside = np.arange(best.tokens.shape[1]) < best.lengths[:, None]
    new = np.where(inside, best.tokens, config.filler_id).astype(np.int32)
    sequences = np.concatenate([np.repeat(request.input_ids, returned, axis=0), new], axis=1)
    if not config.return_dict_in_generate:
        return sequences
    steps = int(jax.device_get(state.lengths - state.prompt_lengths)[: prompts * samples].max())
    kept = steps_kept(state.kept, prompts * samples, steps)
    for name in {"top_logprobs", "top_ids"} & kept.keys():  # per token: those of the row that gave it
        found = kept[name][best.beam_indices, np.arange(inside.shape[1])]
        kept[name] = np.where(inside[..., None], found, np.zeros_like(found))
    return GenerateOutput(
        sequences=sequences,
        logprobs=best.logprobs,
        model_logprobs=best.model_logprobs,
        lengths=best.lengths,
        finish_reason=[FINISH_REASON[int(code)] for code in best.status],
        generation_config=config,
        seed=request.seed,
        sequences_scores=best.scores,
        beam_indices=best.beam_indices,
        origin=origin.with_weights(),
        seconds=time.time() - origin.started,
        **kept,
    )


def steps_kept(kept: Any, rows: int, width: int) -> dict[str, Any]:
    """The fields of the output that were kept step by step, as HF lays them out."""
    steps: dict[str, Any] = {name: np.asarray(x)[:rows, :width] for name, x in vars(kept).items() if x is not None}
    for name in {"scores", "logits"} & steps.keys():
        steps[name] = tuple(np.moveaxis(steps[name], 1, 0))
    return steps
