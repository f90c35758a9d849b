"""Read this file to understand jaxgen: a prompt's way through `model.generate`.

    ids and options -> prepare: checks, a packed, bucketed prompt -> prefill -> decode -> collect: HF's layout

The host side is numpy; the device runs two executables, `prefill` and `decode`, compiled once per bucket.
`generate` is the same path as a pure function, for use inside a caller's own jit.
"""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from jaxgen.errors import JaxgenError
from jaxgen.generation.choosing.stop import BROKEN
from jaxgen.generation.execute import Chunk, advance, decode, decode_in_chunks, prefill, program_for
from jaxgen.generation.options.arguments import sorted_out
from jaxgen.generation.options.checks import integer
from jaxgen.generation.options.config import GenerationConfig, ModelDefaults, resolve
from jaxgen.generation.options.table import Extras
from jaxgen.generation.options.typed import (
    CallArguments,
    ConfigSource,
    Encoding,
    Flag,
    HasToDict,
    StreamArguments,
    TokenIds,
    TokenMask,
    WarmupOptions,
)
from jaxgen.generation.prepare import Request, prepare
from jaxgen.generation.programs.structure import Untracked
from jaxgen.generation.prompts.layout import generated
from jaxgen.generation.results.output import GenerateOutput, collect
from jaxgen.generation.results.score import TextScore, score, transition_scores
from jaxgen.lowering import check_process, own_rules
from jaxgen.shards import check_axes

if TYPE_CHECKING:
    from jaxgen.engine.outputs import GenerationOutput
    from jaxgen.text.stream import TextStream


class GenerationMixin:
    """`generate` and what goes with it, for a causal language model."""

    @overload
    def generate(
        self,
        input_ids: TokenIds | Encoding | None = None,
        attention_mask: TokenMask | HasToDict | None = None,
        *,
        generation_config: ConfigSource | None = None,
        return_dict_in_generate: Literal[True],
        **options: Unpack[CallArguments],
    ) -> GenerateOutput: ...

    @overload
    def generate(
        self,
        input_ids: TokenIds | Encoding | None = None,
        attention_mask: TokenMask | None = None,
        *,
        return_dict_in_generate: Literal[False] | None = None,
        **options: Unpack[CallArguments],
    ) -> Int32[np.ndarray, "R total"]: ...

    @overload
    def generate(
        self,
        input_ids: TokenIds | Encoding | None = None,
        attention_mask: TokenMask | HasToDict | None = None,
        *,
        generation_config: ConfigSource | None,
        return_dict_in_generate: Literal[False],
        **options: Unpack[CallArguments],
    ) -> Int32[np.ndarray, "R total"]: ...

    @overload  # which of them, a configuration or a variable says
    def generate(
        self,
        input_ids: TokenIds | Encoding | None = None,
        attention_mask: TokenMask | HasToDict | None = None,
        *,
        generation_config: ConfigSource | None = None,
        return_dict_in_generate: Flag | None = None,
        **options: Unpack[CallArguments],
    ) -> "Int32[np.ndarray, 'R total'] | GenerateOutput": ...

    def generate(
        self,
        input_ids: object = None,
        attention_mask: object = None,
        *,
        generation_config: object = None,
        key: object = None,
        seed: object = None,
        row_ids: object = None,
        streamer: object = None,
        chunk_size: int | None = None,
        **options: object,
    ) -> "Int32[np.ndarray, 'R total'] | GenerateOutput":
        """Generate text ids as transformers' `generate` does: same names, same defaults, same layout.

        `input_ids` [B, T] are lists, numpy or jax arrays; `attention_mask` [B, T] is 1 on real tokens, in any
        arrangement (None: all are real). A tokenizer's whole output, HF's `inputs=`, and a `generation_config` as
        second argument are taken too. Without a prompt there is one row, of BOS, as in HF. `options` are fields of
        `GenerationConfig`, which win over `generation_config`, which wins over the checkpoint's own; and HF's other
        arguments (`Extras`): `logits_processor` and `stopping_criteria` (jittable functions of tokens [R, S], lengths
        [R] and logits [R, V]),
        `prefix_allowed_tokens_fn`, `negative_prompt_ids` with its mask, `tokenizer` (for `stop_strings`),
        `assistant_model`, `past_key_values` (or `cache`). Sampling takes its randomness from `key` (a jax.random key)
        or `seed` (any int); with neither, from a fresh seed. `row_ids` (ints or strings) name the rows: a row's draws
        depend on its id, its position and the key, and on nothing else. A list of seeds (or an array of keys) gives
        each row its own, and of a single prompt as many rows: row i is what `seed=seeds[i]` alone gives. `strict`
        (True, or a `jaxgen.Strict`) computes every batch in one shape, so that log-probabilities too are the same in
        any batch.
        A `streamer` gets the ids as transformers' streamers do, `chunk_size` tokens at a time.

        Returns int32 ids [B * num_return_sequences, T + new]: the input's columns, the new tokens, then pad.
        With `return_dict_in_generate=True` returns a `GenerateOutput`. Raises `JaxgenError` for bad input before
        anything is compiled, and `NonFiniteLogitsError` if the model produces NaN.

        >>> model, tokenizer = getfixture("demo")
        >>> inputs = tokenizer(["A list of colors: red, blue"], return_tensors="np")
        >>> tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0]
        'A list of colors: red, blue, green, yellow, orange, purple, pink,'
        """
        request = self._prepare(input_ids, attention_mask, generation_config, key, seed, row_ids, options)
        if streamer is None and chunk_size is not None:
            raise JaxgenError(f"chunk_size={chunk_size!r} says how often a streamer looks; there is no streamer=")
        now, started = time.time(), time.monotonic()
        if streamer is not None:
            return collect(self, request, self._feed(streamer, request, chunk_size), now)
        program = program_for(self, request)
        state = prefill(program, request)
        state = decode(program, request, state, started)
        return collect(self, request, state, now)

    def stream(
        self,
        texts: "str | list[dict[str, Any]] | Sequence[str | list[dict[str, Any]]]",
        *,
        tokenizer: object = None,
        chunk_size: int = 1,
        **options: Unpack[StreamArguments],
    ) -> "TextStream":
        """The text that `generate` gives, piece by piece: an iterator, or in a notebook a display that grows.

        For one text it yields strings; for a list of texts `(row, piece)`. `chunk_size` says how many tokens pass
        between two looks, and changes nothing else. `tokenizer` defaults to the checkpoint's. `options` are those
        of `generate`, and those of `jaxgen.text.stream.stream`.

        >>> model, _ = getfixture("demo")
        >>> list(model.stream("A list of colors: red, blue", max_new_tokens=5))
        [', ', 'green,']
        """
        from jaxgen.text.stream import stream

        return stream(self, texts, tokenizer=tokenizer, chunk_size=chunk_size, **options)

    def score(self, texts: "str | list[str]", *, tokenizer: object = None, batch_size: int = 8) -> "list[TextScore]":
        """The log-probability of every token of some texts, each given the tokens before it.

        `tokenizer` defaults to the checkpoint's. Raises `JaxgenError` for a text of fewer than two tokens, or longer
        than the model's context.

        >>> model, _ = getfixture("demo")
        >>> [scored] = model.score(["Portugal is a country"])
        >>> float(scored.logprobs.sum()) > -20
        True
        """
        return score(self, texts, tokenizer, batch_size)

    def compute_transition_scores(
        self, sequences: object, scores: object, beam_indices: object = None, normalize_logits: bool = False
    ) -> Float[np.ndarray, "R N"]:
        """The score of each generated token, from `output_scores=True`: as transformers' method of this name.

        `normalize_logits` makes log-probabilities of raw scores. With beams pass the output's `beam_indices`; entries
        past a beam's end are 0.

        >>> model, tokenizer = getfixture("demo")
        >>> ids = tokenizer(["1, 2, 3"], return_tensors="np")["input_ids"]
        >>> out = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, output_scores=True)
        >>> given = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
        >>> bool(np.allclose(given, out.logprobs, atol=1e-5))
        True
        """
        return transition_scores(sequences, scores, beam_indices, normalize_logits)

    def _prepare(
        self,
        input_ids: object,
        attention_mask: object,
        generation_config: object,
        key: object,
        seed: object,
        row_ids: object,
        options: Mapping[str, Any],
    ) -> Request:
        check_process()
        input_ids, attention_mask, generation_config, options = sorted_out(
            input_ids, attention_mask, generation_config, options
        )
        extras, fields = Extras.take(options)
        config = resolve(fields, generation_config, self.stored_generation_config)
        return prepare(self, input_ids, attention_mask, config, key, seed, row_ids, extras)

    def _feed(self, streamer: object, request: Request, chunk_size: int | None) -> Any:
        """Generate under the eyes of a streamer; the state at the end."""
        from jaxgen.text.streamers import check_streamer, feed

        check_streamer(streamer)
        every = 1 if chunk_size is None else integer(1)("chunk_size", chunk_size)
        if not request.search.append_only:
            raise JaxgenError("streamer: beam search has no text to show before it ends; use num_beams=1")
        now, program = time.monotonic(), program_for(self, request)
        state = prefill(program, request)
        prompt = np.repeat(request.input_ids, request.layout.samples, axis=0)

        def chunks() -> Iterator[Chunk]:
            nonlocal state
            for chunk in decode_in_chunks(program, request, state, now, every):
                state = chunk.state
                yield chunk

        feed(streamer, prompt, chunks(), request.config.filler_id)
        return state

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: ConfigSource | None = None,
        **options: Any,
    ) -> "dict[str, GenerationOutput]":
        """Generate for many prompts, lists of ids, of which none waits for another: transformers' method of this name.

        Runs on a `jaxgen.Engine`; options and errors as in `jaxgen.engine.generate_batch`.

        >>> model, _ = getfixture("demo")
        >>> model.generate_batch([[1, 5, 9]], max_new_tokens=3)["req_0"].finish_reason
        'length'
        """
        from jaxgen.engine.generate_batch import generate_batch

        return generate_batch(self, inputs, generation_config, **options)

    def warmup(self, batch: int, prompt_length: int, max_new_tokens: int, **options: Unpack[WarmupOptions]) -> None:
        """Compile what a `generate` call of this size needs, so that the first real one is already fast.

        `options` are those of the later call: which processors run decides what is compiled. Raises as `generate`.

        >>> model, _ = getfixture("demo")
        >>> model.warmup(batch=1, prompt_length=10, max_new_tokens=20)
        """
        sizes = {"batch": batch, "prompt_length": prompt_length}
        for name, size in sizes.items():
            if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 1:
                raise JaxgenError(f"{name}={size!r:.60} must be a positive int")
        ids = np.zeros((batch, prompt_length), np.int32)
        request = self._prepare(ids, None, None, None, None, None, {**options, "max_new_tokens": max_new_tokens})
        program = program_for(self, request)
        # The prefill has drawn one: the loop is compiled, not entered.
        state = advance(program, request, prefill(program, request), until=1)
        jax.block_until_ready(state.lengths)

    @property
    def generation_config(self) -> GenerationConfig:
        """The model's own generation defaults: set a field of it, or assign another (transformers' too).

        What is assigned is copied: changing it afterwards, or another model that has it too, changes nothing here.

        >>> import copy
        >>> model = copy.copy(getfixture("demo")[0])
        >>> model.generation_config.max_new_tokens = 4
        >>> model.generate([[1, 5]]).shape
        (1, 6)
        """
        return ModelDefaults(self)

    @generation_config.setter
    def generation_config(self, config: object) -> None:
        known = isinstance(config, GenerationConfig)
        self.set_stored_generation_config(copy.copy(config) if known else GenerationConfig.from_hf(config))
        self.generation_assigned = Untracked(None)

    def set_stored_generation_config(self, config: GenerationConfig) -> None:
        """Change what `generation_config` says, for everyone who holds it."""
        self._generation_defaults = Untracked(config)

    @property
    def stored_generation_config(self) -> GenerationConfig:
        """What `generation_config` says now; nobody changes it."""
        return self._generation_defaults.value

    @property
    def name_or_path(self) -> str | None:
        """The directory that the model was loaded from, where its tokenizer is; None if it was not."""
        return self._loaded_from.value

    @name_or_path.setter
    def name_or_path(self, name: str | None) -> None:
        self._loaded_from = Untracked(name)

    _loaded_from = Untracked(None)
    generation_assigned = Untracked(None)  # another one whenever `generation_config` is assigned


@own_rules()
def generate(
    model: Any,
    input_ids: Int[Array | np.ndarray, "B T"],
    attention_mask: "Int[Array | np.ndarray, 'B T'] | Bool[Array | np.ndarray, 'B T'] | None" = None,
    key: object = None,
    config: GenerationConfig | None = None,
    row_ids: object = None,
    **extras: object,
) -> "Int[Array, 'R total'] | dict[str, Array]":
    """Generate as a pure function: no buckets, no checks of values, usable inside jit and under vmap over keys.

    As `model.generate`, with arrays in and arrays out: ids [B * num_return_sequences, T + max_new_tokens] (or T +
    `max_length`, as far as a row of few real tokens may go), always full width. With `return_dict_in_generate` a dict
    with `sequences`, `logprobs` and `model_logprobs` [R, N], `lengths` [R] (new tokens per row) and `broken` [R] (the
    row met NaN logits). `key` is needed for sampling; `row_ids` are as in `model.generate`, and static. `extras` are
    its arguments that are no numbers (`logits_processor`, `stopping_criteria`, `tokenizer`, ...). Raises
    `JaxgenError` for a bad configuration, and `UnsupportedError` for what needs the host or a second model.

    >>> model, _ = getfixture("demo")
    >>> config = GenerationConfig(max_new_tokens=4, do_sample=True)
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> jax.vmap(lambda key: generate(model, jnp.array([[1, 5]]), None, key, config))(keys).shape
    (3, 1, 6)
    """
    effective = resolve({}, config, model.generation_config)
    given, unknown = Extras.take(extras)
    if unknown:
        raise JaxgenError(f"{next(iter(unknown))!r} is no argument of jaxgen.generate; options belong in config=")
    if hasattr(model, "layout"):
        check_axes(model)
    request = prepare(model, input_ids, attention_mask, effective, key, None, row_ids, given, inside_jit=True)
    search, layout, traced = request.search, request.layout, jax.tree.map(jnp.asarray, request.traced)
    state = search.prefill(model, request.prompts, request.key, traced, layout)
    state = search.decode(model, state, jnp.int32(layout.total), traced, layout.static)

    def new(table: Float[Array, "R S"] | Int[Array, "R S"], fill: float) -> Array:
        return generated(table, state.prompt_lengths, state.lengths, request.new_tokens, fill, jnp)

    prompt = jnp.repeat(request.input_ids, layout.samples, axis=0)
    sequences = jnp.concatenate([prompt, new(state.tokens, effective.filler_id)], axis=1)
    if not effective.return_dict_in_generate:
        return sequences
    return {
        "sequences": sequences,
        "logprobs": new(state.logprobs, 0.0),
        "model_logprobs": new(state.model_logprobs, 0.0),
        "lengths": state.lengths - state.prompt_lengths,
        "broken": state.status == BROKEN,
    }
