"""The layers of which blocks are made: linear, embedding, norm."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgen import shards
from jaxgen.quant.weight import Weight, matmul


def scaled(x: Float[Array, "*axes"], multiplier: float) -> Float[Array, "*axes"]:
    """`x * multiplier`, rounded once: JAX would round the number to x's dtype first, and torch does not."""
    return x if multiplier == 1 else (x.astype(jnp.float32) * multiplier).astype(x.dtype)


class QuantizedWeight(nnx.Variable):
    """A quantised `Weight` in the place of a Linear's `nnx.Param`: read, but never trained."""

    def __getitem__(self, index: Any) -> Weight:
        """`weight[...]`, as for an array."""
        return self.get_value() if hasattr(self, "get_value") else self.value  # flax before 0.12


class Linear(nnx.Module):
    """`x @ weight.T + bias`; weight `[out, in]`, of floats or quantised, bias `[out]` or None.

    `inputs` names what the inputs are divided along on a mesh: there a product is a part of a sum.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        inputs: str | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.inputs = inputs
        scale = in_features**-0.5
        weight = scale * jax.random.normal(rngs.params(), (out_features, in_features), dtype)
        self.weight: nnx.Param | QuantizedWeight = nnx.Param(weight)
        self.bias: nnx.Param | None = nnx.Param(jnp.zeros(out_features, dtype)) if bias else None

    def __call__(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        """Map the last axis from `in_features` to `out_features`."""
        product = shards.summed(matmul(x, self.weight[...]), self.inputs)
        return product if self.bias is None else product + self.bias[...]


class Embedding(nnx.Module):
    """Token embeddings `[V, D]`, also usable as an output head (`attend`) when weights are tied.

    What is looked up is multiplied by `multiplier`; the head is not.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, multiplier: float = 1.0, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.multiplier = multiplier
        scale = hidden_size**-0.5
        self.weight = nnx.Param(scale * jax.random.normal(rngs.params(), (vocab_size, hidden_size), dtype))

    def __call__(self, ids: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        """Look ids up; ids must lie inside the vocabulary."""
        return scaled(self._rows(ids), self.multiplier)

    def _rows(self, ids: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        table = self.weight[...]
        if not shards.divided("vocab"):
            return jnp.take(table, ids, axis=0)
        ids = ids - shards.part("vocab") * len(table)
        here = (ids >= 0) & (ids < len(table))
        return shards.summed(jnp.where(here[..., None], jnp.take(table, ids, axis=0, mode="clip"), 0), "vocab")

    def attend(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Logits against every embedding: the tied lm_head."""
        return matmul(x, self.weight[...])


class RMSNorm(nnx.Module):
    """Root-mean-square norm: computed in float32, cast back, then scaled in the compute dtype, as HF mostly does.

    `in_float32`: scaled before it is cast back. `offset`: what is added to the weights then. `over`: what the numbers
    are divided along on a mesh.
    """

    def __init__(
        self,
        size: int,
        eps: float,
        *,
        offset: float = 0.0,
        in_float32: bool = False,
        over: str | None = None,
        dtype: jnp.dtype,
    ):
        self.over = over
        self.weight = nnx.Param(jnp.full(size, 1 - offset, dtype))
        self.eps, self.offset, self.in_float32 = eps, offset, in_float32

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalise the last axis."""
        x32 = x.astype(jnp.float32)
        mean = shards.averaged(jnp.mean(jnp.square(x32), axis=-1, keepdims=True), self.over)
        normed = x32 * jax.lax.rsqrt(mean + self.eps)
        if self.in_float32:
            return ((self.offset + self.weight[...].astype(jnp.float32)) * normed).astype(x.dtype)
        return self.weight[...] * normed.astype(x.dtype)
