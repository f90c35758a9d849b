"""bitsandbytes, MLX and GGUF's blocks, against what the formats' own libraries dequantise (formats/make_tables.py)."""

import json
import logging
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxgen import Int4Config
from jaxgen.convert.checkpoint import Checkpoint
from jaxgen.convert.formats.bitsandbytes import open_bitsandbytes
from jaxgen.convert.formats.ggml_blocks import FLOATS, FOUR_BITS
from jaxgen.convert.formats.mlx import open_mlx
from jaxgen.convert.load import AutoModelForCausalLM
from jaxgen.errors import CheckpointError, JaxgenError, UnsupportedError
from jaxgen.models.tensors import Part
from jaxgen.quant import Int4, Lookup4
from tests.formats.tables import BNB, MLX, bnb_tensors, is_linear, mlx_tensors, write_both
from tests.helpers import some_slow

FIXTURES = Path(__file__).parent / "formats"
STATE = "weight.quant_state.bitsandbytes__nf4"
IDS = np.array([[1, 5, 9, 2, 7, 10, 3]])


def part(name: str, *shape: int) -> Part:
    return Part(name, shape, shape)


def headers_agree(checkpoint: Checkpoint, stored: Any) -> bool:
    tensors = checkpoint.tensors
    return all(tensors[n].shape == want.shape and tensors[n].dtype in want.dtypes for n, want in stored.items())


# bitsandbytes


BNB_VARIANTS = {
    "nf4": (4, 128),
    "fp4": (4, 128),
    "nf4_double": (68, 256),
    "fp4_double": (68, 256),
    "nf4_float_storage": (4, 128),
    "nf4_large_blocks": (4, 256),
}


@pytest.mark.parametrize("variant", BNB_VARIANTS)
def test_bitsandbytes_is_read_as_its_library_reads_it(variant):
    checkpoint = Checkpoint(FIXTURES, "bitsandbytes.safetensors")
    reader, weight = open_bitsandbytes(BNB, checkpoint), part(f"{variant}.weight", *BNB_VARIANTS[variant])
    stored = reader.stored(weight)
    assert stored is not None and headers_agree(checkpoint, stored)
    of_variant = {n for n in checkpoint.tensors if n.split(".")[0] == variant}
    assert stored.keys() == of_variant - {f"{variant}.rows", f"{variant}.expected"}
    read = reader.weight(weight)
    assert read.group_size == (128 if variant == "nf4_large_blocks" else 64) and read.scale.dtype == np.float32
    rows, expected = checkpoint.read(f"{variant}.rows"), checkpoint.read(f"{variant}.expected")
    np.testing.assert_array_equal(np.asarray(read.dequantize())[rows], expected)


def test_bitsandbytes_says_what_it_is(nf4):
    assert open_bitsandbytes(BNB, Checkpoint(nf4[0])).name == "bitsandbytes NF4, block 64"
    checkpoint = Checkpoint(FIXTURES, "bitsandbytes.safetensors")
    double = {name: info for name, info in checkpoint.tensors.items() if name.startswith("fp4_double")}
    checkpoint.tensors = double
    assert open_bitsandbytes(BNB, checkpoint).name == "bitsandbytes FP4, double quantised, block 64"


def test_blocks_that_run_across_rows_are_refused():
    reader = open_bitsandbytes(BNB, Checkpoint(FIXTURES, "bitsandbytes.safetensors"))
    with pytest.raises(UnsupportedError, match=r"'nf4_across_rows\.weight' has rows of 96 weights and blocks of 64"):
        reader.stored(part("nf4_across_rows.weight", 4, 96))


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="float32", device_map="cpu", **options)


def weights(model: Any) -> list[Any]:
    """What the linear layers are made of: of the first block, then the head."""
    block = model.model.layers[0]
    linears = [block.self_attn.qkv_proj, block.self_attn.o_proj, block.mlp.gate_up_proj, block.mlp.down_proj]
    return [linear.weight[...] for linear in [*linears, model.lm_head]]


def values(model: Any) -> list[np.ndarray]:
    return [np.asarray(w.dequantize() if isinstance(w, Int4 | Lookup4) else w) for w in weights(model)]


def same_values(left: Any, right: Any) -> None:
    for ours, theirs in zip(values(left), values(right), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)


@pytest.fixture
def nf4(tmp_path):
    return write_both(tmp_path, {"quantization_config": BNB}, bnb_tensors, is_linear)


@pytest.mark.slow
def test_a_bitsandbytes_checkpoint_is_the_model_of_its_values(nf4):
    packed, plain = map(load, nf4)
    assert [type(weight) is Lookup4 for weight in weights(packed)] == [True] * 4 + [False]
    np.testing.assert_allclose(packed(IDS).logits, plain(IDS).logits, atol=1e-4, rtol=0)


def test_modules_that_bitsandbytes_skipped_stay_floats(tmp_path):
    field = {"quantization_config": BNB | {"llm_int8_skip_modules": ["o_proj", "k_proj", "lm_head"]}}
    skipped = ("o_proj.weight", "k_proj.weight")
    both = write_both(tmp_path, field, bnb_tensors, lambda name: is_linear(name) and not name.endswith(skipped))
    packed, plain = map(load, both)
    assert [type(weight) is Lookup4 for weight in weights(packed)] == [False, False, True, True, False]
    same_values(packed, plain)


def test_four_bits_stay_as_they_are_under_load_in_4bit(nf4, caplog):
    packed = load(nf4[0], load_in_4bit=True)
    assert [type(weight) is Lookup4 for weight in weights(packed)] == [True] * 4 + [False] and not caplog.records


@pytest.mark.slow
def test_nf4_becomes_int4_on_request_with_one_warning(nf4, caplog):
    with caplog.at_level(logging.WARNING, "jaxgen"):
        packed = load(nf4[0], quantization_config=Int4Config(group_size=32))
    assert [type(weight) is Int4 for weight in weights(packed)] == [True] * 4 + [False]
    (record,) = caplog.records
    assert "bitsandbytes NF4" in record.message and "errors add up" in record.message
    from_plain = load(nf4[1], quantization_config=Int4Config(group_size=32))
    for ours, theirs in zip(weights(packed)[:4], weights(from_plain)[:4], strict=True):
        np.testing.assert_array_equal(ours.packed, theirs.packed)


def test_int8_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"LLM\.int8.*load_in_4bit=True"):
        open_bitsandbytes({"load_in_8bit": True, "load_in_4bit": False}, Checkpoint(FIXTURES, "mlx.safetensors"))


def test_gptqmodels_spelling_is_refused_by_name(tmp_path):
    save_file({"p.weight": np.zeros(4, np.uint8), "p.weight_quant_state": np.zeros(4, np.uint8)},
              tmp_path / "model.safetensors")  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"GPTQModel's own spelling.*'p\.weight_quant_state'"):
        open_bitsandbytes(BNB, Checkpoint(tmp_path))


GOOD_STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4, 128]}
NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "7",
        "[" * 5000,
        json.dumps(GOOD_STATE) + " " * 20_000,
        json.dumps(GOOD_STATE | {"blocksize": 48}),
        json.dumps(GOOD_STATE | {"blocksize": None}),
        json.dumps(GOOD_STATE | {"blocksize": [64]}),
        json.dumps(GOOD_STATE | {"shape": None}),
        json.dumps(GOOD_STATE | {"shape": [4, 64]}),
        json.dumps(GOOD_STATE | {"quant_type": "fp4"}),
        json.dumps({"quant_type": "nf4"}),
        json.dumps(GOOD_STATE | NESTED | {"nested_offset": float("nan")}),
        json.dumps(GOOD_STATE | NESTED | {"nested_offset": "much"}),
        json.dumps(GOOD_STATE | NESTED | {"nested_dtype": "float16"}),
        json.dumps(GOOD_STATE | NESTED | {"nested_blocksize": 0}),
    ],
)
def test_damaged_descriptions_of_a_tensor_are_errors(tmp_path, text):
    save_file({STATE: np.frombuffer(text.encode(), np.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="weight"):
        open_bitsandbytes(BNB, Checkpoint(tmp_path)).stored(part("weight", 4, 128))


def test_missing_and_misshapen_tensors_of_bitsandbytes_are_all_named(nf4):
    from safetensors.numpy import load_file

    file = nf4[0] / "model.safetensors"
    tensors = load_file(file)
    down, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("down", "up"))
    del tensors[f"{down}.absmax"]
    tensors[f"{up}.quant_map"] = np.zeros(15, np.float32)
    tensors[f"{up}.absmax"] = tensors[f"{up}.absmax"][:-1]
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        load(nf4[0])
    assert {problem.split("'")[1] for problem in caught.value.problems} == {
        f"{down}.absmax", f"{up}.quant_map", f"{up}.absmax"}  # fmt: skip


# MLX


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_mlx_is_read_as_its_library_reads_it(dtype, group):
    checkpoint = Checkpoint(FIXTURES, "mlx.safetensors")
    reader = open_mlx({"group_size": group, "bits": 4}, checkpoint)
    weight = part(f"{dtype}_{group}.weight", 4, 128)
    stored = reader.stored(weight)
    assert stored is not None and len(stored) == 3 and headers_agree(checkpoint, stored)
    read = reader.weight(weight)
    assert read.scale.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype), "the file's precision"
    assert (read.scale < 0).any(), "the fixture has scales of both signs"
    expected = checkpoint.read(f"{dtype}_{group}.expected")
    np.testing.assert_allclose(read.dequantize(), expected, rtol=0, atol=4e-7 * abs(expected).max())
    assert reader.name == f"MLX 4-bit affine, group {group}"


@pytest.mark.slow
@pytest.mark.parametrize("tied", some_slow([False, True], lambda tied: not tied))
def test_an_mlx_checkpoint_has_embeddings_and_head_of_four_bits(tmp_path, tied):
    field = {"quantization": MLX, "quantization_config": MLX}
    both = write_both(tmp_path, field, mlx_tensors, lambda name: True, tie_word_embeddings=tied)
    packed, plain = map(load, both)
    np.testing.assert_allclose(packed(IDS).logits, plain(IDS).logits, atol=1e-4, rtol=0)
    embeddings = [model.model.embed_tokens.weight[...] for model in (packed, plain)]
    np.testing.assert_allclose(*embeddings, atol=1e-6)
    if not tied:
        assert all(type(weight) is Int4 for weight in weights(packed))
        same_values(packed, plain)


def test_mlx_paths_have_their_own_settings(tmp_path):
    paths = {"model.layers.0.mlp.down_proj": {"group_size": 64, "bits": 4}, "model.layers.0.mlp.up_proj": True}
    settings = MLX | paths | {"lm_head": False}

    def encode(name: str, shape: tuple[int, int], seed: int) -> Any:
        return mlx_tensors(name, shape, seed, 64 if "down_proj" in name else 32)

    both = write_both(tmp_path, {"quantization": settings}, encode, lambda name: name != "lm_head.weight")
    packed, plain = map(load, both)
    assert [getattr(weight, "group_size", None) for weight in weights(packed)] == [32, 32, 32, 64, None]
    same_values(packed, plain)


def test_int4_is_not_quantised_again(tmp_path):
    packed, _ = write_both(tmp_path, {"quantization": MLX}, mlx_tensors, is_linear)
    assert type(weights(load(packed, load_in_4bit=True))[0]) is Int4
    with pytest.raises(JaxgenError, match=r"quantization_config=.*is int4 already \(MLX 4-bit affine, group 32\)"):
        load(packed, quantization_config=Int4Config())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mode": "mxfp4"}, "mode='mxfp4'"),
        ({"mode": "nvfp4", "group_size": 16}, "mode='nvfp4'|group_size=16"),
        ({"bits": 8}, "bits=8"),
        ({"group_size": 16}, "group_size=16"),
        ({"group_size": True}, "group_size=True"),
        ({"lm_head": {"group_size": 64, "bits": 6}}, r"lm_head\.bits=6"),
        ({"lm_head": {"group_size": 64, "bits": 4, "mode": "mxfp8"}}, r"lm_head\.mode='mxfp8'"),
        ({"lm_head": {"rank": 3}}, r"lm_head\.rank=3"),
        ({"trick": "yes"}, "trick='yes'"),
    ],
)
def test_other_kinds_of_mlx_are_refused_by_name(settings, named):
    with pytest.raises(UnsupportedError, match=f"MLX quantisation with ({named})"):
        open_mlx(MLX | settings, Checkpoint(FIXTURES, "mlx.safetensors"))


def test_settings_of_an_mlx_path_do_not_inherit_from_the_others():
    reader = open_mlx({"group_size": 32, "bits": 4, "float16_64": {"bits": 4}}, Checkpoint(FIXTURES, "mlx.safetensors"))
    stored = reader.stored(part("float16_64.weight", 4, 128))
    assert stored is not None and stored["float16_64.scales"].shape == (4, 2), "MLX's own default is 64"


def test_mlx_weights_without_scales_are_missing_them(tmp_path):
    from safetensors.numpy import load_file

    packed, _ = write_both(tmp_path, {"quantization": MLX}, mlx_tensors, is_linear)
    tensors = load_file(packed / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mlp\.up_proj\.scales' is missing"):
        load(packed)


# GGUF


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q8_0"])
def test_ggml_blocks_are_read_as_their_library_reads_them(kind):
    checkpoint = Checkpoint(FIXTURES, "ggml_blocks.safetensors")
    rows, expected = checkpoint.read(f"{kind}.rows"), checkpoint.read(f"{kind}.expected")
    if kind in FOUR_BITS:
        weight = FOUR_BITS[kind](rows)
        assert weight.group_size == 32
        np.testing.assert_allclose(weight.dequantize(), expected, rtol=0, atol=4e-7 * abs(expected).max())
    else:
        np.testing.assert_array_equal(FLOATS[kind](rows), expected)


@pytest.mark.parametrize("name", ["other.gguf", "model.bin", "", 7])
def test_gguf_files_that_are_not_there(tmp_path, name):
    with pytest.raises(JaxgenError, match="gguf_file="):
        load(tmp_path, gguf_file=name)


def test_a_directory_of_gguf_files_says_how_to_choose_one(tmp_path):
    (tmp_path / "b.gguf").touch()
    (tmp_path / "a.gguf").touch()
    with pytest.raises(JaxgenError, match=r"a\.gguf, b\.gguf: choose one with gguf_file='a\.gguf'"):
        load(tmp_path)
