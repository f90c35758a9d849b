"""The arguments of `generate` for type checkers and editors: what each takes, in all the forms that it is read in.

Nothing here runs: what a value may be is checked by `jaxgen.generation.options.table`, whose rows these are.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypedDict, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from jaxgen.constraints.grammars import Grammar
from jaxgen.constraints.patterns import Constraint
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.processors.constraint import AllowedTokens
from jaxgen.generation.processors.watermark import WatermarkingConfig
from jaxgen.generation.programs.strict import Strict
from jaxgen.generation.prompts.past_key_values import PastKeyValues
from jaxgen.models.protocol import DecodingModel


@runtime_checkable
class HasArray(Protocol):
    """What numpy can read, such as a tensor of torch."""

    def __array__(self) -> np.ndarray:
        """Its values."""
        ...


@runtime_checkable
class HasToDict(Protocol):
    """A configuration of transformers."""

    def to_dict(self) -> dict[str, Any]:
        """Its fields."""
        ...


@runtime_checkable
class Streamer(Protocol):
    """What transformers' `BaseStreamer` has."""

    def put(self, value: Any, /) -> object:
        """Take the prompts' ids [R, T], and then each step's [R]."""
        ...

    def end(self) -> object:
        """Know that no more come."""
        ...


Integer: TypeAlias = int | np.integer
Number: TypeAlias = float | np.integer | np.floating
Flag: TypeAlias = bool | np.bool_
IdList: TypeAlias = Sequence[Integer] | np.ndarray

TokenIds: TypeAlias = Int[Array | np.ndarray, "B T"] | Sequence[Sequence[int]] | HasArray
TokenMask: TypeAlias = (
    Int[Array | np.ndarray, "B T"] | Bool[Array | np.ndarray, "B T"] | Sequence[Sequence[int]] | HasArray
)
Encoding: TypeAlias = Mapping[str, Any]  # a tokenizer's whole output
ConfigSource: TypeAlias = GenerationConfig | HasToDict | Mapping[str, Any] | str | os.PathLike[str]
RandomKey: TypeAlias = Key[Array, "*rows"]  # one, or one per row
Seed: TypeAlias = Integer | Sequence[Integer] | Int[np.ndarray, " R"]  # one, or one per row
RowIds: TypeAlias = Sequence[Integer | str] | np.ndarray  # one per prompt

LogitsProcessor: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # tokens, lengths, logits -> logits
StoppingCriterion: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # ... scores -> bool [R]
AllowedTokensFunction: TypeAlias = Callable[[int, np.ndarray], IdList]  # the prompt's index and the row's ids


class SharedOptions(TypedDict, total=False):
    """The options of every call; None switches one off."""

    max_length: Integer | None
    max_time: Number | None
    stop_strings: str | Sequence[str] | None
    eos_token_id: Integer | IdList | None
    pad_token_id: Integer | None
    bos_token_id: Integer | None

    do_sample: Flag | None
    num_return_sequences: Integer | None
    num_beams: Integer | None
    length_penalty: Number | None
    early_stopping: Flag | Literal["never"] | None
    prompt_lookup_num_tokens: Integer | None
    num_assistant_tokens: Integer | None
    assistant_confidence_threshold: Number | None
    max_matching_ngram_size: Integer | None

    guidance_scale: Number | None
    sequence_bias: Mapping[tuple[int, ...], Number] | Sequence[Sequence[IdList | Number]] | None
    encoder_repetition_penalty: Number | None
    repetition_penalty: Number | None
    frequency_penalty: Number | None
    presence_penalty: Number | None
    no_repeat_ngram_size: Integer | None
    encoder_no_repeat_ngram_size: Integer | None
    bad_words_ids: Sequence[IdList] | None
    min_length: Integer | None
    min_new_tokens: Integer | None
    forced_bos_token_id: Integer | None
    forced_eos_token_id: Integer | IdList | None
    remove_invalid_values: Flag | None
    exponential_decay_length_penalty: Sequence[Number] | np.ndarray | None
    suppress_tokens: IdList | None
    begin_suppress_tokens: IdList | None

    temperature: Number | None
    top_h: Number | None
    top_k: Integer | None
    top_p: Number | None
    min_p: Number | None
    typical_p: Number | None
    epsilon_cutoff: Number | None
    eta_cutoff: Number | None

    watermarking_config: WatermarkingConfig | HasToDict | Mapping[str, Any] | None
    renormalize_logits: Flag | None

    output_scores: Flag | None
    output_logits: Flag | None
    output_attentions: Flag | None
    output_hidden_states: Flag | None
    top_logprobs: Integer | None

    cache_implementation: Literal["static", "quantized"] | None
    max_cache_len: Integer | None
    prefill_chunk_size: Integer | None

    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None
    stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] | None
    prefix_allowed_tokens_fn: AllowedTokensFunction | AllowedTokens | None
    constraint: Constraint | Grammar | Sequence[Constraint | Grammar | None] | None
    negative_prompt_ids: TokenIds | None
    negative_prompt_attention_mask: TokenMask | None
    assistant_model: DecodingModel | None
    past_key_values: PastKeyValues | None
    strict: bool | Strict | None

    cache: PastKeyValues | None  # `past_key_values`, under its name since transformers 5.24
    use_cache: Literal[True] | None  # what scripts for transformers say: there always is a cache


# Parameters that some functions write out, each in its place. Two of a function may not have one name.
class MaxNewTokens(TypedDict, total=False):
    """One option."""

    max_new_tokens: Integer | None


class Tokenizer(TypedDict, total=False):
    """One option."""

    tokenizer: Any  # transformers'


class ReturnDict(TypedDict, total=False):
    """One option."""

    return_dict_in_generate: Flag | None


class GenerateOptions(SharedOptions, MaxNewTokens, Tokenizer, ReturnDict, total=False):
    """All options of `generate`: the fields of a `GenerationConfig`, and the arguments that are none.

    >>> options: GenerateOptions = {"max_new_tokens": 5, "top_p": 0.9}
    """


class CallArguments(SharedOptions, MaxNewTokens, Tokenizer, total=False):
    """What `model.generate` takes by name, besides what its result's type depends on."""

    inputs: TokenIds | Encoding | None  # `input_ids`, under the name that it has in HF
    token_type_ids: object  # not read
    key: RandomKey | None
    seed: Seed | None
    row_ids: RowIds | None
    streamer: Streamer | None
    chunk_size: int | None


class StreamArguments(SharedOptions, MaxNewTokens, ReturnDict, total=False):
    """What `model.stream` takes by name, besides what it writes out."""

    generation_config: ConfigSource | None
    key: RandomKey | None
    seed: Seed | None
    row_ids: RowIds | None
    skip_special_tokens: bool
    include_stop_str_in_output: bool


class BatchArguments(SharedOptions, MaxNewTokens, total=False):
    """What `jaxgen.batch.Generator` takes by name, besides what it writes out."""


class PipelineArguments(SharedOptions, MaxNewTokens, ReturnDict, total=False):
    """What a `TextGenerationPipeline` takes by name: its own options, and those of `generate`."""

    generation_config: ConfigSource | None
    streamer: Streamer | None
    chunk_size: int | None
    key: RandomKey | None
    seed: Integer | None  # one for all texts
    row_ids: RowIds | None
    batch_size: int | None

    return_full_text: bool | None
    return_tensors: bool | None
    return_text: bool | None
    return_type: object  # the name of transformers' `ReturnType`, or one of them
    clean_up_tokenization_spaces: bool | None
    skip_special_tokens: bool | None
    prefix: str | None
    handle_long_generation: Literal["hole"] | None
    stop_sequence: str | Sequence[str] | None

    truncation: bool | str | None
    padding: bool | str | None
    add_special_tokens: bool | None
    continue_final_message: bool | None
    tokenizer_encode_kwargs: Mapping[str, Any] | None
    tools: Sequence[Any] | None
    documents: Sequence[Mapping[str, Any]] | None


class WarmupOptions(SharedOptions, Tokenizer, ReturnDict, total=False):
    """What `model.warmup` takes by name, besides sizes."""
