"""Beam search and beam-sample: `num_beams` rows per prompt, which at every step continue the best candidates.

Each prompt is searched as if it were alone: its beams share the batch with others, and nothing else. A beam that
goes on in another row leaves a trace, `parents` and `picked`, along which the result is read at the end; only its
tokens (which processors look at) and its part of the cache move with it.

Source: transformers `GenerationMixin._beam_search`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.errors import UnsupportedError
from jaxgen.generation.choosing.constrained import has_grammar
from jaxgen.generation.choosing.stop import BROKEN, LENGTH, RUNNING, meets_any, status_after
from jaxgen.generation.loop import DecodeState, begin, constrain, process, unfinished
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.options.table import Extras
from jaxgen.generation.processors.select import best_of
from jaxgen.generation.programs.inputs import BatchLayout, StaticOptions, TracedOptions
from jaxgen.generation.prompts.guidance import guided, with_negatives
from jaxgen.generation.prompts.prefill import Count, Prompts
from jaxgen.generation.prompts.rows import Rows
from jaxgen.generation.results.step_outputs import Found
from jaxgen.generation.searches.beam_cache import reordered
from jaxgen.generation.searches.beam_trace import best_sequences
from jaxgen.models.protocol import DecodingModel
from jaxgen.pytree import pytree

# Added to the score of what must not be chosen while there is anything else. Finite, as in HF: if nothing else is
# left, such beams are still in order.
WORSE = -1.0e9


@pytree
@dataclasses.dataclass
class Finished:
    """The best sequences that have ended, best first: row `b * num_beams + i` holds the i-th of prompt b.

    Or what ends now, [B, K].
    """

    scores: Float[Array, "*R"]  # log-probability / new tokens ** length_penalty; WORSE where there is none yet
    done: Bool[Array, "*R"]  # there is one
    lengths: Int[Array, "*R"]  # its tokens, prompt included
    parents: Int[Array, "*R"]  # the row that held all of it but the last token
    picked: Int[Array, "*R"]  # that token
    logprobs: Float[Array, "*R"]  # of that token
    model_logprobs: Float[Array, "*R"]
    reasons: Int[Array, "*R"]  # why it ended (`stop`)

    @classmethod
    def none(cls, prompt_lengths: Int[Array, " R"]) -> "Finished":
        """Nothing yet: should it come to this, an empty continuation that is worse than any other."""
        zeros, ids = jnp.zeros(len(prompt_lengths), jnp.float32), jnp.zeros_like(prompt_lengths)
        reasons = jnp.full(len(zeros), LENGTH, jnp.int8)
        return cls(zeros + WORSE, ids > 0, prompt_lengths, ids, ids, zeros, zeros, reasons)


@pytree
@dataclasses.dataclass
class BeamState(DecodeState):
    """A `DecodeState` whose rows are the running beams, best first: beam i of prompt b in row `b * num_beams + i`.

    `tokens` are those of the beam that is in the row now; `logprobs`, `model_logprobs`, `picked` and `parents` say
    what happened to the row at that length, whoever was in it. `logprobs` are the terms that the scores add up. All
    rows of a prompt run until its search ends; their `status` is then that of the sequences in `finished`.
    """

    scores: Float[Array, " R"]  # sum of the log-probabilities, after processors, of the beam's new tokens
    picked: Int[Array, "R S"]  # the token that the row was given at this length
    parents: Int[Array, "R S"]  # the row that the beam came from when it was given that token
    finished: Finished


class Candidates(NamedTuple):
    """The K continuations of each prompt that are looked at, in order; B prompts."""

    scores: Float[Array, "B K"]  # of the beam with that token
    parents: Int[Array, "B K"]  # the row that it continues
    picked: Int[Array, "B K"]  # the token
    logprobs: Float[Array, "B K"]  # what the token adds to the score
    model_logprobs: Float[Array, "B K"]
    status: Int[Array, "B K"]  # RUNNING, or why it ends with this token


def prefill(
    model: DecodingModel, prompts: Prompts, key: Key[Array, "*rows"], traced: TracedOptions, layout: BatchLayout
) -> BeamState:
    """Process the prompts once, and give every beam its first token: the best ones after the prompt."""
    start, logits = begin(model, prompts, key, traced, layout)
    rows, beams = len(start.lengths), layout.static.num_beams
    state = BeamState(
        **vars(start),
        # All beams are alike now: the others wait, so that the candidates differ.
        scores=jnp.where(jnp.arange(rows) % beams == 0, 0.0, WORSE).astype(jnp.float32),
        picked=jnp.zeros_like(start.tokens),
        parents=jnp.zeros_like(start.tokens),
        finished=Finished.none(start.prompt_lengths),
    )
    state, _ = append(state, logits, traced, layout.static)
    return state  # the caches of a prompt's beams are alike: there is nothing to move


def decode(
    model: DecodingModel, state: BeamState, until: Count, traced: TracedOptions, static: StaticOptions
) -> BeamState:
    """Decode until every search has ended or its beams have `until` new tokens; calling again goes on from there."""

    def step(state: BeamState) -> BeamState:
        return decode_step(model, state, traced, static)

    return jax.lax.while_loop(lambda state: unfinished(state, until), step, state)


def decode_step(model: DecodingModel, state: BeamState, traced: TracedOptions, static: StaticOptions) -> BeamState:
    """Run each beam's newest token, choose the beams that go on, and move their caches to where they are now."""
    newest = state.lengths - 1
    tokens = jnp.take_along_axis(state.tokens, newest[:, None], axis=1)[:, 0]
    logits, cache = model.step(*with_negatives(tokens, newest, state.negative_shift), state.cache)
    after, parents = append(dataclasses.replace(state, cache=cache), logits, traced, static)
    with jax.named_scope("reorder"):
        own = parents == jnp.arange(len(parents))
        shift = jnp.zeros_like(newest) if state.negative_shift is None else state.negative_shift
        # A prompt's beams share the slots of the prompt.
        first = jnp.where(own, jnp.iinfo(jnp.int32).max, state.prompt_lengths + jnp.minimum(shift, 0)).min()
        last = jnp.where(own, 0, newest + jnp.maximum(shift, 0)).max()
        if state.negative_shift is not None:
            parents = jnp.concatenate([parents, parents + len(parents)])
        return dataclasses.replace(after, cache=reordered(cache, parents, first, last))


def append(
    state: BeamState, logits: Float[Array, "logit_rows V"], traced: TracedOptions, static: StaticOptions
) -> tuple[BeamState, Int[Array, " R"]]:
    """Choose the beams that go on and those that end; also the row that each row's beam came from.

    Searches that have ended stay as they are.
    """
    rows, beams = state.rows(), static.num_beams
    own = logits[: len(rows.lengths)]  # with guidance, those of the negative rows follow
    with jax.named_scope("sample"):
        log_probs = jax.nn.log_softmax(own, axis=1)
        scores = guided(logits, traced.guidance_scale) if traced.guidance_scale is not None else log_probs
        scores = process(scores, rows, traced)
        candidates = propose(state, scores, log_probs, traced, static)
    with jax.named_scope("select"):
        runs = rows.running & jnp.repeat(_is_finite(candidates, scores, log_probs, static), beams)
        ends = candidates.status != RUNNING
        onward = _take(candidates._replace(scores=candidates.scores + jnp.where(ends, WORSE, 0.0)), beams)
        finished = merged(state.finished, candidates, rows, traced)
        ended = _is_over(onward.scores[:, 0], finished, ends, rows, traced, static)
    with jax.named_scope("record"):
        index = jnp.arange(len(runs))
        slot = jnp.where(runs, state.lengths, state.tokens.shape[1])  # past the end: dropped

        def put(table: Array, value: Array) -> Array:
            where = table.at[index, slot]
            return where.set(value.reshape(-1), mode="drop", unique_indices=True, indices_are_sorted=True)

        def where_running(new: Array, old: Array) -> Array:
            return jnp.where(runs, new.reshape(-1), old)

        parents = where_running(onward.parents, index)
        matched = state.matched
        if matched is not None and traced.stop_strings is not None:
            after, _ = traced.stop_strings.advance(matched[parents], onward.picked.reshape(-1))
            matched = jnp.where(runs, after, matched)
        before = None if state.constrained is None else state.constrained[parents]
        constrained, _ = constrain(traced, before, state.prompts, onward.picked.reshape(-1), runs)
        status = jnp.where(jnp.repeat(ended, beams), finished.reasons, jnp.int8(RUNNING))
        broken = jnp.where(rows.running, jnp.int8(BROKEN), state.status)
        state = dataclasses.replace(
            state,
            tokens=put(state.tokens[parents], onward.picked),
            lengths=state.lengths + runs,
            status=jnp.where(runs, status, broken),
            logprobs=put(state.logprobs, onward.logprobs),
            model_logprobs=put(state.model_logprobs, onward.model_logprobs),
            matched=matched,
            constrained=constrained,
            step_outputs=state.step_outputs.put(rows.new_tokens, runs, scores, own),
            scores=where_running(onward.scores, state.scores),
            picked=put(state.picked, onward.picked),
            parents=put(state.parents, onward.parents),
            finished=jax.tree.map(where_running, finished, state.finished),
        )
        return state, parents


def propose(
    state: BeamState,
    scores: Float[Array, "R V"],
    log_probs: Float[Array, "R V"],
    traced: TracedOptions,
    static: StaticOptions,
) -> Candidates:
    """The K best continuations of each prompt's beams, or K that are drawn without replacement, in the order drawn.

    K leaves `num_beams` of them to go on even if every end-of-sequence id of every beam is among them. The draw is
    Gumbel-top-K over `softmax` of the accumulated scores, with each row's own key at its position.
    """
    beams, vocab_size = static.num_beams, scores.shape[1]
    total = scores + state.scores[:, None]
    order = total
    if static.do_sample:

        def noise(row_key: Key[Array, ""], position: Int[Array, ""]) -> Float[Array, " V"]:
            draw_key = jax.random.fold_in(row_key, position)
            return jax.random.gumbel(draw_key, (vocab_size,), jnp.float32, mode="low")

        order = total + jax.vmap(noise)(state.row_keys, state.lengths)
    count = min(max(2, 1 + static.eos_count), vocab_size) * beams
    _, index = best_of(order.reshape(-1, beams * vocab_size), count)
    parents = index // vocab_size + beams * jnp.arange(len(index))[:, None]
    picked = index % vocab_size

    def at(table: Float[Array, "R V"]) -> Float[Array, "B K"]:
        return table[parents, picked]

    flat, token = parents.reshape(-1), picked.reshape(-1)
    hits = meets = jnp.zeros(flat.shape, bool)
    lengths = state.lengths[flat] + 1
    if state.matched is not None and traced.stop_strings is not None:
        _, hits = traced.stop_strings.advance(state.matched[flat], token)
    if traced.criteria:
        tokens = state.tokens[flat].at[jnp.arange(len(flat)), lengths - 1].set(token, mode="drop")
        meets = meets_any(traced.criteria, tokens, lengths, scores[flat])
    before = None if state.constrained is None else state.constrained[flat]
    _, completes = constrain(traced, before, state.prompts[flat], token, jnp.ones_like(hits))
    status = status_after(
        is_eos=(token[:, None] == traced.eos_ids).any(axis=1),
        hits_stop_string=hits,
        meets_criterion=meets,
        reaches_limit=lengths >= state.max_lengths[flat],
        completes=completes,
    )
    return Candidates(at(total), parents, picked, at(scores), at(log_probs), status.reshape(index.shape))


def merged(finished: Finished, candidates: Candidates, rows: Rows, traced: TracedOptions) -> Finished:
    """The best of what had ended and of what ends now: of the candidates only the first `num_beams` may."""
    prompts, count = candidates.scores.shape
    beams = len(finished.scores) // prompts
    new_tokens = (rows.new_tokens + 1)[::beams, None].astype(jnp.float32)
    counts = (candidates.status != RUNNING) & (jnp.arange(count) < beams)
    scores = candidates.scores / new_tokens**traced.length_penalty + jnp.where(counts, 0.0, WORSE)
    ends = Finished(
        scores=scores,
        done=counts,
        lengths=jnp.repeat(rows.lengths[::beams, None] + 1, count, axis=1),
        parents=candidates.parents,
        picked=candidates.picked,
        logprobs=candidates.logprobs,
        model_logprobs=candidates.model_logprobs,
        # What does not end is only here if there is too little else: then it is as empty as `Finished.none`.
        reasons=jnp.where(counts, candidates.status, jnp.int8(LENGTH)),
    )
    ends = dataclasses.replace(ends, lengths=jnp.where(counts, ends.lengths, rows.prompt_lengths[::beams, None]))

    def joined(old: Array, new: Array) -> Array:
        return jnp.concatenate([old.reshape(prompts, beams), new], axis=1)

    both = jax.tree.map(joined, finished, ends)
    _, best = jax.lax.top_k(both.scores, beams)
    return jax.tree.map(lambda x: jnp.take_along_axis(x, best, axis=1).reshape(-1), both)


def _take(candidates: Candidates, beams: int) -> Candidates:
    """The best candidates, best first."""
    _, best = jax.lax.top_k(candidates.scores, beams)
    return Candidates(*(jnp.take_along_axis(x, best, axis=1) for x in candidates))


def _is_finite(
    candidates: Candidates, scores: Float[Array, "R V"], log_probs: Float[Array, "R V"], static: StaticOptions
) -> Bool[Array, " B"]:
    """Which prompts met no NaN and no +inf, and have something to choose from."""
    largest = scores.max(axis=1)
    valid = ~jnp.isnan(largest) & (largest < jnp.inf)
    if not static.allow_invalid:
        valid &= ~jnp.isnan(log_probs.max(axis=1))
    return valid.reshape(-1, static.num_beams).all(axis=1) & jnp.isfinite(candidates.scores[:, 0])


def _is_over(
    best: Float[Array, " B"],
    finished: Finished,
    ends: Bool[Array, "B K"],
    rows: Rows,
    traced: TracedOptions,
    static: StaticOptions,
) -> Bool[Array, " B"]:
    """Which searches end: nothing better is to be expected, enough has ended, or nothing can go on.

    `best` is the score of the best beam that goes on.
    """
    beams, penalty = static.num_beams, traced.length_penalty
    length = (rows.new_tokens + 1)[::beams]
    if static.early_stopping == "never":
        longest = (rows.max_lengths - rows.prompt_lengths)[::beams]
        length = jnp.where(penalty > 0, longest, length)
    possible = best / length.astype(jnp.float32) ** penalty
    done = finished.done.reshape(-1, beams)
    worst = jnp.where(done, finished.scores.reshape(-1, beams)[:, -1:], WORSE)
    over = ~(possible[:, None] > worst).any(axis=1) | ends.all(axis=1)
    return over | done.all(axis=1) if static.early_stopping is True else over


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """`num_beams` rows per prompt, of which the best sequences are returned. A `Search`."""

    num_beams: int
    append_only = False
    prefill, decode = staticmethod(prefill), staticmethod(decode)

    def check(self, model: Any, config: GenerationConfig, extras: Extras) -> None:
        """Raise for what needs rows that keep what they were given."""
        if has_grammar(extras.constraint):
            raise UnsupportedError(
                "constraint: a grammar with num_beams: the host reads one text per row, and beams change theirs; use "
                "num_beams=1, or a constraint that is regular"
            )
        if config.output_attentions or config.output_hidden_states:
            raise UnsupportedError(
                "output_attentions and output_hidden_states with num_beams: beams that were given up cannot be read "
                "again"
            )

    def rows_per_prompt(self, config: GenerationConfig) -> int:
        """One for each beam."""
        return self.num_beams

    def collect(
        self, state: BeamState, prompts: int, returned: int, traced: TracedOptions, layout: BatchLayout, details: bool
    ) -> Found:
        """The best sequences of each prompt; what was recorded per step is of the rows, as in HF."""
        best = best_sequences(state, prompts, layout.samples, returned, float(traced.length_penalty))
        if not details:
            return Found(best.tokens, best.lengths, best.status)
        rows = prompts * layout.samples
        steps = int(jax.device_get(state.lengths - state.prompt_lengths)[:rows].max())
        recorded = state.step_outputs.on_host(rows, steps)
        column = np.arange(best.tokens.shape[1])
        for name in {"top_logprobs", "top_ids"} & recorded.keys():  # per token: those of the row that gave it
            found = recorded[name][best.beam_indices, column]
            recorded[name] = np.where((column < best.lengths[:, None])[..., None], found, np.zeros_like(found))
        recorded |= {"sequences_scores": best.scores, "beam_indices": best.beam_indices}
        return Found(best.tokens, best.lengths, best.status, best.logprobs, best.model_logprobs, recorded)
