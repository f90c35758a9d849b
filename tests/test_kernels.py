"""GPU kernels in interpret mode, on any machine: against float64 numpy, and against the model's own step.

What a GPU's compiler makes of them stands in tests/aot, what a GPU computes in `benchmarks/gpu.py --parts check`.
"""

import dataclasses
import warnings
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from jaxgen import MistralConfig, MistralForCausalLM, Phi3Config, Phi3ForCausalLM
from jaxgen.cache import Int8Slots, LayerCache, held_positions, to_int8
from jaxgen.convert.load import _place
from jaxgen.generation.programs.stages import Stage
from jaxgen.generation.programs.structure import value_of
from jaxgen.kernels import backend, dense_row, dense_rows, int4_row, int4_rows, step, tiles
from jaxgen.kernels.add_norm import add_norm
from jaxgen.kernels.attend import attend, splits_for, takes
from jaxgen.kernels.products import AdaptedProducts
from jaxgen.kernels.write_down import write_down
from jaxgen.lowering import Target, device_runs_kernels, tracing_for
from jaxgen.models import causal_lm
from jaxgen.models.layers import QuantizedWeight
from jaxgen.parallel.layout import Layout
from jaxgen.quant import Int4, Lookup4, int4_matmul, quantize
from jaxgen.quant.adapted import Adapted
from tests.helpers import SOAK, some_slow

# Relative error, in norm, of a result that is rounded once; bfloat16 products round scaled weights too.
CLOSE = {jnp.bfloat16: 4e-3, jnp.float16: 5e-4}
EPS = 1e-5


def relative(got: Any, expected: np.ndarray) -> float:
    got = np.asarray(got, np.float64)
    assert got.shape == expected.shape
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), dtype)


def codes(weight: Int4 | Lookup4) -> np.ndarray:
    """The weight in float64, from its bytes, by the format's own words."""
    packed = np.asarray(weight.packed)
    q = np.stack([packed & 15, packed >> 4], -1).reshape(*weight.scale.shape, -1).astype(np.int64)
    if isinstance(weight, Lookup4):
        return (wide(weight.table)[q] * wide(weight.scale)[..., None]).reshape(weight.shape)
    q = np.where(q > 7, q - 16, q) * wide(weight.scale)[..., None]
    return (q if weight.offset is None else q + wide(weight.offset)[..., None]).reshape(weight.shape)


def int4_weight(rng: np.random.Generator, out: int, inputs: int, group: int, offset: bool) -> Int4:
    packed = jnp.asarray(rng.integers(0, 256, (out, inputs // 2), np.uint8))
    shape = (out, inputs // group)
    scale = jnp.asarray(rng.uniform(0.002, 0.02, shape) * rng.choice([-1, 1], shape), jnp.bfloat16)
    return Int4(packed, scale, jnp.asarray(rng.uniform(-0.05, 0.05, shape), jnp.bfloat16) if offset else None)


def table_weight(rng: np.random.Generator, out: int, inputs: int, block: int) -> Lookup4:
    packed = jnp.asarray(rng.integers(0, 256, (out, inputs // 2), np.uint8))
    scale = jnp.asarray(rng.uniform(0.02, 0.1, (out, inputs // block)), jnp.float32)
    return Lookup4(packed, scale, jnp.asarray(rng.uniform(-1, 1, 16), jnp.float32))


def swiglu(h: np.ndarray) -> np.ndarray:
    gate, up = h[:, ::2], h[:, 1::2]
    return gate / (1 + np.exp(-gate)) * up


def normed(x: np.ndarray, weight: Any) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * wide(weight)


# Columns: those of 7B shapes cut down, with odd numbers of groups (43 and 86 of 11008; 3, 6 and 12 of 768 and 1536).
SHAPES = [
    (24, 1024, 128, False, jnp.bfloat16),
    (10, 768, 32, True, jnp.bfloat16),
    (12, 11008 // 4, 32, False, jnp.float16),
    (8, 1024, 1024, False, jnp.bfloat16),  # whole rows
]


@pytest.mark.parametrize(
    ("out", "inputs", "group", "offset", "dtype"), some_slow(SHAPES, soak=lambda case: case[2] != 128)
)
def test_int4_products(out: int, inputs: int, group: int, offset: bool, dtype: Any):
    rng = np.random.default_rng(inputs + out)
    check_products(rng, int4_weight(rng, out, inputs, group, offset), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("out", "inputs", "block", "dtype"),
    some_slow(
        [(10, 768, 64, jnp.bfloat16), (8, 1024, 128, jnp.float16), (12, 11008 // 4, 32, jnp.float16)],
        lambda case: case[2] != 64,
    ),
)
def test_products_with_a_table(out: int, inputs: int, block: int, dtype: Any):
    rng = np.random.default_rng(inputs + out)
    check_products(rng, table_weight(rng, out, inputs, block), dtype)


def check_products(rng: np.random.Generator, stored: Int4 | Lookup4, dtype: Any) -> None:
    """Of one row and of five, with all that may stand around them."""
    (out, inputs), weight, exact = stored.shape, stored.for_kernels(), codes(stored)
    assert weight.planar == min(stored.group_size, 128)
    np.testing.assert_array_equal(weight.as_stored().packed, stored.packed)
    np.testing.assert_allclose(wide(weight.dequantize()), exact, atol=1e-6)

    x, norm_weight = normal(rng, (1, inputs), dtype), jnp.asarray(rng.uniform(0.5, 1.5, inputs), dtype)
    residual = normal(rng, (1, out), dtype)
    after_norm, tile = normed(wide(x), norm_weight) @ exact.T, int4_row.Tile(rows=8, blocks=8)
    one = {"weight": weight, "interpret": True}
    assert relative(int4_row.int4_row_product(x, tile=tile, **one), wide(x) @ exact.T) < CLOSE[dtype]
    ahead = dataclasses.replace(tile, ahead=True)
    around = {"norm": (norm_weight, EPS), "residual": residual}
    got = int4_row.int4_row_product(x, tile=ahead, **one, **around)
    assert relative(got, after_norm + wide(residual)) < CLOSE[dtype]
    got = int4_row.int4_row_product(x, tile=tile, swiglu=True, norm=(norm_weight, EPS), **one)
    assert relative(got, swiglu(after_norm)) < 2 * CLOSE[dtype]

    down, up = normal(rng, (3, inputs), dtype) / 16, normal(rng, (out, 3), dtype) / 16
    adapted = AdaptedProducts(Adapted(weight, down, up), interpret=True)
    whole = exact + wide(up) @ wide(down)
    got = adapted.row(x, norm=(norm_weight, EPS), residual=residual)
    assert relative(got, normed(wide(x), norm_weight) @ whole.T + wide(residual)) < CLOSE[dtype]
    got = adapted.row(x, norm=(norm_weight, EPS), swiglu=True)
    assert relative(got, swiglu(normed(wide(x), norm_weight) @ whole.T)) < 2 * CLOSE[dtype]

    rows = normal(rng, (5, inputs), dtype)
    columns = int4_rows.as_columns(rows)
    parts = int4_rows.int4_rows_product(columns, tile=int4_rows.Tile(outputs=16, splits=2), **one)
    assert parts.dtype == jnp.float32
    assert relative(wide(parts).sum(0)[:5], wide(rows) @ exact.T) < CLOSE[dtype]
    got = int4_rows.int4_rows_product(columns, tile=int4_rows.Tile(outputs=16), swiglu=True, **one)
    assert relative(got.T[:5], swiglu(wide(rows) @ exact.T)) < 2 * CLOSE[dtype]
    got = adapted.columns(columns, 5)
    assert relative(wide(got).sum(0)[:5], wide(rows) @ whole.T) < CLOSE[dtype]
    got = adapted.columns(columns, 5, swiglu=True)
    assert relative(got.T[:5], swiglu(wide(rows) @ whole.T)) < 2 * CLOSE[dtype]


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(
    rows=st.sampled_from([2, 7, 16, 33, 64]), seed=st.integers(0, 99), splits=st.sampled_from([1, 2, 4]),
    table=st.booleans(),
)  # fmt: skip
def test_a_row_does_not_know_its_neighbours(rows: int, seed: int, splits: int, table: bool):
    rng = np.random.default_rng(seed)
    stored = table_weight(rng, 16, 512, 64) if table else int4_weight(rng, 16, 512, 64, True)
    weight, x = stored.for_kernels(), normal(rng, (rows, 512), jnp.bfloat16)
    tile = int4_rows.Tile(outputs=16, splits=splits)
    base = int4_rows.int4_rows_product(int4_rows.as_columns(x), weight, tile=tile, interpret=True)
    others = normal(rng, (rows, 512), jnp.bfloat16).at[0].set(x[0]).at[-1].set(jnp.nan)
    got = int4_rows.int4_rows_product(int4_rows.as_columns(others), weight, tile=tile, interpret=True)
    np.testing.assert_array_equal(np.asarray(base[:, 0]), np.asarray(got[:, 0]))
    assert relative(base.astype(jnp.float32).sum(0)[:rows], wide(x) @ codes(stored).T) < 5e-3


@pytest.mark.parametrize(("out", "inputs", "dtype"), [(16, 1024, jnp.bfloat16), (10, 700, jnp.float16)])
def test_the_product_of_a_row_with_floats(out: int, inputs: int, dtype: Any):
    rng = np.random.default_rng(0)
    weight, x, residual = (normal(rng, shape, dtype) for shape in ((out, inputs), (1, inputs), (1, out)))
    norm_weight = jnp.asarray(rng.uniform(0.5, 1.5, inputs), dtype)
    after_norm = normed(wide(x), norm_weight) @ wide(weight).T
    got = dense_row.dense_row_product(x, weight, norm=(norm_weight, EPS), residual=residual, interpret=True)
    assert relative(got, after_norm + wide(residual)) < CLOSE[dtype]
    got = dense_row.dense_row_product(x, weight, norm=(norm_weight, EPS), swiglu=True, interpret=True)
    assert relative(got, swiglu(after_norm)) < CLOSE[dtype]


@pytest.mark.parametrize(("out", "inputs", "splits", "dtype"), [(24, 1024, 2, jnp.bfloat16), (10, 700, 3, jnp.float16)])
def test_the_product_of_some_rows_with_floats(out: int, inputs: int, splits: int, dtype: Any):
    rng = np.random.default_rng(0)
    weight, x = (normal(rng, shape, dtype) for shape in ((out, inputs), (5, inputs)))
    columns, exact = int4_rows.as_columns(x), wide(x) @ wide(weight).T
    tile = dense_rows.Tile(outputs=16, splits=splits)
    parts = dense_rows.dense_rows_product(columns, weight, tile=tile, interpret=True)
    assert parts.dtype == jnp.float32
    assert relative(wide(parts).sum(0)[:5], exact) < 1e-6
    got = dense_rows.dense_rows_product(columns, weight, swiglu=True, interpret=True)
    assert relative(got.T[:5], swiglu(exact)) < CLOSE[dtype]
    assert dense_rows.tile_for(4096, 14336, False).splits == 4
    assert dense_rows.tile_for(4096, 14336, True).splits == 1


@pytest.mark.parametrize(("width", "parts", "columns"), [(96, 0, 16), (128, 1, 0), (96, 3, 16)])
def test_add_norm(width: int, parts: int, columns: int):
    rng = np.random.default_rng(0)
    x, weight = normal(rng, (3, width), jnp.bfloat16), normal(rng, (width,), jnp.bfloat16)
    delta = normal(rng, (parts, 5, width), jnp.float32) if parts else None
    total, result = add_norm(x, delta, weight, EPS, columns=columns, interpret=True)
    exact = wide(x) + (0 if delta is None else wide(delta)[:, :3].sum(0))
    assert relative(total, exact) < 4e-3
    result = result.T[:3] if columns else result
    assert relative(result, normed(wide(total), weight)) < 6e-3


def test_each_row_has_its_number_written_into_its_slot():
    tables = jnp.zeros((3, 6), jnp.int32), jnp.ones((3, 6), jnp.float32)
    values = jnp.asarray([7, 8, 9], jnp.int32), jnp.asarray([0.5, jnp.nan, 0.25])
    slots = jnp.asarray([5, 6, 0], jnp.int32)  # 6 is past the end
    for got, table, value in zip(write_down(tables, slots, values, interpret=True), tables, values, strict=True):
        expected = np.array(table)
        expected[0, 5], expected[2, 0] = value[0], value[2]
        np.testing.assert_array_equal(got, expected)


def attended(qkv: Any, cos: Any, sin: Any, starts: list[int], counts: list[int], cache: LayerCache) -> Any:
    """Attention of a few new tokens per row in float64, as the text of the paper has it: over what a row remembers."""
    rows, window = len(starts), cache.window or 10**9
    qkv, cos, sin = (x.reshape(rows, -1, *x.shape[1:]) for x in (wide(qkv).sum(0), wide(cos), wide(sin)))
    (_, tokens, heads, projections, size), slots = qkv.shape, cache.slots

    def rotated(x: np.ndarray, row: int, token: int) -> np.ndarray:
        (first, second), c, s = np.split(x, 2, axis=-1), cos[row, token], sin[row, token]
        return np.concatenate([first * c - second * s, second * c + first * s], -1)

    keys, values = (
        wide(x.values) * wide(x.scales)[..., None] if isinstance(x, Int8Slots) else wide(x)
        for x in (cache.keys, cache.values)
    )
    keys, values = keys.copy(), values.copy()

    def stored(x: np.ndarray) -> np.ndarray:
        scale = np.abs(x).max() / 127
        return np.round(x / scale) * scale if isinstance(cache.keys, Int8Slots) else x

    out = np.zeros((rows, tokens, heads, projections - 2, size))
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        held = np.asarray(held_positions(jnp.asarray([start + count - 1]), slots))[0]
        for head in range(heads):
            for token in range(count):
                keys[row, head, (start + token) % slots] = stored(rotated(qkv[row, token, head, -2], row, token))
                values[row, head, (start + token) % slots] = stored(qkv[row, token, head, -1])
            for token in range(count):
                position = start + token
                seen = [s for s in range(slots) if 0 <= held[s] <= position and position - held[s] < window]
                scores = rotated(qkv[row, token, head, :-2], row, token) @ keys[row, head, seen].T / np.sqrt(size)
                weights = np.exp(scores - scores.max(1, keepdims=True))
                out[row, token, head] = weights / weights.sum(1, keepdims=True) @ values[row, head, seen]
    return out, keys, values


@pytest.mark.parametrize(
    ("parts", "groups", "size", "slots", "window", "splits", "block", "starts", "counts"),
    [
        (1, 4, 64, 256, None, 2, 32, [0, 77, 255], None),
        (4, 4, 32, 64, 64, 2, 32, [63, 64, 300], None),  # a ring that has turned; sums in parts
        (1, 4, 32, 128, 40, 4, 32, [5, 100, 500], None),  # a window with room for drafts
        (1, 4, 32, 96, None, 3, 32, [0, 31, 88], [5, 3, 8]),  # a few tokens: over the edge of a block
        (2, 7, 32, 48, 40, 2, 16, [44, 3, 500], [8, 1, 6]),  # ... and of a ring with a window
        pytest.param(2, 3, 64, 96, None, 1, 64, [63, 64, 95], None, marks=SOAK),
        pytest.param(1, 7, 64, 100, None, None, None, [0, 99, 50], None, marks=SOAK),
        pytest.param(2, 1, 128, 48, None, 3, 16, [0, 47, 10], None, marks=SOAK),
        pytest.param(2, 3, 64, 50, 45, 1, 16, [46, 7, 1], [5, 2, 5], marks=SOAK),
        pytest.param(1, 1, 64, 100, None, None, None, [0, 90, 50], [2, 1, 2], marks=SOAK),
    ],
)
@pytest.mark.parametrize("int8", [False, True])
def test_attention(
    parts: int, groups: int, size: int, slots: int, window: int | None, splits: int | None, block: int | None,
    starts: list[int], counts: list[int] | None, int8: bool,
):  # fmt: skip
    rng, dtype = np.random.default_rng(0), jnp.float32  # float32 shows a wrong index that bfloat16 would hide
    tokens = max(counts) if counts else 1
    lines, counts = 3 * tokens, counts or [1, 1, 1]
    qkv = normal(rng, (parts, lines, 2, groups + 2, size), dtype)
    held = [normal(rng, (3, 2, slots, size), dtype) for _ in range(2)]
    cache = LayerCache(*map(to_int8, held), window=window) if int8 else LayerCache(*held, window=window)
    angles = rng.uniform(0, 6, (lines, size // 2))
    rotation = jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)
    where, newest = jnp.asarray(starts, jnp.int32), jnp.asarray(np.add(starts, counts) - 1, jnp.int32)
    options: dict[str, Any] = {"newest": newest, "splits": splits, "block": block, "interpret": True}
    out, after = attend(qkv, rotation, where, cache, **options)
    expected, keys, values = attended(qkv, *rotation, starts, counts, cache)
    close, real = 2e-5, np.arange(tokens) < np.asarray(counts)[:, None]
    np.testing.assert_allclose(wide(out).reshape(expected.shape)[real], expected[real], atol=close)
    assert np.isfinite(wide(out)).all()  # of padding as well
    for got, exact in ((after.keys, keys), (after.values, values)):
        numbers = wide(got.values) * wide(got.scales)[..., None] if isinstance(got, Int8Slots) else wide(got)
        np.testing.assert_allclose(numbers, exact, atol=2 * close)
    columns, _ = attend(qkv, rotation, where, cache, columns=64, **options)
    np.testing.assert_array_equal(np.asarray(columns.T[:lines]).reshape(out.shape), np.asarray(out))


def test_a_few_tokens_are_as_many_as_fit_a_program():
    assert takes(1, 4)
    assert takes(8, 8)
    assert takes(16, 4)
    assert not takes(17, 1)
    assert not takes(16, 7)


def test_splits_fill_the_chip_and_no_more():
    assert [splits_for(rows, 8, 768)[0] for rows in (1, 8, 32, 64)] == [24, 4, 1, 1]
    assert splits_for(1, 8, 16) == (1, 32)


CONFIG = MistralConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, sliding_window=None,
)  # fmt: skip


PHI = Phi3Config(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, bos_token_id=None, eos_token_id=None, pad_token_id=None, sliding_window=4, rope_scaling={
        "rope_type": "longrope", "original_max_position_embeddings": 5, "short_factor": [1.0] * 16,
        "long_factor": [4.0] * 16,
    },
)  # fmt: skip


def permuted(weight: Int4, rng: np.random.Generator) -> Int4:
    return dataclasses.replace(weight, permutation=jnp.asarray(rng.permutation(weight.shape[1]), jnp.int32))


def model_of(kind: str) -> Any:
    """A random model in bfloat16 whose linear layers are of a kind, or a model of Phi, with rows that are long."""
    if kind == "phi":
        model = Phi3ForCausalLM(PHI, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        assert model._fits_kernels
        return model
    model, rng = MistralForCausalLM(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16), np.random.default_rng(0)
    if kind == "floats":
        return model
    for layer in model.model.layers:
        for linear in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
            dense = np.asarray(linear.weight[...], np.float32)
            weight: Any = jax.tree.map(jnp.asarray, quantize(dense, 32))
            if kind == "permuted":
                weight = permuted(weight, rng)
            if kind == "table":
                table = jnp.asarray(np.linspace(-1, 1, 16), jnp.float32)
                weight = Lookup4(weight.packed, jnp.abs(weight.scale) * 8, table)
            if kind == "adapted":
                down, up = (normal(rng, shape, jnp.bfloat16) / 16 for shape in ((4, dense.shape[1]), (len(dense), 4)))
                weight = Adapted(weight, down, up)
            linear.weight = QuantizedWeight(weight.for_kernels())
    return model


def more_of_a_kind(case: tuple[Any, ...]) -> bool:
    """Several rows, of weights that have a test with one."""
    return case[1] == 3 and case[0] in ("floats", "table", "adapted")


STEPS = [
    ("floats", 1, False),
    ("floats", 3, False),
    ("phi", 3, False),
    ("int4", 3, True),
    ("permuted", 3, False),
    ("table", 1, False),
    ("table", 3, False),
    ("adapted", 1, False),
    ("adapted", 3, False),
]


@pytest.mark.parametrize(
    ("kind", "rows", "int8"), some_slow(STEPS, lambda case: case[:2] != ("adapted", 1), more_of_a_kind)
)
def test_a_decode_step_of_kernels_is_the_model_s_step(kind: str, rows: int, int8: bool):
    """In bfloat16, so as near as two orders of rounding are; and the same cache."""
    model = model_of(kind)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 64, (rows, 6)), jnp.int32)
    lengths = jnp.arange(4, 4 + rows) % 3 + 3
    _, cache = model.prefill(tokens, lengths, 24, int8)
    newest, copies = tokens[:, -1], jax.tree.map(jnp.copy, cache)
    expected, before = model.step(newest, lengths, cache)
    logits, after = step.decode_step(model, newest, lengths, copies, interpret=True)
    assert logits.shape == expected.shape
    assert logits.dtype == jnp.float32
    assert relative(logits, wide(expected)) < 2e-2
    for got, wanted in zip(after, before, strict=True):
        for mine, theirs in zip(*(x.read(jnp.dtype("float32")) for x in (got, wanted)), strict=True):
            np.testing.assert_allclose(wide(mine), wide(theirs), atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "int8"), some_slow([("int4", True), ("floats", False)], lambda case: case[0] == "floats")
)
def test_a_few_tokens_by_kernels_are_the_model_s_own(kind: str, int8: bool):
    model, rng = model_of(kind), np.random.default_rng(1)
    tokens, lengths = jnp.asarray(rng.integers(0, 64, (2, 6)), jnp.int32), jnp.asarray([4, 6])
    _, cache = model.prefill(tokens, lengths, 24, int8)
    new, counts = jnp.asarray(rng.integers(0, 64, (2, 3)), jnp.int32), jnp.asarray([3, 2])
    copies = jax.tree.map(jnp.copy, cache)
    expected, before = model.extend(new, lengths, counts, cache)
    hidden, after = step.extend(model, new, lengths, counts, copies, interpret=True)
    real = np.arange(3) < np.asarray(counts)[:, None]
    assert relative(wide(hidden)[real], wide(expected)[real]) < 2e-2
    for got, wanted in zip(after, before, strict=True):
        for mine, theirs in zip(*(x.read(jnp.dtype("float32")) for x in (got, wanted)), strict=True):
            np.testing.assert_allclose(wide(mine), wide(theirs), atol=0.1)


def test_planar_order_is_only_a_layout():
    """XLA's own forms compute the same from it, bit for bit on CPU, and its bytes come back."""
    rng = np.random.default_rng(0)
    stored = int4_weight(rng, 16, 256, 64, True)
    x = normal(rng, (3, 256), jnp.float32)
    np.testing.assert_array_equal(int4_matmul(x, stored.for_kernels()).shape, (3, 16))
    assert relative(int4_matmul(x, stored.for_kernels()), wide(x) @ codes(stored).T) < 1e-5
    for odd in (int4_weight(rng, 16, 96, 48, False), table_weight(rng, 16, 96, 48)):
        assert odd.for_kernels() is odd  # groups that kernels do not read stay as they are
    assert stored.for_kernels().for_kernels().planar == 64
    table = table_weight(rng, 16, 256, 64)
    np.testing.assert_array_equal(table.for_kernels().dequantize(), table.dequantize())
    assert relative(table.for_kernels().matmul(x), wide(x) @ codes(table).T) < 1e-5


def test_tiles_cover_every_shape():
    for rows, out, inputs in [(2, 64, 256), (8, 6144, 4096), (64, 28672, 4096), (16, 4096, 14336), (3, 7, 11008)]:
        tile = tiles.rows_tile(rows, out, inputs, False)
        assert tile.splits in (1, 2, 4, 8)
        assert tiles.rows_tile(rows, out, inputs, True).splits == 1


def test_devices_that_run_kernels():
    def device(platform: str, capability: Any) -> Any:
        return type("Device", (), {"platform": platform, "compute_capability": capability})()

    runs = [("gpu", "9.0"), ("gpu", "8.0"), ("gpu", "12.0")]
    not_these = [("gpu", "7.5"), ("cpu", None), ("gpu", "gfx942"), ("tpu", "8.0")]
    assert all(device_runs_kernels(device(*d)) for d in runs)
    assert not any(device_runs_kernels(device(*d)) for d in not_these)
    assert not device_runs_kernels(jax.devices("cpu")[0])


def test_a_model_on_several_devices_is_not_for_kernels(monkeypatch: pytest.MonkeyPatch):
    """XLA would gather its weights for them."""
    monkeypatch.setattr(causal_lm, "device_runs_kernels", lambda device: True)
    model = MistralForCausalLM(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    assert model.decodes_with_kernels
    norm = SimpleNamespace(weight=SimpleNamespace(devices=lambda: {"first", "second"}, dtype=jnp.dtype("bfloat16")))
    monkeypatch.setattr(model.model, "norm", norm)
    assert not model.decodes_with_kernels


@pytest.mark.slow
def test_an_assistant_in_float32_beside_a_model_of_kernels_stays_in_float32():
    model = MistralForCausalLM(CONFIG, rngs=nnx.Rngs(0))
    _, cache = model.prefill(jnp.ones((1, 4), jnp.int32), jnp.full((1,), 4), 8)
    arguments = jnp.ones((1,), jnp.int32), jnp.full((1,), 4), cache
    with tracing_for(Target(gpu_decode=True, kernels=True)):  # on this platform a kernel would raise
        logits, _ = model.step(*arguments)
    np.testing.assert_allclose(logits, model.step(*arguments)[0], atol=1e-5)


def test_a_refused_kernel_is_not_the_users_affair(caplog: pytest.LogCaptureFixture):
    """Whatever a compiler raises, the other form runs, once and for all; an error of the user's own stays theirs."""

    def refuses(x: Any) -> Any:
        raise NotImplementedError("Unimplemented primitive")

    plain = Stage(lambda x: x + 1, lambda x: "plain")
    stage = Stage(refuses, lambda x: "fast", otherwise=plain)
    assert [int(stage(jnp.ones(()))) for _ in range(2)] == [2, 2]
    assert caplog.text.count("Unimplemented primitive") == 1

    both = Stage(refuses, lambda x: "fast", otherwise=Stage(refuses, lambda x: "plain"))
    for _ in range(2):
        with pytest.raises(NotImplementedError):
            both(jnp.ones(()))
    assert not both._refused


def test_no_warning_of_jax_reaches_a_user():
    x = jnp.ones((16, 16), jnp.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_norm(x, None, x[0], EPS, interpret=True)
        assert backend.dot(x, x, interpret=True).dtype == jnp.float32


# On a mesh, each device by its own kernels.


INTERPRETED = [("int4", 1), ("int4", 3), ("floats", 1), ("adapted", 3)]


@pytest.mark.parametrize("kind, rows", some_slow(INTERPRETED, lambda case: case != ("int4", 3), more_of_a_kind))
def test_kernels_on_a_mesh_compute_the_step(kind: str, rows: int):
    model = model_of(kind)
    tokens, lengths = jnp.asarray(np.random.default_rng(1).integers(0, 64, (rows, 6)), jnp.int32), jnp.full(rows, 5)
    _, cache = model.prefill(tokens, lengths, 16)
    expected, _ = model.step(tokens[:, -1], lengths, jax.tree.map(jnp.copy, cache))

    layout = Layout.of(Mesh(np.array(jax.devices()[:2]), ("model",)), model.config)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        _place(model, name, layout.put(model.config, name, jax.device_get(value_of(variable))))
    model.layout = layout
    step_of_each = lambda part, *args: step.decode_step(part, *args, interpret=True)  # noqa: E731
    run = jax.jit(lambda *args: model.as_traced()._each(step_of_each, args[:2], args[2], caches=True))
    logits, _ = run(tokens[:, -1], lengths, jax.device_put(cache, layout.everywhere))
    assert relative(logits, wide(expected)) < 2e-2
