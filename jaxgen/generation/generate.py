"""Read this file to understand jaxgen: a prompt's way through `model.generate`.

    ids and options -> checks -> packed, bucketed prompt -> prefill -> decode loop -> HF's layout

The host side is numpy; the device runs two executables, `prefill` and `decode`, compiled once per bucket.
`generate` is the same path as a pure function, for use inside a caller's own jit.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgen.errors import JaxgenError
from jaxgen.generation import loop
from jaxgen.generation.compiled import Stage
from jaxgen.generation.config import GenerationConfig, resolve
from jaxgen.generation.limits import check_memory, new_token_budget
from jaxgen.generation.logits import Controls, Recipe
from jaxgen.generation.output import GenerateOutput, collect
from jaxgen.generation.prompt import (
    SMALLEST_PROMPT,
    SMALLEST_TOTAL,
    bucket,
    generated,
    pack,
    pad_to,
    read_prompt,
)
from jaxgen.generation.sample import random_key, row_id_words

if TYPE_CHECKING:
    from jaxgen.model import MistralForCausalLM


class GenerationMixin:
    """`generate` and `warmup` for a causal language model."""

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        generation_config: Any = None,
        key: Any = None,
        seed: int | None = None,
        row_ids: Any = None,
        **options: Any,
    ) -> "np.ndarray | GenerateOutput":
        """Generate text ids as transformers' `generate` does: same names, same defaults, same layout.

        `input_ids` [B, T] are lists, numpy or jax arrays; `attention_mask` [B, T] is 1 on real tokens, in any
        arrangement (None: all are real). `options` are fields of `GenerationConfig` and win over
        `generation_config`, which wins over the checkpoint's own. Sampling takes its randomness from `key` (a
        jax.random key) or `seed` (any int); with neither, from a fresh seed. `row_ids` (ints or strings) name the
        rows: a row's draws depend on its id, its position and the key, and on nothing else.

        Returns int32 ids [B * num_return_sequences, T + new]: the input's columns, the new tokens, then pad.
        With `return_dict_in_generate=True` returns a `GenerateOutput`. Raises `JaxgenError` for bad input before
        anything is compiled, and `NonFiniteLogitsError` if the model produces NaN.

        >>> model, tokenizer = getfixture("demo")
        >>> inputs = tokenizer(["A list of colors: red, blue"], return_tensors="np")
        >>> tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0]
        'A list of colors: red, blue, green, yellow, orange, purple, pink,'
        """
        config = resolve(options, generation_config, self.generation_config)
        call = _Call.prepare(self, input_ids, attention_mask, config, key, seed, row_ids)
        return collect(call.run(), call.input_ids, call.config, call.seed)

    def warmup(self, batch: int, prompt_length: int, max_new_tokens: int, **options: Any) -> None:
        """Compile what a `generate` call of this size needs, so that the first real one is already fast.

        `options` are those of the later call: which processors run decides what is compiled.

        >>> model, _ = getfixture("demo")
        >>> model.warmup(batch=1, prompt_length=10, max_new_tokens=20)
        """
        config = resolve(options | {"max_new_tokens": max_new_tokens}, None, self.generation_config)
        prompt = np.zeros((batch, prompt_length), np.int32)
        state = _Call.prepare(self, prompt, None, config, None, 0, None).run(until=1)
        jax.block_until_ready(state.lengths)

    @property
    def generation_config(self) -> GenerationConfig:
        """The checkpoint's own generation defaults; assign a `GenerationConfig` to change them."""
        box = getattr(self, "_generation_defaults", None)
        return box.config if box else GenerationConfig()

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self._generation_defaults = _Untracked(config)


@dataclasses.dataclass
class _Call:
    """One call of `generate`, checked and laid out in numpy: everything the two executables need."""

    model: "MistralForCausalLM"
    input_ids: Int[np.ndarray, "B T"]
    config: GenerationConfig
    seed: int | None
    prompt: tuple[Any, ...]  # tokens, lengths, row_ids, idle: bucketed
    key: Any
    controls: Controls
    shape: "_Shape"

    @classmethod
    def prepare(cls, model: Any, input_ids: Any, attention_mask: Any, config: GenerationConfig,
                key: Any, seed: Any, row_ids: Any) -> "_Call":  # fmt: skip
        """Check everything that can be checked on the host, then pack and bucket."""
        if isinstance(input_ids, jax.core.Tracer) or isinstance(attention_mask, jax.core.Tracer):
            raise JaxgenError("model.generate runs on the host; inside jit or vmap use jaxgen.generate(model, ...)")
        ids, mask = read_prompt(input_ids, attention_mask, model.config.vocab_size)
        check_eos(config, model.config.vocab_size)
        words = row_id_words(row_ids, len(ids))
        random, seed = random_key(key, seed)
        tokens, lengths = pack(ids, mask)
        longest, samples = int(lengths.max()), config.num_return_sequences or 1
        budget = new_token_budget(config, ids.shape[1], longest, model.config.max_position_embeddings)

        rows, length = bucket(len(ids)), bucket(longest, SMALLEST_PROMPT)
        total = bucket(length + budget, SMALLEST_TOTAL)
        check_memory(model.config, model.dtype.itemsize, rows * samples, length, total, model.device)
        prompt = (
            pad_to(tokens[:, :longest], (rows, length)),
            pad_to(lengths, (rows,), fill=1),
            pad_to(words, (rows, 2)),
            np.arange(rows) >= len(ids),
        )
        shape = _Shape(Recipe.of(config), total, model.config.cache_slots(total), samples)
        return cls(model, ids, config, seed, prompt, random, controls_of(config, budget), shape)

    def run(self, until: int | None = None) -> loop.DecodeState:
        """Dispatch prefill and decode; `until` stops after that many new tokens."""
        structure, weights = nnx.split(self.model)
        state = _prefill(structure, weights, self.prompt, self.key, self.controls, self.shape)
        stop = self.controls.max_new_tokens if until is None else np.array(until, np.int32)
        return _decode(structure, weights, state, stop, self.controls, self.shape.recipe)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What is static in a prefill, besides the shapes of its arguments."""

    recipe: Recipe
    total: int
    slots: int
    samples: int


class _Untracked:
    """Holds a value that NNX should not see: all boxes are equal, so changing the value never recompiles."""

    def __init__(self, config: GenerationConfig):
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Untracked)

    def __hash__(self) -> int:
        return hash(_Untracked)


def _run_prefill(structure: Any, weights: Any, prompt: Any, key: Any, controls: Controls, shape: _Shape):
    model = nnx.merge(structure, weights)
    return loop.prefill(model, *prompt, key, controls, shape.recipe, shape.total, shape.slots, shape.samples)


def _run_decode(structure: Any, weights: Any, state: loop.DecodeState, until: Any, controls: Controls, recipe: Recipe):
    return loop.decode(nnx.merge(structure, weights), state, until, controls, recipe)


# Weights are arguments, never constants; the state is donated, so the cache is updated in place.
_prefill = Stage(
    _run_prefill,
    lambda _, weights, prompt, *rest: f"prefill[B={prompt[0].shape[0]}, T={prompt[0].shape[1]}, S={rest[-1].total}]",
    static_argnums=(0, 5),
)
_decode = Stage(
    _run_decode,
    lambda _, weights, state, *rest: f"decode[B={state.tokens.shape[0]}, S={state.tokens.shape[1]}]",
    static_argnums=(0, 5),
    donate_argnums=2,
)


def controls_of(config: GenerationConfig, max_new_tokens: int) -> Controls:
    """The traced numbers of an effective configuration, as numpy scalars (0-d arrays); unset ones are neutral."""
    eos = config.eos_token_ids
    return Controls(
        temperature=np.array(config.temperature or 1.0, np.float32),
        top_k=np.array(config.top_k or 0, np.int32),
        top_p=np.array(1.0 if config.top_p is None else config.top_p, np.float32),
        min_p=np.array(config.min_p or 0.0, np.float32),
        repetition_penalty=np.array(config.repetition_penalty or 1.0, np.float32),
        min_new_tokens=np.array(config.min_new_tokens or 0, np.int32),
        max_new_tokens=np.array(max_new_tokens, np.int32),
        eos_ids=pad_to(np.array(eos, np.int32), (bucket(len(eos), 4),), fill=-1),
    )


def check_eos(config: GenerationConfig, vocab_size: int) -> None:
    """Raise `JaxgenError` for an end-of-sequence id that the model can never produce."""
    for token in config.eos_token_ids:
        if token >= vocab_size:
            raise JaxgenError(f"eos_token_id={token} is outside the model's vocabulary of {vocab_size} tokens")


def generate(
    model: Any,
    input_ids: Int[Array | np.ndarray, "B T"],
    attention_mask: "Int[Array | np.ndarray, 'B T'] | None" = None,
    key: Any = None,
    config: GenerationConfig | None = None,
    row_ids: Any = None,
) -> "Int[Array, 'R total'] | dict[str, Array]":
    """Generate as a pure function: no buckets, no checks of values, usable inside jit and under vmap over keys.

    As `model.generate`, with arrays in and arrays out: ids [B * num_return_sequences, T + max_new_tokens], always
    full width. With `return_dict_in_generate` a dict with `sequences`, `logprobs` and `model_logprobs` [R, N],
    `lengths` [R] (new tokens per row) and `broken` [R] (the row met NaN logits). `key` is needed for sampling;
    `row_ids` are as in `model.generate`, and static. Raises `JaxgenError` for a bad configuration.

    >>> model, _ = getfixture("demo")
    >>> config = GenerationConfig(max_new_tokens=4, do_sample=True)
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> jax.vmap(lambda key: generate(model, jnp.array([[1, 5]]), None, key, config))(keys).shape
    (3, 1, 6)
    """
    effective = resolve({}, config, model.generation_config)
    check_eos(effective, model.config.vocab_size)
    if effective.do_sample and key is None:
        raise JaxgenError("do_sample=True needs key=: jax.random.key(seed)")
    (batch, width), samples = input_ids.shape, effective.num_return_sequences or 1
    budget = new_token_budget(effective, width, width, model.config.max_position_embeddings)
    random, _ = random_key(key, 0 if key is None else None)
    ids = jnp.asarray(input_ids)
    real = jnp.ones(ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask) != 0
    tokens, lengths = pack(ids, real, jnp)
    recipe, total = Recipe.of(effective), width + budget
    controls = jax.tree.map(jnp.asarray, controls_of(effective, budget))
    state = loop.prefill(
        model, tokens, lengths, jnp.asarray(row_id_words(row_ids, batch)), jnp.zeros(batch, bool), random,
        controls, recipe, total, model.config.cache_slots(total), samples,
    )  # fmt: skip
    state = loop.decode(model, state, controls.max_new_tokens, controls, recipe)

    def new(table: Float[Array, "R S"] | Int[Array, "R S"], fill: float) -> Array:
        return generated(table, state.prompt_lengths, state.lengths, budget, fill, jnp)

    eos = effective.eos_token_ids
    pad = effective.pad_token_id if effective.pad_token_id is not None else eos[0] if eos else 0
    prompt = jnp.repeat(ids.astype(jnp.int32), samples, axis=0)
    sequences = jnp.concatenate([prompt, new(state.tokens, pad)], axis=1)
    if not effective.return_dict_in_generate:
        return sequences
    return {
        "sequences": sequences,
        "logprobs": new(state.logprobs, 0.0),
        "model_logprobs": new(state.model_logprobs, 0.0),
        "lengths": state.lengths - state.prompt_lengths,
        "broken": state.broken,
    }
