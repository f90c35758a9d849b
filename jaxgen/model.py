"""MistralForCausalLM as a Flax NNX module: embed, blocks, norm, head.

An ordinary Flax module: `model(input_ids)` gives logits, and `jax.grad` goes through it. Submodules have HF's
names; weights are `[out, in]` as in HF, with two fusions that save kernel launches while decoding:

- `self_attn.qkv_proj`: for each key-value head its G query heads, then its key, then its value;
- `mlp.gate_up_proj`: rows 2i and 2i + 1 are row i of HF's gate_proj and up_proj.

Both keep what belongs to one key-value head, or one feed-forward unit, together: sharding the output rows needs
no reshuffling. `convert/` maps HF's tensors to these names and back.
"""

import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxgen.attention import (
    Rotation,
    allowed_in_prompt,
    attend,
    attend_to_prompt,
    attend_to_slots,
    attention_weights,
    rope,
    rotate,
)
from jaxgen.cache import KVCache, LayerCache, empty_cache, layer_cache_from_prompt, visible_slots
from jaxgen.config import MistralConfig
from jaxgen.familiar import FamiliarMethods, answer
from jaxgen.generation.config import GenerationConfig
from jaxgen.generation.generate import GenerationMixin
from jaxgen.generation.weights import split
from jaxgen.lowering import device_runs_kernels, own_rules, target
from jaxgen.quant.adapted import Adapted
from jaxgen.quant.int4 import Int4
from jaxgen.quant.lookup import Lookup4
from jaxgen.quant.matmul import matmul
from jaxgen.residual import add_and_norm

# flax 0.11.2 (Colab) keeps submodules in plain lists; 0.12 needs to be told that a list holds them.
_module_list = getattr(nnx, "List", list)


class QuantizedWeight(nnx.Variable):
    """An `Int4`, `Lookup4` or `Adapted` in the place of a Linear's `nnx.Param`: read, but never trained."""

    def __getitem__(self, index: Any) -> "Int4 | Lookup4 | Adapted":
        """`weight[...]`, as for an array."""
        return self.get_value() if hasattr(self, "get_value") else self.value  # flax before 0.12


class Linear(nnx.Module):
    """`x @ weight.T` without bias; weight `[out, in]`, of floats or quantised."""

    def __init__(self, in_features: int, out_features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        scale = in_features**-0.5
        weight = scale * jax.random.normal(rngs.params(), (out_features, in_features), dtype)
        self.weight: nnx.Param | QuantizedWeight = nnx.Param(weight)

    def __call__(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        """Map the last axis from `in_features` to `out_features`."""
        return matmul(x, self.weight[...])


class Embedding(nnx.Module):
    """Token embeddings `[V, D]`, also usable as an output head (`attend`) when weights are tied."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        scale = hidden_size**-0.5
        self.weight = nnx.Param(scale * jax.random.normal(rngs.params(), (vocab_size, hidden_size), dtype))

    def __call__(self, ids: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        """Look ids up; ids must lie inside the vocabulary."""
        return jnp.take(self.weight[...], ids, axis=0)

    def attend(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Logits against every embedding: the tied lm_head."""
        return matmul(x, self.weight[...])


class RMSNorm(nnx.Module):
    """Root-mean-square norm: computed in float32, cast back, then scaled in the compute dtype, as HF does."""

    def __init__(self, size: int, eps: float, *, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalise the last axis."""
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * normed.astype(x.dtype)


class MistralAttention(nnx.Module):
    """Grouped-query attention with rotary positions and an optional sliding window."""

    def __init__(self, config: MistralConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kv_heads, self.groups = config.num_key_value_heads, config.query_groups
        self.head_dim, self.window = config.head_size, config.sliding_window
        fused = self.kv_heads * (self.groups + 2) * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, fused, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(config.num_attention_heads * self.head_dim, config.hidden_size, dtype=dtype, rngs=rngs)

    def project(
        self, x: Float[Array, "B T D"], rotation: Rotation
    ) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Rotated queries and keys, and values."""
        fused = self.qkv_proj(x).reshape(*x.shape[:2], self.kv_heads, self.groups + 2, self.head_dim)
        queries, keys, values = fused[..., :-2, :], fused[..., -2, :], fused[..., -1, :]
        return rotate(queries, rotation), rotate(keys, rotation), values

    def output(self, mixed: Float[Array, "B T K G H"]) -> Float[Array, "B T D"]:
        """Mix the heads."""
        return self.o_proj(mixed.reshape(*mixed.shape[:2], -1))


class MistralMLP(nnx.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: MistralConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """`down(silu(gate(x)) * up(x))`."""
        return self.down(self.gate_up_proj(x))

    def down(self, gate_up: Float[Array, "B T two_F"]) -> Float[Array, "B T D"]:
        """What follows `gate_up_proj`."""
        pairs = gate_up.reshape(*gate_up.shape[:2], -1, 2)
        return self.down_proj(jax.nn.silu(pairs[..., 0]) * pairs[..., 1])


class MistralDecoderLayer(nnx.Module):
    """One block: attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: MistralConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.self_attn = MistralAttention(config, dtype=dtype, rngs=rngs)
        self.mlp = MistralMLP(config, dtype=dtype, rngs=rngs)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)

    def prompt(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        positions: Int[Array, "B T"],
        real: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]]:
        """A whole prompt at once; also returns its keys and values."""
        with jax.named_scope("attention"):
            queries, keys, values = self.self_attn.project(self.input_layernorm(x), rotation)
            mixed = attend_to_prompt(queries, keys, values, positions, real, self.self_attn.window)
            x = x + self.self_attn.output(mixed)
        with jax.named_scope("mlp"):
            x = x + self.mlp(self.post_attention_layernorm(x))
        # Together, or XLA:GPU may keep the fused projections of all layers until it takes the keys and values out.
        x, keys, values = jax.lax.optimization_barrier((x, keys, values))
        return x, (keys, values)

    def step(
        self,
        x: Float[Array, "B 1 D"],
        delta: Float[Array, "B 1 D"],
        rotation: Rotation,
        positions: Int[Array, " B"],
        cache: LayerCache,
        visible: Bool[Array, "B C"],
    ) -> tuple[Float[Array, "B 1 D"], Float[Array, "B 1 D"], LayerCache]:
        """One token per row, against the cache that it is first written to.

        `delta` has yet to be added to the residual stream `x`; so has the one that is returned with it.
        """
        rows = len(x)
        with jax.named_scope("attention"):
            x, normed = add_and_norm(x, delta, self.input_layernorm)
            queries, keys, values = (heads[:rows, 0] for heads in self.self_attn.project(normed, rotation))
            cache = cache.write(keys, values, positions)
            mixed = attend_to_slots(queries, *cache.read(x.dtype), visible)
            delta = self.self_attn.output(mixed[:, None])
        with jax.named_scope("mlp"):
            x, normed = add_and_norm(x, delta, self.post_attention_layernorm)
            gate_up = self.mlp.gate_up_proj(normed)[:rows]
            return x, self.mlp.down(gate_up), cache

    def extend(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        positions: Int[Array, "B T"],
        real: Bool[Array, "B T"],
        cache: LayerCache,
        visible: Bool[Array, "B T C"],
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Several tokens per row, against the cache that they are first written to."""
        with jax.named_scope("attention"):
            queries, keys, values = self.self_attn.project(self.input_layernorm(x), rotation)
            cache = cache.write_block(keys, values, positions, real)
            x = x + self.self_attn.output(attend(queries, *cache.read(x.dtype), visible))
        with jax.named_scope("mlp"):
            return x + self.mlp(self.post_attention_layernorm(x)), cache

    def activations(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        positions: Int[Array, "B T"],
        real: Bool[Array, "B T"],
        with_attentions: bool,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B N T T"] | None]:
        """What a whole prompt becomes, and on request how much each token reads of each other one."""
        after, _ = self.prompt(x, rotation, positions, real)
        if not with_attentions:
            return after, None
        queries, keys, _ = self.self_attn.project(self.input_layernorm(x), rotation)
        allowed = allowed_in_prompt(positions, real, self.self_attn.window, 0, x.shape[1])
        weights = attention_weights(queries, jnp.moveaxis(keys, 1, 2), allowed)
        return after, weights.reshape(len(x), -1, *weights.shape[3:])


class MistralModel(nnx.Module):
    """Embeddings, blocks and final norm: everything but the head."""

    def __init__(self, config: MistralConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        layers = [MistralDecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)]
        self.layers = _module_list(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)


class MistralForCausalLM(FamiliarMethods, nnx.Module, GenerationMixin):
    """A Mistral language model with random weights; `AutoModelForCausalLM.from_pretrained` loads real ones.

    `dtype` is that of the weights and of the computation; norms, softmax and logits are float32 throughout.

    >>> config = MistralConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                        num_attention_heads=2, num_key_value_heads=1)
    >>> MistralForCausalLM(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).shape
    (1, 3, 50)
    """

    @own_rules()
    def __init__(self, config: MistralConfig, *, rngs: nnx.Rngs, dtype: "jnp.dtype | type | str" = jnp.float32):
        dtype = jnp.dtype(dtype)
        self.config = config
        self.generation_config = GenerationConfig.from_model_config(config)
        self.model = MistralModel(config, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of embeddings, activations and cache."""
        return self.model.norm.weight.dtype

    @property
    def device(self) -> Any:
        """Where the weights are (the first device, if sharded)."""
        return next(iter(self.model.norm.weight.devices()))

    @property
    def decodes_with_kernels(self) -> bool:
        """Whether the kernels of `jaxgen.kernels` can carry out a decode step of this model, where it is."""
        return self._fits_kernels and device_runs_kernels(self.device)

    @property
    def _fits_kernels(self) -> bool:
        size = self.config.head_size
        return self.dtype.itemsize == 2 and size >= 32 and size & (size - 1) == 0

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
    ) -> Any:
        """Logits [B, T, V] (float32) for the token after each column; `options` as for `jaxgen.familiar.answer`.

        `attention_mask` is 1 on real tokens, in any arrangement; positions count real tokens only, and the logits
        of masked columns mean nothing.
        """
        logits = self.logits(self.hidden(input_ids, attention_mask))
        return answer(logits, **options) if options else logits

    @own_rules()
    def hidden(
        self,
        input_ids: Int[Array | np.ndarray, "B T"],
        attention_mask: "Int[Array | np.ndarray, 'B T'] | Bool[Array | np.ndarray, 'B T'] | None" = None,
    ) -> Float[Array, "B T D"]:
        """The hidden states from which `logits` computes what `__call__` returns."""
        return self._prompt(*_read_mask(input_ids, attention_mask))[0]

    def activations(
        self, tokens: Int[np.ndarray, "B T"], real: Bool[np.ndarray, "B T"], with_attentions: bool
    ) -> Iterator[tuple[Float[Array, "B T D"], Float[Array, "B N T T"] | None]]:
        """HF's `hidden_states` and `attentions`, one layer after the other; runs on the host.

        First the embeddings, without attentions; then every layer's output, the last one normed.
        """
        ids, positions, mask = _read_mask(tokens, real)
        x, rotation = self.model.embed_tokens(ids), self.rotation(positions)
        yield x, None
        for index, layer in enumerate(self.model.layers):
            x, weights = _layer_activations(*split(layer), x, rotation, positions, mask, with_attentions)
            yield (self.model.norm(x) if index + 1 == len(self.model.layers) else x), weights

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], slots: int, int8: bool = False
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Read right-padded prompts: float32 logits after each row's last token, and a cache of `slots` slots."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, fresh = self._prompt(tokens, positions, positions < lengths[:, None])
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
        with jax.named_scope("cache"):
            cache = [layer_cache_from_prompt(keys, values, lengths, slots, int8) for keys, values in fresh]
        return self.logits(last)[:, 0], cache

    def step(
        self, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Read one token per row at `positions`: float32 logits for the next one, and the cache that holds it."""
        if target().kernels and self._fits_kernels:  # an assistant may not, beside a model that does
            from jaxgen.kernels.step import decode_step

            return decode_step(self, tokens, positions, cache)
        x = self.model.embed_tokens(tokens[:, None])
        rotation = self.rotation(positions[:, None])
        visible = visible_slots(positions[:, None], positions, cache[0].slots, self.config.sliding_window)[:, 0]
        caches, delta = [], jnp.zeros_like(x)
        for layer, before in zip(self.model.layers, cache, strict=True):
            x, delta, after = layer.step(x, delta, rotation, positions, before, visible)
            caches.append(after)
        _, hidden = add_and_norm(x, delta, self.model.norm)
        return self.logits(hidden)[: len(x), 0], caches

    def extend(
        self, tokens: Int[Array, "B T"], starts: Int[Array, " B"], counts: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Read up to T tokens per row from position `starts` on, after what the cache holds.

        Only the first `counts` tokens of a row are real. Returns the last layer's hidden states, which `logits` turns
        into logits, and the cache. Beside a sliding window W the cache must have W + T slots (`cache`).
        """
        column = jnp.arange(tokens.shape[1])
        positions, real = starts[:, None] + column, column < counts[:, None]
        x, rotation = self.model.embed_tokens(tokens), self.rotation(positions)
        newest = starts + counts - 1
        visible = visible_slots(positions, newest, cache[0].slots, self.config.sliding_window)
        caches = []
        for layer, before in zip(self.model.layers, cache, strict=True):
            x, after = layer.extend(x, rotation, positions, real, before, visible)
            caches.append(after)
        return self.model.norm(x), caches

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """What the head makes of hidden states: float32 logits."""
        with jax.named_scope("lm_head"):
            tied = self.config.tie_word_embeddings
            logits = self.model.embed_tokens.attend(hidden) if tied else self.lm_head(hidden)
            return logits.astype(jnp.float32)

    def empty_cache(self, rows: int, slots: int, int8: bool = False) -> KVCache:
        """A cache that holds nothing yet."""
        c = self.config
        return empty_cache(c.num_hidden_layers, rows, c.num_key_value_heads, slots, c.head_size, self.dtype, int8)

    def _prompt(
        self, ids: Int[Array, "B T"], positions: Int[Array, "B T"], real: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], list[tuple[Array, Array]]]:
        x = self.model.embed_tokens(ids)
        rotation = self.rotation(positions)
        fresh = []
        for layer in self.model.layers:
            x, keys_and_values = layer.prompt(x, rotation, positions, real)
            fresh.append(keys_and_values)
        return self.model.norm(x), fresh

    def rotation(self, positions: Int[Array, "B T"]) -> Rotation:
        """The rotary tables of `positions`, in the compute dtype."""
        return rope(positions, self.config.head_size, self.config.rope_theta, self.dtype)


def _read_mask(input_ids: Any, attention_mask: Any) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Bool[Array, "B T"]]:
    """Ids, the position of each (real tokens before it), and which are real."""
    ids = jnp.asarray(input_ids, jnp.int32)
    real = jnp.ones(ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask, jnp.int32) != 0
    return ids, jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0), real


def _run_layer(structure: Any, weights: Any, *arguments: Any) -> Any:
    return structure.module(weights).activations(*arguments)


_layer_activations = jax.jit(_run_layer, static_argnums=(0, 6))  # one program for all layers, which are alike
