"""A call of `generate`, checked and laid out in numpy: everything that the executables will be given."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool, Int

from jaxgen.errors import JaxgenError, shown
from jaxgen.generation.config import GenerationConfig
from jaxgen.generation.controls import Controls, Plan, Recipe, controls_of, recipe_of
from jaxgen.generation.limits import check_memory, row_limits
from jaxgen.generation.options import Extras
from jaxgen.generation.past import PastKeyValues
from jaxgen.generation.prompt import SMALLEST_PROMPT, SMALLEST_TOTAL, bucket, pack, pad_to, read_prompt
from jaxgen.generation.read import Negative, Prompts
from jaxgen.generation.reread import check_reread
from jaxgen.generation.sample import FreshSeed, padded_key, random_key, row_id_words
from jaxgen.generation.speculate import check_assistant
from jaxgen.generation.strict import Strict
from jaxgen.generation.unused import once


@dataclasses.dataclass(frozen=True)
class Request:
    """What one call asks for; numpy throughout, so that nothing is dispatched or compiled to make it."""

    input_ids: Int[np.ndarray, "B T"]  # as given, for the layout of the result
    attention_mask: Bool[np.ndarray, "B T"]
    config: GenerationConfig  # the values in effect
    seed: int | tuple[int, ...] | None
    key: Any
    prompts: Prompts
    controls: Controls
    plan: Plan
    extras: Extras = Extras()
    strict: Strict | None = None

    @property
    def asks_host(self) -> bool:
        """Whether a processor calls the user's Python."""
        return self.extras.prefix_allowed_tokens_fn is not None

    @classmethod
    def read(
        cls,
        model: Any,
        input_ids: Any,
        attention_mask: Any,
        config: GenerationConfig,
        key: Any = None,
        seed: Any = None,
        row_ids: Any = None,
        extras: Extras = Extras(),
    ) -> "Request":
        """Check all that can be checked on the host, then pack the rows and choose the buckets."""
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
        words = row_id_words(row_ids, len(ids))
        strict = Strict.of(extras.strict)
        if strict:
            strict.check(config, extras.past_key_values)
        if extras.assistant_model is not None:
            check_assistant(model, extras.assistant_model)
        recipe = recipe_of(config, extras)
        controls = controls_of(config, model.config.vocab_size, extras)
        tokens, lengths = pack(ids, mask)
        limits = row_limits(config, lengths, model.config.max_position_embeddings)

        negative = _negative(config, extras, ids, mask, model.config.vocab_size)
        longest = max(int(x.max()) for _, x in ((tokens, lengths), *negative))
        rows, length, total = sizes_of(config, samples_of(config), longest, lengths, limits, strict)
        plan = plan_of(model, config, recipe, total, int((limits - lengths).max()), strict)
        guided = bool(negative)
        # Before anything is padded: what the device cannot hold, the host may not either.
        check_memory(model, (rows, length), plan, extras.assistant_model, guided=guided)

        def placed(packed: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """In the bucket: without the columns that no row reaches, and with idle rows."""
            return pad_to(packed[:, :length], (rows, length)), pad_to(count, (rows,), fill=1)

        prompts = Prompts(
            *placed(tokens, lengths),
            limits=pad_to(limits, (rows,), fill=2),
            row_ids=pad_to(words, (rows, 2)),
            idle=np.arange(rows) >= len(ids),
            negative=Negative(*placed(*negative[0])) if negative else None,
        )
        if extras.past_key_values is not None:
            if not isinstance(extras.past_key_values, PastKeyValues):
                raise JaxgenError(
                    f"past_key_values is a {type(extras.past_key_values).__name__}; pass the past_key_values of an "
                    "earlier call's output"
                )
            prompts, plan = extras.past_key_values.continue_with(prompts, plan, len(ids), model)
            check_memory(model, (rows, length), plan, extras.assistant_model, past=True)
        check_reread(config, len(ids) * plan.samples, plan.total, model)
        return cls(ids, mask, config, seed, padded_key(key, rows), prompts, controls, plan, extras, strict)


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


def samples_of(config: GenerationConfig) -> int:
    """Rows that are generated for each prompt."""
    beams = config.num_beams or 1
    return beams if beams > 1 else config.num_return_sequences or 1


def sizes_of(
    config: GenerationConfig,
    samples: int,
    longest: int,
    lengths: Int[np.ndarray, " B"],
    limits: Int[np.ndarray, " B"],
    strict: Strict | None,
) -> tuple[int, int, int]:
    """How many prompts, how long (the `longest`, negative ones included), and the total length of a row, in buckets."""
    guided = config.guidance_scale not in (None, 1.0)  # a negative row may be longer than its row
    budget = int((limits - lengths).max())
    if strict:
        total = strict.fits(max(int(limits.max()), longest + budget if guided else 0))
        return strict.prompts(len(lengths), samples), total, total
    length = bucket(longest, SMALLEST_PROMPT)
    # From the bucketed prompt, not the real one: the prompt's bucket then decides the total's.
    by_length = config.max_new_tokens is None and config.max_length is not None
    total = max(int(limits.max()), length) if by_length and not guided else length + budget
    return bucket(len(lengths)), length, bucket(max(total, config.max_cache_len or 0), SMALLEST_TOTAL)


def plan_of(
    model: Any, config: GenerationConfig, recipe: Recipe, total: int, budget: int, strict: Strict | None
) -> Plan:
    """Sizes of rows, caches and records; `budget`: the most new tokens of a row."""
    chunk = config.prefill_chunk_size or (strict.chunk if strict else 0)
    recorded = recipe.record_scores or recipe.record_logits or recipe.top_logprobs
    # No row has a use for more drafts than the tokens that it may get.
    drafts = min(recipe.drafts, total if strict else bucket(budget, SMALLEST_TOTAL))
    recipe = dataclasses.replace(recipe, recorded=bucket(budget, 16) if recorded else 0, drafts=drafts)
    return Plan(
        recipe=recipe,
        samples=samples_of(config),
        total=total,
        slots=model.config.cache_slots(total, ahead=max(chunk, drafts + 1 if drafts else 0)),
        int8_cache=config.cache_implementation == "quantized",
        chunk=chunk,
    )


def _negative(
    config: GenerationConfig,
    extras: Extras,
    ids: Int[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    vocab_size: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The negative prompts of guidance, packed, if there is guidance: as given, or each row's last token, as in HF."""
    if config.guidance_scale in (None, 1.0):
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
