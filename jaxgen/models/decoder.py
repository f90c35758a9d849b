"""The block that all families share, by configuration: attention and feed-forward, each behind a norm.

Submodules have HF's names; weights are `[out, in]` as in HF, with two fusions that save kernel launches while
decoding:

- `self_attn.qkv_proj`: for each key-value head its G query heads, then its key, then its value;
- `mlp.gate_up_proj`: rows 2i and 2i + 1 are row i of HF's gate_proj and up_proj.

Both keep what belongs to one key-value head, or one feed-forward unit, together: sharding the output rows needs
no reshuffling. Where the config says so, the feed-forward is one of experts (`models/experts.py`).
`models/tensors.py` maps HF's tensors to these names and back.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxgen.attention import (
    Rotation,
    allowed_in_prompt,
    attend_to_prompt,
    attention_weights,
    rope,
    rotate,
    rotate_queries,
)
from jaxgen.cache import LayerCache, Reading
from jaxgen.models.config import DecoderConfig
from jaxgen.models.experts import SparseMLP
from jaxgen.models.layers import Embedding, Linear, RMSNorm
from jaxgen.residual import add_and_norm

# flax 0.11.2 (Colab) keeps submodules in plain lists; 0.12 needs to be told that a list holds them.
_module_list = getattr(nnx, "List", list)


def rotation(config: DecoderConfig, positions: Int[Array, "B T"], dtype: jnp.dtype) -> Rotation:
    """The rotary tables of `positions`."""
    return rope(positions, config.head_size, config.rope_theta, dtype, config.rope_scaling)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; a sliding window, biases and norms per head where configured."""

    def __init__(self, config: DecoderConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kv_heads, self.groups = config.num_key_value_heads, config.query_groups
        self.head_dim, self.window = config.head_size, config.layer_windows[index]
        fused, mixed = self.kv_heads * (self.groups + 2) * self.head_dim, config.num_attention_heads * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, fused, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(mixed, config.hidden_size, bias=config.o_bias, dtype=dtype, rngs=rngs)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype=dtype)
        self.qk_norm = config.qk_norm

    def project(
        self, x: Float[Array, "B T D"], rotation: Rotation
    ) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Rotated queries and keys, and values."""
        fused = self.qkv_proj(x).reshape(*x.shape[:2], self.kv_heads, self.groups + 2, self.head_dim)
        queries, keys, values = self.heads(fused)
        return rotate_queries(queries, rotation), rotate(keys, rotation), values

    def heads(
        self, fused: Float[Array, "*rows K P H"]
    ) -> tuple[Float[Array, "*rows K G H"], Float[Array, "*rows K H"], Float[Array, "*rows K H"]]:
        """Queries and keys before they are rotated, and values, of what `qkv_proj` gives."""
        queries, keys, values = fused[..., :-2, :], fused[..., -2, :], fused[..., -1, :]
        if self.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        return queries, keys, values

    def output(self, mixed: Float[Array, "B T K G H"]) -> Float[Array, "B T D"]:
        """Mix the heads."""
        return self.o_proj(mixed.reshape(*mixed.shape[:2], -1))


class MLP(nnx.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = Linear(width, 2 * inner, bias=bias, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(inner, width, bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """`down(silu(gate(x)) * up(x))`."""
        return self.down(self.gate_up_proj(x))

    def down(self, gate_up: Float[Array, "B T two_F"]) -> Float[Array, "B T D"]:
        """What follows `gate_up_proj`."""
        pairs = gate_up.reshape(*gate_up.shape[:2], -1, 2)
        return self.down_proj(jax.nn.silu(pairs[..., 0]) * pairs[..., 1])

    def step(self, x: Float[Array, "R 1 D"], rows: int) -> Float[Array, "B 1 D"]:
        """Of the first rows only (`residual.add_and_norm`)."""
        return self.down(self.gate_up_proj(x)[:rows])


class DecoderLayer(nnx.Module):
    """One block: attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.self_attn = Attention(config, index, dtype=dtype, rngs=rngs)
        routing = config.routing(index)
        self.mlp = (
            MLP(config, dtype=dtype, rngs=rngs)
            if routing is None
            else SparseMLP(config.hidden_size, routing, dtype=dtype, rngs=rngs)
        )
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
        reading: Reading,
        cache: LayerCache,
    ) -> tuple[Float[Array, "B 1 D"], Float[Array, "B 1 D"], LayerCache]:
        """One token per row, against the cache that it is first written to.

        `delta` has yet to be added to the residual stream `x`; so has the one that is returned with it.
        """
        rows = len(x)
        with jax.named_scope("attention"):
            x, normed = add_and_norm(x, delta, self.input_layernorm)
            queries, keys, values = (heads[:rows] for heads in self.self_attn.project(normed, rotation))
            mixed, cache = cache.attend(queries, keys, values, reading)
            delta = self.self_attn.output(mixed)
        with jax.named_scope("mlp"):
            x, normed = add_and_norm(x, delta, self.post_attention_layernorm)
            return x, self.mlp.step(normed, rows), cache

    def extend(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        reading: Reading,
        cache: LayerCache,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Several tokens per row, against the cache that they are first written to."""
        with jax.named_scope("attention"):
            queries, keys, values = self.self_attn.project(self.input_layernorm(x), rotation)
            mixed, cache = cache.attend(queries, keys, values, reading)
            x = x + self.self_attn.output(mixed)
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


class Decoder(nnx.Module):
    """Embeddings, blocks and final norm: everything but the head."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        layers = [DecoderLayer(config, index, dtype=dtype, rngs=rngs) for index in range(config.num_hidden_layers)]
        self.layers = _module_list(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
