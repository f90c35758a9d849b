"""The ways to write a product with int4 weights that compete in `gpu.py`, each with a check against float32.

A contest runs a chain of products with different weights, so that none is found in a cache, in one executable.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.lowering import Target, tracing_for
from jaxgen.quant import Int4, int4_matmul
from jaxgen.quant.matmul import FUSION_OPTIONS

GROUP = 128
COPIES, ROUNDS = 8, 4  # weights in turn, and turns, in one chain
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
TILES = [(16, 256, 1), (32, 128, 2), (64, 128, 4), (128, 128, 8)]  # of output columns and K; warps
# What XLA puts into CUDA graphs by default.
COMMAND_BUFFERS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL"

Form = Callable[[jax.Array, Int4], jax.Array]


@dataclasses.dataclass(frozen=True)
class Entrant:
    """One contest."""

    name: str
    layer: str
    shape: tuple[int, int]
    rows: int
    form: Form
    options: dict[str, Any]

    @property
    def what(self) -> dict[str, Any]:
        """What the row in the report is about."""
        return {"form": self.name, "layer": self.layer, "rows": self.rows}


def library(fuses: bool) -> Form:
    """jaxgen's own product, as decode runs it."""

    def form(x: jax.Array, weight: Int4) -> jax.Array:
        with tracing_for(Target(gpu_decode=True, fuses_int4=fuses)):
            return int4_matmul(x, weight)

    return form


def split(parts: int) -> Form:
    """The fused form with K in parts, added afterwards: more blocks for the narrow matrices."""

    def form(x: jax.Array, weight: Int4) -> jax.Array:
        rows = x.shape[0]
        x = jnp.concatenate([x, jnp.zeros_like(x)]) if rows == 1 else x  # or XLA makes a plain sum of it
        codes = jax.lax.bitcast_convert_type(weight.packed, jnp.int4).reshape(*weight.scale.shape, -1)
        dense = (codes.astype(x.dtype) * weight.scale[..., None].astype(x.dtype)).reshape(weight.shape[0], parts, -1)
        pieces = jnp.einsum("msk,nsk->smn", x.reshape(len(x), parts, -1), dense, preferred_element_type=jnp.float32)
        return pieces.sum(0)[:rows].astype(x.dtype)

    return form


def two_rows(x: jax.Array, weight: Int4) -> jax.Array:
    """The fused form beside a second row, as decode has it for one row."""
    return library(True)(jnp.concatenate([x, x]), weight)[: len(x)]


def dense(x: jax.Array, weight: jax.Array) -> jax.Array:
    """bfloat16 weights: what int4 is to beat."""
    return x @ weight.T


def entrants(tiny: bool) -> Iterator[Entrant]:
    """Everything worth timing, in the order in which it is wanted."""
    shapes = SHAPES if not tiny else {"tiny": (256, 256)}
    rows = (1, 8, 32) if not tiny else (1, 8)
    every = list(itertools.product(rows, shapes.items()))
    triton = FUSION_OPTIONS | {"xla_gpu_experimental_autotune_backends": "TRITON"}
    for count, (layer, shape) in every:
        yield Entrant("fused", layer, shape, count, library(True), FUSION_OPTIONS)
        yield Entrant("bf16", layer, shape, count, dense, {})
        yield Entrant("by groups", layer, shape, count, library(False), {})
    one = list(shapes.items())
    for layer, shape in one:
        yield Entrant("fused, two rows", layer, shape, 1, two_rows, FUSION_OPTIONS)
        yield Entrant("fused, triton only", layer, shape, 1, library(True), triton)
        for parts in (2, 4):
            yield Entrant(f"fused, K in {parts}", layer, shape, 1, split(parts), FUSION_OPTIONS)
    for layer, shape in one:
        for width, depth, warps in TILES:
            tile = (
                f"block_m: {width} block_n: 16 block_k: {depth} split_k: 1 num_stages: 4 num_warps: {warps} num_ctas: 1"
            )
            pinned = FUSION_OPTIONS | {"xla_gpu_override_gemm_autotuner": tile}
            yield Entrant(f"fused, tile {width}x{depth} w{warps}", layer, shape, 1, library(True), pinned)
    for layer, shape in one:
        one_graph = FUSION_OPTIONS | {"xla_gpu_enable_command_buffer": COMMAND_BUFFERS + ",WHILE"}
        yield Entrant("fused, one graph", layer, shape, 1, library(True), one_graph)
        cudnn = FUSION_OPTIONS | {"xla_gpu_cudnn_gemm_fusion_level": 2}
        yield Entrant("fused, cudnn", layer, shape, 1, library(True), cudnn)
        yield Entrant("unfused, default options", layer, shape, 1, library(True), {})


def run(entrant: Entrant, seconds_of: Callable[[Callable[[], Any]], float]) -> dict[str, Any]:
    """Microseconds per product, bandwidth, and the largest error against float32, relative to the largest result."""
    columns, width = entrant.shape
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((entrant.rows, width)), jnp.bfloat16)
    weights, exact = [], []
    for seed in range(COPIES):
        packed = jax.random.bits(jax.random.key(seed), (columns, width // 2), jnp.uint8)
        scale = 0.01 * (1 + jax.random.uniform(jax.random.key(seed), (columns, width // GROUP)))
        weight = Int4(packed, scale.astype(jnp.bfloat16))
        exact.append(weight)
        weights.append(jax.jit(lambda w: w.dequantize(jnp.bfloat16))(weight) if entrant.name == "bf16" else weight)

    # The number of rounds is an argument: XLA removes a loop that it knows to run once, and its fusion of int4
    # outside of loops has aborted the process (jaxlib 0.10.2).
    def chain(x: jax.Array, weights: list[Any], rounds: jax.Array) -> jax.Array:
        def turn(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            i, x, total = carry
            for weight in weights:  # products of one x would be merged into one, or moved out of the loop
                x, total = jax.lax.optimization_barrier((x, total + entrant.form(x, weight)))
            return i + 1, x, total

        start = (jnp.int32(0), x, jnp.zeros((entrant.rows, columns), x.dtype))
        return jax.lax.while_loop(lambda carry: carry[0] < rounds, turn, start)[2]

    compiled = jax.jit(chain, compiler_options=entrant.options)
    seconds = seconds_of(lambda: compiled(x, weights, jnp.int32(ROUNDS))) / (COPIES * ROUNDS)
    result = np.asarray(compiled(x, weights[:1], jnp.int32(1)), np.float32)
    with jax.default_matmul_precision("highest"):
        reference = np.asarray(x.astype(jnp.float32) @ exact[0].dequantize().T)
    read = jax.tree.leaves(weights[0])
    return {
        "us": round(1e6 * seconds, 2),
        "gb_s": round(sum(array.nbytes for array in read) / seconds / 1e9, 1),
        "error": float(f"{np.abs(result - reference).max() / np.abs(reference).max():.1e}"),
    }
