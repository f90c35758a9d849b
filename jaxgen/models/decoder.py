"""The block that all families share, by configuration: attention and feed-forward, each behind a norm.

Submodules have HF's names; weights are `[out, in]` as in HF, with two fusions that save kernel launches while
decoding:

- `self_attn.qkv_proj`: for each key-value head its G query heads, then its key, then its value;
- `mlp.gate_up_proj`: rows 2i and 2i + 1 are row i of HF's gate_proj and up_proj.

What belongs to one key-value head, or one feed-forward unit, lies together: sharding the output rows needs no
reshuffling. Where the config says so, the feed-forward is one of experts (`models/experts.py`).
`models/tensors.py` maps HF's tensors to these names and back, be they fused in the files or not.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxgen.attention import (
    Rotation,
    Scoring,
    allowed_in_prompt,
    attend_to_prompt,
    attention_weights,
    rope,
    rotate,
    rotate_queries,
)
from jaxgen.cache import LayerCache, Reading
from jaxgen.models.config import NORMS, DecoderConfig
from jaxgen.models.experts import SparseMLP
from jaxgen.models.layers import Embedding, Linear, RMSNorm, scaled
from jaxgen.residual import add_and_norm
from jaxgen.shards import parts

# flax 0.11.2 (Colab) keeps submodules in plain lists; 0.12 needs to be told that a list holds them.
_module_list = getattr(nnx, "List", list)


def rotations(
    config: DecoderConfig, positions: Int[Array, "B T"], dtype: jnp.dtype, ends: Int[Array, " B"] | None = None
) -> list[Rotation | None]:
    """The rotary tables of `positions` for each layer; layers of one base and scaling share theirs. `ends`: `rope`."""
    dtype = jnp.dtype("float32") if config.rotates_in_float32 else dtype
    tables = {
        given: None if given is None else rope(positions, config.rotary_size, given[0], dtype, given[1], ends)
        for given in dict.fromkeys(config.ropes)
    }
    return [tables[given] for given in config.ropes]


def norm(config: DecoderConfig, size: int, dtype: jnp.dtype, over: str | None = None) -> RMSNorm:
    """A norm over `size` numbers, with the arithmetic of the family."""
    offset, in_float32 = config.norm_offset, config.norms_in_float32
    return RMSNorm(size, config.rms_norm_eps, offset=offset, in_float32=in_float32, over=over, dtype=dtype)


_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; a sliding window, biases and norms per head where configured."""

    def __init__(self, config: DecoderConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.all_kv_heads, self.groups = config.num_key_value_heads, config.query_groups
        self.head_dim, self.window = config.head_size, config.layer_windows[index]
        fused, mixed = self.all_kv_heads * (self.groups + 2) * self.head_dim, config.num_attention_heads * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, fused, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(mixed, config.hidden_size, bias=config.o_bias, inputs="heads", dtype=dtype, rngs=rngs)
        if config.qk_norm:
            whole = config.qk_norm == "whole"
            heads, over = ((config.num_attention_heads, self.all_kv_heads), "heads") if whole else ((1, 1), None)
            self.q_norm, self.k_norm = (norm(config, count * self.head_dim, dtype, over) for count in heads)
        self.qk_norm = config.qk_norm
        multiplier = config.attention_multiplier
        scale = self.head_dim**-0.5 if multiplier is None else multiplier
        self.scoring = Scoring(scale, config.attn_logit_softcapping)

    @property
    def kv_heads(self) -> int:
        """Those that are here: on a mesh a device has a part of them."""
        return self.all_kv_heads // parts("heads")

    def project(
        self, x: Float[Array, "B T D"], rotation: Rotation | None
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
        if self.qk_norm == "head":
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if self.qk_norm == "whole":
            rows = fused.shape[:-3]
            queries = self.q_norm(queries.reshape(*rows, -1)).reshape(queries.shape)
            keys = self.k_norm(keys.reshape(*rows, -1)).reshape(keys.shape)
        return queries, keys, values

    def output(self, mixed: Float[Array, "B T K G H"]) -> Float[Array, "B T D"]:
        """Mix the heads."""
        return self.o_proj(mixed.reshape(*mixed.shape[:2], -1))


class MLP(nnx.Module):
    """Gated feed-forward."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = Linear(width, 2 * inner, bias=bias, dtype=dtype, rngs=rngs)
        self.activation = config.activation
        self.down_proj = Linear(inner, width, bias=bias, inputs="mlp", dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """`down(act(gate(x)) * up(x))`."""
        return self.down(self.gate_up_proj(x))

    def down(self, gate_up: Float[Array, "B T two_F"]) -> Float[Array, "B T D"]:
        """What follows `gate_up_proj`."""
        pairs = gate_up.reshape(*gate_up.shape[:2], -1, 2)
        return self.down_proj(_ACTIVATIONS[self.activation](pairs[..., 0]) * pairs[..., 1])

    def step(self, x: Float[Array, "R 1 D"], rows: int) -> Float[Array, "B 1 D"]:
        """Of the first rows only (`residual.add_and_norm`)."""
        return self.down(self.gate_up_proj(x)[:rows])


class DecoderLayer(nnx.Module):
    """One block: attention and feed-forward, each between the norms that it has, added to the residual stream."""

    def __init__(self, config: DecoderConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.self_attn = Attention(config, index, dtype=dtype, rngs=rngs)
        routing = config.routing(index)
        self.mlp = (
            MLP(config, dtype=dtype, rngs=rngs)
            if routing is None
            else SparseMLP(config.hidden_size, routing, dtype=dtype, rngs=rngs)
        )
        for name in filter(None, NORMS[config.norms]):
            setattr(self, name, norm(config, config.hidden_size, dtype))
        self.norms, self.residual_multiplier = config.norms, config.residual_multiplier

    def normed(self, place: int, x: Float[Array, "R T D"]) -> Float[Array, "R T D"]:
        """`x` normed, if there is a norm at a place of `NORMS`."""
        name = NORMS[self.norms][place]
        return x if name is None else getattr(self, name)(x)

    def before_attention(self, x: Float[Array, "R T D"]) -> Float[Array, "R T D"]:
        """What attention gets of the residual stream."""
        return self.normed(0, x)

    def before_mlp(self, x: Float[Array, "R T D"]) -> Float[Array, "R T D"]:
        """What the feed-forward gets of the residual stream."""
        return self.normed(2, x)

    def attended(self, mixed: Float[Array, "B T K G H"]) -> Float[Array, "B T D"]:
        """What attention adds to the residual stream."""
        return scaled(self.normed(1, self.self_attn.output(mixed)), self.residual_multiplier)

    def fed_forward(self, result: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the feed-forward adds to the residual stream, of what it gives."""
        return scaled(self.normed(3, result), self.residual_multiplier)

    def prompt(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation | None,
        positions: Int[Array, "B T"],
        real: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]]:
        """A whole prompt at once; also returns its keys and values."""
        attention = self.self_attn
        with jax.named_scope("attention"):
            queries, keys, values = attention.project(self.before_attention(x), rotation)
            mixed = attend_to_prompt(queries, keys, values, positions, real, attention.window, attention.scoring)
            x = x + self.attended(mixed)
        with jax.named_scope("mlp"):
            x = x + self.fed_forward(self.mlp(self.before_mlp(x)))
        # Together, or XLA:GPU may keep the fused projections of all layers until it takes the keys and values out.
        x, keys, values = jax.lax.optimization_barrier((x, keys, values))
        return x, (keys, values)

    def step(
        self,
        x: Float[Array, "B 1 D"],
        delta: Float[Array, "B 1 D"],
        rotation: Rotation | None,
        reading: Reading,
        cache: LayerCache,
    ) -> tuple[Float[Array, "B 1 D"], Float[Array, "B 1 D"], LayerCache]:
        """One token per row, against the cache that it is first written to.

        `delta` has yet to be added to the residual stream `x`; so has the one that is returned with it.
        """
        rows = len(x)
        with jax.named_scope("attention"):
            x, normed = add_and_norm(x, delta, self.before_attention)
            queries, keys, values = (heads[:rows] for heads in self.self_attn.project(normed, rotation))
            mixed, cache = cache.attend(queries, keys, values, reading, self.self_attn.scoring)
            delta = self.attended(mixed)
        with jax.named_scope("mlp"):
            x, normed = add_and_norm(x, delta, self.before_mlp)
            return x, self.fed_forward(self.mlp.step(normed, rows)), cache

    def extend(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation | None,
        reading: Reading,
        cache: LayerCache,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Several tokens per row, against the cache that they are first written to."""
        with jax.named_scope("attention"):
            queries, keys, values = self.self_attn.project(self.before_attention(x), rotation)
            mixed, cache = cache.attend(queries, keys, values, reading, self.self_attn.scoring)
            x = x + self.attended(mixed)
        with jax.named_scope("mlp"):
            return x + self.fed_forward(self.mlp(self.before_mlp(x))), cache

    def activations(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation | None,
        positions: Int[Array, "B T"],
        real: Bool[Array, "B T"],
        with_attentions: bool,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B N T T"] | None]:
        """What a whole prompt becomes, and on request how much each token reads of each other one."""
        after, _ = self.prompt(x, rotation, positions, real)
        if not with_attentions:
            return after, None
        queries, keys, _ = self.self_attn.project(self.before_attention(x), rotation)
        allowed = allowed_in_prompt(positions, real, self.self_attn.window, 0, x.shape[1])
        weights = attention_weights(queries, jnp.moveaxis(keys, 1, 2), allowed, self.self_attn.scoring)
        return after, weights.reshape(len(x), -1, *weights.shape[3:])


class Decoder(nnx.Module):
    """Embeddings, blocks and final norm: everything but the head."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        multiplier = config.embedding_multiplier
        if config.rounds_embedding_multiplier:
            multiplier = float(np.asarray(multiplier, dtype))
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, multiplier=multiplier, dtype=dtype, rngs=rngs
        )
        layers = [DecoderLayer(config, index, dtype=dtype, rngs=rngs) for index in range(config.num_hidden_layers)]
        self.layers = _module_list(layers)
        self.norm = norm(config, config.hidden_size, dtype)
