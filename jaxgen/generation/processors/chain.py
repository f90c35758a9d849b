"""From a configuration to its processors: which ones run, in HF's order, and with which numbers."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jax.tree_util import Partial
from jaxtyping import Float, Int

from jaxgen.errors import JaxgenError
from jaxgen.generation.config import GenerationConfig
from jaxgen.generation.processors import constraint, filters, history, lengths, watermark
from jaxgen.generation.prompt import bucket, pad_to

# A larger top_k is counted out instead of sorted out: from here on that is faster.
LARGEST_TOP_K_BOUND = 1024


def chain_of(
    config: GenerationConfig,
    vocab_size: int,
    *,
    user: Any = (),
    beams: bool = False,
    prefix_allowed_tokens_fn: Any = None,
) -> tuple[Partial, ...]:
    """The processors that an effective configuration switches on: `entry(logits [R, V] float32, rows) -> logits`.

    Each is a pytree: the function is static, its numbers are numpy arrays. So the chains of two configurations that
    switch on the same processors differ in numbers only, and share executables. `user` is a sequence of jittable
    `f(tokens [R, S], lengths [R], logits) -> logits`, which run where HF runs them: before the sampling filters.
    `beams` says that rows are beams. `prefix_allowed_tokens_fn` is HF's function, or an `AllowedTokens`.

    Raises `JaxgenError` for a token id outside the vocabulary, and for options that contradict each other.
    Source: transformers `GenerationMixin._get_logits_processor`.
    """
    _check_vocabulary(config, vocab_size)
    return (
        *_of_history(config),
        *_of_length(config, "min_length", "min_new_tokens"),
        *_of_constraint(prefix_allowed_tokens_fn, beams),
        *_of_length(config, "forced_bos_token_id", "forced_eos_token_id"),
        *([Partial(filters.remove_invalid_values)] if config.remove_invalid_values else []),
        *_of_length(config, "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
        *_of_user(user),
        *(_filters(config, beams) if config.do_sample else []),
        *_watermark(config.watermarking_config),
        *([Partial(filters.renormalize)] if config.renormalize_logits else []),
    )


@functools.cache
def fixed(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """`function` with static settings; equal settings give the identical object, as jit compares functions by it."""

    @functools.wraps(function)
    def with_settings(logits: Any, rows: Any, **numbers: Any) -> Any:
        return function(logits, rows, **settings, **numbers)

    return with_settings


def _number(value: float) -> Float[np.ndarray, ""]:
    return np.array(value, np.float32)


def _count(value: int) -> Int[np.ndarray, ""]:
    return np.array(value, np.int32)


def _ids(tokens: Iterable[int]) -> Int[np.ndarray, " E"]:
    ids = np.array(tuple(tokens), np.int32)
    return pad_to(ids, (bucket(len(ids), 4),), fill=-1)


def _several(value: "int | Sequence[int] | None") -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _of_history(config: GenerationConfig) -> list[Partial]:
    chain = []
    if config.sequence_bias:
        chain.append(_biases(dict(config.sequence_bias)))
    if config.encoder_repetition_penalty not in (None, 1.0):
        inverse = _number(1 / config.encoder_repetition_penalty)
        chain.append(Partial(history.encoder_repetition_penalty, inverse=inverse))
    if config.repetition_penalty not in (None, 1.0):
        chain.append(Partial(history.repetition_penalty, penalty=_number(config.repetition_penalty)))
    if config.no_repeat_ngram_size:
        chain.append(Partial(history.no_repeat_ngram, size=_count(config.no_repeat_ngram_size)))
    if config.encoder_no_repeat_ngram_size:
        chain.append(Partial(history.encoder_no_repeat_ngram, size=_count(config.encoder_no_repeat_ngram_size)))
    if config.bad_words_ids:
        ends = {(token,) for token in config.eos_token_ids}
        bad = dict.fromkeys((tuple(words) for words in config.bad_words_ids if tuple(words) not in ends), -math.inf)
        if not bad:
            raise JaxgenError(
                f"bad_words_ids={config.bad_words_ids} holds end-of-sequence tokens only, which it does not ban; "
                "use suppress_tokens or min_new_tokens"
            )
        chain.append(_biases(bad))
    return chain


def _biases(bias_of: dict[tuple[int, ...], float]) -> Partial:
    number, longest = bucket(len(bias_of), 4), bucket(max(map(len, bias_of)) - 1)
    prefixes = np.full((number, longest), -1, np.int32)
    for row, sequence in enumerate(bias_of):
        prefixes[row, longest - len(sequence) + 1 :] = sequence[:-1]
    last = pad_to(np.array([sequence[-1] for sequence in bias_of], np.int32), (number,))
    bias = pad_to(np.array([*bias_of.values()], np.float32), (number,))
    return Partial(history.sequence_bias, prefixes=prefixes, last=last, bias=bias)


def _of_length(config: GenerationConfig, *fields: str) -> list[Partial]:
    """The processors of those of `fields` that are set, in their order."""
    eos = config.eos_token_ids
    return [_LENGTH[field](getattr(config, field), eos, config) for field in fields if _is_on(config, field, eos)]


def _is_on(config: GenerationConfig, field: str, eos: tuple[int, ...]) -> bool:
    value = getattr(config, field)
    if field == "min_length" and config.min_new_tokens is not None:  # which takes precedence, as in HF, even at 0
        return False
    if field in ("min_length", "min_new_tokens"):
        return bool(value) and bool(eos)
    if field == "exponential_decay_length_penalty" and value is not None and not eos:
        raise JaxgenError(f"{field}={value} raises the end-of-sequence token, but eos_token_id is not set")
    return value is not None and value != ()


_LENGTH: dict[str, Callable[[Any, tuple[int, ...], GenerationConfig], Partial]] = {
    "min_length": lambda least, eos, _: Partial(lengths.min_length, length=_count(least), ids=_ids(eos)),
    "min_new_tokens": lambda least, eos, _: Partial(lengths.min_new_tokens, number=_count(least), ids=_ids(eos)),
    "forced_bos_token_id": lambda bos, _, __: Partial(lengths.forced_bos, ids=_ids((bos,))),
    "forced_eos_token_id": lambda ids, _, __: Partial(lengths.forced_eos, ids=_ids(_several(ids))),
    "exponential_decay_length_penalty": lambda decay, eos, _: Partial(
        lengths.exponential_decay, start=_count(decay[0]), log_factor=_number(math.log(decay[1])), ids=_ids(eos)
    ),
    "suppress_tokens": lambda ids, _, __: Partial(lengths.suppress_tokens, ids=_ids(_several(ids))),
    "begin_suppress_tokens": lambda ids, _, config: Partial(
        lengths.begin_suppress_tokens,
        ids=_ids(_several(ids)),
        after_bos=_count(config.forced_bos_token_id is not None),
    ),
}


def _of_constraint(function: Any, beams: bool) -> list[Partial]:
    if function is None:
        return []
    jittable = isinstance(function, constraint.AllowedTokens)
    processor = constraint.allowed_tokens if jittable else constraint.prefix_allowed_tokens
    function = constraint.as_pytree(function.function if jittable else function, "prefix_allowed_tokens_fn")
    return [Partial(fixed(processor, beams=beams), function=function)]


def _of_user(user: Any) -> list[Partial]:
    if callable(user) or not isinstance(user, Iterable):
        raise JaxgenError(f"logits_processor={user!r} must be a list of functions")
    functions = [constraint.as_pytree(function, f"logits_processor[{i}]") for i, function in enumerate(user)]
    return [Partial(constraint.user_processor, function=function) for function in functions]


def _filters(config: GenerationConfig, beams: bool) -> list[Partial]:
    """What only sampling does. Beams need one candidate more than there are ways to end."""
    keep = max(2, len(config.eos_token_ids) + 1) if beams else 1
    chain = []
    if config.temperature is not None:  # at 1.0 too, where it changes nothing: a sweep over it compiles once
        chain.append(Partial(filters.temperature, value=_number(config.temperature)))
    if config.top_h is not None:
        chain.append(Partial(filters.top_h, share=_number(config.top_h)))
    if config.top_k:
        k = max(config.top_k, keep)
        bound = max(64, 1 << (k - 1).bit_length())
        top_k = fixed(filters.top_k, bound=bound if bound <= LARGEST_TOP_K_BOUND else 0)
        chain.append(Partial(top_k, k=_count(k)))
    if config.top_p not in (None, 1.0):
        chain.append(Partial(fixed(filters.top_p, keep=keep), tail=_number(1 - config.top_p)))
    if config.min_p:
        chain.append(Partial(fixed(filters.min_p, keep=keep), log_p=_number(math.log(config.min_p))))
    if config.typical_p not in (None, 1.0):
        chain.append(Partial(fixed(filters.typical_p, keep=keep), mass=_number(config.typical_p)))
    for name, function in (("epsilon_cutoff", filters.epsilon_cutoff), ("eta_cutoff", filters.eta_cutoff)):
        if cutoff := getattr(config, name):
            chain.append(Partial(fixed(function, keep=keep), log_epsilon=_number(math.log(cutoff))))
    return chain


def _watermark(config: watermark.WatermarkingConfig | None) -> list[Partial]:
    if config is None:
        return []
    processor = watermark.selfhash_bias if config.seeding_scheme == "selfhash" else watermark.lefthash_bias
    numbers = {"key_words": config.key_words, "threshold": config.threshold}
    return [Partial(processor, **numbers, bias=_number(config.bias), width=_count(config.context_width))]


def _check_vocabulary(config: GenerationConfig, vocab_size: int) -> None:
    """Raise for token ids that the model does not have, and for tokens that are forced and suppressed at once."""
    ids = {
        "sequence_bias": [token for sequence, _ in config.sequence_bias or () for token in sequence],
        "bad_words_ids": [token for sequence in config.bad_words_ids or () for token in sequence],
        "forced_bos_token_id": _several(config.forced_bos_token_id),
        "forced_eos_token_id": _several(config.forced_eos_token_id),
        "suppress_tokens": _several(config.suppress_tokens),
        "begin_suppress_tokens": _several(config.begin_suppress_tokens),
    }
    for field, tokens in ids.items():
        if (largest := max(tokens, default=0)) >= vocab_size:
            raise JaxgenError(f"{field}: token {largest} is outside the model's vocabulary of {vocab_size} tokens")
    suppressed = set(ids["suppress_tokens"])
    for field in ("forced_bos_token_id", "forced_eos_token_id"):
        if ids[field] and suppressed.issuperset(ids[field]):
            raise JaxgenError(
                f"{field}={getattr(config, field)} and suppress_tokens contradict each other: nothing would be left"
            )
