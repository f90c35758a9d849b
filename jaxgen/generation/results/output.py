"""What `generate` returns: ids laid out as HF does, and the optional details."""

import dataclasses
import time
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxgen.errors import JaxgenError
from jaxgen.generation.choosing.stop import FINISH_REASON
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.prepare import Request
from jaxgen.generation.programs.structure import references, same_arrays, split
from jaxgen.generation.prompts.past_key_values import PastKeyValues
from jaxgen.generation.results.activations import with_activations


@dataclasses.dataclass(frozen=True)
class Origin:
    """What gave an output: the model, the call as it was prepared, and when it began (seconds since 1970)."""

    model: Any
    request: Request
    started: float
    weights: tuple[Any, ...] = ()  # references to the model's arrays, to see whether they have changed since

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
    finish_reason: list[str]  # "eos", "stop_string", "criterion", "length", "time" or "complete", per row
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
    def prompt_lengths(self) -> Int[np.ndarray, " R"]:
        """The real tokens of each row's prompt: what `jaxgen.score_tokens` asks for."""
        return self._prompt_mask().sum(axis=1, dtype=np.int32)

    @property
    def attention_mask(self) -> Int[np.ndarray, "R total"]:
        """Which of `sequences` are real tokens: 1 in the prompts and up to each row's end, int32."""
        width = self.sequences.shape[1] - self._prompt_mask().shape[1]
        new = np.arange(width) < self.lengths[:, None]
        return np.concatenate([self._prompt_mask(), new], axis=1).astype(np.int32)

    def _prompt_mask(self) -> np.ndarray:
        if self.origin is None:
            raise JaxgenError("this output was not made by model.generate, and does not know its prompts")
        mask = self.origin.request.attention_mask
        return np.repeat(mask, len(self.sequences) // len(mask), axis=0)

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
        from jaxgen.display.table import to_pandas

        return to_pandas(self)

    def __repr__(self) -> str:
        from jaxgen.display.notebook import summary

        return summary(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: the tokens, coloured by their probability."""
        from jaxgen.display.notebook import html

        return html(self)


def collect(model: Any, request: Request, state: object, started: float = 0.0) -> "np.ndarray | GenerateOutput":
    """Fetch a finished state and lay it out; raises `NonFiniteLogitsError` if a row ran into NaN.

    `started` is when the call did, in seconds since 1970.
    """
    config, layout, prompts = request.config, request.layout, len(request.input_ids)
    details = bool(config.return_dict_in_generate)
    returned = config.sequences_per_prompt
    found = request.search.collect(state, prompts, returned, request.traced, layout, details)
    inside = np.arange(found.tokens.shape[1]) < found.lengths[:, None]
    new = np.where(inside, found.tokens, config.filler_id).astype(np.int32)
    sequences = np.concatenate([np.repeat(request.input_ids, returned, axis=0), new], axis=1)
    if not details:
        return sequences
    assert found.logprobs is not None and found.model_logprobs is not None
    past = PastKeyValues(model, state, len(sequences), layout.static.drafts) if request.search.append_only else None
    output = GenerateOutput(
        sequences=sequences,
        logprobs=found.logprobs,
        model_logprobs=found.model_logprobs,
        lengths=found.lengths,
        finish_reason=[FINISH_REASON[int(code)] for code in found.status],
        generation_config=config,
        seed=request.seed,
        past_key_values=past,
        origin=Origin(model, request, started, references(split(model)[1])),
        seconds=time.time() - started,
        **found.details,
    )
    return with_activations(model, output, request)
