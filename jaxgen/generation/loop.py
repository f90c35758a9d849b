"""The two computations of generation: `prefill` processes the prompts, `decode` is one while_loop of `decode_step`.

Both are pure functions of a model, arrays and static options. Everything the loop carries is one `DecodeState`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.cache import KVCache
from jaxgen.generation.choosing.sample import draw, row_keys
from jaxgen.generation.choosing.stop import (
    BROKEN,
    IDLE,
    RUNNING,
    Completes,
    meets_any,
    raise_if_broken,
    status_after,
)
from jaxgen.generation.choosing.told import Told
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.options.table import Extras
from jaxgen.generation.programs.inputs import BatchLayout, StaticOptions, TracedOptions
from jaxgen.generation.prompts.guidance import guided, with_negatives
from jaxgen.generation.prompts.layout import generated
from jaxgen.generation.prompts.prefill import Prompts, prefill_prompts, read_one_by_one
from jaxgen.generation.prompts.rows import Rows
from jaxgen.generation.results.step_outputs import Found, StepOutputs
from jaxgen.lowering import target
from jaxgen.models.protocol import DecodingModel
from jaxgen.pytree import pytree


@pytree
@dataclasses.dataclass
class DecodeState:
    """All that generation knows between two tokens. R rows, S the largest total length, V vocabulary."""

    tokens: Int[Array, "R S"]  # slot p holds the row's token p: the packed prompt, then the new tokens
    lengths: Int[Array, " R"]  # tokens the row holds; the position of the next one
    prompt_lengths: Int[Array, " R"]  # how many of them came with the prompt
    prompts: Int[Array, " R"]  # the index of that prompt in the call
    max_lengths: Int[Array, " R"]  # the length at which the row ends
    status: Int[Array, " R"]  # RUNNING, or why it ended (`stop`)
    logprobs: Float[Array, "R S"]  # of the token in each slot, under the distribution it was drawn from
    model_logprobs: Float[Array, "R S"]  # the same under the model's own distribution, before any processor
    row_keys: Key[Array, " R"]  # never advanced: a draw folds in its position
    cache: KVCache  # keys and values of tokens 0 .. lengths - 2; those of the newest token are not in it yet
    matched: Int[Array, " R"] | None  # how far each row is into a stop string
    constrained: Int[Array, " R"] | None  # where each row is in its constraint's automaton
    negative_shift: Int[Array, " R"] | None  # with guidance: a negative row's length minus that of its row
    given: Int[Array, "R S"] | None  # strict: the tokens that rows are to get, in their slots; -1 where they choose
    step_outputs: StepOutputs  # scores and logits, if asked for

    @property
    def running(self) -> Bool[Array, " R"]:
        """Which rows have not ended."""
        return self.status == RUNNING

    def rows(self, active: Bool[Array, " R"] | None = None) -> Rows:
        """What processors may know; `active`, if given, narrows down the running rows."""
        running = self.running if active is None else self.running & active
        lengths = self.lengths, self.prompt_lengths, self.max_lengths
        return Rows(self.tokens, *lengths, self.prompts, running, self.constrained)


Until = Int[Array | np.ndarray, "*rows"]
State = TypeVar("State", bound=DecodeState)  # of this search, or of one that builds on it


def prefill(
    model: DecodingModel, prompts: Prompts, key: Key[Array, "*rows"], traced: TracedOptions, layout: BatchLayout
) -> DecodeState:
    """Process the prompts once, spread each over `layout.samples` rows, and draw every row's first token.

    `layout.one_by_one` leaves the last token of each prompt, and with it that draw, to the first decode step.
    """
    if layout.one_by_one:
        cache = read_one_by_one(model, prompts, layout)
        logits, _ = jax.eval_shape(model.step, jnp.asarray(prompts.lengths), jnp.asarray(prompts.lengths), cache)
        return started(prompts, cache, logits.shape[1], key, traced, layout)
    state, logits = begin(model, prompts, key, traced, layout)
    return append_token(state, logits, traced, layout.static)


def begin(
    model: DecodingModel, prompts: Prompts, key: Key[Array, "*rows"], traced: TracedOptions, layout: BatchLayout
) -> tuple[DecodeState, Float[Array, "logit_rows V"]]:
    """The state before the first token, and the logits it will be drawn from."""
    logits, cache = prefill_prompts(model, prompts, layout)
    return started(prompts, cache, logits.shape[1], key, traced, layout), _spread(logits, layout)


def _spread(x: Any, layout: BatchLayout) -> Array:
    """What each prompt has, for each of its rows."""
    return jnp.repeat(jnp.asarray(x), layout.samples, axis=0) if layout.samples > 1 else jnp.asarray(x)


def started(
    prompts: Prompts,
    cache: KVCache,
    vocab_size: int,
    key: Key[Array, "*rows"],
    traced: TracedOptions,
    layout: BatchLayout,
) -> DecodeState:
    """The state of rows that hold their prompts and have no new token."""

    def spread(x: Any) -> Array:
        return _spread(x, layout)

    tokens, lengths, idle = spread(prompts.tokens), spread(prompts.lengths), spread(prompts.idle)
    rows, stop_strings, automata = len(tokens), traced.stop_strings, traced.automata
    tokens = jnp.pad(tokens, ((0, 0), (0, layout.total - tokens.shape[1])))
    of_prompt = spread(jnp.arange(len(prompts.tokens)))
    return DecodeState(
        tokens=tokens,
        lengths=lengths,
        prompt_lengths=lengths,
        prompts=of_prompt,
        max_lengths=spread(prompts.max_lengths),
        status=jnp.where(idle, jnp.int8(IDLE), jnp.int8(RUNNING)),
        logprobs=jnp.zeros((rows, layout.total), jnp.float32),
        model_logprobs=jnp.zeros((rows, layout.total), jnp.float32),
        row_keys=row_keys(key, jnp.asarray(prompts.row_ids), layout.samples),
        cache=jax.tree.map(spread, cache),
        matched=None if stop_strings is None else stop_strings.start(tokens, lengths),
        constrained=None if automata is None else automata.start(of_prompt),
        negative_shift=None if prompts.negative is None else spread(prompts.negative.lengths) - lengths,
        given=None if prompts.given is None else jnp.asarray(prompts.given),
        step_outputs=StepOutputs.empty(layout.static, rows, vocab_size),
    )


def decode(
    model: DecodingModel, state: DecodeState, until: Until, traced: TracedOptions, static: StaticOptions
) -> DecodeState:
    """Decode until every row has ended or has `until` new tokens, of all rows or of each; calling again goes on."""

    def step(state: DecodeState) -> DecodeState:
        return decode_step(model, state, traced, static)

    return jax.lax.while_loop(lambda state: unfinished(state, until), step, state)


def unfinished(state: DecodeState, until: Until) -> Bool[Array, ""]:
    """Whether some row still runs and has fewer than `until` new tokens."""
    wanted = state.lengths - state.prompt_lengths < until
    return (state.running & wanted).any()


def decode_step(model: DecodingModel, state: State, traced: TracedOptions, static: StaticOptions) -> State:
    """Feed each row's newest token to the model and draw the next one.

    Rows that have ended feed their last token again: it lands in the slot that already holds it.
    """
    newest = state.lengths - 1
    tokens = jnp.take_along_axis(state.tokens, newest[:, None], axis=1)[:, 0]
    logits, cache = model.step(*with_negatives(tokens, newest, state.negative_shift), state.cache)
    return append_token(dataclasses.replace(state, cache=cache), logits, traced, static)


def append_token(
    state: State,
    logits: Float[Array, "logit_rows V"],
    traced: TracedOptions,
    static: StaticOptions,
    active: Bool[Array, " R"] | None = None,
) -> State:
    """Choose each running row's next token from its logits, write it down, and see who ends.

    With guidance, the logits of the negative rows follow those of the rows. Rows that are not `active` stay as
    they are.
    """
    with jax.named_scope("sample"):
        rows = state.rows(active)
        scores = process(guided(logits, traced.guidance_scale), rows, traced)
        logits = logits[: len(state.lengths)]  # the rows' own
        chosen = choose(scores, state.row_keys, state.lengths, traced.samples) if static.do_sample else greedy(scores)
        told = None if state.given is None else Told.at(state.given, state.lengths)
        chosen = told.instead_of(chosen) if told else chosen

    with jax.named_scope("record"):
        logprobs, model_logprobs = log_prob(scores, chosen), log_prob(logits, chosen)
        # One NaN or +inf anywhere in a row, or nothing left to choose from, shows here.
        finite = jnp.isfinite(logprobs) | (told.removed(logprobs) if told else False)
        finite &= jnp.isfinite(model_logprobs) | static.allow_invalid
        runs = rows.running & finite
        slot, lengths = jnp.where(runs, state.lengths, state.tokens.shape[1]), state.lengths + runs
        if len(slot) == 1:  # or XLA:GPU would compute them again where they are used, and for that copy the state
            slot, lengths = jax.lax.optimization_barrier((slot, lengths))
        tables = state.tokens, state.logprobs, state.model_logprobs
        tokens, logprobs, model_logprobs = put(tables, slot, (chosen, logprobs, model_logprobs))
        matched, hits = state.matched, jnp.zeros_like(runs)
        if traced.stop_strings is not None and matched is not None:
            after, hits = traced.stop_strings.advance(matched, chosen)
            matched = jnp.where(runs, after, matched)
        constrained, completes = constrain(traced, state.constrained, state.prompts, chosen, runs)
        status = status_after(
            is_eos=(chosen[:, None] == traced.eos_ids).any(axis=1),
            hits_stop_string=hits,
            meets_criterion=meets_any(traced.criteria, tokens, lengths, scores),
            reaches_limit=lengths >= state.max_lengths,
            completes=completes,
        )
        status = told.ended(status) if told else status
        status = jnp.where(runs, status, jnp.where(rows.running, jnp.int8(BROKEN), state.status))
        return dataclasses.replace(
            state,
            tokens=tokens,
            lengths=lengths,
            status=status,
            logprobs=logprobs,
            model_logprobs=model_logprobs,
            matched=matched,
            constrained=constrained,
            step_outputs=state.step_outputs.put(rows.new_tokens, runs, scores, logits, traced.ranked),
        )


def put(tables: Sequence[Array], slot: Int[Array, " R"], values: Sequence[Array]) -> list[Array]:
    """The tables `[R, S]` with each row's value in its slot; one past the end is dropped."""
    if target().kernels:
        from jaxgen.kernels.write_down import write_down

        return write_down(tables, slot, values)
    index = jnp.arange(len(slot))
    return [
        table.at[index, slot].set(value, mode="drop", unique_indices=True, indices_are_sorted=True)
        for table, value in zip(tables, values, strict=True)
    ]


def constrain(
    traced: TracedOptions,
    before: Int[Array, " R"] | None,
    prompts: Int[Array, " R"],
    chosen: Int[Array, " R"],
    runs: Bool[Array, " R"],
) -> tuple[Int[Array, " R"] | None, Completes | None]:
    """Where rows that run are in their constraints with one more token, and whether their texts are whole.

    None without constraints.
    """
    if traced.automata is None or before is None:
        return None, None
    after, whole, ends = traced.automata.advance(before, prompts, chosen)
    return jnp.where(runs, after, before), (whole, ends)


def process(logits: Float[Array, "R V"], rows: Rows, traced: TracedOptions) -> Float[Array, "R V"]:
    """The logits to draw from: every processor of the call, in HF's order."""
    for processor in traced.processors:
        logits = processor(logits, rows)
    return logits


def choose(
    scores: Float[Array, "R V"],
    row_keys: Key[Array, " R"],
    positions: Int[Array, " R"],
    samples: Bool[Array | np.ndarray, " R"] | None,
) -> Int[Array, " R"]:
    """A token drawn for each row; for those that do not sample, the most likely one."""
    drawn = draw(scores, row_keys, positions)
    return drawn if samples is None else jnp.where(samples, drawn, greedy(scores))


def greedy(scores: Float[Array, "R V"]) -> Int[Array, " R"]:
    """The most likely token; the first one of a tie, as in HF."""
    return jnp.argmax(scores, axis=1).astype(jnp.int32)


def log_prob(scores: Float[Array, "R V"], chosen: Int[Array, " R"]) -> Float[Array, " R"]:
    """log softmax(scores) at the chosen token; -inf for one that cannot come, also where none can."""
    of_chosen = jnp.take_along_axis(scores, chosen[:, None], axis=1)[:, 0]
    return jnp.where(jnp.isneginf(of_chosen), of_chosen, of_chosen - jax.nn.logsumexp(scores, axis=1))


@dataclasses.dataclass(frozen=True)
class PlainSearch:
    """One token after the other, each row alone: greedy, or drawn. A `Search`."""

    append_only = True
    prefill, decode = staticmethod(prefill), staticmethod(decode)

    def check(self, model: Any, config: GenerationConfig, extras: Extras) -> None:
        """There is nothing that this cannot do."""

    def rows_per_prompt(self, config: GenerationConfig) -> int:
        """One for each sequence that is returned."""
        return config.sequences_per_prompt

    def collect(
        self, state: DecodeState, prompts: int, returned: int, traced: TracedOptions, layout: BatchLayout, details: bool
    ) -> Found:
        """The rows, as they are."""
        rows = prompts * layout.samples
        names = ("tokens", "lengths", "prompt_lengths", "status", *(("logprobs", "model_logprobs") if details else ()))
        arrays = {name: x[:rows] for name, x in jax.device_get({name: getattr(state, name) for name in names}).items()}
        lengths, starts, status = arrays["lengths"], arrays["prompt_lengths"], arrays["status"]
        raise_if_broken(status, lengths - starts)
        width = int((lengths - starts).max())

        def new(name: str) -> np.ndarray:
            return generated(arrays[name], starts, lengths, width, arrays[name].dtype.type(0))

        if not details:
            return Found(new("tokens"), lengths - starts, status)
        recorded = state.step_outputs.on_host(rows, width)
        return Found(new("tokens"), lengths - starts, status, new("logprobs"), new("model_logprobs"), recorded)
