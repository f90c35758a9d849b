"""How likely the tokens of a text are, all at once: pure, and differentiable in the model's weights.

    model_logprobs[t] = log softmax(z_t)[x_t]       z_t: the model's logits given x_0 .. x_(t-1)
    logprobs[t]       = log softmax(f_t(z_t))[x_t]  f_t: the processors of a configuration, in HF's order

`f_t` is what `generate` does to logits before it draws: with `do_sample=True` among others z / temperature, and
-inf for what top_k and top_p remove. So `logprobs` are those under which a token was drawn, which importance ratios
need, and -inf for one that could not be. With no processors both are the same. Where a constraint is and what it then
allows follows from the tokens: it is read along the row, and a token that must not come is as if it had not.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.generation.choosing.constrained import has_grammar
from jaxgen.generation.loop import log_prob
from jaxgen.generation.options.config import GenerationConfig, resolve
from jaxgen.generation.options.table import DEFAULT_NEW_TOKENS, Extras
from jaxgen.generation.processors.constraint import AllowedTokens
from jaxgen.generation.processors.processor import Processor
from jaxgen.generation.processors.regular import automata_of, where
from jaxgen.generation.programs.inputs import traced_options
from jaxgen.generation.prompts.contexts import contexts_in
from jaxgen.generation.prompts.layout import arrays_inside_jit, pack
from jaxgen.generation.prompts.rows import Rows
from jaxgen.lowering import own_rules
from jaxgen.pytree import pytree

# Logits are computed for so many columns at a time, at most: B*BLOCK*V floats, and not B*T*V.
_BLOCK = 64
_TAKEN = ("logits_processor", "prefix_allowed_tokens_fn", "constraint", "tokenizer")


@own_rules()
def logprobs(
    model: Any,
    input_ids: Int[Array | np.ndarray, "B T"],
    attention_mask: "Int[Array | np.ndarray, 'B T'] | Bool[Array | np.ndarray, 'B T'] | None" = None,
    config: GenerationConfig | None = None,
    prompt_lengths: "Int[Array | np.ndarray, ' B'] | int | None" = None,
    **extras: object,
) -> Float[Array, "B T"]:
    """The log-probability of each id given the real ones before it, as a pure function: for `jit`, `grad` and `vmap`.

    `attention_mask` is 1 on real ids, in any arrangement. Without `config` they are the model's own; with one those
    under which `jaxgen.generate` with that config draws a token (the formulas: `jaxgen.generation.results.logprobs`),
    -inf for one that its filters remove. `prompt_lengths` are the real ids of each row's prompt, by default 1; the
    result, float32, is 0 for these and for masked ids. `extras` are `logits_processor`, `prefix_allowed_tokens_fn`
    (a `jaxgen.AllowedTokens`), and `constraint` with its `tokenizer`: one, or a list of one per prompt or row. Logits
    are kept for 64 columns at a time, under `grad` too. Raises `JaxgenError` for a bad configuration and
    for shapes and dtypes that do not agree, and `UnsupportedError` for beams, guidance, drafts and what needs the host.

    >>> model, _ = getfixture("demo")
    >>> ids = jnp.array([[1, 5, 9]])
    >>> own = jax.nn.log_softmax(model(ids).logits)[0, jnp.array([0, 1]), ids[0, 1:]]
    >>> bool(jnp.allclose(logprobs(model, ids)[0, 1:], own, atol=1e-5))
    True
    """
    given, unknown = Extras.take(extras)
    if unknown:
        raise JaxgenError(f"{next(iter(unknown))!r} is no argument of jaxgen.logprobs; options belong in config=")
    for name, value in vars(given).items():
        grammar = name == "constraint" and has_grammar(value)
        if value is not None and (name not in _TAKEN or grammar):
            hint = "use jaxgen.score_tokens" if grammar or name == "strict" else "it changes no logits; leave it out"
            what = "constraint: a grammar, which the host reads" if grammar else name
            raise UnsupportedError(f"{what}: not in the pure function jaxgen.logprobs; {hint}")
    ids, mask = arrays_inside_jit(input_ids, attention_mask)
    tokens, lengths = pack(ids, mask, jnp)
    starts = _starts(1 if prompt_lengths is None else prompt_lengths, len(ids))
    drawn = None
    if config is not None or extras:
        effective = resolve({}, config, model.generation_config)
        given = of_rows(given, len(ids), effective)
        drawn = drawn_by(effective, given, model.config, starts, lengths)
    packed = packed_logprobs(model, tokens, lengths, drawn).logprobs
    positions = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    chosen = jnp.take_along_axis(packed, jnp.maximum(positions, 0), axis=1)
    return jnp.where(mask & (positions >= starts[:, None]), chosen, 0)


def _starts(prompt_lengths: Any, rows: int) -> Int[Array, " B"]:
    """How many tokens each row's prompt has; shape and dtype are known inside jit too."""
    given = prompt_lengths if hasattr(prompt_lengths, "dtype") else np.asarray(prompt_lengths)
    if given.shape not in ((), (rows,)) or not jnp.issubdtype(given.dtype, jnp.integer):
        raise JaxgenError(
            f"prompt_lengths has shape {given.shape} and dtype {given.dtype}; expected an int, or one per row: {rows}"
        )
    return jnp.broadcast_to(jnp.asarray(given, jnp.int32), (rows,))


@pytree
@dataclasses.dataclass
class Drawn:
    """How the tokens of rows were drawn: all that processors may know, but the tokens themselves."""

    processors: tuple[Processor, ...]
    prompt_lengths: Int[Array | np.ndarray, " B"]
    max_lengths: Int[Array | np.ndarray, " B"]  # as in `Rows`
    bits: Int[Array | np.ndarray, "B T W"] | None = None  # of grammars: as in `Constrained`, for each slot

    def states(self, tokens: Int[Array, "B T"]) -> Int[Array, "B T"] | None:
        """Where each row was in its constraint when the token in each slot was drawn."""
        automata = automata_of(self.processors)
        return None if automata is None else automata.along(tokens, jnp.asarray(self.prompt_lengths))

    def processors_after(self, start: Array, count: int) -> tuple[Processor, ...]:
        """What the logits before some slots of all rows went through; as `rows`."""
        return self.processors if self.bits is None else where(self.processors, _slots(self.bits, start, count))

    def rows(
        self,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        states: Int[Array, "B T"] | None,
        start: Array,
        count: int,
    ) -> Rows:
        """Every row `count` times: as it was when the tokens after `start`, `start + 1`, ... were drawn."""

        def each(x: Any) -> Array:
            return jnp.repeat(jnp.asarray(x), count, axis=0)

        held = jnp.tile(start + 1 + jnp.arange(count), len(tokens))
        begun, ends = each(self.prompt_lengths), each(lengths)
        return Rows(
            tokens=each(tokens),
            lengths=held,
            prompt_lengths=begun,
            max_lengths=each(self.max_lengths),
            prompts=each(jnp.arange(len(tokens))),
            running=(held >= begun) & (held < ends),
            constrained=None if states is None else _slots(states, start, count),
        )


def _slots(table: Any, start: Array, count: int) -> Array:
    """The entries `[B * count, ...]` of a table `[B, T, ...]` for the slots after `start`, `start + 1`, ..."""
    slots = jnp.minimum(start + 1 + jnp.arange(count), table.shape[1] - 1)
    return jnp.take(jnp.asarray(table), slots, axis=1).reshape(-1, *table.shape[2:])


def drawn_by(config: GenerationConfig, extras: Extras, model_config: Any, prompt_lengths: Any, lengths: Any) -> Drawn:
    """What `generate` with an effective configuration would draw these rows from; raises as `logprobs`."""
    check_scorable(config, extras)
    config = copy.copy(config)
    config.update(stop_strings=None)  # what ends a row changes no logits
    extras = dataclasses.replace(extras, stopping_criteria=None)
    traced = traced_options(config, model_config.vocab_size, extras, lengths.shape[0])
    return Drawn(traced.processors, prompt_lengths, max_lengths_of(config, model_config, prompt_lengths, lengths))


def of_rows(extras: Extras, rows: int, config: GenerationConfig) -> Extras:
    """With one constraint per row, where a list has one per prompt, and each prompt as many rows as are returned."""
    given = extras.constraint
    if not isinstance(given, list | tuple):
        return extras
    times = config.sequences_per_prompt if len(given) * config.sequences_per_prompt == rows else 1
    return dataclasses.replace(extras, constraint=[each for each in given for _ in range(times)])


def max_lengths_of(config: GenerationConfig, model_config: Any, prompt_lengths: Any, lengths: Any) -> Any:
    """The length at which a configuration ends each row, as `row_limits` has it; where a row is longer, its own."""
    xp: Any = np if isinstance(lengths, np.ndarray) else jnp
    if config.max_new_tokens is not None:
        ends = prompt_lengths + config.max_new_tokens
    elif config.max_length is not None:
        ends = config.max_length
    else:
        ends = xp.minimum(prompt_lengths + DEFAULT_NEW_TOKENS, contexts_in(xp, model_config, prompt_lengths))
    return xp.maximum(lengths, ends).astype(np.int32)


def check_scorable(config: GenerationConfig, extras: Extras) -> None:
    """Raise for options under which a token's probability does not follow from its row alone."""
    refused = {
        "num_beams": config.beams > 1,
        "guidance_scale": config.is_guided,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens,
        "assistant_model": extras.assistant_model,
        "past_key_values": extras.past_key_values,
        "negative_prompt_ids": extras.negative_prompt_ids,
        "prefix_allowed_tokens_fn": extras.prefix_allowed_tokens_fn is not None
        and not isinstance(extras.prefix_allowed_tokens_fn, AllowedTokens),
    }
    for name, given in refused.items():
        if given is not None and given is not False and given != 0:
            hint = "; pass a jaxgen.AllowedTokens" if name == "prefix_allowed_tokens_fn" else ""
            raise UnsupportedError(f"{name}: tokens that were chosen with it cannot be scored; leave it out{hint}")


class Packed(NamedTuple):
    """What is known of the token in each slot of packed rows [B, T]; 0 in the first and after the end.

    Arrays of JAX, or of numpy once they are on the host.
    """

    logprobs: Any  # float32, under what a configuration draws from
    model_logprobs: Any  # float32, the model's own
    greedy: Any  # bool, whether it is the model's own first choice


def packed_logprobs(model: Any, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], drawn: Drawn | None) -> Packed:
    """What a model thinks of packed rows. It reads all columns but the last, which no token follows."""
    if tokens.shape[1] == 1:
        nothing = jnp.zeros(tokens.shape, jnp.float32)
        return Packed(nothing, nothing, nothing != 0)
    states = None if drawn is None else drawn.states(tokens)

    def found(logits: Float[Array, "n V"], chosen: Int[Array, " n"], start: Array, count: int) -> tuple[Array, ...]:
        own = after = log_prob(logits, chosen)
        if drawn is not None and drawn.processors:
            rows, scores = drawn.rows(tokens, lengths, states, start, count), logits
            for processor in drawn.processors_after(start, count):
                scores = processor(scores, rows)
            after = log_prob(scores, chosen)
        return after, own, logits.argmax(axis=1) == chosen

    return Packed(*of_tokens(model, tokens, lengths, found))


def of_tokens(
    model: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    found: Callable[[Array, Array, Array, int], tuple[Array, ...]],
) -> tuple[Array, ...]:
    """What `found(logits [n, V], tokens [n], start, count)` gives of tokens and the logits before them, `[B, T, ...]`.

    It is asked for the tokens after the columns `start` to `start + count` of all rows, row-major: n = B * count. T is
    at least 2. What has no token is 0: each row's first one, and what is behind its end.
    """
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    columns = tokens.shape[1] - 1
    size = min(_BLOCK, columns)
    spare = -columns % size
    hidden = jnp.pad(model.hidden(tokens[:, :-1], real[:, :-1]), ((0, 0), (0, spare), (0, 0)))
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, spare)))

    @jax.checkpoint  # gradients compute a block's logits again, and keep none
    def block(start: Array) -> tuple[Array, ...]:
        logits = model.logits(jax.lax.dynamic_slice_in_dim(hidden, start, size, axis=1))
        chosen = jax.lax.dynamic_slice_in_dim(following, start, size, axis=1)
        tables = found(logits.reshape(-1, logits.shape[2]), chosen.reshape(-1), start, size)
        return tuple(x.reshape(*chosen.shape, *x.shape[1:]) for x in tables)

    def in_slots(blocks: Array) -> Array:
        rows = jnp.moveaxis(blocks, 0, 1).reshape(len(tokens), -1, *blocks.shape[3:])[:, :columns]
        rows = jnp.pad(rows, ((0, 0), (1, 0)) + ((0, 0),) * (rows.ndim - 2))
        return jnp.where(real.reshape(*real.shape, *(1,) * (rows.ndim - 2)), rows, jnp.zeros((), rows.dtype))

    return tuple(map(in_slots, jax.lax.map(block, jnp.arange(0, hidden.shape[1], size))))
