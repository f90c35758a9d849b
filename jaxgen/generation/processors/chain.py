"""From a configuration to its processors: which ones run, in HF's order, and with which numbers."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxgen.errors import JaxgenError
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.options.table import ARGUMENTS, OPTIONS
from jaxgen.generation.processors.processor import Call, Processor, several
from jaxgen.generation.processors.regular import Asked


def chain_of(
    config: GenerationConfig,
    vocab_size: int,
    *,
    user: object = (),
    beams: bool = False,
    prefix_allowed_tokens_fn: object = None,
    constraint: Asked | None = None,
) -> tuple[Processor, ...]:
    """The processors that an effective configuration switches on: `entry(logits [R, V] float32, rows) -> logits`.

    `user` is a sequence of jittable `f(tokens [R, S], lengths [R], logits) -> logits`. `beams` says that rows are
    beams. `prefix_allowed_tokens_fn` is HF's function, or an `AllowedTokens`. Each stands where HF has it, and
    `constraint` behind all but what only sampling has: see the order of `jaxgen.generation.options.table`.

    Raises `JaxgenError` for a token id outside the vocabulary, and for options that contradict each other.
    Source: transformers `GenerationMixin._get_logits_processor`.
    """
    arguments = {"logits_processor": user, "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn}
    values = {**vars(config), **arguments, "constraint": constraint}
    on = [*_in_order(values)]
    _check_tokens(values, {name: processor for name, processor, _ in on}, vocab_size)
    call = Call(values, config.eos_token_ids, beams)
    chain = [processor.of(values[name], call) for name, processor, sampling in on if config.do_sample or not sampling]
    return tuple(processor for processor in chain if processor is not None)


def _in_order(values: Mapping[str, Any]) -> Iterator[tuple[str, type[Processor], bool]]:
    """The options that are on and have a processor: name, processor, and whether only sampling uses it."""
    for name, option in OPTIONS.items():
        ahead = [(argument, row) for argument, row in ARGUMENTS.items() if row.before == name]
        for each, row in (*ahead, (name, option)):
            if row.processor is not None and row.is_on(values[each]):
                yield each, row.processor, row.only_sampling


def _check_tokens(values: Mapping[str, Any], on: Mapping[str, type[Processor]], vocab_size: int) -> None:
    """Raise for token ids that the model does not have, and for tokens that are forced and suppressed at once."""
    tokens = {name: tuple(processor.tokens_in(values[name])) for name, processor in on.items()}
    for name, ids in tokens.items():
        if (largest := max(ids, default=0)) >= vocab_size:
            raise JaxgenError(f"{name}: token {largest} is outside the model's vocabulary of {vocab_size} tokens")
    suppressed = set(several(values["suppress_tokens"] or ()))
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        if tokens.get(name) and suppressed.issuperset(tokens[name]):
            raise JaxgenError(f"{name}={values[name]} and suppress_tokens contradict each other: nothing would be left")
