"""The first step of a call: `prepare` checks what was asked for and lays it out for the device, compiling nothing."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from jaxgen.errors import JaxgenError, UnsupportedError, shown
from jaxgen.generation.choosing.sample import FreshSeed, padded_key, random_key, row_id_words
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.options.table import Extras
from jaxgen.generation.options.unused import once
from jaxgen.generation.programs.inputs import BatchLayout, StaticOptions, TracedOptions, static_options, traced_options
from jaxgen.generation.programs.strict import Strict
from jaxgen.generation.prompts.layout import SMALLEST_PROMPT, SMALLEST_TOTAL, bucket, pack, pad_to, read_prompt
from jaxgen.generation.prompts.memory import check_memory
from jaxgen.generation.prompts.past_key_values import PastKeyValues
from jaxgen.generation.prompts.prefill import Negative, Prompts
from jaxgen.generation.prompts.row_limits import row_limits
from jaxgen.generation.results.activations import check_memory_of_activations
from jaxgen.generation.searches.search import Search, search_for


@dataclasses.dataclass(frozen=True)
class Request:
    """What one call asks for; on the host numpy throughout, so that nothing is dispatched or compiled to make it."""

    input_ids: Int[Array | np.ndarray, "B T"]  # as given, for the layout of the result
    attention_mask: Bool[Array | np.ndarray, "B T"]
    config: GenerationConfig  # the values in effect
    seed: int | tuple[int, ...] | None
    key: Any
    prompts: Prompts
    traced: TracedOptions
    layout: BatchLayout
    search: Search
    new_tokens: int  # the most that a row may get
    extras: Extras = Extras()
    strict: Strict | None = None

    @property
    def asks_host(self) -> bool:
        """Whether a processor calls the user's Python."""
        return self.extras.prefix_allowed_tokens_fn is not None


class Given(NamedTuple):
    """The prompts and the randomness of a call, checked."""

    ids: Any  # int32 [B, T], of numpy or, under jit, of jax
    mask: Any  # bool [B, T]
    key: Any  # one, or one per row
    seed: int | tuple[int, ...] | None
    row_ids: Any


class Sizes(NamedTuple):
    """The shape of a batch."""

    rows: int  # prompts, with the idle ones
    length: int  # of the prompts
    total: int  # of a row, prompt and new tokens
    new_tokens: int  # the most that a row may get


def prepare(
    model: Any,
    input_ids: Any,
    attention_mask: Any,
    config: GenerationConfig,
    key: Any = None,
    seed: Any = None,
    row_ids: Any = None,
    extras: Extras = Extras(),
    *,
    inside_jit: bool = False,
) -> Request:
    """Check all that can be checked on the host, pack the rows, and choose the shape of the batch.

    `inside_jit`: inside the caller's own jit, where ids have no values to be checked, and no buckets are needed. Raises
    `JaxgenError` for what is wrong, and `UnsupportedError` for what needs the host.
    """
    vocab_size, context = model.config.vocab_size, model.config.max_position_embeddings
    given = None if inside_jit else _given(model, input_ids, attention_mask, config, key, seed, row_ids)
    strict = None if inside_jit else Strict.of(extras.strict)
    if strict:
        strict.check(config, extras.past_key_values)
    static = static_options(config, extras)
    if inside_jit:
        _check_traced(config, extras, static)
    search = search_for(static)
    search.check(model, config, extras)
    traced = traced_options(config, vocab_size, extras)
    given = given or _given_traced(input_ids, attention_mask, config, key, row_ids)
    ids, mask, key, seed, row_ids = given
    words = row_id_words(row_ids, len(ids))
    samples = search.rows_per_prompt(config)

    tokens, lengths = pack(ids, mask, jnp if inside_jit else np)
    negative = [] if inside_jit else _negative(config, extras, ids, mask, vocab_size)
    if inside_jit:
        sizes, limits = _sizes_of_columns(config, lengths, ids.shape[1], context)
    else:
        limits = row_limits(config, lengths, context)
        longest = max(int(x.max()) for _, x in ((tokens, lengths), *negative))
        sizes = _buckets(config, samples, longest, lengths, limits, strict)
    layout = layout_of(model, config, static, samples, sizes, strict)
    shape = (sizes.rows, sizes.length)
    if not inside_jit:
        # Before anything is padded: what the device cannot hold, the host may not either.
        check_memory(model, shape, layout, extras.assistant_model, guided=bool(negative))

    def grown(array: Any, shape: tuple[int, ...], fill: int = 0) -> Any:
        return array if inside_jit else pad_to(array, shape, fill)

    def placed(packed: Any, count: Any) -> tuple[Any, Any]:
        """In the bucket: without the columns that no row reaches, and with idle rows."""
        return grown(packed[:, : sizes.length], shape), grown(count, shape[:1], fill=1)

    prompts = Prompts(
        *placed(tokens, lengths),
        limits=grown(limits, shape[:1], fill=2),
        row_ids=grown(words, (sizes.rows, 2)),
        idle=np.arange(sizes.rows) >= len(ids),
        negative=Negative(*placed(*negative[0])) if negative else None,
    )
    if extras.past_key_values is not None:
        prompts, layout = _continued(extras.past_key_values, prompts, layout, len(ids), model)
        check_memory(model, shape, layout, extras.assistant_model, past=True)
    if not inside_jit:
        check_memory_of_activations(config, len(ids) * samples, layout.total, model)
        key = padded_key(key, sizes.rows)
    return Request(ids, mask, config, seed, key, prompts, traced, layout, search, sizes.new_tokens, extras, strict)


def _given(
    model: Any, input_ids: Any, attention_mask: Any, config: GenerationConfig, key: Any, seed: Any, row_ids: Any
) -> Given:
    """The prompts and the randomness of a call on the host, after every check of their values."""
    if _traced(model, input_ids, attention_mask, key):
        raise JaxgenError("model.generate runs on the host; inside jit or vmap use jaxgen.generate(model, ...)")
    input_ids = from_bos(config) if input_ids is None else input_ids
    ids, mask = read_prompt(input_ids, attention_mask, model.config.vocab_size)
    if seed is not None and not isinstance(seed, FreshSeed) and not config.do_sample:
        once("seed", f"seed={shown(seed)} changes nothing without do_sample=True")
    key, seed = random_key(key, seed)
    seed = int(seed) if isinstance(seed, FreshSeed) else seed  # it is written down, as any
    if key.ndim:
        ids, mask, row_ids = _row_per_key(key.shape[0], ids, mask, row_ids)
    row_id_words(row_ids, len(ids))
    return Given(ids, mask, key, seed, row_ids)


def _given_traced(input_ids: Any, attention_mask: Any, config: GenerationConfig, key: Any, row_ids: Any) -> Given:
    """The same inside a caller's jit."""
    if config.do_sample and key is None:
        raise JaxgenError("do_sample=True needs key=: jax.random.key(seed)")
    key, _ = random_key(key, 0 if key is None else None)
    if key.ndim:
        if len(key) != len(input_ids):
            raise JaxgenError(f"key holds {len(key)} keys, input_ids {len(input_ids)} rows; pass one, or one per row")
        row_ids = [0] * len(input_ids) if row_ids is None else row_ids
    # By explicit dtypes: a caller under x64 has 64-bit ids, which our rules do not know.
    mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask, jnp.int32) != 0
    return Given(jnp.asarray(input_ids, jnp.int32), mask, key, None, row_ids)


def _continued(past: Any, prompts: Prompts, layout: BatchLayout, rows: int, model: Any) -> tuple[Prompts, BatchLayout]:
    if not isinstance(past, PastKeyValues):
        raise JaxgenError(
            f"past_key_values is a {type(past).__name__}; pass the past_key_values of an earlier call's output"
        )
    return past.continue_with(prompts, layout, rows, model)


def _traced(model: Any, *arrays: Any) -> bool:
    """Whether this is called while jit or vmap traces the model's weights or its inputs."""
    try:
        return model.device is None or any(isinstance(x, Tracer) for x in arrays)
    except jax.errors.ConcretizationTypeError:  # the weights
        return True


def _row_per_key(
    keys: int, ids: Int[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"], row_ids: Any
) -> tuple[Int[np.ndarray, "R T"], Bool[np.ndarray, "R T"], Any]:
    """One row for each key: of a single prompt as many, and each has the id that it would have alone."""
    if len(ids) not in (1, keys):
        raise JaxgenError(f"seed or key holds {keys}, input_ids {len(ids)} rows; pass one per row, or one row for all")
    if len(ids) < keys:
        ids, mask = np.repeat(ids, keys, axis=0), np.repeat(mask, keys, axis=0)
    return ids, mask, [0] * keys if row_ids is None else row_ids


def from_bos(config: GenerationConfig) -> list[list[int]]:
    """The prompt of a call without one. Source: transformers `_maybe_initialize_input_ids_for_generation`."""
    if config.bos_token_id is None:
        raise JaxgenError("there is no prompt, and no bos_token_id to begin with; pass input_ids")
    return [[config.bos_token_id]]


def _buckets(
    config: GenerationConfig,
    samples: int,
    longest: int,
    lengths: Int[np.ndarray, " B"],
    limits: Int[np.ndarray, " B"],
    strict: Strict | None,
) -> Sizes:
    """Sizes rounded up, so that few of them are compiled; `longest` is the longest prompt, negative ones included."""
    guided = config.is_guided  # a negative row may be longer than its row
    budget = int((limits - lengths).max())
    if strict:
        total = strict.fits(max(int(limits.max()), longest + budget if guided else 0))
        return Sizes(strict.prompts(len(lengths), samples), total, total, budget)
    length = bucket(longest, SMALLEST_PROMPT)
    # From the bucketed prompt, not the real one: the prompt's bucket then decides the total's.
    total = max(int(limits.max()), length) if _by_length(config) and not guided else length + budget
    return Sizes(bucket(len(lengths)), length, bucket(max(total, config.max_cache_len or 0), SMALLEST_TOTAL), budget)


def _sizes_of_columns(
    config: GenerationConfig, lengths: Int[Array, " B"], width: int, context: int
) -> tuple[Sizes, Int[Array, " B"]]:
    """Sizes as if every column were real, and each row's limit: how many are is known to the device only."""
    batch = len(lengths)
    total = int(row_limits(config, np.full(batch, width, np.int32), context).max())
    if _by_length(config):
        return Sizes(batch, width, total, total), jnp.full(batch, total)
    return Sizes(batch, width, total, total - width), lengths + (total - width)


def _by_length(config: GenerationConfig) -> bool:
    """Whether `max_length` says where rows end."""
    return config.max_new_tokens is None and config.max_length is not None


def layout_of(
    model: Any, config: GenerationConfig, static: StaticOptions, samples: int, sizes: Sizes, strict: Strict | None
) -> BatchLayout:
    """Sizes of rows, caches and records."""
    chunk = config.prefill_chunk_size or (strict.chunk if strict else 0)
    recorded = static.record_scores or static.record_logits or static.top_logprobs
    # No row has a use for more drafts than the tokens that it may get.
    drafts = min(static.drafts, sizes.total if strict else bucket(sizes.new_tokens, SMALLEST_TOTAL))
    static = dataclasses.replace(static, recorded=bucket(sizes.new_tokens, 16) if recorded else 0, drafts=drafts)
    return BatchLayout(
        static=static,
        samples=samples,
        total=sizes.total,
        slots=model.config.cache_slots(sizes.total, ahead=max(chunk, drafts + 1 if drafts else 0)),
        int8_cache=config.cache_implementation == "quantized",
        chunk=chunk,
    )


def _check_traced(config: GenerationConfig, extras: Extras, static: StaticOptions) -> None:
    """Raise for what only `model.generate` can do."""
    refused = {
        "max_time": config.max_time,
        "num_beams": static.num_beams > 1,
        "assistant_model": extras.assistant_model,
        "prompt_lookup_num_tokens": static.prompt_lookup,
        "past_key_values": extras.past_key_values,
        "strict": extras.strict,
        "max_cache_len": config.max_cache_len,
        "negative_prompt_ids": extras.negative_prompt_ids is not None,
        "negative_prompt_attention_mask": extras.negative_prompt_attention_mask is not None,
        "guidance_scale": config.is_guided,
        "output_scores": static.record_scores,
        "output_logits": static.record_logits,
        "output_attentions": config.output_attentions,
        "output_hidden_states": config.output_hidden_states,
        "top_logprobs": static.top_logprobs,
    }
    for name, given in refused.items():
        if given:
            raise UnsupportedError(f"{name}: not in the pure function jaxgen.generate; use model.generate")


def _negative(
    config: GenerationConfig,
    extras: Extras,
    ids: Int[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    vocab_size: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The negative prompts of guidance, packed, if there is guidance: as given, or each row's last token, as in HF."""
    if not config.is_guided:
        if extras.negative_prompt_ids is not None:
            raise JaxgenError("negative_prompt_ids needs guidance_scale, which says how strongly to avoid it")
        return []
    if extras.negative_prompt_ids is None:
        if extras.negative_prompt_attention_mask is not None:
            raise JaxgenError("negative_prompt_attention_mask was given without negative_prompt_ids")
        packed, lengths = pack(ids, mask)
        return [(np.take_along_axis(packed, lengths[:, None] - 1, axis=1), np.ones_like(lengths))]
    names = ("negative_prompt_ids", "negative_prompt_attention_mask")
    negative = read_prompt(extras.negative_prompt_ids, extras.negative_prompt_attention_mask, vocab_size, names)
    if len(negative[0]) not in (1, len(ids)):
        raise JaxgenError(f"negative_prompt_ids has {len(negative[0])} rows; expected {len(ids)}, or 1 for all of them")
    packed, lengths = pack(*negative)
    repeats = len(ids) // len(packed)
    return [(np.repeat(packed, repeats, axis=0), np.repeat(lengths, repeats))]
