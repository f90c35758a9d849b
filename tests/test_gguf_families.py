"""GGUF files of the families: what their metadata may say, and that nothing which it says is a raw error.

The numbers are compared with transformers in tests/oracle/test_gguf_families_oracle.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgen.convert.formats.gguf import open_gguf
from jaxgen.convert.load import check_tensors
from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.models.families import families
from tests.gguf_files import gguf_file
from tests.helpers import some_slow

COMMON: dict[str, Any] = {
    "context_length": 512,
    "embedding_length": 64,
    "block_count": 4,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
# The smallest file that is of the family, beside what all have.
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma2ForCausalLM": ("gemma2", {"attention.sliding_window": 16, **SOFTCAPS}),
    "Gemma3ForCausalLM": ("gemma3", {"attention.sliding_window": 16}),
    "GraniteForCausalLM": (
        "granite", {"attention.scale": 0.5, "embedding_scale": 12.0, "residual_scale": 0.2, "logit_scale": 8.0},
    ),
    "LlamaForCausalLM": ("llama", {}),
    "Ministral3ForCausalLM": ("mistral3", {"attention.temperature_scale": 0.1, **YARN}),
    "MistralForCausalLM": ("mistral3", {}),
    "MixtralForCausalLM": ("llama", {"expert_count": 4, "expert_used_count": 2}),
    "Olmo2ForCausalLM": ("olmo2", {}),
    "Olmo3ForCausalLM": ("olmo2", {"attention.sliding_window": 16}),
    "Phi3ForCausalLM": ("phi3", {"rope.dimension_count": 12}),
    "Qwen2ForCausalLM": ("qwen2", {}),
    "Qwen3ForCausalLM": ("qwen3", {}),
    "Qwen3MoeForCausalLM": (
        "qwen3moe", {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
    ),
    "SmolLM3ForCausalLM": ("smollm3", {}),
}  # fmt: skip
DERIVED = ("Gemma3ForCausalLM", "Ministral3ForCausalLM", "Olmo3ForCausalLM", "Phi3ForCausalLM")
FACTORS = {f"rope_factors_{length}.weight": np.ones(6, np.float32) for length in ("short", "long")}


def opened(path: Path, name: str, changes: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> Any:
    architecture, own = OWN[name]
    said = {f"{architecture}.{key}": value for key, value in (COMMON | own | changes).items()}
    embedding = {"model.embed_tokens.weight": np.zeros((24, 64), np.float32)}
    path.write_bytes(gguf_file({"general.architecture": architecture, **said}, embedding | (tensors or {})))
    return open_gguf(path)


def test_every_family_that_llama_cpp_has_is_here():
    kinds: list[Any] = families()
    assert OWN.keys() == {kind.__name__ for kind in kinds if kind.gguf is not None}


@pytest.mark.parametrize("name", OWN)
def test_a_file_is_of_the_family_that_its_metadata_tell(name: str, tmp_path: Path):
    config, *_ = opened(tmp_path / "m.gguf", name, {})
    assert config.architecture == name


@pytest.mark.parametrize("name", some_slow(list(OWN), soak=lambda name: name not in DERIVED))
def test_any_value_is_read_or_refused(name: str, tmp_path: Path):
    values = (0, 3, 2**32 - 1, 0.0, float("nan"), "yarn", True, [True], [1, 2])
    tensors = FACTORS if name == "Phi3ForCausalLM" else {}
    own = (
        OWN[name][1]
        | (YARN if name == "Olmo3ForCausalLM" else {})
        | ({"rope.scaling.attn_factor": 1.2} if tensors else {})
    )
    optional = dict.fromkeys(("attention.key_length", "attention.sliding_window_pattern", "rope.scaling.type"), None)
    refused = 0
    for key in COMMON | own | optional:
        for value in values:
            try:
                opened(tmp_path / "m.gguf", name, own | {key: value}, tensors)
            except JaxgenError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 60


@pytest.mark.parametrize("name, changes, message", [
    ("GraniteForCausalLM", {"attention.sliding_window": 8}, r"granite\.attention\.sliding_window=8 is not supported"),
    ("Qwen3MoeForCausalLM", {"expert_feed_forward_length": None}, "expert_feed_forward_length is missing"),
    ("Qwen3MoeForCausalLM", {"expert_used_count": 9}, "num_experts_per_tok=9 is more than num_experts=4"),
    ("Qwen3MoeForCausalLM", {"expert_shared_count": 1}, r"qwen3moe\.expert_shared_count=1 is not supported"),
    ("Gemma2ForCausalLM", {"attn_logit_softcapping": None}, r"gemma2\.attn_logit_softcapping is missing"),
    ("Gemma2ForCausalLM", {"attention.sliding_window": None}, r"sliding_window is missing"),
    ("Gemma3ForCausalLM", {"attention.sliding_window_pattern": 0}, "sliding_window_pattern=0 names no layers"),
    ("Gemma3ForCausalLM", {"attention.sliding_window_pattern": [True]}, "layer_types names 1 layers"),
    ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, r"gemma3\.attn_logit_softcapping=50\.0 is not supported"),
    ("Olmo3ForCausalLM", {"rope.scaling.type": "yarn"}, r"olmo2\.rope\.scaling\.factor is missing"),
    ("Olmo2ForCausalLM", YARN | {"rope.scaling.yarn_attn_factor": 0.9}, r"yarn_attn_factor=0\.8999.* 0\.1 \* log"),
    ("Olmo2ForCausalLM", YARN | {"rope.scaling.yarn_ext_factor": 0.5}, r"yarn_ext_factor=0\.5 is not supported"),
    ("Olmo2ForCausalLM", {"rope.scaling.factor": 2.0}, r"olmo2\.rope\.scaling\.factor=2\.0 is not supported"),
    ("MixtralForCausalLM", YARN, r"llama\.rope\.scaling\.type='yarn' is not supported"),
    ("Ministral3ForCausalLM", dict.fromkeys(YARN), "temperature_scale is not supported without"),
    ("Phi3ForCausalLM", {"rope.dimension_count": 18}, "dimension_count=18 must be at most the size of heads, 16"),
    ("Phi3ForCausalLM", {"rope.scaling.attn_factor": 1.2}, r"attn_factor=1\.2.* is not supported without rope_factors"),
])  # fmt: skip
def test_what_is_refused(name: str, changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(JaxgenError, match=message):
        opened(tmp_path / "m.gguf", name, changes)


@pytest.mark.parametrize("name, changes, tensors, message", [
    ("Phi3ForCausalLM", {}, FACTORS, "rope_factors are not supported without"),
    ("Phi3ForCausalLM", {"rope.scaling.original_context_length": 128},
     {"rope_factors_short.weight": np.ones(6, np.float32)}, "long_factor is missing"),
    ("Phi3ForCausalLM", {"rope.scaling.original_context_length": 128, "rope.dimension_count": 16}, FACTORS,
     "short_factor has 6 numbers, and 8 pairs"),
    ("LlamaForCausalLM", YARN, {"rope_freqs.weight": np.ones(8, np.float32)}, r"beside llama\.rope\.scaling\.type"),
])  # fmt: skip
def test_scaled_positions_that_do_not_fit(name: str, changes: Any, tensors: Any, message: str, tmp_path: Path):
    with pytest.raises(JaxgenError, match=message):
        opened(tmp_path / "m.gguf", name, changes, tensors)


@pytest.mark.parametrize("architecture, why", [
    ("gemma3n", "share keys and values"), ("gpt-oss", "MXFP4"), ("qwen3next", "gated linear"), ("llama4", "; jaxgen"),
])  # fmt: skip
def test_other_architectures_are_refused_with_the_reason(architecture: str, why: str, tmp_path: Path):
    (tmp_path / "m.gguf").write_bytes(gguf_file({"general.architecture": architecture}, {}))
    with pytest.raises(UnsupportedError, match=f"general.architecture='{architecture}' is not supported.*{why}"):
        open_gguf(tmp_path / "m.gguf")


def test_a_damaged_count_of_experts_is_not_spelt_out(tmp_path: Path):
    experts = {"blk.0.ffn_gate_exps.weight": np.zeros((4, 96, 64), np.float32)}
    config, checkpoint, stored_as = opened(
        tmp_path / "m.gguf", "MixtralForCausalLM", {"expert_count": 2**31 - 1}, experts
    )
    with pytest.raises(JaxgenError, match="has num_local_experts=2147483647, the weights have 4"):
        check_tensors(checkpoint, config, stored_as)


def test_experts_of_old_files_are_tensors_of_their_own(tmp_path: Path):
    named = {f"blk.0.ffn_{matrix}.3.weight": np.zeros((96, 64), np.float32) for matrix in ("gate", "up", "down")}
    checkpoint = opened(tmp_path / "m.gguf", "MixtralForCausalLM", {}, named)[1]
    expert = "model.layers.0.block_sparse_moe.experts.3"
    assert {f"{expert}.{name}.weight" for name in ("w1", "w2", "w3")} < checkpoint.tensors.keys()
