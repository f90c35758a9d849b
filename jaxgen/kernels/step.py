"""One decode step made of kernels: what `MistralForCausalLM.step` computes, in five launches per layer for one row.

The residual stream is carried as `x` and `delta`: parts that have yet to be added to it, or None. One row adds them
where they arise, in the epilogue of its product, and normalises in the prologue of the next; more rows do both in
`add_norm`, because the sums of their products come in parts.
"""

import dataclasses
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.cache import KVCache, LayerCache
from jaxgen.kernels import tiles
from jaxgen.kernels.add_norm import add_norm
from jaxgen.kernels.attend import attend
from jaxgen.kernels.dense_row import dense_row_product
from jaxgen.kernels.int4_row import int4_row_product
from jaxgen.kernels.int4_rows import as_columns, columns_for, int4_rows_product
from jaxgen.linear import linear
from jaxgen.quant.adapted import Adapted
from jaxgen.quant.int4 import Int4
from jaxgen.quant.matmul import matmul

MOST_ROWS = 64  # of a product; more are worth unpacking the weight for


def decode_step(
    model: Any, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: KVCache, interpret: bool = False
) -> tuple[Float[Array, "B V"], KVCache]:
    """Read one token per row at `positions`: float32 logits for the next one, and the cache that holds it."""
    x, delta, caches = model.model.embed_tokens(tokens), None, []
    rotation = model.rotation(positions[:, None])
    rotation = rotation[0][:, 0], rotation[1][:, 0]
    for layer, before in zip(model.model.layers, cache, strict=True):
        x, delta, after = _layer(layer, x, delta, rotation, positions, before, interpret)
        caches.append(after)
    with jax.named_scope("lm_head"):
        tied = model.config.tie_word_embeddings
        head = model.model.embed_tokens.weight[...] if tied else model.lm_head.weight[...]
        _, logits = normed_product(x, delta, model.model.norm, head, interpret=interpret)
    return logits[:, : len(tokens)].astype(jnp.float32).sum(0), caches


def _layer(
    layer: Any, x: Array, delta: Array | None, rotation: Any, positions: Array, cache: LayerCache, interpret: bool
) -> tuple[Array, Array | None, LayerCache]:
    attention, mlp, rows = layer.self_attn, layer.mlp, len(x)
    with jax.named_scope("attention"):
        x, qkv = normed_product(x, delta, layer.input_layernorm, attention.qkv_proj.weight[...], interpret=interpret)
        qkv = qkv.reshape(*qkv.shape[:2], attention.kv_heads, attention.groups + 2, attention.head_dim)
        output = attention.o_proj.weight[...]
        columns = columns_for(rows) if _reads_columns(output, rows) else 0
        mixed, cache = attend(qkv, rotation, positions, cache, attention.window, columns=columns, interpret=interpret)
        mixed = mixed if columns else mixed.reshape(rows, -1)
        x, delta = product_onto(x, mixed, output, columns=bool(columns), interpret=interpret)
    with jax.named_scope("mlp"):
        norm, gate_up = layer.post_attention_layernorm, mlp.gate_up_proj.weight[...]
        x, hidden = normed_product(x, delta, norm, gate_up, swiglu=True, interpret=interpret)
        columns = _reads_columns(gate_up, rows)
        hidden = hidden if columns else hidden[0]
        x, delta = product_onto(x, hidden, mlp.down_proj.weight[...], columns=columns, interpret=interpret)
    return x, delta, cache


def normed_product(
    x: Float[Array, "B D"], delta: Array | None, norm: Any, weight: Any, *, swiglu: bool = False, interpret: bool
) -> tuple[Float[Array, "B D"], Array]:
    """`x + delta`, and the product of its norm with a weight in S parts, `[S, M, O]` with at least B rows.

    With `swiglu` its activations: in one part, or as columns where the weight reads columns.
    """
    rows, scaled = len(x), (norm.weight[...], norm.eps)
    if delta is None and rows == 1:
        result = _row_product(x, weight, norm=scaled, swiglu=swiglu, interpret=interpret)
        if result is not None:
            return x, result[None]
    if _reads_columns(weight, rows):
        x, normed = add_norm(x, delta, *scaled, columns=columns_for(rows), interpret=interpret)
        return x, _rows_product(normed, weight, rows, swiglu, interpret)
    x, normed = add_norm(x, delta, *scaled, interpret=interpret)
    return x, product(normed, weight, swiglu, interpret)


def product_onto(
    x: Float[Array, "B D"], y: Array, weight: Any, *, columns: bool, interpret: bool
) -> tuple[Float[Array, "B D"], Array | None]:
    """`x + y @ weight.T`: added, or with what is yet to be added. `columns`: y is `[I, M]`, and not `[B, I]`."""
    rows = len(x)
    if rows == 1:
        result = _row_product(y, weight, residual=x, interpret=interpret)
        if result is not None:
            return result, None
    if _reads_columns(weight, rows):
        return x, _rows_product(y if columns else as_columns(y), weight, rows, False, interpret)
    return x, product(y.T[:rows] if columns else y, weight, False, interpret)


def _reads(weight: Any) -> TypeGuard[Int4]:
    """Whether the int4 kernels read this weight as it is."""
    return isinstance(weight, Int4) and bool(weight.planar) and weight.permutation is None


def _reads_columns(weight: Any, rows: int) -> bool:
    """Whether it is the kernel for several rows that reads it."""
    return _reads(weight) and 1 < rows <= MOST_ROWS


def _row_product(x: Float[Array, "1 I"], weight: Any, **around: Any) -> Array | None:
    """The product of one row with what stands `around` it, or None where no kernel does both."""
    if isinstance(weight, jax.Array) and weight.dtype == x.dtype:
        return dense_row_product(x, weight, **around)
    return int4_row_product(x, weight, tile=tiles.row_tile(*weight.shape), **around) if _reads(weight) else None


def _rows_product(x: Float[Array, "I M"], weight: Int4, rows: int, swiglu: bool, interpret: bool) -> Array:
    tile = tiles.rows_tile(rows, *weight.shape, swiglu)
    return int4_rows_product(x, weight, swiglu=swiglu, tile=tile, interpret=interpret)


def product(
    x: Float[Array, "B I"], weight: Any, swiglu: bool = False, interpret: bool = False
) -> Float[Array, "1 B O"]:
    """A product that stands alone: of a permuted weight, of one with an adapter, or XLA's own."""
    if isinstance(weight, Int4) and weight.planar and weight.permutation is not None:
        x, weight = jnp.take(x, weight.permutation, axis=-1), dataclasses.replace(weight, permutation=None)
    if isinstance(weight, Adapted):
        base = product(x, weight.base, False, interpret).astype(jnp.float32)[0]
        result = (base + linear(linear(x, weight.down), weight.up)).astype(x.dtype)
    elif _reads(weight) and len(x) == 1:
        result = int4_row_product(x, weight, tile=tiles.row_tile(*weight.shape), interpret=interpret)
    elif _reads_columns(weight, len(x)):
        parts = _rows_product(as_columns(x), weight, len(x), False, interpret)
        result = parts[:, : len(x)].astype(jnp.float32).sum(0).astype(x.dtype)
    else:
        result = matmul(x, weight)
    if swiglu:
        pairs = result.reshape(len(x), -1, 2)
        result = jax.nn.silu(pairs[..., 0]) * pairs[..., 1]
    return result[None]
