"""float16, which GPUs without bfloat16 compute in (Colab's T4): how near to float32 it is, and that nothing overflows.

It rounds eight times finer than bfloat16 and ends at 65504: what squares, sums or exponentiates must do so in
float32. Here every part is given numbers whose squares and partial sums are far beyond, and whose result is not.
"""

from functools import partial
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxgen
from jaxgen import attention, linear
from jaxgen.cache import LayerCache, layer_cache_from_prompt
from jaxgen.convert.placement import auto_dtype
from jaxgen.models.layers import RMSNorm
from jaxgen.models.mistral import MistralForCausalLM
from jaxgen.quant import Int4, int4_matmul, matmul
from jaxgen.quant.nibbles import pack
from jaxgen.text.tokenizer import load_tokenizer

HALF = np.float16
LARGEST = 65504.0
COMMON: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None}
TEXTS = ["A list of colors: red, blue", "A sequence of numbers: 1, 2, 3", "Portugal is"]


logits = nnx.jit(lambda model, ids, mask: model(ids, mask).logits)


@pytest.fixture(scope="module")
def inputs() -> Any:
    return load_tokenizer(jaxgen.demo.path())(TEXTS, padding=True, return_tensors="np")


@pytest.fixture(scope="module")
def load():
    loaded: dict[Any, Any] = {}

    def get(dtype: str, load_in_4bit: bool = False) -> MistralForCausalLM:
        if (dtype, load_in_4bit) not in loaded:
            loaded[dtype, load_in_4bit] = jaxgen.AutoModelForCausalLM.from_pretrained(
                jaxgen.demo.path(), dtype=dtype, load_in_4bit=load_in_4bit
            )
        return loaded[dtype, load_in_4bit]

    return get


@pytest.mark.slow
def test_logits_are_nearer_to_float32_than_those_of_bfloat16(load, inputs):
    """float16 has three more bits, so a ratio of about 8; 4 leaves room for which roundings meet.

    The logits reach 21, where float16's steps are 1/64: the head alone rounds by up to 1/128.
    """
    real = inputs["attention_mask"] == 1
    full, half, brain = (
        np.asarray(logits(load(dtype), inputs["input_ids"], inputs["attention_mask"]))[real]
        for dtype in ("float32", "float16", "bfloat16")
    )
    assert half.dtype == np.float32
    error = np.abs(half - full).max()
    assert 0 < error < 3 / 128
    assert 4 * error < np.abs(brain - full).max()


SAMPLING: dict[str, Any] = {"do_sample": True, "seed": 1, "top_k": 0}


@pytest.mark.parametrize(
    ("load_in_4bit", "options", "tolerance"),
    [
        (False, {}, 0.02),
        pytest.param(True, SAMPLING, 0.02, marks=pytest.mark.slow),
        pytest.param(False, {"num_beams": 2}, 0.003, marks=pytest.mark.slow),  # of a mean over 12 tokens
        # Which rounds keys and values to 8 bits.
        pytest.param(False, {"cache_implementation": "quantized", **SAMPLING}, 0.2, marks=pytest.mark.slow),
    ],
    ids=["greedy", "sampling from int4", "beams", "int8 cache"],
)
def test_what_is_generated_is_as_likely_in_float32(load, load_in_4bit: bool, options: dict[str, Any], tolerance: float):
    """Whatever way it was found: float32 gives each of its tokens the log-probability that float16 reports.

    The prompts are no text, which leaves the demo in doubt; bfloat16 would be off by 0.04, and beams by 0.004.
    """
    half, full = load("float16", load_in_4bit), load("float32", load_in_4bit)
    ids = np.random.default_rng(0).integers(5, 500, (3, 10))
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    found = half.generate(ids, attention_mask=mask, **COMMON, **options, return_dict_in_generate=True)
    new = found.sequences[:, 10:]
    assert new.shape == (3, 12)
    mask = np.concatenate([mask, np.ones_like(new)], axis=1)
    exact = np.asarray(logits(full, found.sequences, mask))[:, 9:-1]
    log_probs = np.take_along_axis(np.asarray(jax.nn.log_softmax(exact)), new[..., None], axis=-1)[..., 0]
    if "num_beams" in options:
        np.testing.assert_allclose(found.sequences_scores, log_probs.mean(axis=1), atol=tolerance)
    else:
        np.testing.assert_allclose(found.logprobs, log_probs, atol=tolerance)
    if not options:
        np.testing.assert_array_equal(new, exact.argmax(axis=-1))


def as_written(function: Any) -> Any:
    """Compiled with each rounding to float16 that the code asks for: XLA:CPU leaves out those between operations."""
    return jax.jit(function, compiler_options={"xla_allow_excess_precision": False})


def halves(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array.astype(HALF))


def test_norm_squares_in_float32():
    random = np.random.default_rng(0)
    x = halves(random.uniform(-1, 1, (3, 64)) * 60_000)
    norm = RMSNorm(64, 1e-5, dtype=jnp.dtype("float16"))
    exact = np.asarray(x, np.float64)
    exact /= np.sqrt((exact**2).mean(axis=-1, keepdims=True))
    np.testing.assert_allclose(np.asarray(norm(x)), exact, rtol=2**-10)


def test_angles_of_far_positions():
    """Float16 has only every 16th position there; what is left is float32's rounding of 30,001 radians."""
    *tables, scale = attention.rope(jnp.array([[30_001]]), 128, 1e6, jnp.dtype("float16"))
    assert scale is None
    angles = 30_001 / 1e6 ** (np.arange(0, 128, 2) / 128)
    for table, exact in zip(tables, (np.cos(angles), np.sin(angles)), strict=True):
        assert table.dtype == HALF
        np.testing.assert_allclose(np.asarray(table)[0, 0], exact, atol=2e-3 + 2**-12)


def exact_attention(queries: Any, keys: Any, values: Any, visible: np.ndarray) -> np.ndarray:
    """`[B, K, G, H]` of one query per row, in float64; rows that see nothing see everything alike."""
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    scores = np.einsum("bkgh,bkch->bkgc", queries, keys) / np.sqrt(queries.shape[-1])
    scores = np.where(visible[:, None, None], scores, -1e300)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bkgc,bkch->bkgh", weights / weights.sum(-1, keepdims=True), values)


def one_query_of_many(queries: Any, keys: Any, values: Any, visible: Any, scoring: Any) -> jax.Array:
    return attention.attend(queries[:, None], keys, values, visible[:, None], scoring)[:, 0]


PLAIN = attention.Scoring(32**-0.5)


@pytest.mark.parametrize("form", [one_query_of_many, attention._attend_by_products, attention._attend_by_sums])
@pytest.mark.parametrize("rows", [1, 2])
def test_attention_scores_beyond_the_range(form: Any, rows: int):
    """Of queries and keys up to 400: so far apart that each query reads one slot."""
    random = np.random.default_rng(0)
    queries, keys = (halves(random.uniform(-400, 400, (rows, 2, n, 32))) for n in (3, 7))
    values = halves(random.uniform(-LARGEST, LARGEST, (rows, 2, 7, 32)))
    scores = np.einsum("bkgh,bkch->bkgc", np.asarray(queries, np.float64), np.asarray(keys, np.float64)) / 32**0.5
    assert np.abs(scores).max() > LARGEST
    visible = np.ones((rows, 7), bool)
    visible[0, 3:] = False
    result = np.asarray(as_written(partial(form, scoring=PLAIN))(queries, keys, values, jnp.asarray(visible)))
    assert result.dtype == HALF
    np.testing.assert_allclose(result, exact_attention(queries, keys, values, visible), rtol=2**-9)


@pytest.mark.parametrize("form", [one_query_of_many, attention._attend_by_products, attention._attend_by_sums])
def test_where_nothing_may_be_seen_numbers_stay_finite(form: Any):
    """The mask's value, the lowest float32, is -inf in float16: a row of padding would be NaN."""
    random = np.random.default_rng(0)
    queries, keys, values = (halves(random.normal(size=shape)) for shape in ((1, 1, 1, 8), *[(1, 1, 4, 8)] * 2))
    result = np.asarray(as_written(partial(form, scoring=PLAIN))(queries, keys, values, jnp.zeros((1, 4), bool)))
    np.testing.assert_allclose(result, np.asarray(values, np.float64).mean(axis=2, keepdims=True), atol=2**-9)


@pytest.mark.parametrize("rows", [1, 3])
def test_float_products_sum_in_float32(rows: int):
    """Sums that pass 600,000 half way, and end within the range."""
    x, weight = _turning(rows, 1024), np.full((16, 1024), 2.0, HALF)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    assert np.abs(exact).max() < LARGEST < np.abs(x[:, :512].astype(np.float64) @ weight[:, :512].T).max() / 9
    for form in (linear._weight_first, linear._weight_second):
        np.testing.assert_array_equal(
            np.asarray(as_written(form)(jnp.asarray(x), jnp.asarray(weight))), exact.astype(HALF)
        )


def test_float_products_are_rounded_once():
    """XLA:CPU of jax 0.7.2 sums float16 in float16, with an error eight times as large, unless told not to."""
    random = np.random.default_rng(0)
    x, weight = halves(random.normal(size=(39, 1024))), halves(random.normal(size=(256, 1024)))
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    error = np.abs(np.asarray(as_written(linear.linear)(x, weight)) - exact)
    assert (error <= 0.51 * np.spacing(np.abs(exact).astype(HALF)).astype(np.float64) + 1e-4).all()


FORMS = [matmul._dequantized, matmul._fused, matmul._by_groups, matmul._in_chunks]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
def test_int4_products_sum_in_float32(form: Any, rows: int, scale_dtype: str):
    """As above, from codes: eight groups, each of whose own sums is beyond the range, with its scale and without."""
    x, codes = _turning(rows, 1024), np.full((16, 1024), 4, np.int8)
    weight = Int4(jnp.asarray(pack(codes)), jnp.full((16, 8), 0.5, scale_dtype))
    groups = x.astype(np.float64).reshape(rows, 8, 128).sum(axis=2) * 2
    assert np.abs(groups).min() > LARGEST
    exact = groups.sum(axis=1, keepdims=True)
    result = np.asarray(as_written(form)(jnp.asarray(x), weight.packed, weight.scale))
    np.testing.assert_array_equal(result, np.broadcast_to(exact, result.shape).astype(HALF))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [2e-5, 1e-3, 500.0])
def test_int4_scales_in_float16s_range(form: Any, scale: float):
    """Scales of bfloat16 reach float16 as they are, but for those below 6e-5, where its steps are 6e-8 (here 0.3%).

    Such a group's weights are below 1.6e-4; of the Mistral-7B shape, weights are about 2e-2.
    """
    random = np.random.default_rng(0)
    codes = random.integers(-8, 8, (16, 64)).astype(np.int8)
    stored = jnp.full((16, 2), scale, jnp.bfloat16)
    x = halves(random.normal(size=(2, 64)))
    exact = np.asarray(x, np.float64) @ (codes * np.asarray(stored, np.float64)[0, 0]).T
    result = np.asarray(as_written(form)(x, jnp.asarray(pack(codes)), stored))
    limit = np.abs(np.asarray(x, np.float64)) @ np.abs(codes * scale).T
    tolerance = np.abs(exact) * 2**-11 + limit * 1e-6  # the result is rounded, and the sum in float32 is not exact
    assert (np.abs(result - exact) <= tolerance + (limit * 3e-8 / scale + 3e-8 if scale < 6e-5 else 0)).all()


def test_an_offset_is_added_in_float32():
    """GPTQ's and AWQ's offsets: a sum of inputs and a shift that are beyond the range, where the result is not."""
    x = halves(np.full((1, 64), 1100.0))
    weight = Int4(jnp.asarray(pack(np.full((4, 64), 7, np.int8))), jnp.full((4, 1), 1 / 8), jnp.full((4, 1), -15 / 16))
    assert 7 / 8 * 64 * 1100 < LARGEST < 15 / 16 * 64 * 1100
    result = np.asarray(as_written(int4_matmul)(x, weight))
    np.testing.assert_array_equal(result, np.full((1, 4), (7 / 8 - 15 / 16) * 64 * 1100, HALF))


def test_int8_cache_keeps_the_largest_of_each_head():
    """At both ends of the range: a scale in float16 would be off by 0.04% for the largest, and by 1.6% for 1e-4."""
    random = np.random.default_rng(0)
    keys = halves(random.choice([-1.0, 0.0, 1.0], (1, 4, 2, 8)) * [[[[LARGEST], [1e-4]]]])
    cache = layer_cache_from_prompt(keys, keys, jnp.array([4], jnp.int32), 6, True)
    assert isinstance(cache, LayerCache)
    read = np.asarray(cache.read(jnp.dtype("float16"))[0])[:, :, :4]
    assert read.dtype == HALF
    np.testing.assert_allclose(read, np.moveaxis(np.asarray(keys), 1, 2), rtol=2**-11)


def test_a_feed_forward_that_overflows_is_an_error_and_not_a_text(inputs):
    """The one product that float16 itself must hold, gate times up, as in transformers: said, not passed on."""
    model = jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), dtype="float16")
    weight = model.model.layers[0].mlp.gate_up_proj.weight
    weight[...] = weight[...] * 2000
    with pytest.raises(jaxgen.NonFiniteLogitsError, match="row 0 at step 0"):
        model.generate(**inputs, **COMMON)


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("gpu", "7.5", "float16"),  # T4
        ("gpu", "7.0", "float16"),  # V100
        ("gpu", "6.0", "float16"),  # P100
        ("gpu", "8.0", "bfloat16"),  # A100
        ("gpu", "8.9", "bfloat16"),  # L4
        ("gpu", "10.0", "bfloat16"),
        ("gpu", "gfx942", "bfloat16"),  # AMD
        ("gpu", None, "bfloat16"),
        ("tpu", None, "bfloat16"),
        ("cpu", None, "float32"),
    ],
)
def test_auto_dtype(platform: str, capability: str | None, expected: str):
    device = Mock(spec=jax.Device, platform=platform)
    if capability is not None:
        device.compute_capability = capability
    assert auto_dtype(device) == expected


def _turning(rows: int, width: int) -> np.ndarray:
    """Rows whose first half sums to 610 * width / 2, and which sum to 30 * width / 2 in all."""
    x = np.full((rows, width), 610.0)
    x[:, width // 2 :] = -580.0
    return x.astype(HALF)
