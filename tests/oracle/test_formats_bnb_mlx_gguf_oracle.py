"""bitsandbytes, MLX and GGUF checkpoints, made and read by the formats' own libraries and transformers on torch."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxgen.convert.load import AutoModelForCausalLM, open_checkpoint
from jaxgen.errors import CheckpointError, JaxgenError, UnsupportedError
from jaxgen.models.tensors import parameter_parts
from jaxgen.quant import Int4, Lookup4

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("default"),  # of libraries that we do not answer for
]

CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
}
IDS = np.array([[1, 5, 9, 2, 7, 10, 3]])


def torch_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(transformers.MistralConfig(**CONFIG | changes)).eval()


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.float().numpy()


def with_weights(weights: dict[str, Any], **changes: Any) -> Any:
    """The torch model of these tensors."""
    model = torch_model(**changes)
    tensors = {name: torch.from_numpy(np.array(tensor, np.float32)) for name, tensor in weights.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def ours(place: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, dtype="float32", device_map="cpu", **options)


def same_logits(model: Any, theirs: Any) -> None:
    want = torch_logits(theirs)
    assert abs(want).max() > 0.1
    np.testing.assert_allclose(model(jnp.asarray(IDS)).logits, want, atol=1e-4, rtol=0)


def read_all(place: Path) -> dict[str, Any]:
    """Every weight of a checkpoint that is stored in four bits, by HF name."""
    config, _, stored_as = open_checkpoint(place)
    assert stored_as is not None
    parts = [part for group in parameter_parts(config).values() for part in group]
    return {part.name: stored_as.weight(part) for part in parts if stored_as.stored(part) is not None}


# bitsandbytes


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes makes and reads NF4 and FP4")


def save_bitsandbytes(target: Path, *, model: Any = None, **options: Any) -> None:
    (model or torch_model()).save_pretrained(target / "float")
    config = transformers.BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **options)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        target / "float", quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    quantized.save_pretrained(target / "quantized")


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_checkpoints_of_transformers(tmp_path, bitsandbytes, kind, double, storage):
    save_bitsandbytes(tmp_path, load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
                      bnb_4bit_quant_storage=storage)  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", device_map="cpu")
    linears = {n: m for n, m in theirs.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    read = read_all(tmp_path / "quantized")
    assert read.keys() == {f"{name}.weight" for name in linears} and len(read) == 14
    for name, linear in linears.items():
        linear.support_avx512bf16_for_cpu = False  # a kernel that rounds to bfloat16, on CPUs that have it
        weight = read[f"{name}.weight"]
        expected = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        assert isinstance(weight, Lookup4)
        np.testing.assert_array_equal(weight.dequantize(), expected.numpy())
    same_logits(ours(tmp_path / "quantized"), theirs)


def test_bitsandbytes_blocks_across_rows(tmp_path, bitsandbytes):
    narrow = torch_model(hidden_size=96)
    save_bitsandbytes(tmp_path, model=narrow, load_in_4bit=True)
    with pytest.raises(UnsupportedError, match="rows of 96 weights and blocks of 64"):
        ours(tmp_path / "quantized")


def test_int8_checkpoints_of_transformers_are_refused(tmp_path, bitsandbytes):
    save_bitsandbytes(tmp_path, load_in_8bit=True)
    with pytest.raises(UnsupportedError, match=r"LLM\.int8"):
        ours(tmp_path / "quantized")


# MLX


def save_mlx(mx: Any, target: Path, settings: dict[str, Any], dtype: str, model: Any) -> dict[str, np.ndarray]:
    """What mlx-lm's convert writes; returns the values of all tensors, as MLX dequantises them."""
    tensors, values = {}, {}
    for name, tensor in model.state_dict().items():
        weight = mx.array(tensor.numpy()).astype(getattr(mx, dtype))
        path = name.removesuffix(".weight")
        own = settings.get(path, settings)
        if weight.ndim == 1 or own is False or (path == "lm_head" and model.config.tie_word_embeddings):
            if path != "lm_head" or not model.config.tie_word_embeddings:
                tensors[name], values[name] = weight, np.array(weight.astype(mx.float32))
            continue
        options = {"group_size": own["group_size"], "bits": own["bits"]}
        packed, scales, biases = mx.quantize(weight, **options)
        tensors |= {name: packed, f"{path}.scales": scales, f"{path}.biases": biases}
        wide = scales.astype(mx.float32), biases.astype(mx.float32)
        values[name] = np.array(mx.dequantize(packed, *wide, **options))
    target.mkdir()
    mx.save_safetensors(str(target / "model.safetensors"), tensors, {"format": "mlx"})
    config = model.config.to_dict() | {"quantization": settings, "quantization_config": settings}
    (target / "config.json").write_text(json.dumps(config))
    return values


@pytest.mark.parametrize(
    ("dtype", "tied", "settings"),
    [
        ("float16", False, {"group_size": 64, "bits": 4, "mode": "affine"}),
        ("bfloat16", True, {"group_size": 64, "bits": 4}),
        ("float32", True, {"group_size": 128, "bits": 4, "mode": "affine"}),
        ("bfloat16", False, {"group_size": 32, "bits": 4, "model.layers.1.mlp.down_proj": {"group_size": 64, "bits": 4},
                             "model.embed_tokens": False, "lm_head": {"group_size": 128, "bits": 4}}),
    ],
)  # fmt: skip
def test_mlx_checkpoints(tmp_path, dtype, tied, settings):
    mx = pytest.importorskip("mlx.core", reason="MLX makes and reads its 4-bit weights")
    model = torch_model(tie_word_embeddings=tied)
    values = save_mlx(mx, tmp_path / "mlx", settings, dtype, model)
    read = read_all(tmp_path / "mlx")
    assert len(read) == 14 + (settings.get("model.embed_tokens") is not False) + (not tied)
    for name, weight in read.items():
        assert isinstance(weight, Int4) and (np.asarray(weight.scale) < 0).any()
        np.testing.assert_allclose(weight.dequantize(), values[name], rtol=0, atol=4e-7 * abs(values[name]).max())
    same_logits(ours(tmp_path / "mlx"), with_weights(values, tie_word_embeddings=tied))


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_mlx_modes_without_biases_are_refused(tmp_path, mode):
    mx = pytest.importorskip("mlx.core", reason="MLX makes its other modes")
    packed, scales = mx.quantize(mx.random.normal((256, 256)), mode=mode)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mistral", **CONFIG, "quantization": {"group_size": 32, "bits": 4, "mode": mode}})
    )
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"p.weight": packed, "p.scales": scales})
    with pytest.raises(UnsupportedError, match=f"mode='{mode}'"):
        ours(tmp_path)


# GGUF


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
METADATA: dict[str, Any] = {
    "llama.context_length": 512,
    "llama.embedding_length": 256,
    "llama.block_count": 2,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 64,
    "llama.rope.freq_base": 100000.0,
    "llama.vocab_size": 96,
}


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf", reason="gguf writes and reads .gguf files")


def gguf_name(name: str) -> str:
    path = name.removesuffix(".weight")
    layer, _, inner = path.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[inner]}.weight" if path.startswith("model.layers.") else f"{NAMES[path]}.weight"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's convert_hf_to_gguf.py lays out the rows of q and k."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def blocks_of(gguf: Any, weight: np.ndarray, kind: Any) -> np.ndarray:
    """Quantised by gguf, or of random codes where it cannot: those are values as good as others."""
    if kind.name not in ("Q4_K", "Q6_K"):
        return gguf.quantize(weight, kind)
    weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(weight.size)
    rows = generator.integers(0, 256, (weight.shape[0], weight.shape[1] // weights * nbytes), np.uint8)
    blocks = rows.reshape(-1, nbytes)
    for start in (0, 2) if kind.name == "Q4_K" else (nbytes - 2,):
        halves = generator.normal(0, 1e-4, len(blocks)).astype(np.float16)
        blocks[:, start : start + 2] = halves.view(np.uint8).reshape(-1, 2)
    return rows


def save_gguf(gguf: Any, path: Path, kinds: Any, *, tied: bool = False, **metadata: Any) -> dict[str, np.ndarray]:
    """A file as llama.cpp writes it, each matrix of type `kinds(HF name)`; returns its values under HF's names."""
    model = torch_model(tie_word_embeddings=tied)
    writer = gguf.GGUFWriter(path, metadata.pop("arch", "llama"), endianess=metadata.pop("endianess", 0) or gguf.GGUFEndian.LITTLE)  # fmt: skip  # noqa: E501
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    fields = METADATA | {"general.name": "Tiny Mistral", "general.file_type": 15} | metadata
    for name, value in fields.items():
        if value is not None:
            adders[type(value)](name, value)
    words = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(93))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * 96)
    writer.add_token_types([1] * 96)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    values = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        weight = tensor.numpy()
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        kind = gguf.GGMLQuantizationType[kinds(name)] if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        rows = blocks_of(gguf, permuted(weight, heads) if heads else weight, kind)
        plain = gguf.dequantize(rows, kind).reshape(weight.shape)
        values[name] = unpermuted(plain, heads) if heads else plain
        writer.add_tensor(gguf_name(name), rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def q4_k_m(name: str) -> str:
    """Roughly llama.cpp's mixture: six bits for the head, and for every second v and down."""
    return "Q6_K" if name == "lm_head.weight" or ("layers.0" in name and ("v_proj" in name or "down" in name)) else "Q4_K"  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q8_0", "F16", "BF16", "F32", "mixture"])
def test_gguf_files(tmp_path, gguf, kind, tied):
    values = save_gguf(gguf, tmp_path / "tiny.gguf", q4_k_m if kind == "mixture" else lambda name: kind, tied=tied)
    model = ours(tmp_path / "tiny.gguf")
    assert model.config.tie_word_embeddings is tied and model.config.sliding_window is None
    four = kind in ("Q4_0", "Q4_1", "Q4_K", "mixture")
    assert isinstance(model.model.layers[1].mlp.down_proj.weight[...], Int4) is four
    for name, weight in read_all(tmp_path / "tiny.gguf").items():
        np.testing.assert_allclose(weight.dequantize(), values[name], rtol=0, atol=4e-7 * abs(values[name]).max())
    same_logits(model, with_weights(values, tie_word_embeddings=tied))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q8_0"])
def test_gguf_files_are_the_same_model_in_transformers(tmp_path, gguf, kind):
    save_gguf(gguf, tmp_path / "tiny.gguf", lambda name: kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    model = ours(tmp_path, gguf_file="tiny.gguf")
    same_logits(model, theirs.eval())
    for name in ("hidden_size", "head_dim", "num_key_value_heads", "rms_norm_eps", "vocab_size", "eos_token_id"):
        assert getattr(model.config, name) == getattr(theirs.config, name), name
    assert model.config.rope_theta == theirs.config.rope_parameters["rope_theta"]


def test_gguf_says_what_it_is(tmp_path, gguf):
    save_gguf(gguf, tmp_path / "tiny.gguf", q4_k_m)
    stored_as = open_checkpoint(tmp_path / "tiny.gguf")[2]
    assert stored_as is not None and stored_as.name == "GGUF Q4_K_M (Q4_K, Q6_K)"


def test_gguf_of_more_bits_is_quantised_on_request(tmp_path, gguf):
    save_gguf(gguf, tmp_path / "tiny.gguf", lambda name: "Q8_0")
    weight = ours(tmp_path / "tiny.gguf", load_in_4bit=True).model.layers[0].self_attn.qkv_proj.weight[...]
    assert isinstance(weight, Int4) and weight.group_size == 128


@pytest.mark.parametrize(
    ("kind", "metadata", "named"),
    [
        ("Q5_0", {}, "'token_embd.weight' is of type Q5_0"),
        ("Q4_0", {"arch": "gemma4"}, "general.architecture='gemma4' is not supported: its layers have embeddings"),
        ("Q4_0", {"llama.expert_shared_count": 8}, "llama.expert_shared_count=8"),
        ("Q4_0", {"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn'"),
        ("Q4_0", {"llama.rope.scaling.factor": 2.0}, "llama.rope.scaling.factor=2.0"),
        ("Q4_0", {"llama.logit_scale": 2.0}, "llama.logit_scale=2.0"),
        ("Q4_0", {"llama.rope.dimension_count": 32, "llama.attention.key_length": 64}, "one size of heads"),
        ("Q4_0", {"split.count": 2}, "split"),
    ],
)
def test_other_gguf_files_are_refused_by_name(tmp_path, gguf, kind, metadata, named):
    save_gguf(gguf, tmp_path / "tiny.gguf", lambda name: kind, **metadata)
    with pytest.raises(UnsupportedError, match=named):
        ours(tmp_path / "tiny.gguf")


def test_big_endian_gguf_is_refused(tmp_path, gguf):
    save_gguf(gguf, tmp_path / "tiny.gguf", lambda name: "F32", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(UnsupportedError, match="big-endian"):
        ours(tmp_path / "tiny.gguf")


def test_harmless_metadata_is_no_obstacle(tmp_path, gguf):
    harmless = {"llama.rope.scaling.type": "none", "llama.expert_count": 0, "llama.attention.key_length": 64}
    save_gguf(gguf, tmp_path / "tiny.gguf", lambda name: "Q4_0", **harmless)
    assert ours(tmp_path / "tiny.gguf").config.head_dim == 64


def test_metadata_that_is_not_there(tmp_path, gguf):
    save_gguf(gguf, tmp_path / "tiny.gguf", lambda name: "Q4_0", **{"llama.block_count": None})
    with pytest.raises(CheckpointError, match=r"llama\.block_count is missing"):
        ours(tmp_path / "tiny.gguf")


def test_metadata_that_contradicts_the_tensors(tmp_path, gguf):
    save_gguf(gguf, tmp_path / "tiny.gguf", lambda name: "Q4_0", **{"llama.feed_forward_length": 511})
    with pytest.raises(CheckpointError) as caught:
        ours(tmp_path / "tiny.gguf")
    assert len(caught.value.problems) == 6, "gate, up and down of two layers"
    assert all("but tiny.gguf implies" in problem for problem in caught.value.problems)


def test_damaged_gguf_files_are_errors(tmp_path, gguf):
    path = tmp_path / "tiny.gguf"
    save_gguf(gguf, path, lambda name: "Q4_0")
    whole = path.read_bytes()
    header = whole.index(b"output_norm.weight") + 60  # about where the list of tensors ends
    generator = np.random.default_rng(0)
    cuts = [0, 3, 4, 20, *generator.integers(24, header, 20), len(whole) - 1]
    for cut in cuts:
        path.write_bytes(whole[: int(cut)])
        with pytest.raises(CheckpointError, match="truncated"):
            open_checkpoint(path)
    noticed = 0
    for place, value in zip(generator.integers(0, header, 120), generator.integers(1, 256, 120), strict=True):
        damaged = bytearray(whole)
        damaged[place] ^= int(value)
        path.write_bytes(damaged)
        try:
            open_checkpoint(path)
        except JaxgenError:
            noticed += 1
    assert noticed > 60, "the rest is in the tokenizer, or in numbers that mean something else now"


def test_tensors_that_changed_places_are_noticed(tmp_path, gguf):
    path = tmp_path / "tiny.gguf"
    save_gguf(gguf, path, lambda name: "Q4_0")
    whole = bytearray(path.read_bytes())
    gate, up = (
        slice(end, end + 8)  # the offset, behind name, number of dimensions, dimensions and type
        for end in (
            whole.index(name) + len(name) + 4 + 16 + 4 for name in (b"blk.0.ffn_gate.weight", b"blk.0.ffn_up.weight")
        )
    )
    whole[gate], whole[up] = whole[up], whole[gate]
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_gate\.weight' begins at byte"):
        open_checkpoint(path)
