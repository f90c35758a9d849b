"""The int4 weight: packing, quantising, and every form of its product, against numbers not computed by jaxgen."""

import dataclasses
import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

import jaxgen
from jaxgen import AutoModelForCausalLM, CheckpointError, Int4Config, JaxgenError, UnsupportedError, demo
from jaxgen.convert import convert_checkpoint
from jaxgen.convert.inspect import describe
from jaxgen.generation.programs.stages import Stage
from jaxgen.lowering import Target, target, tracing_for
from jaxgen.models.layers import QuantizedWeight
from jaxgen.quant import Int4, Lookup4, int4_matmul, quantize
from jaxgen.quant import matmul as forms
from jaxgen.quant.int4 import search_scale
from jaxgen.quant.nibbles import pack, unpack
from jaxgen.quant.weight import matmul
from jaxgen.text.tokenizer import load_tokenizer
from tests.hf_files import CONFIG, hf_tensors, write_hf

FIXTURES = Path(__file__).parent / "formats" / "uniform"
RANDOM = np.random.default_rng(0)


def relative_error(weight: np.ndarray, **options) -> float:
    exact = quantize(weight, **options)
    return float(np.sqrt(np.square(exact.dequantize() - weight).sum() / np.square(weight).sum()))


def test_every_byte_holds_its_two_numbers():
    """The layout written out: low nibble first, two's complement."""
    expected = [[n - 16 if n > 7 else n for n in (byte % 16, byte // 16)] for byte in range(256)]
    every = np.arange(256, dtype=np.uint8).reshape(256, 1)
    for packed in (every, jnp.asarray(every)):
        np.testing.assert_array_equal(unpack(packed), expected)
        np.testing.assert_array_equal(pack(unpack(packed)), every)
    np.testing.assert_array_equal(jax.lax.bitcast_convert_type(jnp.asarray(every), jnp.int4).reshape(256, 2), expected)


@pytest.mark.parametrize(
    ("shape", "group", "message"),
    [
        ((4, 33), 32, "'w' has rows of 33 weights; int4 packs two into a byte"),
        ((4, 96), 64, "'w' has rows of 96 weights, which groups of 64 do not divide; choose group_size=32, or -1"),
        ((4, 14), 128, "'w' has rows of 14 weights, which groups of 128 do not divide; choose group_size=-1 (whole"),
        ((4, 15), -1, "rows of 15 weights"),
    ],
)
def test_shapes_that_do_not_come_out_even(shape, group, message):
    with pytest.raises(JaxgenError, match=re.escape(message)):
        quantize(np.zeros(shape, np.float32), group, name="'w'")


def test_a_group_by_hand():
    """-8 s .. 7 s with s = 0.25 holds these exactly; with the other sign it does not. Absmax / 7 holds none of them."""
    weight = np.array([[-2.0, -1.75, -0.25, 0.0, 0.5, 1.0, 1.5, 1.75] * 4], np.float32)
    for sign in (1, -1):
        int4 = quantize(sign * weight, 32)
        assert float(int4.scale[0, 0]) == sign * 0.25
        np.testing.assert_array_equal(unpack(int4.packed)[0, :8], [-8, -7, -1, 0, 2, 4, 6, 7])
        np.testing.assert_array_equal(int4.dequantize(), sign * weight)
    assert float(quantize(weight, 32, search=False).scale[0, 0]) == pytest.approx(2 / 7, rel=2**-8)


@pytest.mark.parametrize("weight", [np.zeros((2, 32), np.float32), np.full((2, 32), 1e-30, np.float32)])
def test_groups_of_nothing_stay_finite(weight):
    assert np.abs(np.asarray(quantize(weight, 32).dequantize()) - weight).max() <= 1e-30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "absmax", "searched"), [(128, 0.1173, 0.0966), (64, 0.1077, 0.0898), (32, 0.0970, 0.0810)]
)
def test_the_search_halves_nothing_but_a_third_of_the_error_energy(group, absmax, searched):
    """Relative error of Gaussian weights, against a simulation of the two methods outside jaxgen."""
    weight = RANDOM.standard_normal((256, 1024)).astype(np.float32)
    naive, ours = relative_error(weight, group_size=group, search=False), relative_error(weight, group_size=group)
    assert naive == pytest.approx(absmax, rel=0.02)
    assert ours == pytest.approx(searched, rel=0.02)
    assert (ours / naive) ** 2 < 0.72


@pytest.mark.slow
@pytest.mark.parametrize(("size", "allowed"), [(32, 1.01), (96, 1.0015), (128, 1.0015)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_misses_little_of_what_trying_all_scales_finds(size, allowed, weighted):
    """In float64, by numpy: 512 scales of either sign, around the one that just reaches a group's largest weight."""
    rng = np.random.default_rng(1)
    groups = rng.standard_normal((256, size)).astype(np.float32).astype(np.float64)
    importance = 1e6 * rng.exponential(1, size).astype(np.float32) if weighted else np.float32(1)

    def errors(scale: np.ndarray) -> np.ndarray:
        codes = np.clip(np.round(groups / scale[:, None]), -8, 7)
        return (importance * np.square(groups - codes * scale[:, None])).sum(axis=1)

    reaching = np.abs(groups).max(axis=1) / 8
    least = np.min([errors(sign * f * reaching) for f in np.linspace(0.4, 1.4, 512) for sign in (1, -1)], axis=0)
    found = search_scale(jnp.asarray(groups, jnp.float32), jnp.asarray(importance))
    assert errors(np.asarray(found, np.float64)).sum() < allowed * least.sum()


@pytest.mark.parametrize(
    ("group", "dtype", "expected"),
    [
        (128, "bfloat16", "9f7c80dbe280aa5d"),
        (128, "float32", "4564048b4601344d"),
        (32, "float32", "a300286220ba1b0f"),
        (-1, "bfloat16", "9b649075c01fe007"),
    ],
)
def test_the_search_finds_the_same_on_every_jax(group, dtype, expected):
    """CI runs this on three versions. By sums of floats, jax 0.7.2 found another sign where two scales are as good."""
    weight = np.random.RandomState(0).standard_normal((1024, 4096)).astype(dtype)
    int4 = quantize(weight, group)
    assert hashlib.sha256(int4.packed.tobytes() + int4.scale.tobytes()).hexdigest()[:16] == expected


def test_in_a_jit_as_outside():
    weight = RANDOM.standard_normal((64, 256)).astype(np.float32)
    outside, inside = quantize(weight, 64), jax.jit(lambda w: quantize(w, 64))(weight)
    np.testing.assert_array_equal(outside.packed, inside.packed)
    np.testing.assert_array_equal(outside.scale, inside.scale)


def random_int4(group: int, scale: str = "bfloat16", **fields) -> tuple[Int4, np.ndarray]:
    """An int4 weight [24, 256] and what it stands for, in float64."""
    codes = RANDOM.integers(-8, 8, (24, 256))
    scales = RANDOM.uniform(-1, 1, (24, 256 // group)).astype(jnp.dtype(scale))
    dense = codes * np.repeat(scales.astype(np.float64), group, axis=1)
    weight = Int4(pack(codes.astype(np.int8)), scales, **fields)
    return jax.tree.map(jnp.asarray, weight), dense


FORMS = [forms._dequantized, forms._fused, forms._by_groups, forms._in_chunks]


@pytest.mark.parametrize("rows", [(), (1,), (1, 1), (5,), (2, 3)])
@pytest.mark.parametrize("group", [32, 128, 256])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_product(form, group, rows):
    """The tests' platform runs one of them; the others run on GPUs, or for other numbers of rows."""
    weight, dense = random_int4(group)
    x = RANDOM.standard_normal((*rows, 256)).astype(np.float32)
    result = np.asarray(jax.jit(form)(x, weight.packed, weight.scale))
    np.testing.assert_allclose(result, x @ dense.T, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_forms_in_bfloat16(form):
    """Rounded as much as bfloat16 rounds, and no more: sums are float32."""
    weight, dense = random_int4(64)
    x = jnp.asarray(RANDOM.standard_normal((3, 256)), jnp.bfloat16)
    result = np.asarray(jax.jit(form)(x, weight.packed, weight.scale), np.float32)
    exact = np.asarray(x, np.float64) @ dense.T
    assert np.abs(result - exact).max() < 0.01 * np.abs(exact).max()


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("group", [32, 64, 256])
@pytest.mark.parametrize("kernels", [False, True])
def test_the_form_for_many_rows_on_a_gpu(kernels, group, with_offset):
    """The weight is in HF's order there, however it is stored."""
    offset = RANDOM.standard_normal((24, 256 // group)).astype(np.float32) if with_offset else None
    weight, dense = random_int4(group, offset=offset)
    stored = weight.for_kernels() if kernels else weight
    assert bool(stored.planar) == kernels
    exact = dense if offset is None else dense + np.repeat(offset, group, axis=1)
    x = RANDOM.standard_normal((2, 40, 256)).astype(np.float32)
    result, back = jax.jit(lambda x, w: jax.vjp(lambda x: forms.unpacked_product(x, w), x))(x, stored)
    np.testing.assert_allclose(result, x @ exact.T, atol=1e-3, rtol=1e-5)
    [gradient] = back(jnp.ones_like(result))
    np.testing.assert_allclose(gradient, np.broadcast_to(exact.sum(axis=0), x.shape), atol=1e-3, rtol=1e-5)


def on_a_gpu(*args: Any, cpu: Any, default: Any) -> Any:
    """What `jax.lax.platform_dependent` chooses there."""
    return default(*args)


@pytest.mark.parametrize("kernels", [False, True])
def test_permuted_columns_of_many_rows_on_a_gpu(kernels, monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", on_a_gpu)
    order = RANDOM.permutation(256)
    weight, dense = random_int4(64, permutation=order.astype(np.int32))
    in_hf_order = np.empty_like(dense)
    in_hf_order[:, order] = dense
    x = RANDOM.standard_normal((80, 256)).astype(np.float32)
    result = int4_matmul(jnp.asarray(x), weight.for_kernels() if kernels else weight)
    np.testing.assert_allclose(result, x @ in_hf_order.T, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("low_cpu_memory", [False, True])
@pytest.mark.parametrize("scale", ["float16", "float32"])
def test_offsets_and_permutations(low_cpu_memory, scale):
    order = RANDOM.permutation(256)
    offset = RANDOM.standard_normal((24, 4)).astype(np.float32)
    weight, dense = random_int4(64, scale, offset=offset, permutation=order.astype(np.int32))
    weight = dataclasses.replace(weight, low_cpu_memory=low_cpu_memory)
    in_hf_order = np.empty_like(dense)
    in_hf_order[:, order] = dense + np.repeat(offset, 64, axis=1)
    np.testing.assert_allclose(weight.dequantize(), in_hf_order, atol=1e-5)
    x = RANDOM.standard_normal((2, 1, 256)).astype(np.float32)
    np.testing.assert_allclose(int4_matmul(jnp.asarray(x), weight), x @ in_hf_order.T, atol=2e-3)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_lookup_table(gpu, kernels, monkeypatch):
    if gpu:
        monkeypatch.setattr(jax.lax, "platform_dependent", on_a_gpu)
    table = np.sort(RANDOM.standard_normal(16)).astype(np.float32)
    codes = RANDOM.integers(0, 16, (8, 64))
    scale = RANDOM.uniform(0, 1, (8, 2)).astype(np.float32)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
    weight = Lookup4(jnp.asarray(packed), jnp.asarray(scale), jnp.asarray(table))
    weight = weight.for_kernels() if kernels else weight
    dense = table[codes] * np.repeat(scale, 32, axis=1)
    np.testing.assert_array_equal(weight.dequantize(), dense)
    x = RANDOM.standard_normal((3, 64)).astype(np.float32)
    np.testing.assert_allclose(matmul(jnp.asarray(x), weight), x @ dense.T, atol=1e-5)


def test_bounded_memory_on_cpu_is_bounded():
    """In a loop XLA:CPU unpacks the weight ahead and keeps that; with low_cpu_memory it cannot."""
    packed, scale = jnp.zeros((2048, 1024), jnp.uint8), jnp.ones((2048, 16), jnp.bfloat16)

    def temporary(weight: Int4) -> int:
        def loop(x, weight):
            return jax.lax.fori_loop(0, x.shape[0], lambda i, x: x + int4_matmul(x, weight) * i, x)

        memory = jax.jit(loop).lower(jnp.ones((2, 2048)), weight).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    unpacked = 4 * 2048 * 2048
    assert temporary(Int4(packed, scale)) >= unpacked  # what makes the default fast
    assert temporary(Int4(packed, scale, low_cpu_memory=True)) < unpacked / 4


@pytest.fixture(scope="module")
def loaded() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo.path(), load_in_4bit=True)


def test_load_in_4bit(loaded):
    """Every linear layer of the blocks is int4; embeddings, norms and head are not. It says what it said."""
    kinds = {path: type(value).__name__ for path, value in nnx.to_flat_state(nnx.state(loaded))}
    quantized = {path[-2] for path, kind in kinds.items() if kind == "QuantizedWeight"}
    assert quantized == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert loaded.model.layers[0].mlp.down_proj.weight[...].group_size == 128
    assert kinds["model", "embed_tokens", "weight"] == "Param"
    tokenizer = load_tokenizer(demo.path())
    ids = loaded.generate(**tokenizer(["A list of colors: red, blue"], return_tensors="np"))
    text = tokenizer.batch_decode(ids, skip_special_tokens=True)[0]
    assert text == "A list of colors: red, blue, green, yellow, orange, purple, pink,"


def test_what_is_loaded_is_what_quantize_makes_of_the_file(loaded):
    """A fused parameter holds the rows of its parts where the model wants them."""
    dense = AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")
    for name in ("qkv_proj", "o_proj"):
        exact = np.asarray(getattr(dense.model.layers[1].self_attn, name).weight[...])
        int4 = getattr(loaded.model.layers[1].self_attn, name).weight[...]
        whole = quantize(exact, 128)
        np.testing.assert_array_equal(int4.packed, whole.packed)
        np.testing.assert_array_equal(int4.scale, whole.scale)


@pytest.mark.parametrize("low_cpu_memory", [False, True])
def test_options_of_the_config(low_cpu_memory):
    config = Int4Config(group_size=32, lm_head=True, low_cpu_memory=low_cpu_memory)
    model = AutoModelForCausalLM.from_pretrained(demo.path(), quantization_config=config)
    weights = [model.model.layers[0].mlp.down_proj.weight[...], model.lm_head.weight[...]]
    assert all(w.group_size == 32 and w.low_cpu_memory == low_cpu_memory for w in weights)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group_size": 48}, JaxgenError, "group_size=48 must be 32, 64, 128, or -1"),
        ({"group_size": True}, JaxgenError, "group_size=True"),
        ({"lm_head": 1}, JaxgenError, "lm_head=1 must be True or False"),
        ({"method": "gptq"}, UnsupportedError, "jaxgen convert SRC DST --method gptq"),
        ({"method": "awq"}, JaxgenError, "method='awq' must be 'rtn'"),
    ],
)
def test_configs_that_make_no_sense(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Int4Config(**options)


def test_options_of_from_pretrained_are_checked():
    with pytest.raises(JaxgenError, match=r"must be a jaxgen\.Int4Config"):
        AutoModelForCausalLM.from_pretrained(demo.path(), quantization_config=4)
    with pytest.raises(JaxgenError, match="load_in_4bit='yes' must be True or False"):
        AutoModelForCausalLM.from_pretrained(demo.path(), load_in_4bit="yes")


def test_a_compiler_that_refuses_an_option_costs_speed_and_nothing_else(caplog: pytest.LogCaptureFixture):
    """As jaxlib 0.7.2 refuses one of FUSION_OPTIONS. The form changes with the options, and it is logged once."""
    traced = []

    def double(x):
        traced.append(target().fuses_int4)
        return 2 * x

    plain = Stage(double, lambda x: "double", donate_argnums=0)
    fused = Stage(
        double, lambda x: "double", compiled_for=Target(fuses_int4=True), otherwise=plain,
        compiler_options={"xla_no_such_option": True}, donate_argnums=0,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="jaxgen"):
        assert [float(fused(jnp.float32(x))) for x in (1, 2, 3)] == [2, 4, 6]
    assert traced == [True, False]
    (record,) = caplog.records
    assert "xla_no_such_option" in record.getMessage()
    assert fused.compiler_options == {}  # those that it runs with now


def test_errors_of_running_are_not_taken_for_errors_of_compiling():
    def fail(x):
        raise ValueError("from the user's model")

    stage = Stage(fail, lambda x: "fail", otherwise=Stage(lambda x: x, lambda x: "other"))
    with pytest.raises(ValueError, match="from the user's model"):
        stage(jnp.ones(()))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_the_decode_step_for_gpus_computes_what_the_other_does(rows):
    """For one row it carries a second one along; the tests' platform would never trace it."""
    config = jaxgen.MistralConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = jaxgen.MistralForCausalLM(config, rngs=nnx.Rngs(0))
    model.model.norm.weight[...] = jnp.linspace(0.5, 2, 64)
    tokens = RANDOM.integers(0, 50, (rows, 6))
    expected = model(tokens).logits[:, -1]
    _, cache = model.prefill(jnp.asarray(tokens[:, :5]), jnp.full(rows, 5), 8)
    with tracing_for(Target(gpu_decode=True)):
        logits, _ = model.step(jnp.asarray(tokens[:, 5]), jnp.full(rows, 5), cache)
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_quantized_weights_are_no_parameters_of_training(loaded):
    assert isinstance(loaded.model.layers[0].mlp.down_proj.weight, QuantizedWeight)
    assert not any("proj" in str(path) for path, _ in nnx.to_flat_state(nnx.state(loaded, nnx.Param)))


def test_int4_models_are_not_saved_as_something_else(loaded, tmp_path):
    with pytest.raises(UnsupportedError, match="jaxgen convert SRC DST"):
        loaded.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_inspect_shows_format_group_and_bytes():
    """The bytes are those that ls and the headers show: six packed weights, their scales, zeros and so on."""
    text = describe(FIXTURES / "gptq-v1-symmetric")
    (line,) = [line for line in text.splitlines() if line.startswith("format")]
    assert "GPTQ v1, symmetric, group 16: " in line
    with safe_open(FIXTURES / "gptq-v1-symmetric" / "model.safetensors", "numpy") as file:
        packed = [file.get_tensor(name) for name in file.keys() if "_proj." in name]  # noqa: SIM118
    assert f"{sum(tensor.nbytes for tensor in packed) / 1000:.4g} kB" in line
    assert "format" not in describe(demo.path())


SMALL = CONFIG | {"hidden_size": 96, "intermediate_size": 64, "head_dim": 24}


def test_groups_are_checked_before_anything_is_read(tmp_path):
    write_hf(tmp_path, SMALL, hf_tensors(SMALL))
    with pytest.raises(JaxgenError, match=r"group_size=128.*rows of 96 weights.*choose group_size=32, or -1"):
        AutoModelForCausalLM.from_pretrained(tmp_path, load_in_4bit=True)


def test_weights_that_are_not_finite_do_not_become_zeros(tmp_path):
    tensors = hf_tensors(SMALL)
    tensors["model.layers.1.mlp.down_proj.weight"][95, 63] = np.nan
    write_hf(tmp_path, SMALL, tensors)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.down_proj\.weight' has weights that are not"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Int4Config(group_size=32))


def test_a_tied_head_is_not_quantised_silently(tmp_path):
    config = SMALL | {"tie_word_embeddings": True}
    write_hf(tmp_path, config, hf_tensors(config))
    with pytest.raises(JaxgenError, match="lm_head=True, but this model's head is its embedding"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Int4Config(group_size=32, lm_head=True))


def test_what_a_checkpoint_left_as_floats_is_quantised_if_asked(tmp_path):
    """A packed layer stays bit for bit; its neighbours, floats in the file, follow load_in_4bit."""
    convert_checkpoint(demo.path(), tmp_path / "int4", group_size=64)
    fields = json.loads((tmp_path / "int4" / "config.json").read_text())
    name = "model.layers.0.mlp.down_proj"
    fields["quantization_config"]["ignore"].append(name)
    (tmp_path / "int4" / "config.json").write_text(json.dumps(fields))
    with safe_open(tmp_path / "int4" / "model.safetensors", "numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if not key.startswith(name)}  # noqa: SIM118
    with safe_open(demo.path() / "model.safetensors", "numpy") as file:
        tensors[f"{name}.weight"] = file.get_tensor(f"{name}.weight")
    save_file(tensors, tmp_path / "int4" / "model.safetensors")
    weights = {
        asked: AutoModelForCausalLM.from_pretrained(tmp_path / "int4", load_in_4bit=asked).model.layers[0].mlp
        for asked in (False, True)
    }
    assert isinstance(weights[False].down_proj.weight, nnx.Param)
    assert weights[True].down_proj.weight[...].group_size == 128
    assert weights[True].gate_up_proj.weight[...].group_size == 64
