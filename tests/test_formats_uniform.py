"""Checkpoints of compressed-tensors, GPTQ, AWQ and AutoRound: their libraries' weights and logits, and their traps."""

import json
import re
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxgen.convert.checkpoint import Checkpoint
from jaxgen.convert.formats import detect
from jaxgen.errors import CheckpointError, JaxgenError, UnsupportedError
from jaxgen.files import read_json
from jaxgen.models.tensors import Part
from jaxgen.quant import Int4
from jaxgen.quant.nibbles import unpack
from tests.formats.files import DOWN, IDS, QUERY, UNIFORM, Change, Tensors, add, changed, drop, load, put, read, same
from tests.helpers import some_slow

NAMES = {
    "autoround-awq": "AutoRound in the layout of AWQ GEMM, asymmetric, group 16",
    "autoround-gptq": "AutoRound in the layout of GPTQ v1, symmetric, group 16",
    "autoround-gptqmodel": "AutoRound in the layout of GPTQ v2, asymmetric, group 16",
    "awq": "AWQ GEMM, asymmetric, group 16",
    "compressed-asymmetric": "compressed-tensors pack-quantized, asymmetric, whole rows and asymmetric, group 6",
    "compressed-g-idx": "compressed-tensors pack-quantized, symmetric, group 16",
    "compressed-symmetric": "compressed-tensors pack-quantized, symmetric, group 6 and symmetric, whole rows",
    "gptq-v1-asymmetric": "GPTQ v1, asymmetric, group 16",
    "gptq-v1-symmetric": "GPTQ v1, symmetric, group 16",
    "gptq-v2-asymmetric": "GPTQ v2, asymmetric, group 16",
}


@pytest.mark.parametrize("case", NAMES)
def test_weights_are_exactly_those_of_the_library(case):
    checkpoint, expected = Checkpoint(UNIFORM / case), np.load(UNIFORM / case / "expected.npz")
    _, stored_as = detect(read_json(UNIFORM / case / "config.json"), checkpoint)
    assert stored_as is not None and stored_as.name == NAMES[case]
    for module in (QUERY, DOWN):
        int4 = read(UNIFORM / case, module)
        np.testing.assert_array_equal(int4.dequantize(), expected[f"{module}.weight"])
        scales = next(name for name in checkpoint.tensors if re.fullmatch(rf"{module}\.(scales|weight_scale)", name))
        assert int4.scale.dtype == checkpoint.read(scales).dtype in (np.float16, jnp.bfloat16)
        assert len(np.unique(unpack(int4.packed))) == 16


@pytest.mark.parametrize(
    "case", some_slow(NAMES, lambda case: case not in ("awq", "compressed-symmetric", "gptq-v1-symmetric"))
)
def test_logits_are_those_of_torch(case, caplog):
    model = load(UNIFORM / case)
    expected = np.load(UNIFORM / case / "expected.npz")["logits"]
    np.testing.assert_allclose(model(jnp.asarray(IDS)).logits[0], expected, atol=1e-4, rtol=0)
    assert isinstance(model.model.layers[0].mlp.down_proj.weight[...], Int4)
    # Queries, keys and values of one parameter, of different permutations or partly in floats.
    fused = isinstance(model.model.layers[0].self_attn.qkv_proj.weight[...], Int4)
    assert fused == (
        case in ("gptq-v1-symmetric", "gptq-v2-asymmetric", "compressed-symmetric", "compressed-asymmetric")
    )
    warned = any("self_attn.k_proj.weight" in record.message for record in caplog.records)
    assert warned == (
        case in ("gptq-v1-asymmetric", "compressed-g-idx", "autoround-gptq", "autoround-gptqmodel", "autoround-awq")
    )


# GPTQ


@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("zero", [7, 8])
def test_gptq_symmetric_zero_points_say_the_version_whatever_the_label(tmp_path, label, zero):
    def rewrite(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith("qzeros"):
                tensors[name][...] = np.uint32(0x11111111 * zero).view(np.int32)

    case = "gptq-v1-symmetric"
    directory = changed(tmp_path, case, rewrite, checkpoint_format=label, format=label)
    assert same(read(directory, DOWN), read(UNIFORM / case, DOWN))


def test_gptq_asymmetric_zero_points_follow_the_label(tmp_path):
    one, two = (read(changed(tmp_path, "gptq-v2-asymmetric", checkpoint_format=f), QUERY) for f in ("gptq", "gptq_v2"))
    assert one.offset is not None and two.offset is not None
    wrapped = one.offset == 8 * one.scale.astype(np.float32)
    np.testing.assert_array_equal((two.offset - one.offset)[~wrapped], one.scale[~wrapped])


def test_gptq_v1_stores_zero_as_15_and_is_read_so_with_a_warning(tmp_path, caplog):
    def first_word(tensors: Tensors) -> None:
        tensors[f"{DOWN}.qzeros"][0, 0] = np.uint32(0x6543210F).view(np.int32)  # of outputs 0 to 7

    int4 = read(changed(tmp_path, "gptq-v1-asymmetric", first_word), DOWN)
    assert int4.offset is not None
    np.testing.assert_array_equal(
        int4.offset[:8, 0], [(8 - zero) * np.float32(scale) for zero, scale in enumerate(int4.scale[:8, 0])]
    )
    assert f"{DOWN}.qzeros has zero points stored as 15" in caplog.text


def test_gptq_g_idx_may_be_absent_where_it_says_nothing(tmp_path):
    case = "gptq-v1-symmetric"
    assert f"{DOWN}.g_idx" in Checkpoint(UNIFORM / case).tensors
    assert read(UNIFORM / case, DOWN).permutation is None
    directory = changed(tmp_path, case, drop("g_idx"))
    assert same(read(directory, DOWN), read(UNIFORM / case, DOWN))
    np.testing.assert_array_equal(
        load(directory)(jnp.asarray(IDS)).logits, load(UNIFORM / case)(jnp.asarray(IDS)).logits
    )


def test_gptq_activation_order_is_a_permutation_of_columns():
    order = load_file(UNIFORM / "gptq-v1-asymmetric" / "model.safetensors")[f"{DOWN}.g_idx"]
    permutation = read(UNIFORM / "gptq-v1-asymmetric", DOWN).permutation
    assert permutation is not None and permutation.dtype == np.int32
    np.testing.assert_array_equal(order[permutation], np.repeat([0, 1], 16))


def test_gptq_activation_order_without_g_idx_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=rf"tensor '{DOWN}\.g_idx' is missing"):
        load(changed(tmp_path, "gptq-v1-asymmetric", drop("g_idx")))


def test_gptq_head_is_read_where_it_is_quantised():
    assert isinstance(load(UNIFORM / "gptq-v2-asymmetric").lm_head.weight[...], Int4)


@pytest.mark.parametrize("case", ["gptq-v2-asymmetric", "awq"])
def test_group_size_of_minus_one_means_whole_rows(tmp_path, case):
    def keep_first_group(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(("qzeros", "scales")):
                tensors[name] = tensors[name][:1].copy()
            if name.endswith("g_idx"):
                tensors[name][...] = 0

    int4 = read(changed(tmp_path, case, keep_first_group, group_size=-1, dynamic={}), DOWN)
    half = read(UNIFORM / case, DOWN)
    assert int4.scale.shape == (32, 1) and int4.group_size == 32
    np.testing.assert_array_equal(int4.dequantize()[:, :16], half.dequantize()[:, :16])


# AWQ


def test_awq_shuffles_the_outputs_of_a_word(tmp_path):
    words = np.full((32, 4), np.uint32(0x76543210).view(np.int32))
    int4 = read(changed(tmp_path, "awq", add(f"{DOWN}.qweight", words)), DOWN)
    expected = np.tile(np.array([0, 4, 1, 5, 2, 6, 3, 7]) - 8, 4)
    np.testing.assert_array_equal(unpack(int4.packed), np.repeat(expected[:, None], 32, axis=1))


# AutoRound


def test_autoround_scales_may_be_negative():
    assert (read(UNIFORM / "autoround-gptq", DOWN).scale < 0).any()


def test_autoround_exceptions_may_be_regular_expressions(tmp_path):
    exceptions = {".*o_proj.*": {"bits": 16, "data_type": "float"}, "v_proj$": {"group_size": 32}}
    directory = changed(tmp_path, "autoround-gptq", extra_config=exceptions)
    np.testing.assert_array_equal(
        load(directory)(jnp.asarray(IDS)).logits, load(UNIFORM / "autoround-gptq")(jnp.asarray(IDS)).logits
    )


@pytest.mark.parametrize("case, backend", [
    ("autoround-gptqmodel", "auto_round:exllamav2"), ("autoround-gptqmodel", "auto_round:tritonv2"),
    ("autoround-gptq", "auto_gptq:exllamav2"), ("autoround-gptq", "gptq:exllamav2"),
    ("autoround-gptq", "auto_round:gptq"), ("autoround-awq", "auto_round:awq"),
])  # fmt: skip
def test_autoround_of_before_packing_formats_says_its_backend(tmp_path, case, backend):
    old = changed(tmp_path, case, quant_method="intel/auto-round", packing_format=None, backend=backend)
    assert same(read(old, DOWN), read(UNIFORM / case, DOWN))
    with pytest.raises(UnsupportedError, match=r"AutoRound in the layout 'auto_round:marlin' is not supported"):
        load(changed(tmp_path, case, quant_method="intel/auto-round", packing_format=None, backend="auto_round:marlin"))


@pytest.mark.parametrize(
    "one, other", [("auto_round:gptq", "auto_round:auto_gptq"), ("auto_round", "auto_round:gptqmodel")]
)
def test_autoround_names_of_a_layout(tmp_path, one, other):
    left, right = (read(changed(tmp_path, "autoround-gptqmodel", packing_format=name), DOWN) for name in (one, other))
    assert same(left, right)
    assert same(left, read(UNIFORM / "autoround-gptqmodel", DOWN)) == (one == "auto_round")


# compressed-tensors


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_compressed_shape_may_have_32_or_64_bits(tmp_path, dtype):
    def rewrite(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith("weight_shape"):
                tensors[name] = tensors[name].astype(dtype)

    assert same(read(changed(tmp_path, "compressed-g-idx", rewrite), DOWN), read(UNIFORM / "compressed-g-idx", DOWN))


def test_compressed_rows_are_padded_to_whole_words():
    stored = Checkpoint(UNIFORM / "compressed-symmetric").tensors[f"{QUERY}.weight_packed"].shape
    assert stored == (24, 5)
    assert read(UNIFORM / "compressed-symmetric", QUERY).shape == (24, 36)


# Damage


DAMAGES: dict[str, tuple[str, Change, str]] = {
    "missing": ("awq", drop("q_proj.qweight"), "tensor .*q_proj.qweight' is missing"),
    "missing scales": ("gptq-v1-symmetric", drop("q_proj.scales"), "tensor .*q_proj.scales' is missing"),
    "number of groups": ("awq", add(f"{QUERY}.scales", np.ones((3, 32), np.float16)),
                         r"q_proj.scales' has shape \[3, 32\], but config.json implies \[2, 32\]"),
    "group outside": ("gptq-v1-asymmetric", put(f"{DOWN}.g_idx", 2), "down_proj.g_idx' has group 2, outside 0 to 1"),
    "group below": ("gptq-v1-asymmetric", put(f"{DOWN}.g_idx", -1), "g_idx' has group -1, outside 0 to 1"),
    "huge group": ("gptq-v1-asymmetric", put(f"{DOWN}.g_idx", 2**31 - 1), "g_idx' has group 2147483647, outside"),
    "uneven groups": ("gptq-v1-asymmetric", put(f"{DOWN}.g_idx", *[0] * 17),
                      "g_idx' gives .* columns to group 0, which must have 16"),
    "old g_idx": ("compressed-g-idx", put(f"{DOWN}.weight_g_idx", 5), "weight_g_idx' has group 5, outside 0 to 1"),
    "zero points": ("gptq-v1-symmetric", put(f"{DOWN}.qzeros", 0x77777778), "qzeros' has zero points other than 8"),
    "shape": ("compressed-g-idx", put(f"{DOWN}.weight_shape", 32, 48),
              r"weight_shape' says \[32, 48\], but config.json implies \[32, 32\]"),
    "bias": ("awq", add(f"{DOWN}.bias", np.eye(1, 32, dtype=np.float16)[0]), "down_proj.bias is not zero"),
    "twice": ("awq", add(f"{DOWN}.weight", np.ones((32, 32), np.float16)), "tensor .*down_proj.weight' is not part"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_by_tensor(tmp_path, damage):
    case, change, message = DAMAGES[damage]
    with pytest.raises(JaxgenError, match=message):
        load(changed(tmp_path, case, change))


def test_a_bias_of_zeros_is_ignored(tmp_path):
    directory = changed(tmp_path, "awq", add(f"{DOWN}.bias", np.zeros(32, np.float16)))
    np.testing.assert_array_equal(
        load(directory)(jnp.asarray(IDS)).logits, load(UNIFORM / "awq")(jnp.asarray(IDS)).logits
    )


def test_a_quantised_head_beside_tied_embeddings_is_refused(tmp_path):
    changed(tmp_path, "gptq-v2-asymmetric")
    config = read_json(tmp_path / "config.json") | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"tensor 'lm_head\.qweight' is not part of the model"):
        load(tmp_path)


def test_odd_rows_are_refused_with_the_reason():
    _, stored_as = detect(
        read_json(UNIFORM / "compressed-symmetric" / "config.json"), Checkpoint(UNIFORM / "compressed-symmetric")
    )
    assert stored_as is not None
    with pytest.raises(UnsupportedError, match=r"has rows of 35 weights; int4 packs two into a byte"):
        stored_as.stored(Part(f"{DOWN}.weight", (36, 35), (36, 35)))


# Memory


@pytest.mark.parametrize("case, g_idx", [("gptq", False), ("gptq", True), ("awq", False), ("compressed", False)])
def test_reading_takes_no_more_than_a_few_times_the_packed_weight(tmp_path, case, g_idx):
    size, groups = 1024, 8
    random = np.random.default_rng(0).integers(-(2**31), 2**31, (size, size // 8), np.int32)
    if case == "compressed":
        tensors = {"weight_packed": random, "weight_scale": np.ones((size, groups), np.float16),
                   "weight_shape": np.array([size, size])}  # fmt: skip
        weights = {"num_bits": 4, "group_size": 128}
        fields = {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": {"targets": ["Linear"], "weights": weights}},
        }
    else:
        tensors = {"qweight": random.reshape(-1, size) if case == "gptq" else random,
                   "qzeros": random[:groups], "scales": np.ones((groups, size), np.float16)}  # fmt: skip
        fields = {"quant_method": case, "sym": False}
        if g_idx:
            tensors["g_idx"] = np.random.default_rng(1).permutation(np.repeat(np.arange(groups, dtype=np.int32), 128))
    save_file({f"{DOWN}.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    _, stored_as = detect({"quantization_config": fields}, Checkpoint(tmp_path))
    part = Part(f"{DOWN}.weight", (size, size), (size, size))
    assert stored_as is not None and stored_as.stored(part) is not None
    tracemalloc.start()
    stored_as.weight(part)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4.5 * random.nbytes + size * size
