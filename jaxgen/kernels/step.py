"""One decode step made of kernels: what `DecoderForCausalLM.step` computes, in five launches per layer for one row.

And `extend`, of a few tokens per row: they are so many rows of every product.

The residual stream is carried as `x` and `delta`: parts that have yet to be added to it, or None. One row adds them
where they arise, in the epilogue of its product, and normalises in the prologue of the next; more rows do both in
`add_norm`, because the sums of their products come in parts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.cache import KVCache, LayerCache, Reading
from jaxgen.kernels.add_norm import add_norm
from jaxgen.kernels.int4_rows import as_columns, columns_for
from jaxgen.kernels.products import Products
from jaxgen.quant.weight import as_weight
from jaxgen.shards import divided, joined, summed


def decode_step(
    model: Any, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: KVCache, interpret: bool = False
) -> tuple[Float[Array, "B V"], KVCache]:
    """Read one token per row at `positions`: float32 logits for the next one, and the cache that holds it."""
    x, delta, caches = _layers(model, tokens, Reading.one(positions), cache, interpret)
    with jax.named_scope("lm_head"):
        tied = model.config.tie_word_embeddings
        head = as_weight(model.model.embed_tokens.weight[...] if tied else model.lm_head.weight[...])
        _, logits = normed_product(x, delta, model.model.norm, head.kernels(interpret), interpret)
    return joined(logits[:, : len(tokens)].astype(jnp.float32).sum(0), "vocab"), caches


def extend(
    model: Any,
    tokens: Int[Array, "B T"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
    cache: KVCache,
    interpret: bool = False,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Read up to T tokens per row, of which the first `counts` are real: hidden states, and the cache."""
    reading = Reading.several(starts, counts, tokens.shape[1])
    x, delta, caches = _layers(model, tokens.reshape(-1), reading, cache, interpret)
    norm = model.model.norm
    _, hidden = add_norm(x, delta, norm.weight[...], norm.eps, interpret=interpret)
    return hidden.reshape(*tokens.shape, -1), caches


def _layers(
    model: Any, tokens: Int[Array, " R"], reading: Reading, cache: KVCache, interpret: bool
) -> tuple[Array, Array | None, KVCache]:
    """The residual stream after all layers, as two addends, and the cache."""
    x, delta, caches = model.model.embed_tokens(tokens), None, []
    [rotation, *_] = model.rotations(reading.positions)  # the same for all layers of what runs here
    cosine, sine, scale = rotation
    rotation = cosine.reshape(len(tokens), -1), sine.reshape(len(tokens), -1)
    scale = None if scale is None else scale.reshape(-1, 1, 1, 1)
    for layer, before in zip(model.model.layers, cache, strict=True):
        x, delta, after = _layer(layer, x, delta, rotation, scale, reading, before, interpret)
        caches.append(after)
    return x, delta, caches


def _layer(
    layer: Any,
    x: Array,
    delta: Array | None,
    rotation: Any,
    query_scale: Array | None,
    reading: Reading,
    cache: LayerCache,
    interpret: bool,
) -> tuple[Array, Array | None, LayerCache]:
    attention, mlp, rows = layer.self_attn, layer.mlp, len(x)
    qkv_proj, o_proj, gate_up_proj, down_proj = (
        as_weight(linear.weight[...]).kernels(interpret)
        for linear in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    )
    with jax.named_scope("attention"):
        x, qkv = normed_product(x, delta, layer.input_layernorm, qkv_proj, interpret)
        qkv = qkv.reshape(*qkv.shape[:2], attention.kv_heads, attention.groups + 2, attention.head_dim)
        qkv = _finished_heads(attention, qkv, query_scale, x.dtype)
        columns = columns_for(rows) if o_proj.reads_columns(rows) else 0
        mixed, cache = cache.attend_by_kernel(qkv, rotation, reading, columns=columns, interpret=interpret)
        mixed = mixed if columns else mixed.reshape(rows, -1)
        x, delta = product_onto(x, mixed, o_proj, columns=bool(columns), over=attention.o_proj.inputs)
    with jax.named_scope("mlp"):
        x, hidden = normed_product(x, delta, layer.post_attention_layernorm, gate_up_proj, interpret, swiglu=True)
        columns = gate_up_proj.reads_columns(rows)
        x, delta = product_onto(
            x, hidden if columns else hidden[0], down_proj, columns=columns, over=mlp.down_proj.inputs
        )
    return x, delta, cache


def _finished_heads(
    attention: Any, qkv: Float[Array, "S M K P H"], query_scale: Array | None, dtype: Any
) -> Float[Array, "S M K P H"]:
    """Biases, norms and scales of heads, which the kernel of attention knows nothing of: one launch, made by XLA."""
    bias = attention.qkv_proj.bias
    if bias is None and not attention.qk_norm and query_scale is None:
        return qkv
    total = qkv.astype(jnp.float32).sum(0).astype(dtype)
    if bias is not None:
        total = total + bias[...].reshape(total.shape[1:])
    queries, keys, values = attention.heads(total)
    if query_scale is not None:  # before they are rotated, which is the same but for the rounding
        queries = jnp.concatenate([queries[: len(query_scale)] * query_scale, queries[len(query_scale) :]])
    return jnp.concatenate([queries, keys[..., None, :], values[..., None, :]], axis=-2)[None]


def normed_product(
    x: Float[Array, "B D"], delta: Array | None, norm: Any, weight: Products, interpret: bool, swiglu: bool = False
) -> tuple[Float[Array, "B D"], Array]:
    """`x + delta`, and the product of its norm with a weight in S parts, `[S, M, O]` with at least B rows.

    With `swiglu` its activations: in one part, or as columns where the weight reads columns.
    """
    rows, scaled = len(x), (norm.weight[...], norm.eps)
    if delta is None and rows == 1:
        result = weight.row(x, norm=scaled, swiglu=swiglu)
        if result is not None:
            return x, result[None]
    if weight.reads_columns(rows):
        x, normed = add_norm(x, delta, *scaled, columns=columns_for(rows), interpret=interpret)
        return x, weight.columns(normed, rows, swiglu)
    x, normed = add_norm(x, delta, *scaled, interpret=interpret)
    return x, product(normed, weight, swiglu)


def product_onto(
    x: Float[Array, "B D"], y: Array, weight: Products, *, columns: bool, over: str | None
) -> tuple[Float[Array, "B D"], Array | None]:
    """`x + y @ weight.T`: added, or with what is yet to be added. `columns`: y is `[I, M]`, and not `[B, I]`.

    On a mesh whose devices have a part of y each (`over`), the parts are summed first.
    """
    rows, whole = len(x), not divided(over)
    if rows == 1:
        result = weight.row(y, residual=x if whole else None)
        if result is not None:
            return (result, None) if whole else (x, summed(result, over)[None])
    if weight.reads_columns(rows):
        delta = weight.columns(y if columns else as_columns(y), rows)
    else:
        delta = product(y.T[:rows] if columns else y, weight)
    return x, delta if whole else summed(delta.astype(jnp.float32).sum(0), over).astype(x.dtype)[None]


def product(x: Float[Array, "B I"], weight: Products, swiglu: bool = False) -> Float[Array, "1 B O"]:
    """A product that stands alone, or its activations."""
    result = weight.alone(x)
    if swiglu:
        pairs = result.reshape(len(x), -1, 2)
        result = jax.nn.silu(pairs[..., 0]) * pairs[..., 1]
    return result[None]
