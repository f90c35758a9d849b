"""The two computations of generation: `prefill` reads the prompts, `decode` is one while_loop of `decode_step`.

Both are pure functions of a model, arrays and a static recipe. Everything the loop carries is one `DecodeState`.
"""

import dataclasses
from typing import Protocol, no_type_check, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from jaxgen.cache import KVCache
from jaxgen.generation.logits import Controls, Count, Recipe, process
from jaxgen.generation.sample import draw, row_keys


@runtime_checkable
class CausalLM(Protocol):
    """What the loop needs of a model."""

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], slots: int
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Logits after each row's last token, and the cache."""
        ...

    def step(
        self, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Logits after one more token per row, and the cache that holds it."""
        ...


@jax.tree_util.register_dataclass
@no_type_check  # JAX rebuilds it around placeholders
@dataclasses.dataclass
class Prompts:
    """A batch of prompts as the device reads them: right-padded, possibly with idle rows that fill up a bucket."""

    tokens: Int[Array | np.ndarray, "B T"]
    lengths: Int[Array | np.ndarray, " B"]  # real tokens per row, at least 1
    row_ids: UInt32[Array | np.ndarray, "B 2"]  # two words per row, see `sample.row_id_words`
    idle: Bool[Array | np.ndarray, " B"]  # nobody asked for this row


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in a generation, besides the shapes of its arrays."""

    recipe: Recipe
    samples: int  # rows per prompt
    total: int  # the largest length of a row, prompt and new tokens
    slots: int  # cache slots per row


@jax.tree_util.register_dataclass
@no_type_check  # JAX rebuilds it around placeholders
@dataclasses.dataclass
class DecodeState:
    """All that generation knows between two tokens. R rows, S the largest total length, V vocabulary."""

    tokens: Int[Array, "R S"]  # slot p holds the row's token p: the packed prompt, then the new tokens
    lengths: Int[Array, " R"]  # tokens the row holds; the position of the next one
    prompt_lengths: Int[Array, " R"]  # how many of them came with the prompt
    done: Bool[Array, " R"]  # the row has ended (end-of-sequence, length, or broken)
    broken: Bool[Array, " R"]  # the row's logits were not finite; it stopped before drawing from them
    logprobs: Float[Array, "R S"]  # of the token in each slot, under the distribution it was drawn from
    model_logprobs: Float[Array, "R S"]  # the same under the model's own distribution, before any processor
    row_keys: Key[Array, " R"]  # never advanced: a draw folds in its position
    steps: Int[Array, ""]  # tokens drawn so far in the rows that are still running
    cache: KVCache  # keys and values of tokens 0 .. lengths - 2; the newest token has not been read yet


def prefill(model: CausalLM, prompts: Prompts, key: Key[Array, ""], controls: Controls, plan: Plan) -> DecodeState:
    """Read the prompts once, spread each over `plan.samples` rows, and draw every row's first token."""
    tokens, lengths = jnp.asarray(prompts.tokens), jnp.asarray(prompts.lengths)
    logits, cache = model.prefill(tokens, lengths, plan.slots)

    def spread(x: Array) -> Array:
        return jnp.repeat(x, plan.samples, axis=0) if plan.samples > 1 else x

    rows = tokens.shape[0] * plan.samples
    lengths = spread(lengths)
    state = DecodeState(
        tokens=jnp.pad(spread(tokens), ((0, 0), (0, plan.total - tokens.shape[1]))),
        lengths=lengths,
        prompt_lengths=lengths,
        done=spread(jnp.asarray(prompts.idle)),
        broken=jnp.zeros(rows, bool),
        logprobs=jnp.zeros((rows, plan.total), jnp.float32),
        model_logprobs=jnp.zeros((rows, plan.total), jnp.float32),
        row_keys=row_keys(key, jnp.asarray(prompts.row_ids), plan.samples),
        steps=jnp.zeros((), jnp.int32),
        cache=jax.tree.map(spread, cache),
    )
    return append_token(state, spread(logits), controls, plan.recipe)


def decode(model: CausalLM, state: DecodeState, until: Count, controls: Controls, recipe: Recipe) -> DecodeState:
    """Decode until every row is done, or `until` tokens have been drawn; calling again goes on from there."""

    def unfinished(state: DecodeState) -> Bool[Array, ""]:
        some_row_runs = ~state.done.all()
        caller_wants_more = state.steps < until
        return some_row_runs & caller_wants_more

    return jax.lax.while_loop(unfinished, lambda state: decode_step(model, state, controls, recipe), state)


def decode_step(model: CausalLM, state: DecodeState, controls: Controls, recipe: Recipe) -> DecodeState:
    """Read each row's newest token and draw the next one.

    Rows that are done read their last token again: it lands in the slot that already holds it.
    """
    newest = state.lengths - 1
    tokens = jnp.take_along_axis(state.tokens, newest[:, None], axis=1)[:, 0]
    logits, cache = model.step(tokens, newest, state.cache)
    return append_token(dataclasses.replace(state, cache=cache), logits, controls, recipe)


def append_token(state: DecodeState, logits: Float[Array, "R V"], controls: Controls, recipe: Recipe) -> DecodeState:
    """Choose each running row's next token from its logits, write it down, and see who is done."""
    with jax.named_scope("sample"):
        new_tokens = state.lengths - state.prompt_lengths
        seen = seen_tokens(state, logits.shape[1]) if recipe.repetition_penalty else None
        scores = process(logits, seen, new_tokens, controls, recipe)
        chosen = draw(scores, state.row_keys, state.lengths) if recipe.do_sample else greedy(scores)

    with jax.named_scope("record"):
        logprobs, model_logprobs = log_prob(scores, chosen), log_prob(logits, chosen)
        # One NaN or +inf anywhere in a row, or nothing left to choose from, shows here.
        broken = ~state.done & ~(jnp.isfinite(logprobs) & jnp.isfinite(model_logprobs))
        runs = ~(state.done | broken)
        rows = jnp.arange(chosen.shape[0])
        slot = jnp.where(runs, state.lengths, state.tokens.shape[1])  # past the end: dropped

        def put(table: Array, value: Array) -> Array:
            return table.at[rows, slot].set(value, mode="drop", unique_indices=True, indices_are_sorted=True)

        ends = (chosen[:, None] == controls.eos_ids).any(axis=1) | (new_tokens + 1 >= controls.max_new_tokens)
        return dataclasses.replace(
            state,
            tokens=put(state.tokens, chosen),
            lengths=state.lengths + runs.astype(jnp.int32),
            done=~runs | ends,
            broken=state.broken | broken,
            logprobs=put(state.logprobs, logprobs),
            model_logprobs=put(state.model_logprobs, model_logprobs),
            steps=state.steps + 1,
        )


def greedy(scores: Float[Array, "R V"]) -> Int[Array, " R"]:
    """The most likely token; the first one of a tie, as in HF."""
    return jnp.argmax(scores, axis=1).astype(jnp.int32)


def log_prob(scores: Float[Array, "R V"], chosen: Int[Array, " R"]) -> Float[Array, " R"]:
    """log softmax(scores) at the chosen token."""
    return jnp.take_along_axis(scores, chosen[:, None], axis=1)[:, 0] - jax.nn.logsumexp(scores, axis=1)


def seen_tokens(state: DecodeState, vocab_size: int) -> Bool[Array, "R V"]:
    """Which tokens each row holds, prompt included."""
    rows = jnp.arange(state.tokens.shape[0])[:, None]
    real = jnp.arange(state.tokens.shape[1]) < state.lengths[:, None]
    return jnp.zeros((state.tokens.shape[0], vocab_size), bool).at[rows, state.tokens].max(real)
