"""The first step of a call: `prepare` checks what was asked for and lays it out for the device, compiling nothing."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, UInt32

from jaxgen.errors import JaxgenError, UnsupportedError, shown
from jaxgen.generation.choosing.constrained import has_grammar
from jaxgen.generation.choosing.grammars import Grammars
from jaxgen.generation.choosing.sample import FreshSeed, padded_key, random_key, row_id_words
from jaxgen.generation.loop import PlainSearch
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.options.table import Extras
from jaxgen.generation.options.unused import once
from jaxgen.generation.programs.inputs import BatchLayout, TracedOptions, static_options, traced_options
from jaxgen.generation.programs.strict import Strict
from jaxgen.generation.prompts.contexts import check_pieces, contexts, note
from jaxgen.generation.prompts.layout import arrays_inside_jit, checked_prompt, pack, pad_to
from jaxgen.generation.prompts.memory import check_memory
from jaxgen.generation.prompts.past_key_values import PastKeyValues
from jaxgen.generation.prompts.prefill import Negative, Prompts
from jaxgen.generation.prompts.row_limits import check_negative_lengths
from jaxgen.generation.prompts.sizes import Sizes, bucketed_sizes, layout_of, sizes_inside_jit
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
    grammars: Grammars | None = None  # what the host says before each token


class Given(NamedTuple):
    """The prompts and the randomness of a call, checked; arrays are numpy's or, inside jit, jax's."""

    ids: Any  # int32 [B, T], as given
    mask: Any  # bool [B, T]
    tokens: Any  # int32 [B, T]: the real ones of each row first
    lengths: Any  # int32 [B]: how many those are
    row_ids: UInt32[np.ndarray, "B 2"]
    key: Any  # one, or one per row
    seed: int | tuple[int, ...] | None = None
    negative: Negative | None = None


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
    runs: bool = True,
) -> Request:
    """Check all that can be checked on the host, pack the rows, and choose the shape of the batch.

    `inside_jit`: inside the caller's own jit, where ids have no values to be checked, and no buckets are needed.
    Without `runs` the call is only to be written down, and the device needs no memory for it. Raises `JaxgenError` for
    what is wrong, and `UnsupportedError` for what needs the host.
    """
    take = _given_inside_jit if inside_jit else _given_on_host
    given = take(model, input_ids, attention_mask, config, extras, key, seed, row_ids)
    strict = Strict.of(extras.strict)
    if strict:
        strict.check(config, extras.past_key_values)
    static = static_options(config, extras)
    search = search_for(static)
    search.check(model, config, extras)
    traced = traced_options(config, model.config.vocab_size, extras, len(given.ids))

    samples = search.rows_per_prompt(config)
    if inside_jit:
        sizes = sizes_inside_jit(config, given.lengths, given.ids.shape[1], model.config)
    else:
        longest = max(int(x.lengths.max()) for x in (given, given.negative) if x is not None)
        mesh = getattr(model, "layout", None)
        groups = mesh.parts("rows") if mesh else 1
        sizes = bucketed_sizes(config, samples, longest, given.lengths, model.config, strict, groups)
        if given.negative is not None:
            negative, new = np.asarray(given.negative.lengths), np.asarray(sizes.max_lengths - given.lengths)
            check_negative_lengths(negative, new, contexts(model.config, negative), note(model.config))
    layout = layout_of(model, config, static, samples, sizes, strict)
    if layout.chunk and not inside_jit:
        check_pieces(model.config, given.lengths)
    shape, assistant = (sizes.rows, sizes.length), extras.assistant_model
    if not inside_jit:
        if runs:  # before anything is padded: what the device cannot hold, the host may not either
            check_memory(model, shape, layout, assistant, guided=given.negative is not None)
        given = given._replace(key=padded_key(given.key, sizes.rows))
    prompts = in_bucket(given, sizes)
    if traced.automata is not None and not inside_jit:
        traced.automata.check_room(sizes.max_lengths - given.lengths)
    if strict and search == PlainSearch():
        # Also where every row chooses: what scores given tokens is then the very same program.
        prompts = dataclasses.replace(prompts, given=np.full((sizes.rows * samples, layout.total), -1, np.int32))
        layout = dataclasses.replace(layout, one_by_one=given.negative is None)
    if extras.past_key_values is not None:
        prompts, layout = _continued(extras.past_key_values, prompts, layout, len(given.ids), model)
        check_memory(model, shape, layout, assistant, past=True)
    check_memory_of_activations(config, len(given.ids) * samples, layout.total, model)
    return Request(
        input_ids=given.ids,
        attention_mask=given.mask,
        config=config,
        seed=given.seed,
        key=given.key,
        prompts=prompts,
        traced=traced,
        layout=layout,
        search=search,
        new_tokens=sizes.new_tokens,
        extras=extras,
        strict=strict,
        grammars=_grammars(extras, config, len(given.ids), model.config.vocab_size),
    )


def _grammars(extras: Extras, config: GenerationConfig, prompts: int, vocab_size: int) -> Grammars | None:
    given = extras.constraint, extras.tokenizer, prompts, vocab_size, config.eos_token_ids
    return Grammars.of(*given) if has_grammar(extras.constraint) else None


def in_bucket(given: Given, sizes: Sizes) -> Prompts:
    """The prompts in the shape of the batch: without the columns that no row reaches, and with idle rows."""
    rows, shape = sizes.rows, (sizes.rows, sizes.length)
    negative = given.negative
    return Prompts(
        tokens=pad_to(given.tokens[:, : sizes.length], shape),
        lengths=pad_to(given.lengths, (rows,), fill=1),
        max_lengths=pad_to(sizes.max_lengths, (rows,), fill=2),
        row_ids=pad_to(given.row_ids, (rows, 2)),
        idle=np.arange(rows) >= len(given.ids),
        negative=negative
        and Negative(pad_to(negative.tokens[:, : sizes.length], shape), pad_to(negative.lengths, (rows,), fill=1)),
    )


def _given_on_host(
    model: Any,
    input_ids: Any,
    attention_mask: Any,
    config: GenerationConfig,
    extras: Extras,
    key: Any,
    seed: Any,
    row_ids: Any,
) -> Given:
    """What a call on the host was given, after every check of its values."""
    if traced(model, input_ids, attention_mask, key):
        raise JaxgenError("model.generate runs on the host; inside jit or vmap use jaxgen.generate(model, ...)")
    vocab_size = model.config.vocab_size
    ids, mask = checked_prompt(from_bos(config) if input_ids is None else input_ids, attention_mask, vocab_size)
    if seed is not None and not isinstance(seed, FreshSeed) and not config.do_sample:
        once("seed", f"seed={shown(seed)} changes nothing without do_sample=True")
    key, seed = random_key(key, seed)
    seed = int(seed) if isinstance(seed, FreshSeed) else seed  # it is written down, as any
    if key.ndim:
        ids, mask, row_ids = _row_per_key(key.shape[0], ids, mask, row_ids)
    tokens, lengths = pack(ids, mask)
    negative = None
    if config.is_guided:
        negative = _negative(extras, tokens, lengths, vocab_size)
    elif extras.negative_prompt_ids is not None:
        raise JaxgenError("negative_prompt_ids needs guidance_scale, which says how strongly to avoid it")
    return Given(ids, mask, tokens, lengths, row_id_words(row_ids, len(ids)), key, seed, negative)


def _given_inside_jit(
    model: Any,
    input_ids: Any,
    attention_mask: Any,
    config: GenerationConfig,
    extras: Extras,
    key: Any,
    seed: None,
    row_ids: Any,
) -> Given:
    """The same inside a caller's jit."""
    _check_inside_jit(config, extras)
    ids, mask = arrays_inside_jit(input_ids, attention_mask)
    if config.do_sample and key is None:
        raise JaxgenError("do_sample=True needs key=: jax.random.key(seed)")
    key, _ = random_key(key, 0 if key is None else None)
    if key.ndim:
        if len(key) != len(ids):
            raise JaxgenError(f"key holds {len(key)} keys, input_ids {len(ids)} rows; pass one, or one per row")
        row_ids = [0] * len(ids) if row_ids is None else row_ids
    return Given(ids, mask, *pack(ids, mask, jnp), row_id_words(row_ids, len(ids)), key)


def _check_inside_jit(config: GenerationConfig, extras: Extras) -> None:
    """Raise for what only `model.generate` can do."""
    refused = {
        "constraint: a grammar, which the host reads": has_grammar(extras.constraint),
        "max_time": config.max_time,
        "num_beams": config.beams > 1,
        "assistant_model": extras.assistant_model,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens,
        "past_key_values": extras.past_key_values,
        "strict": extras.strict,
        "max_cache_len": config.max_cache_len,
        "negative_prompt_ids": extras.negative_prompt_ids is not None,
        "negative_prompt_attention_mask": extras.negative_prompt_attention_mask is not None,
        "guidance_scale": config.is_guided,
        "output_scores": config.output_scores,
        "output_logits": config.output_logits,
        "output_attentions": config.output_attentions,
        "output_hidden_states": config.output_hidden_states,
        "top_logprobs": config.top_logprobs,
    }
    for name, given in refused.items():
        if given:
            raise UnsupportedError(f"{name}: not in the pure function jaxgen.generate; use model.generate")


def traced(model: Any, *arrays: Any) -> bool:
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


def _continued(past: Any, prompts: Prompts, layout: BatchLayout, rows: int, model: Any) -> tuple[Prompts, BatchLayout]:
    if not isinstance(past, PastKeyValues):
        raise JaxgenError(
            f"past_key_values is a {type(past).__name__}; pass the past_key_values of an earlier call's output"
        )
    return past.continue_with(prompts, layout, rows, model)


def _negative(
    extras: Extras,
    tokens: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, " B"],
    vocab_size: int,
) -> Negative:
    """The negative prompts of guidance, packed: as given, or each row's last token, as in HF."""
    if extras.negative_prompt_ids is None:
        if extras.negative_prompt_attention_mask is not None:
            raise JaxgenError("negative_prompt_attention_mask was given without negative_prompt_ids")
        return Negative(np.take_along_axis(tokens, lengths[:, None] - 1, axis=1), np.ones_like(lengths))
    names = ("negative_prompt_ids", "negative_prompt_attention_mask")
    ids, mask = checked_prompt(extras.negative_prompt_ids, extras.negative_prompt_attention_mask, vocab_size, names)
    if len(ids) not in (1, len(tokens)):
        raise JaxgenError(f"negative_prompt_ids has {len(ids)} rows; expected {len(tokens)}, or 1 for all of them")
    repeats = len(tokens) // len(ids)
    return Negative(*(np.repeat(x, repeats, axis=0) for x in pack(ids, mask)))
