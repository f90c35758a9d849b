"""Read this file to understand jaxgen: a prompt's way through `model.generate`.

    ids and options -> checks -> packed, bucketed prompt -> prefill -> decode loop -> HF's layout

The host side is numpy; the device runs two executables, `prefill` and `decode`, compiled once per bucket.
`generate` is the same path as a pure function, for use inside a caller's own jit.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgen.errors import JaxgenError
from jaxgen.generation import loop
from jaxgen.generation.compiled import Run
from jaxgen.generation.config import GenerationConfig, resolve
from jaxgen.generation.limits import new_token_budget
from jaxgen.generation.logits import Recipe
from jaxgen.generation.output import collect
from jaxgen.generation.prompt import generated, pack
from jaxgen.generation.request import Request, check_eos, controls_of
from jaxgen.generation.sample import random_key, row_id_words
from jaxgen.generation.weights import Untracked


class GenerationMixin:
    """`generate` and `warmup` for a causal language model."""

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        generation_config: Any = None,
        key: Any = None,
        seed: Any = None,
        row_ids: Any = None,
        **options: Any,
    ) -> Any:
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
        request = Request.read(self, input_ids, attention_mask, config, key, seed, row_ids)
        state = Run(self, request).advance()
        return collect(state, request)

    def warmup(self, batch: int, prompt_length: int, max_new_tokens: int, **options: Any) -> None:
        """Compile what a `generate` call of this size needs, so that the first real one is already fast.

        `options` are those of the later call: which processors run decides what is compiled.

        >>> model, _ = getfixture("demo")
        >>> model.warmup(batch=1, prompt_length=10, max_new_tokens=20)
        """
        config = resolve(options | {"max_new_tokens": max_new_tokens}, None, self.generation_config)
        request = Request.read(self, np.zeros((batch, prompt_length), np.int32), None, config)
        state = Run(self, request).advance(until=1)  # prefill has drawn one: the loop is compiled, not entered
        jax.block_until_ready(state.lengths)

    @property
    def generation_config(self) -> GenerationConfig:
        """The checkpoint's own generation defaults; assign a `GenerationConfig` (or transformers') to change them."""
        return self._generation_defaults.value

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        known = isinstance(config, GenerationConfig)
        self._generation_defaults = Untracked(config if known else GenerationConfig.from_hf(config))


def generate(
    model: Any,
    input_ids: Int[Array | np.ndarray, "B T"],
    attention_mask: "Int[Array | np.ndarray, 'B T'] | Bool[Array | np.ndarray, 'B T'] | None" = None,
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
    total = width + budget
    plan = loop.Plan(Recipe.of(effective), samples, total, model.config.cache_slots(total))
    controls = jax.tree.map(jnp.asarray, controls_of(effective, budget))
    words = jnp.asarray(row_id_words(row_ids, batch))
    prompts = loop.Prompts(tokens, lengths, words, idle=jnp.zeros(batch, bool))
    state = loop.prefill(model, prompts, random, controls, plan)
    state = loop.decode(model, state, controls.max_new_tokens, controls, plan.recipe)

    def new(table: Float[Array, "R S"] | Int[Array, "R S"], fill: float) -> Array:
        return generated(table, state.prompt_lengths, state.lengths, budget, fill, jnp)

    prompt = jnp.repeat(ids.astype(jnp.int32), samples, axis=0)
    sequences = jnp.concatenate([prompt, new(state.tokens, effective.filler_id)], axis=1)
    if not effective.return_dict_in_generate:
        return sequences
    return {
        "sequences": sequences,
        "logprobs": new(state.logprobs, 0.0),
        "model_logprobs": new(state.model_logprobs, 0.0),
        "lengths": state.lengths - state.prompt_lengths,
        "broken": state.broken,
    }
