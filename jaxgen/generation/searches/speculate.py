"""Speculative decoding, for batches: what is cheap to guess is drafted, and the model reads many guesses at once.

A round drafts up to T tokens per row, reads each row's newest token and its drafts in one pass of the model, and
then draws position by position as plain decoding does, for as long as what is drawn is what was drafted. So every
processor, stop rule and record is that of plain decoding, rows accept different numbers of drafts, and a rejected
draft needs no undoing: the row's length did not reach it.

A token is drawn with noise that belongs to its row and position (`sample`), so sampling accepts drafts in the same
way: the token is the model's own draw, whoever drafted. The assistant drafts with that very noise; so they differ
at most twice as often as they would under the best possible coupling of the two distributions, and without
randomness of its own. Hence speculation changes no token (up to ties within rounding), drafts decide about speed
alone, and a row's rounds depend on nothing but the row.

Sources: Leviathan et al. 2023 (arXiv 2211.17192); for the shared noise Daliri, Musco, Suresh 2024
(arXiv 2408.07978); transformers `_assisted_decoding`, `AssistedCandidateGenerator` and
`PromptLookupCandidateGenerator`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from jaxgen.cache import KVCache
from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.generation import loop
from jaxgen.generation.choosing.constrained import has_grammar
from jaxgen.generation.choosing.sample import draw
from jaxgen.generation.loop import DecodeState, PlainSearch
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.options.table import Extras
from jaxgen.generation.programs.inputs import BatchLayout, StaticOptions, TracedOptions
from jaxgen.generation.prompts.guidance import with_negatives
from jaxgen.generation.prompts.memory import assistant_slots
from jaxgen.generation.prompts.prefill import Count, Prompts, prefill_prompts
from jaxgen.generation.results.step_outputs import Found
from jaxgen.models.protocol import DecodingModel
from jaxgen.pytree import pytree

NO_DRAFT = -1  # no token is -1, so it is never accepted


class Pair(NamedTuple):
    """A model and its assistant."""

    model: Any
    assistant: Any


@pytree
@dataclasses.dataclass
class SpeculativeState(DecodeState):
    """A `DecodeState`, with what the assistant has processed and how well drafting went."""

    assistant_cache: KVCache | None  # holds tokens 0 .. lengths - 3 at least; None: prompt lookup
    drafted: Int[Array, " R"]  # tokens that were drafted ...
    accepted: Int[Array, " R"]  # ... and those of them that the model drew too
    rounds: Int[Array, " R"]  # passes of the model, besides the one over the prompt


def check_assistant(model: Any, assistant: Any) -> None:
    """Raise `JaxgenError` if `assistant` cannot draft for `model`: it needs the same vocabulary and device."""
    if not isinstance(assistant, DecodingModel):
        raise JaxgenError(
            f"assistant_model is a {type(assistant).__name__}; load it as the model itself was, "
            "with AutoModelForCausalLM.from_pretrained"
        )
    own, other = model.config.vocab_size, getattr(assistant, "config", model.config).vocab_size
    if own != other:
        raise JaxgenError(
            f"assistant_model has a vocabulary of {other} tokens, the model one of {own}; they must share it, "
            "because drafts are exchanged as token ids"
        )
    if (here := getattr(model, "device", None)) != (there := getattr(assistant, "device", here)):
        raise JaxgenError(f"assistant_model is on {there}, the model on {here}; load both onto the same device")


def prefill(
    models: Any, prompts: Prompts, key: Key[Array, "*rows"], traced: TracedOptions, layout: BatchLayout
) -> SpeculativeState:
    """Read the prompts with the model, and with the assistant if there is one; draw every row's first token.

    `models` is a `Pair`, or for prompt lookup the model alone.
    """
    model, assistant = _both(models)
    state = loop.prefill(model, prompts, key, traced, layout)
    none = jnp.zeros_like(state.lengths)
    cache = None if assistant is None else _assistant_cache(assistant, prompts, layout)
    return SpeculativeState(**vars(state), assistant_cache=cache, drafted=none, accepted=none, rounds=none)


def decode(
    models: Any, state: SpeculativeState, until: Count, traced: TracedOptions, static: StaticOptions
) -> SpeculativeState:
    """Decode until every row has ended or has at least `until` new tokens; calling again goes on from there."""
    model, assistant = _both(models)

    def unfinished(state: SpeculativeState) -> Bool[Array, ""]:
        return loop.unfinished(state, until)

    def one_round(state: SpeculativeState) -> SpeculativeState:
        drafts, cache = ask_assistant(assistant, state, traced, static)
        return verify(model, dataclasses.replace(state, assistant_cache=cache), drafts, traced, static)

    if assistant is None:
        return _decode_with_lookup(model, state, unfinished, traced, static)
    return jax.lax.while_loop(unfinished, one_round, state)


def _decode_with_lookup(
    model: DecodingModel,
    state: SpeculativeState,
    unfinished: Callable[[SpeculativeState], Bool[Array, ""]],
    traced: TracedOptions,
    static: StaticOptions,
) -> SpeculativeState:
    """As `decode`; while no row finds anything to look up, a round is a plain step and costs no more.

    Two loops that take turns, and not a `lax.cond`, for which XLA would copy the cache.
    """

    def with_drafts(state: SpeculativeState) -> tuple[SpeculativeState, Int[Array, "R drafts"]]:
        with jax.named_scope("look_up"):
            drafts = look_up(state.tokens, state.lengths, traced.ngram, static.drafts)
            return state, _usable(drafts, state, traced, static)

    def verify_drafts(carry: tuple[SpeculativeState, Array]) -> tuple[SpeculativeState, Array]:
        return with_drafts(verify(model, *carry, traced, static))

    def plain_step(carry: tuple[SpeculativeState, Array]) -> tuple[SpeculativeState, Array]:
        state = dataclasses.replace(carry[0], rounds=carry[0].rounds + carry[0].running)
        return with_drafts(loop.decode_step(model, state, traced, static))

    def either(carry: tuple[SpeculativeState, Array]) -> tuple[SpeculativeState, Array]:
        carry = jax.lax.while_loop(lambda now: unfinished(now[0]) & (now[1] != NO_DRAFT).any(), verify_drafts, carry)
        return jax.lax.while_loop(lambda now: unfinished(now[0]) & (now[1] == NO_DRAFT).all(), plain_step, carry)

    return jax.lax.while_loop(lambda now: unfinished(now[0]), either, with_drafts(state))[0]


def verify(
    model: DecodingModel,
    state: SpeculativeState,
    drafts: Int[Array, "R drafts"],
    traced: TracedOptions,
    static: StaticOptions,
) -> SpeculativeState:
    """Read each row's newest token and its drafts, and draw tokens until one is not the draft in its place.

    `drafts` are token ids, then `NO_DRAFT`; none of them lies at or beyond the last position of a row.
    """
    newest = state.lengths - 1
    first = jnp.take_along_axis(state.tokens, newest[:, None], axis=1)
    tokens = jnp.concatenate([first, jnp.maximum(drafts, 0)], axis=1)
    count = (drafts != NO_DRAFT).sum(axis=1)
    tokens, starts = with_negatives(tokens, newest, state.negative_shift)
    hidden, cache = model.extend(tokens, starts, jnp.tile(count + 1, len(tokens) // len(count)), state.cache)
    logits = model.logits(hidden)
    expected = jnp.pad(drafts, ((0, 0), (0, 1)), constant_values=NO_DRAFT)

    def draw_next(carry: tuple[Array, Array, SpeculativeState]) -> tuple[Array, Array, SpeculativeState]:
        place, active, before = carry
        after = loop.append_token(before, logits[:, place], traced, static, active)
        chosen = jnp.take_along_axis(after.tokens, after.lengths[:, None] - 1, axis=1)[:, 0]
        agrees = (after.lengths > before.lengths) & (chosen == expected[:, place])
        after = dataclasses.replace(after, accepted=after.accepted + agrees)
        return place + 1, agrees & after.running, after

    # The caches stay outside of the loop, which has no use for them.
    without = dataclasses.replace(
        state, cache=[], assistant_cache=None, drafted=state.drafted + count, rounds=state.rounds + state.running
    )
    carry = (jnp.int32(0), state.running, without)
    _, _, drawn = jax.lax.while_loop(lambda carry: carry[1].any(), draw_next, carry)
    return dataclasses.replace(drawn, cache=cache, assistant_cache=state.assistant_cache)


def ask_assistant(
    assistant: DecodingModel, state: SpeculativeState, traced: TracedOptions, static: StaticOptions
) -> tuple[Int[Array, "R drafts"], KVCache]:
    """Up to T tokens per row by an assistant, and its cache; it draws as the model would from the same logits.

    A row's drafts end before a token that ends the row, and after one whose probability is below
    `traced.confidence`. Source: transformers `AssistedCandidateGenerator`, `ConfidenceCriteria`.
    """
    index, slots = jnp.arange(len(state.tokens)), state.tokens.shape[1]
    most = state.lengths + _room(state, static)

    def choose(
        logits: Array, tokens: Array, lengths: Array, going: Array, constrained: Array | None
    ) -> tuple[Array, Array, Array, Array | None]:
        rows = dataclasses.replace(state.rows(going), tokens=tokens, lengths=lengths, constrained=constrained)
        scores = loop.process(logits, rows, traced)
        chosen = draw(scores, state.row_keys, lengths) if static.do_sample else loop.greedy(scores)
        going &= ~_ends(chosen, traced)
        tokens = tokens.at[index, jnp.where(going, lengths, slots)].set(chosen, mode="drop")
        lengths += going
        sure = jnp.exp(loop.log_prob(scores, chosen)) >= traced.confidence
        constrained, _ = loop.constrain(traced, constrained, state.prompts, chosen, going)
        return tokens, lengths, going & sure & (lengths < most), constrained

    def draft_next(carry: tuple[Array, Array, Array, Array | None, KVCache]) -> tuple[Any, ...]:
        tokens, lengths, going, constrained, cache = carry
        # Rows that draft no more read their newest token again, as in `loop.decode_step`.
        newest = lengths - 1
        logits, cache = assistant.step(jnp.take_along_axis(tokens, newest[:, None], axis=1)[:, 0], newest, cache)
        return *choose(logits, tokens, lengths, going, constrained), cache

    assert state.assistant_cache is not None
    with jax.named_scope("draft"):
        # After a round that accepted all its drafts, the last of them has not been read. Otherwise only the newest
        # token is new, and the one before it goes where it already is.
        start = jnp.maximum(state.lengths - 2, 0)
        two = jnp.take_along_axis(state.tokens, start[:, None] + jnp.arange(2), axis=1)
        hidden, cache = assistant.extend(two, start, jnp.full_like(start, 2), state.assistant_cache)
        logits = assistant.logits(hidden[:, 1:])[:, 0]
        carry = (*choose(logits, state.tokens, state.lengths, state.lengths < most, state.constrained), cache)
        tokens, lengths, _, _, cache = jax.lax.while_loop(lambda carry: carry[2].any(), draft_next, carry)
        place = state.lengths[:, None] + jnp.arange(static.drafts)
        drafts = jnp.take_along_axis(tokens, jnp.minimum(place, slots - 1), axis=1)
        return jnp.where(place < lengths[:, None], drafts, NO_DRAFT), cache


def look_up(
    tokens: Int[Array, "R S"], lengths: Int[Array, " R"], ngram: Count, drafts: int
) -> Int[Array, "R {drafts}"]:
    """What followed the end of each row where the same tokens stood before; `NO_DRAFT` where nothing did.

    The longest end counts that occurs, of at most `ngram` tokens, and its first occurrence.
    Source: Saxena 2023, "Prompt Lookup Decoding"; transformers `PromptLookupCandidateGenerator`.
    """
    slot = jnp.arange(tokens.shape[1])
    earlier = slot < lengths[:, None] - 1

    def one_longer(back: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        matched, alive, shifted = carry  # at slot s, `shifted` holds the token at s - back
        wanted = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1 - back, 0)[:, None], axis=1)
        alive &= (shifted == wanted) & (slot >= back)
        return matched + alive, alive, jnp.roll(shifted, 1, axis=1)

    carry = (jnp.zeros_like(tokens), earlier, tokens)
    matched, _, _ = jax.lax.fori_loop(0, jnp.minimum(ngram, lengths.max()), one_longer, carry)
    source = matched.argmax(axis=1)[:, None] + 1 + jnp.arange(drafts)
    known = (matched.max(axis=1)[:, None] > 0) & (source < lengths[:, None])
    found = jnp.take_along_axis(tokens, jnp.minimum(source, tokens.shape[1] - 1), axis=1)
    return jnp.where(known, found, NO_DRAFT)


def _both(models: Any) -> tuple[Any, Any]:
    """The model, and its assistant or None."""
    return (models.model, models.assistant) if isinstance(models, Pair) else (models, None)


def _assistant_cache(assistant: Any, prompts: Prompts, layout: BatchLayout) -> KVCache:
    """The assistant's cache of every row: of the whole prompt, whatever the model knows from an earlier call."""
    config = getattr(assistant, "config", None)
    slots = layout.total if config is None else assistant_slots(config, layout)
    alone = dataclasses.replace(prompts, negative=None, past=None)
    _, cache = prefill_prompts(assistant, alone, dataclasses.replace(layout, slots=slots, fresh=0))
    return jax.tree.map(lambda x: jnp.repeat(x, layout.samples, axis=0) if layout.samples > 1 else x, cache)


def _room(state: SpeculativeState, static: StaticOptions) -> Int[Array, " R"]:
    """How many drafts a row has use for: the last token that it may get is drawn without one."""
    return jnp.where(state.running, jnp.clip(state.max_lengths - state.lengths - 1, 0, static.drafts), 0)


def _ends(tokens: Int[Array, "R *T"], traced: TracedOptions) -> Bool[Array, "R *T"]:
    """Which tokens end a row. They are not drafted: the model draws the token after the last draft anyway."""
    return (tokens[..., None] == jnp.asarray(traced.eos_ids)).any(axis=-1)


def _usable(
    drafts: Int[Array, "R drafts"], state: SpeculativeState, traced: TracedOptions, static: StaticOptions
) -> Int[Array, "R drafts"]:
    """Drafts up to the first one that ends the row, and as many as there is room for."""
    known = (drafts != NO_DRAFT) & ~_ends(drafts, traced)
    known &= np.arange(static.drafts) < _room(state, static)[:, None]
    return jnp.where(jnp.cumprod(known, axis=1) > 0, drafts, NO_DRAFT)


@dataclasses.dataclass(frozen=True)
class Speculation(PlainSearch):
    """The plain search, several tokens at a time where drafts are right. A `Search`."""

    prefill, decode = staticmethod(prefill), staticmethod(decode)

    def check(self, model: Any, config: GenerationConfig, extras: Extras) -> None:
        """Raise for an assistant that cannot draft for this model, and where the host is asked before each token."""
        if has_grammar(extras.constraint):
            name = "prompt_lookup_num_tokens" if extras.assistant_model is None else "assistant_model"
            raise UnsupportedError(
                f"constraint: a grammar with {name}: the host says what may come for one token at a time; leave {name} "
                "out, or use a constraint that is regular"
            )
        if extras.assistant_model is not None:
            check_assistant(model, extras.assistant_model)

    def collect(
        self, state: Any, prompts: int, returned: int, traced: TracedOptions, layout: BatchLayout, details: bool
    ) -> Found:
        """The rows, and how well drafting went."""
        found = super().collect(state, prompts, returned, traced, layout, details)
        if not details:
            return found
        counts = {name: np.asarray(getattr(state, name))[: len(found.lengths)] for name in ("drafted", "accepted")}
        return dataclasses.replace(found, details=found.details | counts)
