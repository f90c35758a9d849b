"""What the executables are given: what is static (`StaticOptions`, `BatchLayout`), and numbers (`TracedOptions`)."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgen.cache import Slots
from jaxgen.constraints.patterns import Constraint
from jaxgen.errors import JaxgenError, UnsupportedError, shown
from jaxgen.generation.choosing.constrained import Automata, checked, has_grammar
from jaxgen.generation.choosing.grammars import Grammars
from jaxgen.generation.choosing.stop_strings import StopStrings
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.options.table import OPTIONS, Extras
from jaxgen.generation.processors.chain import chain_of
from jaxgen.generation.processors.constraint import as_pytree
from jaxgen.generation.processors.processor import Processor, as_count, as_number
from jaxgen.generation.processors.regular import Asked, automata_of, where
from jaxgen.generation.prompts.layout import bucket, pad_to
from jaxgen.pytree import pytree


@dataclasses.dataclass(frozen=True)
class StaticOptions:
    """What is static in a decode step. Two calls with equal ones share executables."""

    do_sample: bool
    record_scores: bool = False
    record_logits: bool = False
    top_logprobs: int = 0
    recorded: int = 0  # steps that there is room to record
    allow_invalid: bool = False  # remove_invalid_values: NaN logits end nothing
    num_beams: int = 1
    early_stopping: bool | str = False
    eos_count: int = 0  # beams: how many ids may end one, which decides how many candidates are looked at
    drafts: int = 0  # tokens that are drafted at a time; 0: no speculation
    prompt_lookup: bool = False  # they come from the row itself, not from an assistant


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """What is static in a generation, besides the shapes of its arrays."""

    static: StaticOptions
    samples: int  # rows per prompt
    total: int  # the largest length of a row, prompt and new tokens
    slots: Slots  # of the cache, per row
    int8_cache: bool = False
    chunk: int = 0  # prompt tokens that are prefilled at a time; 0: all at once
    one_by_one: bool = False  # so is each prompt, all but its last token, which the first decode step feeds
    fresh: int = 0  # columns that hold what a prompt adds to the past; 0: there is no past


@pytree
@dataclasses.dataclass
class TracedOptions:
    """The numbers of a call: traced, so that changing one compiles nothing."""

    processors: tuple[Processor, ...]  # `f(logits, rows) -> logits` with their numbers, in HF's order
    criteria: tuple[Any, ...]  # the user's `f(tokens, lengths, scores) -> bool [R]`
    eos_ids: Int[Array | np.ndarray, "*rows E"]  # filled up with -1; of all rows, or of each
    stop_strings: StopStrings | None
    guidance_scale: Float[Array | np.ndarray, ""] | None  # None: no negative prompts
    length_penalty: Float[Array | np.ndarray, ""]  # beams
    confidence: Float[Array | np.ndarray, ""]  # an assistant stops drafting when it is less sure than this
    ngram: Int[Array | np.ndarray, ""]  # prompt lookup: the longest end of a row that is looked up
    samples: Bool[Array | np.ndarray, " R"] | None = None  # which rows draw, where some take the most likely token
    ranked: Bool[Array | np.ndarray, " R"] | None = None  # which rows want each step's best tokens; None: all

    @property
    def automata(self) -> Automata | None:
        """What the rows are constrained by in the compiled loop."""
        return automata_of(self.processors)

    def where(self, bits: Int[np.ndarray, "R W"]) -> "TracedOptions":
        """The same where these tokens may come next."""
        return dataclasses.replace(self, processors=where(self.processors, bits))


def static_options(config: GenerationConfig, extras: Extras = Extras()) -> StaticOptions:
    """The static half of an effective configuration; raises `JaxgenError` for strategies that exclude each other."""
    beams, lookup = config.beams, bool(config.prompt_lookup_num_tokens)
    if extras.assistant_model is not None or lookup:
        if extras.assistant_model is not None and lookup:
            raise JaxgenError("both assistant_model and prompt_lookup_num_tokens were given; choose who drafts")
        if beams > 1:
            raise JaxgenError(f"num_beams={beams} and speculation exclude each other, as in transformers")
    drafts = config.prompt_lookup_num_tokens if lookup else 0
    if extras.assistant_model is not None:
        drafts = _value(config, "num_assistant_tokens")
    return StaticOptions(
        do_sample=bool(config.do_sample),
        record_scores=bool(config.output_scores),
        record_logits=bool(config.output_logits),
        top_logprobs=config.top_logprobs or 0,
        allow_invalid=bool(config.remove_invalid_values),
        num_beams=beams,
        early_stopping=(config.early_stopping or False) if beams > 1 else False,  # else another program
        eos_count=len(config.eos_token_ids) if beams > 1 else 0,
        drafts=drafts or 0,
        prompt_lookup=lookup,
    )


def traced_options(
    config: GenerationConfig, vocab_size: int, extras: Extras = Extras(), prompts: int = 1
) -> TracedOptions:
    """The traced half of an effective configuration for so many prompts, as numpy arrays."""
    eos = config.eos_token_ids
    for token in eos:
        if token >= vocab_size:
            raise JaxgenError(f"eos_token_id={token} is outside the model's vocabulary of {vocab_size} tokens")
    if config.stop_strings and extras.tokenizer is None:
        raise JaxgenError("stop_strings needs tokenizer=, to know what text each token stands for")
    return TracedOptions(
        processors=chain_of(
            config,
            vocab_size,
            user=_functions("logits_processor", extras.logits_processor),
            beams=config.beams > 1,
            prefix_allowed_tokens_fn=extras.prefix_allowed_tokens_fn,
            constraint=None if extras.constraint is None else _asked(extras, prompts, vocab_size, eos),
        ),
        criteria=tuple(
            as_pytree(f, "stopping_criteria") for f in _functions("stopping_criteria", extras.stopping_criteria)
        ),
        eos_ids=pad_to(np.array(eos, np.int32), (bucket(len(eos), 4),), fill=-1),
        stop_strings=StopStrings.of(extras.tokenizer, config.stop_strings, vocab_size) if config.stop_strings else None,
        guidance_scale=as_number(_value(config, "guidance_scale")) if config.is_guided else None,
        length_penalty=as_number(_value(config, "length_penalty")),
        confidence=as_number(config.assistant_confidence_threshold or 0.0),
        ngram=as_count(_value(config, "max_matching_ngram_size")),
    )


def _asked(extras: Extras, prompts: int, vocab_size: int, eos: tuple[int, ...]) -> Asked:
    """What `constraint` asks for; raises `JaxgenError` for what cannot be met."""
    given = (extras.constraint, extras.tokenizer, prompts, vocab_size, eos)
    if not has_grammar(extras.constraint):
        return Asked(Automata.of(*given))
    grammars = Grammars.of(*given)
    regular = any(isinstance(one, Constraint) for one in checked(extras.constraint, prompts))
    return Asked(Automata.of(*given) if regular else None, grammars.bits)


def _value(config: GenerationConfig, name: str) -> Any:
    """An option's value; its default where it was switched off, and cannot do nothing."""
    value = getattr(config, name)
    return OPTIONS[name].default if value is None else value


def _functions(name: str, value: object) -> tuple[Any, ...]:
    """One function or several; transformers' own classes, which want torch, are refused by name."""
    # HF's own lists can be called as well.
    functions = () if value is None else (value,) if callable(value) and not isinstance(value, list) else value
    if not isinstance(functions, Sequence) or not all(callable(function) for function in functions):
        raise JaxgenError(f"{name}={value!r} must be a function, or a list of functions, of (tokens, lengths, logits)")
    for function in functions:
        kind = function if inspect.isclass(function) else type(function)
        if kind.__module__.split(".")[0] == "transformers":
            raise UnsupportedError(
                f"{name}: {kind.__name__} of transformers works on torch tensors; pass a jittable "
                "f(tokens, lengths, logits), or the option of generate that it stands for"
            )
        if inspect.isclass(function):
            raise JaxgenError(f"{name}: {function.__name__} is a class; pass an instance of it, or a jittable function")
        if _takes_two(function) or _is_of_transformers(function):
            raise JaxgenError(
                f"{name}: {shown(function)} takes two arguments, as in transformers; here it is a jittable "
                "f(tokens [R, S], lengths [R], logits [R, V]), where a row's first lengths[row] tokens are real"
            )
    return tuple(functions)


def _is_of_transformers(function: object) -> bool:
    """Whether it is an instance of one of transformers' classes, whatever arguments its own class takes."""
    return any(base.__module__.split(".")[0] == "transformers" for base in type(function).__mro__)


def _takes_two(function: Any) -> bool:
    """Whether a function can be called with two arguments by position, and not with three."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return False
    fits = []
    for count in (2, 3):
        try:
            signature.bind(*range(count))
            fits.append(True)
        except TypeError:
            fits.append(False)
    return fits == [True, False]
