"""A causal language model as a Flax NNX module: embed, blocks, norm, head.

An ordinary Flax module: `model(input_ids).logits` are logits, and `jax.grad` goes through it. The blocks are in
`decoder.py`; what distinguishes the families is in their files.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxgen.attention import Rotation
from jaxgen.cache import KVCache, Reading, Slots, empty_layer_cache, layer_cache_from_prompt, of_layers
from jaxgen.causal_output import CausalLMOutput
from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.familiar import FamiliarMethods, answer
from jaxgen.generation.generate import GenerationMixin
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.programs.structure import split
from jaxgen.lowering import device_runs_kernels, own_rules, target
from jaxgen.models.config import DecoderConfig
from jaxgen.models.decoder import Decoder, rotations
from jaxgen.models.gguf import Gguf
from jaxgen.models.layers import Linear
from jaxgen.residual import add_and_norm
from jaxgen.rounding import rounded
from jaxgen.shards import check_axes, joined

if TYPE_CHECKING:
    from jaxgen.parallel.layout import Layout

# What a family may say of the block without its decoding by kernels being another: they compute it, or it is nothing
# that they compute. With another value than the block's own of anything else, a model decodes in XLA's forms.
_KNOWN_TO_KERNELS = frozenset(
    """
    model_type architecture rope_types scales_queries field_checks nullable_fields layered_fields activation_field
    fixed_fields ignored_fields overflows_float16 experts_field sliding_window layer_types rope_scaling qkv_bias qk_norm
    embedding_multiplier rounds_embedding_multiplier stacks_projections
    """.split()
)
_UNKNOWN_TO_KERNELS = (
    DecoderConfig.__annotations__.keys()
    - {field.name for field in dataclasses.fields(DecoderConfig)}
    - _KNOWN_TO_KERNELS
)


class DecoderForCausalLM(FamiliarMethods, nnx.Module, GenerationMixin):
    """A language model of the shared block, with random weights; each family is a class of its own.

    `dtype` is that of the weights and of the computation; norms, softmax and logits are float32 throughout.
    """

    config_class: ClassVar[type[DecoderConfig]]  # of the family
    gguf: ClassVar[Gguf | None] = None  # how llama.cpp's files name it, if they do
    layout: "Layout | None" = None  # which part lies where, if it lies on a mesh

    @own_rules()
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: "jnp.dtype | type | str" = jnp.float32):
        dtype = jnp.dtype(dtype)
        if dtype == jnp.float16 and config.overflows_float16:
            raise UnsupportedError(
                f"dtype=float16: the activations of {type(self).__name__} go beyond float16's 65504; use bfloat16, or "
                "float32 where the device has none (weights of 4 bits stay as small: load_in_4bit=True)"
            )
        self.config = config
        self.generation_config = GenerationConfig.from_model_config(config)
        self.model = Decoder(config, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of embeddings, activations and cache."""
        return self.model.norm.weight.dtype

    @property
    def device(self) -> Any:
        """Where the weights are (the first device, if sharded). Raises `JaxgenError` for arrays of numpy."""
        weight = self.model.norm.weight
        if not hasattr(weight, "devices"):
            raise JaxgenError("the weights are arrays of numpy, on no device; give the model jax.device_put(state)")
        return min(weight.devices(), key=lambda device: device.id)

    @property
    def everywhere(self) -> Any:
        """Where to put what every device of the model is to have: for `jax.device_put`."""
        return self.device if self.layout is None else self.layout.everywhere

    def as_traced(self) -> Any:
        """What the compiled loop is given while it is traced: on a mesh, what each device computes of this model."""
        check_axes(self)
        if self.layout is None:
            return self
        from jaxgen.parallel.on_mesh import OnMesh

        return OnMesh(self, self.layout)

    @property
    def decodes_with_kernels(self) -> bool:
        """Whether the kernels of `jaxgen.kernels` can carry out a decode step of this model, where it is.

        Not over several devices, but where `layout` says what each of them computes: XLA cannot divide a kernel among
        them, and would gather the weights at each step.
        """
        alone = self.layout is not None or len(self.model.norm.weight.devices()) == 1
        return alone and self._fits_kernels and device_runs_kernels(self.device)

    @property
    def _fits_kernels(self) -> bool:
        size, ropes = self.config.head_size, self.config.ropes
        known = all(getattr(self.config, name) == getattr(DecoderConfig, name) for name in _UNKNOWN_TO_KERNELS)
        known = known and None not in ropes and len(set(ropes)) == 1 and self.config.rotary_size == size
        experts = any(self.config.routing(layer) is not None for layer in range(self.config.num_hidden_layers))
        known = known and not experts
        return self.dtype.itemsize == 2 and size >= 32 and size & (size - 1) == 0 and known

    def save_pretrained(self, directory: "str | os.PathLike[str]", **options: Any) -> None:
        """Write a Hugging Face checkpoint; options and errors as in `jaxgen.convert.save_pretrained`."""
        from jaxgen.convert.export import save_pretrained

        save_pretrained(self, directory, **options)

    @own_rules()
    def __call__(
        self,
        input_ids: Int[Array | np.ndarray, "B T"],
        attention_mask: "Int[Array | np.ndarray, 'B T'] | Bool[Array | np.ndarray, 'B T'] | None" = None,
        **options: Any,
    ) -> CausalLMOutput:
        """`.logits` [B, T, V] (float32) for the token after each column; with `labels` [B, T], their `.loss` too.

        `attention_mask` is 1 on real tokens, in any arrangement; positions count real tokens only, and the logits
        of masked columns mean nothing.
        """
        return answer(self.logits(self.hidden(input_ids, attention_mask)), **options)

    @own_rules()
    def hidden(
        self,
        input_ids: Int[Array | np.ndarray, "B T"],
        attention_mask: "Int[Array | np.ndarray, 'B T'] | Bool[Array | np.ndarray, 'B T'] | None" = None,
    ) -> Float[Array, "B T D"]:
        """The hidden states from which `logits` computes those that `__call__` returns."""
        check_axes(self)
        return self._prompt(*_read_mask(input_ids, attention_mask))[0]

    def activations(
        self, tokens: Int[np.ndarray, "B T"], real: Bool[np.ndarray, "B T"], with_attentions: bool
    ) -> Iterator[tuple[Float[Array, "B T D"], Float[Array, "B N T T"] | None]]:
        """HF's `hidden_states` and `attentions`, one layer after the other; runs on the host.

        First the embeddings, without attentions; then every layer's output, the last one normed.
        """
        ids, positions, mask = _read_mask(tokens, real)
        x, tables = self.model.embed_tokens(ids), self.rotations(positions, _ends(positions, mask))
        yield x, None
        for index, (layer, rotation) in enumerate(zip(self.model.layers, tables, strict=True)):
            x, weights = _layer_activations(*split(layer), x, rotation, positions, mask, with_attentions)
            yield (self.model.norm(x) if index + 1 == len(self.model.layers) else x), weights

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], slots: Slots, int8: bool = False
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Process right-padded prompts: float32 logits after each row's last token, and a cache of `slots` slots."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, fresh = self._prompt(tokens, positions, positions < lengths[:, None])
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
        with jax.named_scope("cache"):
            cache = [
                layer_cache_from_prompt(keys, values, lengths, count, int8, layer.self_attn.window)
                for layer, count, (keys, values) in zip(
                    self.model.layers, of_layers(slots, len(fresh)), fresh, strict=True
                )
            ]
        return self.logits(last)[:, 0], cache

    def step(
        self, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Process one token per row at `positions`: float32 logits for the next one, and the cache that holds it."""
        if target().kernels and self._fits_kernels:  # an assistant may not, beside a model that does
            from jaxgen.kernels.step import decode_step

            return decode_step(self, tokens, positions, cache)
        x = self.model.embed_tokens(tokens[:, None])
        reading = Reading.one(positions)
        tables = self.rotations(reading.positions)
        caches, delta = [], jnp.zeros_like(x)
        for layer, rotation, before in zip(self.model.layers, tables, cache, strict=True):
            x, delta, after = layer.step(x, delta, rotation, reading, before)
            caches.append(after)
        _, hidden = add_and_norm(x, delta, self.model.norm)
        return self.logits(hidden)[: len(x), 0], caches

    def extend(
        self, tokens: Int[Array, "B T"], starts: Int[Array, " B"], counts: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Process up to T tokens per row from position `starts` on, after what the cache holds.

        Only the first `counts` tokens of a row are real. Returns the last layer's hidden states, which `logits` turns
        into logits, and the cache. Beside a sliding window W the cache must have W + T slots (`cache`).
        """
        if target().kernels and self._fits_kernels:
            from jaxgen.kernels import attend, step

            if attend.takes(tokens.shape[1], self.config.query_groups):
                return step.extend(self, tokens, starts, counts, cache)
        reading = Reading.several(starts, counts, tokens.shape[1])
        x, tables = self.model.embed_tokens(tokens), self.rotations(reading.positions)
        caches = []
        for layer, rotation, before in zip(self.model.layers, tables, cache, strict=True):
            x, after = layer.extend(x, rotation, reading, before)
            caches.append(after)
        return self.model.norm(x), caches

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """What the head makes of hidden states: float32 logits."""
        with jax.named_scope("lm_head"):
            tied = self.config.tie_word_embeddings
            logits = self.model.embed_tokens.attend(hidden) if tied else self.lm_head(hidden)
            logits = joined(logits, "vocab").astype(jnp.float32)
            scaling, limit = self.config.logits_scaling, self.config.final_logit_softcapping
            logits = logits if scaling == 1 else rounded(logits / scaling)
            return logits if limit is None else rounded(limit * jnp.tanh(logits / limit))

    def empty_cache(self, rows: int, slots: Slots, int8: bool = False) -> KVCache:
        """A cache that holds nothing yet."""
        heads, size, kind = self.config.num_key_value_heads, self.config.head_size, self.dtype
        return [
            empty_layer_cache(rows, heads, count, size, kind, int8, layer.self_attn.window)
            for layer, count in zip(self.model.layers, of_layers(slots, self.config.num_hidden_layers), strict=True)
        ]

    def _prompt(
        self, ids: Int[Array, "B T"], positions: Int[Array, "B T"], real: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], list[tuple[Array, Array]]]:
        x = self.model.embed_tokens(ids)
        fresh = []
        for layer, rotation in zip(self.model.layers, self.rotations(positions, _ends(positions, real)), strict=True):
            x, keys_and_values = layer.prompt(x, rotation, positions, real)
            fresh.append(keys_and_values)
        return self.model.norm(x), fresh

    def rotations(self, positions: Int[Array, "B T"], ends: Int[Array, " B"] | None = None) -> list[Rotation | None]:
        """The rotary tables of `positions` for each layer, in the compute dtype; `ends` as for `rope`."""
        return rotations(self.config, positions, self.dtype, ends)


def _ends(positions: Int[Array, "B T"], real: Bool[Array, "B T"]) -> Int[Array, " B"]:
    """The position of each row's last real token."""
    return jnp.where(real, positions, 0).max(axis=1)


def _read_mask(input_ids: Any, attention_mask: Any) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Bool[Array, "B T"]]:
    """Ids, the position of each (real tokens before it), and which are real."""
    ids = jnp.asarray(input_ids, jnp.int32)
    real = jnp.ones(ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask, jnp.int32) != 0
    return ids, jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0), real


def _run_layer(structure: Any, weights: Any, *arguments: Any) -> Any:
    return structure.module(weights).activations(*arguments)


_layer_activations = jax.jit(_run_layer, static_argnums=(0, 6))  # one program for all layers that are alike
