"""GGUF files of the families, named and written by gguf as llama.cpp's converters do, against transformers on torch."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from jaxgen.models.families import config_from_hf, family_of
from jaxgen.quant import Int4
from tests.families import CONFIGS
from tests.family_files import load, logits
from tests.oracle.torch_families import torch_model

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("default"),  # of libraries that we do not answer for
]

# What the converter of each family adds to those that all write: names of gguf's writer, and of transformers' config.
ARCHITECTURES = {
    "mistral": "MISTRAL3", "ministral3": "MISTRAL3", "mixtral": "LLAMA", "qwen3_moe": "QWEN3MOE", "phi3": "PHI3",
    "olmo2": "OLMO2", "olmo3": "OLMO2", "gemma2": "GEMMA2", "gemma3_text": "GEMMA3", "granite": "GRANITE",
    "smollm3": "SMOLLM3",
}  # fmt: skip
ROTATED = ("mistral", "ministral3", "mixtral", "granite", "smollm3")  # those made by LlamaModel and its children
ABSENT = object()
# Configs whose values are those that llama.cpp has in its code and no metadata says.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral3 without yarn": ("ministral, all sliding", {"model_type": "mistral", "sliding_window": None}),
    "ministral3": ("ministral3", {}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "phi3": ("phi3", {"hidden_size": 64}),
    "phi3, longrope": ("phi3, longrope", {}),
    "olmo2": ("olmo2, yarn", {}),
    "olmo3": ("olmo3", {}),
    "olmo3, yarn": ("olmo3, yarn", {}),
    "gemma2": ("gemma2", {"num_hidden_layers": 3}),
    "gemma2, 46 layers": ("gemma2", {"num_hidden_layers": 46, "query_pre_attn_scalar": 12, "hidden_size": 48}),
    "gemma3": ("gemma3, linear", {"query_pre_attn_scalar": 16, "num_hidden_layers": 6, "layer_types": ABSENT,
                                  "tie_word_embeddings": True}),
    "granite": ("granite", {}),
    "smollm3": ("smollm3, yarn", {"num_hidden_layers": 4, "no_rope_layers": ABSENT}),
}  # fmt: skip
IDS = np.random.default_rng(5).integers(3, 97, (1, 40))


@pytest.fixture
def gguf() -> Any:
    return pytest.importorskip("gguf", reason="gguf names and writes the tensors of .gguf files")


def add_metadata(writer: Any, config: Any) -> None:
    """As `TextModel.set_gguf_parameters` and the families' own; `config` is transformers'."""
    kind, head = config.model_type, getattr(config, "head_dim", None)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if head is not None and kind != "phi3":
        writer.add_key_length(head)
        writer.add_value_length(head)
    ropes = config.rope_parameters
    full = ropes.get("full_attention", ropes)
    if kind != "gemma2":
        writer.add_rope_freq_base(full["rope_theta"])
    if kind != "phi3" and full["rope_type"] in ("linear", "yarn"):
        add_scaling(writer, full)
    if kind in ROTATED:
        writer.add_rope_dimension_count(head or config.hidden_size // config.num_attention_heads)
    if "sliding_attention" in ropes and kind == "gemma3_text":
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    if kind in ("mixtral", "qwen3_moe"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    own = {
        "ministral3": lambda: (
            writer.add_rope_scaling_yarn_log_mul(full["mscale_all_dim"]),
            writer.add_attn_temperature_scale(full["llama_4_scaling_beta"]),
        ),
        "qwen3_moe": lambda: writer.add_expert_feed_forward_length(config.moe_intermediate_size),
        "granite": lambda: (
            writer.add_attention_scale(config.attention_multiplier),
            writer.add_embedding_scale(config.embedding_multiplier),
            writer.add_residual_scale(config.residual_multiplier),
            writer.add_logit_scale(config.logits_scaling),
        ),
        "olmo3": lambda: (
            writer.add_sliding_window(config.sliding_window),
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types]),
        ),
        "gemma2": lambda: (
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping),
            writer.add_final_logit_softcapping(config.final_logit_softcapping),
            writer.add_sliding_window(config.sliding_window),
        ),
        "gemma3_text": lambda: writer.add_sliding_window(config.sliding_window),
        "phi3": lambda: add_phi(writer, config),
    }
    own.get(kind, lambda: None)()


def add_scaling(writer: Any, rope: dict[str, Any]) -> None:
    from gguf import RopeScalingType

    writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if rope.get("beta_fast") is not None:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        if rope.get("beta_slow") is not None:
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def add_phi(writer: Any, config: Any) -> None:
    rope = config.rope_parameters
    size = config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * size))
    original = config.original_max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_sliding_window(config.sliding_window or 0)
    if "long_factor" in rope:
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute`."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts of a layer merged into 3D tensors, under the names that the converters give them."""
    merged: dict[str, Any] = {}
    for name, tensor in tensors.items():
        before, mark, after = name.partition(".experts.")
        if not mark:
            merged[name] = tensor
            continue
        expert, _, matrix = after.partition(".")
        key = f"{before}.experts.{matrix}".replace("block_sparse_moe", "feed_forward")
        key = key.replace("model.layers", "layers") if "feed_forward" in key else key
        merged.setdefault(key, {})[int(expert)] = tensor
    return {
        name: np.stack([value[expert] for expert in range(len(value))]) if isinstance(value, dict) else value
        for name, value in merged.items()
    }


def write(gguf: Any, path: Path, theirs: Any, directory: Path, kind: str) -> None:
    """The file of the checkpoint in `directory`; matrices are of a `kind`, which changes them in `theirs` too."""
    config = theirs.config
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name("Tiny")
    add_metadata(writer, config)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in stacked(load_file(directory / "model.safetensors")).items():
        count = heads.get(name.split(".")[-2]) if config.model_type in ROTATED else None
        values = tensor if count is None else permuted(tensor, count)
        if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored is not None, name
        quantized = kind != "F32" and values.ndim > 1 and "ffn_gate_inp" not in stored
        code = gguf.GGMLQuantizationType[kind if quantized else "F32"]
        writer.add_tensor(stored, gguf.quantize(values, code), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_the_model_of_transformers(case: str, gguf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name, changes = CASES[case]
    fields = {key: value for key, value in (CONFIGS[name] | changes).items() if value is not ABSENT}
    monkeypatch.setitem(CONFIGS, name, fields)
    theirs = torch_model(name, tmp_path)
    write(gguf, tmp_path / "m.gguf", theirs, tmp_path, "F32")
    model = load(tmp_path / "m.gguf")
    plain = config_from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert type(model) is family_of(plain)
    assert (model.config.layer_windows, model.config.rotary_size) == (plain.layer_windows, plain.rotary_size)
    assert model.config.tie_word_embeddings is plain.tie_word_embeddings
    np.testing.assert_allclose(logits(model, IDS), torch_logits(theirs), atol=1e-4)


@pytest.mark.parametrize("case", ["mixtral", "phi3, longrope", "gemma3"])
def test_four_bits(case: str, gguf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of stacked experts, stacked projections, and beside norms that are stored otherwise."""
    name, changes = CASES[case]
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    fields = {key: value for key, value in (CONFIGS[name] | changes | sizes).items() if value is not ABSENT}
    monkeypatch.setitem(CONFIGS, name, fields)
    theirs = torch_model(name, tmp_path)
    rounded = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
    code = gguf.GGMLQuantizationType.Q4_0
    for key, tensor in rounded.items():
        if tensor.ndim > 1 and "mlp.gate.weight" not in key:  # of experts too, whose rows are the same in any stack
            rounded[key] = gguf.dequantize(gguf.quantize(tensor, code), code)
    write(gguf, tmp_path / "m.gguf", theirs, tmp_path, "Q4_0")
    theirs.load_state_dict({key: torch.from_numpy(tensor) for key, tensor in rounded.items()})
    model = load(tmp_path / "m.gguf")
    mlp = model.model.layers[1].mlp
    weight = (mlp.experts if case == "mixtral" else mlp).down_proj.weight[...]
    assert isinstance(weight, Int4) and weight.group_size == 32
    np.testing.assert_allclose(logits(model, IDS), torch_logits(theirs), atol=2e-4)
