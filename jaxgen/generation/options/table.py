"""The options of `generate`: for each what it may hold, its default, and the processor that does what it says.

A row of this table, a class in `jaxgen.generation.processors` and a type in `typed.py` are all that a new filter takes:
the fields of `GenerationConfig`, the order of the processors, what is said of unused options, and the documentation
come from here.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxgen.errors import JaxgenError
from jaxgen.generation.choosing.stop_strings import checked_strings
from jaxgen.generation.options.checks import (
    LARGEST,
    Check,
    biases,
    choice,
    decay,
    flag,
    id_list,
    id_lists,
    integer,
    number,
    plain,
    token_ids,
)  # fmt: skip
from jaxgen.generation.processors import filters, history, lengths, regular
from jaxgen.generation.processors.constraint import AllowedPrefixes, UserProcessors
from jaxgen.generation.processors.processor import Filter, Processor
from jaxgen.generation.processors.watermark import Watermark, WatermarkingConfig

DEFAULT_NEW_TOKENS = 20  # where nobody sets a length


@dataclasses.dataclass(frozen=True)
class Option:
    """A row of the table."""

    section: str  # where the documentation has it
    check: Check
    says: str  # what the documentation says of it
    processor: type[Processor] | None = None  # rows stand in the order of transformers' processors
    default: Any = None  # transformers' default of last resort, where that is not to do nothing
    off: Any = None  # the value, besides None, at which it does nothing
    shown: str = ""  # the default in the documentation, where `default` does not say it
    only_beams: bool = False  # nothing but beam search uses it
    needs: str = ""  # the option without which it is refused
    ours: bool = False  # transformers does not have it
    before: str = ""  # arguments that are processors: the option whose processor comes next

    @property
    def only_sampling(self) -> bool:
        """Whether nothing but sampling uses it: its range then matters where something samples, as in transformers."""
        return self.processor is not None and issubclass(self.processor, Filter)

    @property
    def unused_without(self) -> str:
        """What a call must have for it to do anything."""
        return "do_sample=True" if self.only_sampling else "num_beams of at least 2" if self.only_beams else ""

    def is_on(self, value: object) -> bool:
        """Whether the processor has anything to do."""
        always = self.processor is not None and self.processor.always
        return value is not None and (always or value != self.off)

    @property
    def default_shown(self) -> str:
        """The default, in the documentation."""
        return self.shown or ("off" if self.default is None else str(self.default))


def _row(section: str, check: Check, says: str, *columns: Any, **named: Any) -> Any:
    return dataclasses.field(default=None, metadata={"option": Option(section, check, says, *columns, **named)})


def _rows(table: type) -> dict[str, Option]:
    return {field.name: field.metadata["option"] for field in dataclasses.fields(table)}


_length, _strategy, _sampling, _processor, _output, _cache = (
    functools.partial(_row, section)
    for section in ("Length and end", "Strategy", "Sampling", "Processors", "Output", "Cache")
)
_detail = functools.partial(_output, needs="return_dict_in_generate")
_special = functools.partial(_length, shown="the checkpoint's")
_real, _positive, _share = number("(-inf, inf)"), number("(0, inf)"), number("(0, 1]")
_probability, _cutoff = number("[0, 1]"), number("[0, 1)")


@dataclasses.dataclass
class Options:
    """What a `GenerationConfig` holds, by HF's names; None where a less specific source decides."""

    __slots__ = ()

    max_length: int | None = _length(
        integer(1), "the most tokens of a row, with its prompt and without padding; `max_new_tokens` wins"
    )
    max_new_tokens: int | None = _length(integer(1), "the most new tokens of a row", shown=str(DEFAULT_NEW_TOKENS))
    max_time: float | None = _length(_positive, "seconds, after which all rows end")
    stop_strings: tuple[str, ...] | None = _length(
        lambda _, value: checked_strings(value), "texts that end a row; needs `tokenizer=`"
    )
    eos_token_id: int | tuple[int, ...] | None = _special(token_ids, "id or ids that end a row")
    pad_token_id: int | None = _special(integer(0), "what follows the end of a row; without one, the end token")
    bos_token_id: int | None = _special(integer(0), "the beginning of a text, for a call without a prompt")

    do_sample: bool | None = _strategy(flag, "draw tokens, instead of taking the most likely one", default=False)
    num_return_sequences: int | None = _strategy(integer(1), "rows per prompt, from one prefill", default=1)
    num_beams: int | None = _strategy(integer(1), "more than 1: beam search", default=1)
    length_penalty: float | None = _strategy(
        _real, "beams: sums of log-probabilities are divided by the length to this power", default=1.0, only_beams=True
    )
    early_stopping: bool | str | None = _strategy(
        choice(False, True, "never"), 'beams: True, False or "never"', default=False, only_beams=True
    )
    prompt_lookup_num_tokens: int | None = _strategy(
        integer(1), "speculation: so many tokens drafted from the prompt at a time"
    )
    num_assistant_tokens: int | None = _strategy(
        integer(1), "speculation: tokens that an `assistant_model` drafts at a time", default=20
    )
    assistant_confidence_threshold: float | None = _strategy(
        _probability, "speculation: drafting stops where the assistant is less sure", default=0.4
    )
    max_matching_ngram_size: int | None = _strategy(
        integer(1), "speculation: the longest n-gram looked up in the prompt", default=2
    )

    guidance_scale: float | None = _processor(_real, "classifier-free guidance, with `negative_prompt_ids=`", off=1.0)
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None = _processor(
        biases, "`{(id, ...): bias}`, added to the logit of a sequence's last id", history.SequenceBias, off=()
    )
    encoder_repetition_penalty: float | None = _processor(
        _positive, "above 1: tokens of the prompt become more likely", history.EncoderRepetitionPenalty, off=1.0
    )
    repetition_penalty: float | None = _processor(
        _positive, "above 1: tokens that occurred become less likely", history.RepetitionPenalty, default=1.0, off=1.0
    )
    frequency_penalty: float | None = _processor(
        _real,
        "OpenAI's: subtracted from a token's logit once for each time that it was generated; jaxgen's own",
        history.FrequencyPenalty,
        off=0.0,
        ours=True,
    )
    presence_penalty: float | None = _processor(
        _real,
        "OpenAI's: subtracted once from the logits of tokens that were generated; jaxgen's own",
        history.PresencePenalty,
        off=0.0,
        ours=True,
    )
    no_repeat_ngram_size: int | None = _processor(
        integer(0), "no n-gram of this size twice", history.NoRepeatNgram, off=0
    )
    encoder_no_repeat_ngram_size: int | None = _processor(
        integer(0), "no n-gram of this size that the prompt has", history.EncoderNoRepeatNgram, off=0
    )
    bad_words_ids: tuple[tuple[int, ...], ...] | None = _processor(
        id_lists, "sequences of ids that must not appear", history.BadWords, off=()
    )
    min_length: int | None = _length(
        integer(0), "no end token before so many tokens, with the prompt and without padding", lengths.MinLength, off=0
    )
    min_new_tokens: int | None = _length(
        integer(0), "no end token before so many new tokens", lengths.MinNewTokens, off=0
    )
    forced_bos_token_id: int | None = _processor(
        integer(0), "the first token, for prompts of one token", lengths.ForcedBos
    )
    forced_eos_token_id: int | tuple[int, ...] | None = _processor(
        token_ids, "the last token, where `max_length` is reached", lengths.ForcedEos, off=()
    )
    remove_invalid_values: bool | None = _processor(
        flag, "NaN and infinite logits become finite instead of raising", filters.RemoveInvalidValues, off=False
    )
    exponential_decay_length_penalty: tuple[int, float] | None = _processor(
        decay, "`(start, factor)`: the end token becomes likelier with the length", lengths.ExponentialDecay
    )
    suppress_tokens: tuple[int, ...] | None = _processor(
        id_list, "ids that must not appear", lengths.SuppressTokens, off=()
    )
    begin_suppress_tokens: tuple[int, ...] | None = _processor(
        id_list, "ids that must not be the first new token", lengths.BeginSuppressTokens, off=()
    )

    temperature: float | None = _sampling(
        _positive, "logits are divided by it", filters.Temperature, default=1.0, off=1.0
    )
    top_h: float | None = _sampling(_share, "entropy-bounded truncation", filters.TopH, off=1.0)
    top_k: int | None = _sampling(integer(0), "the k most likely tokens", filters.TopK, default=50, off=0)
    top_p: float | None = _sampling(
        _share, "the most likely tokens whose probabilities reach p", filters.TopP, default=1.0, off=1.0
    )
    min_p: float | None = _sampling(
        _probability, "tokens with at least this share of the most likely one's probability", filters.MinP, off=0.0
    )
    typical_p: float | None = _sampling(_share, "locally typical sampling", filters.TypicalP, off=1.0)
    epsilon_cutoff: float | None = _sampling(
        _cutoff, "tokens of at least this probability", filters.EpsilonCutoff, off=0.0
    )
    eta_cutoff: float | None = _sampling(
        _cutoff, "the same with a bound that depends on the entropy", filters.EtaCutoff, off=0.0
    )

    watermarking_config: WatermarkingConfig | None = _processor(
        lambda _, value: WatermarkingConfig.from_hf(value),
        "a `WatermarkingConfig`; greenlists are JAX's, so a detector must be jaxgen's",
        Watermark,
    )
    renormalize_logits: bool | None = _processor(
        flag, "log-probabilities again, after all processors", filters.Renormalize, off=False
    )

    return_dict_in_generate: bool | None = _output(
        flag, "a `GenerateOutput` instead of ids; the following need it", default=False
    )
    output_scores: bool | None = _detail(flag, "logits per step, after processors")
    output_logits: bool | None = _detail(flag, "logits per step, the model's own")
    output_attentions: bool | None = _detail(flag, "attention weights per step and layer")
    output_hidden_states: bool | None = _detail(flag, "hidden states per step and layer")
    top_logprobs: int | None = _detail(
        integer(0), "the n best tokens of each step and their log-probabilities; jaxgen's own", ours=True
    )

    cache_implementation: str | None = _cache(
        choice("static", "quantized"), '"static", or "quantized": keys and values in 8 bits', shown='"static"'
    )
    max_cache_len: int | None = _cache(integer(1), "room for so many tokens")
    prefill_chunk_size: int | None = _cache(integer(1), "process prompts so many tokens at a time")


def _argument(says: str, processor: type[Processor] | None = None, **columns: object) -> Any:
    return _row("Arguments", lambda _, value: value, says, processor, **columns)


@dataclasses.dataclass(frozen=True)
class Extras:
    """The arguments of `generate` that are no fields of a `GenerationConfig`, by HF's names."""

    logits_processor: Any = _argument(
        "jittable functions of tokens, lengths and logits", UserProcessors, off=(), before="temperature"
    )
    stopping_criteria: Any = _argument("jittable functions of tokens, lengths and scores")
    prefix_allowed_tokens_fn: Any = _argument(
        "which tokens may come next", AllowedPrefixes, before="forced_bos_token_id"
    )
    constraint: Any = _argument(
        "what the text must look like: `jaxgen.regex`, `choice`, `json_schema` or `grammar`, or a list of one per "
        "prompt; needs `tokenizer=`; jaxgen's own",
        regular.Constrained,
        before="temperature",
        ours=True,
    )
    negative_prompt_ids: Any = _argument("the prompts that `guidance_scale` leads away from")
    negative_prompt_attention_mask: Any = _argument("their masks")
    tokenizer: Any = _argument("for `stop_strings` and `constraint`")
    assistant_model: Any = _argument("a smaller model that drafts")
    past_key_values: Any = _argument("of an earlier output; also by the name it has since transformers 5.24, `cache`")
    strict: Any = _argument("True, or a `Strict`: the one shape of every batch; jaxgen's own", ours=True)

    @classmethod
    def take(cls, options: Mapping[str, Any]) -> "tuple[Extras, dict[str, Any]]":
        """Split the keyword arguments of `generate` into these and the fields of a GenerationConfig."""
        if "cache" in options:
            if options.get("past_key_values") is not None:
                raise JaxgenError("both cache and past_key_values were given; they are one argument, pass cache only")
            options = {k: v for k, v in options.items() if k != "cache"} | {"past_key_values": options["cache"]}
        rest = {name: value for name, value in options.items() if name not in ARGUMENTS}
        return cls(**{name: value for name, value in options.items() if name in ARGUMENTS}), rest


OPTIONS, ARGUMENTS = _rows(Options), _rows(Extras)


def checked(name: str, value: object, sampled: bool) -> Any:
    """A user's value as a `GenerationConfig` holds it, which is `sampled` from or not; raises `JaxgenError`."""
    unused = value is None or (not sampled and out_of_range(name, value))
    return plain(value) if unused else OPTIONS[name].check(name, plain(value))


def out_of_range(name: str, value: object) -> str | None:
    """Why sampling cannot use this number; None if it can, or if it is no number at all.

    Greedy search takes it all the same, such as `temperature=0`, as in transformers.
    """
    option, value = OPTIONS[name], plain(value)
    kind = int if isinstance(option.off, int) else int | float
    fits = isinstance(value, kind) and not isinstance(value, bool) and abs(value) <= LARGEST
    if not option.only_sampling or not fits:
        return None
    try:
        option.check(name, value)
    except JaxgenError as error:
        return str(error)
    return None
