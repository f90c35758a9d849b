"""A feed-forward of many experts, of which a router chooses a few for each token; the others are not computed.

Tokens are put into blocks that belong to one expert each, as many as the choice may need; a block reads its expert's
rows out of one matrix `[experts * out, in]` of all. So a token's sums have the same order wherever it lies and whatever
its neighbours choose, and no expert has a capacity that could run out.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgen.linear import product
from jaxgen.models.layers import Linear
from jaxgen.quant.weight import Weight, as_weight
from jaxgen.shards import divided, part, parts, summed

_FEWEST_ROWS, _MOST_ROWS = 16, 128  # of a block: fewer cost nearly as much, more pad too much
# Weights that a CPU takes out of the matrix at a time, to read them again at once; of one row so few that it takes and
# reads them in one thread, which then finds all of them in its own cache.
_AT_A_TIME, _FOR_ONE_ROW = 1 << 18, 1 << 15


@dataclasses.dataclass(frozen=True)
class Routing:
    """What a layer of experts is, and what HF's files call its tensors."""

    experts: int
    chosen: int  # for each token
    size: int  # units of each expert
    normalized: bool  # whether the shares of those chosen are made to add up to 1
    router: str  # "mlp.gate", within the layer
    tensors: tuple[str, ...]  # gate, up and down of expert {}: "mlp.experts.{}.gate_proj", ...

    def names(self, expert: int) -> list[str]:
        """Of an expert's gate, up and down, within the layer."""
        return [name.format(expert) for name in self.tensors]


class SparseMLP(nnx.Module):
    """Router and experts; called as a feed-forward. Source: transformers `MixtralSparseMoeBlock`."""

    def __init__(self, width: int, routing: Routing, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.routing = routing
        self.gate = Linear(width, routing.experts, dtype=dtype, rngs=rngs)
        self.experts = Experts(width, routing, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The outputs of each token's experts, added by their shares."""
        rows = x.reshape(-1, x.shape[-1])
        return self.experts(rows, *self.choose(rows)).reshape(x.shape)

    def step(self, x: Float[Array, "R 1 D"], rows: int) -> Float[Array, "B 1 D"]:
        """Of the first rows only (`residual.add_and_norm`)."""
        return self(x[:rows])

    def choose(self, x: Float[Array, "M D"]) -> tuple[Float[Array, "M k"], Int[Array, "M k"]]:
        """The shares of each token's experts, in float32 and falling, and which they are."""
        shares, chosen = jax.lax.top_k(jax.nn.softmax(self.gate(x).astype(jnp.float32)), self.routing.chosen)
        return shares / shares.sum(-1, keepdims=True) if self.routing.normalized else shares, chosen


class Experts(nnx.Module):
    """SwiGLU feed-forwards, stacked: rows of expert 0, rows of expert 1, and so on."""

    def __init__(self, width: int, routing: Routing, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.count = routing.experts
        self.gate_up_proj = Linear(width, self.count * 2 * routing.size, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(routing.size, self.count * width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "M D"], shares: Float[Array, "M k"], chosen: Int[Array, "M k"]
    ) -> Float[Array, "M D"]:
        """What the chosen experts make of each token, added by shares in float32."""
        if not divided("experts"):
            return self._added(x, shares, chosen, self.count, self.count).astype(x.dtype)
        # A device has some of the experts. To it all others are one more, which is not there and gives nothing.
        count = self.count // parts("experts")
        chosen = chosen - part("experts") * count
        here = (chosen >= 0) & (chosen < count)
        added = self._added(x, jnp.where(here, shares, 0), jnp.where(here, chosen, count), count, count + 1)
        return summed(added, "experts").astype(x.dtype)

    def _added(
        self, x: Float[Array, "M D"], shares: Float[Array, "M k"], chosen: Int[Array, "M k"], here: int, known: int
    ) -> Float[Array, "M D"]:
        tokens, owners, places = blocks(chosen, known)
        pairs = grouped(x[tokens], owners, self.gate_up_proj.weight[...], here).reshape(*tokens.shape, -1, 2)
        hidden = jax.nn.silu(pairs[..., 0]) * pairs[..., 1]
        outputs = grouped(hidden, owners, self.down_proj.weight[...], here).reshape(tokens.size, -1)
        return (outputs[places].astype(jnp.float32) * shares[..., None]).sum(1)


def block_rows(tokens: int, chosen: int, experts: int) -> int:
    """Rows of a block: about an expert's part of so many tokens, each of which it reads once at most."""
    if tokens == 1:
        return 1
    fair = _power_of_two(tokens * chosen / experts)
    return min(max(fair, _FEWEST_ROWS), _MOST_ROWS, _power_of_two(tokens))


def blocks(chosen: Int[Array, "M k"], experts: int) -> tuple[Int[Array, "N T"], Int[Array, " N"], Int[Array, "M k"]]:
    """The token of each row of each block, each block's expert, and the row where each choice lies, in all blocks.

    Blocks that are not needed come last, and their expert is one that is not there.
    """
    tokens, each = chosen.shape
    pairs, rows = tokens * each, block_rows(tokens, each, experts)
    flat, index = chosen.reshape(-1).astype(jnp.int32), jnp.arange(pairs, dtype=jnp.int32)
    if rows == 1:
        return (index // each)[:, None], flat, index.reshape(chosen.shape)
    count = min(pairs, experts if rows >= tokens else pairs // rows + experts)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    counts = jnp.zeros(experts, jnp.int32).at[flat].add(1)
    ends = jnp.cumsum(-(-counts // rows), dtype=jnp.int32)
    before, first = jnp.cumsum(counts, dtype=jnp.int32) - counts, ends - (-(-counts // rows))
    owner = flat[order]
    place = first[owner] * rows + index - before[owner]  # of the pairs in order
    places = jnp.zeros(pairs, jnp.int32).at[order].set(place)
    read = jnp.zeros(count * rows, jnp.int32).at[place].set(order // each)
    owners = jnp.searchsorted(ends, jnp.arange(count, dtype=jnp.int32), side="right").astype(jnp.int32)
    return read.reshape(count, rows), owners, places.reshape(chosen.shape)


def grouped(x: Float[Array, "N T I"], owners: Int[Array, " N"], weight: Any, experts: int) -> Float[Array, "N T O"]:
    """`x[n] @ weight_of(owners[n]).T`: a weight `[experts * O, I]`, an array or, not to be trained, a `Weight`."""
    if isinstance(weight, Weight):
        return _product(experts, x, owners, jax.lax.stop_gradient(weight))
    return _trained(experts, x, owners, weight)


def _product(experts: int, x: Float[Array, "N T I"], owners: Int[Array, " N"], weight: Weight) -> Float[Array, "N T O"]:
    forms = (functools.partial(_by_block, experts, on_cpu) for on_cpu in (True, False))
    return jax.lax.platform_dependent(x, owners, weight, **dict(zip(("cpu", "default"), forms, strict=True)))


def _by_block(
    experts: int, on_cpu: bool, x: Float[Array, "N T I"], owners: Int[Array, " N"], weight: Weight
) -> Float[Array, "N T O"]:
    """On a CPU, which copies what it takes out of a matrix, a part of an expert at a time."""
    rows, inputs = weight.shape[0] // experts, weight.shape[1]
    weights = _FOR_ONE_ROW if x.shape[1] == 1 else _AT_A_TIME
    count = _divisor(rows, weights // inputs) if on_cpu else rows

    @jax.checkpoint  # or a gradient would keep the rows, unpacked, of every block
    def part(x: Float[Array, "T I"], start: Int[Array, ""]) -> Float[Array, "T _"]:
        return weight.rows_from(start, count).matmul(x)

    def compute(x: Float[Array, "T I"], owner: Int[Array, ""]) -> Float[Array, "T O"]:
        if count == rows:
            return part(x, owner * rows)
        starts = owner * rows + jnp.arange(0, rows, count, dtype=jnp.int32)
        _, parts = jax.lax.scan(lambda _, start: (None, part(x, start)), None, starts)
        return jnp.moveaxis(parts, 0, 1).reshape(len(x), rows)

    def block(_: None, given: tuple[Array, Array]) -> tuple[None, Array]:
        x, owner = given
        if not on_cpu and not divided("experts"):  # where asking costs more than computing what is not needed
            return None, compute(x, owner)
        nothing = jnp.zeros((len(x), rows), x.dtype)
        return None, jax.lax.cond(owner < experts, lambda: compute(x, owner), lambda: nothing)

    return jax.lax.scan(block, None, (x, owners))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _trained(
    experts: int, x: Float[Array, "N T I"], owners: Int[Array, " N"], weight: Float[Array, "EO I"]
) -> Float[Array, "N T O"]:
    """JAX's own gradient would add a matrix of all experts, mostly zeros, for each piece that is taken out of it."""
    return _product(experts, x, owners, as_weight(weight))


def _forward(experts: int, x: Array, owners: Array, weight: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _trained(experts, x, owners, weight), (x, owners, weight)


def _backward(experts: int, kept: tuple[Array, Array, Array], gradient: Float[Array, "N T O"]) -> tuple[Any, ...]:
    x, owners, weight = kept
    rows = len(weight) // experts

    def block(total: Float[Array, "EO I"], given: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x, owner, gradient = given  # which is zero in blocks that are not needed
        start = jnp.minimum(owner, experts - 1) * rows
        own = jax.lax.dynamic_slice_in_dim(total, start, rows)
        own += product("to,ti->oi", gradient, x, preferred_element_type=jnp.float32)
        backwards = product("to,oi->ti", gradient, jax.lax.dynamic_slice_in_dim(weight, start, rows))
        return jax.lax.dynamic_update_slice_in_dim(total, own, start, 0), backwards

    total, backwards = jax.lax.scan(block, jnp.zeros(weight.shape, jnp.float32), (x, owners, gradient))
    return backwards.astype(x.dtype), np.zeros(owners.shape, jax.dtypes.float0), total.astype(weight.dtype)


_trained.defvjp(_forward, _backward)


def _power_of_two(number: float) -> int:
    """The least one that is not below a number of at least 1."""
    return 1 << max(math.ceil(number) - 1, 0).bit_length()


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is not above `most`, or 1."""
    parts = next(parts for parts in range(1, number + 1) if number % parts == 0 and number // parts <= max(most, 1))
    return number // parts
