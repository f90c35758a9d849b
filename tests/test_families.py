"""Families beside Mistral: rows on their own, four bits, GGUF, kernels, speculation, and what is refused.

Their numbers are compared with transformers in tests/oracle/test_families_oracle.py.
"""

import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen import AutoConfig, AutoModelForCausalLM, Int4Config, LlamaConfig, Qwen3Config
from jaxgen.convert import convert_checkpoint
from jaxgen.convert.load import open_checkpoint
from jaxgen.convert.placement import auto_dtype
from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.kernels import step
from jaxgen.models.families import config_from_hf, families, family_of
from jaxgen.models.protocol import CausalLM
from jaxgen.models.rope import Llama3, plain_frequencies
from jaxgen.models.tensors import logical_axes, parameter_parts
from jaxgen.quant import Int4
from tests.families import CONFIGS, HUB, LLAMA3, LLAMA_4, YARN
from tests.family_files import load, logits, tensors_of, written
from tests.gguf_files import gguf_file
from tests.helpers import padded, some_slow
from tests.hf_files import write_hf
from tests.rows import BATCH, rows_of, same

BOTH = ["llama, as Llama 3.2", "qwen3, biases, yarn"]
every = pytest.mark.parametrize("name", CONFIGS)
LONG = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}


# One of every other kind of block.
KINDS = [
    "qwen2, windows", "ministral", "ministral3, window", "smollm3", "granite", "gemma2", "gemma3", "phi3", "olmo3",
]  # fmt: skip
SLOW_KINDS = [pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
OFTEN = {*BOTH, "ministral3, window", "gemma2"}  # the others, which tests/oracle has too, for a soak
NAMES = some_slow([*BOTH, *KINDS], lambda name: name != BOTH[1], lambda name: name not in OFTEN)
ROWS = [(name, options) for name in BOTH for options in ("few", "everything", "beams", "lookup")]
ROWS += [(name, "everything") for name in KINDS]


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(written(tmp_path_factory.mktemp("family"), request.param))


@pytest.mark.parametrize(
    ("model", "options"),
    some_slow(ROWS, lambda row: row != (BOTH[1], "few"), lambda row: row[0] not in OFTEN),
    indirect=["model"],
)
def test_a_row_depends_on_itself_only(model: Any, options: str):
    rng, names = np.random.default_rng(0), [f"row {index}" for index in range(BATCH)]
    rows = [rng.integers(0, 97, length).tolist() for length in (3, 14, 1, 9)]
    expected = rows_of(model, options, *padded(rows, "left", 0), names)
    order = [2, 0, 3, 1]
    shuffled = rows_of(
        model, options, *padded([rows[i] for i in order], "holes", 3, filler=96), [names[i] for i in order]
    )
    assert all(same(row, expected[i], options != "lookup") for row, i in zip(shuffled, order, strict=True))
    others = [rows[0], *(rng.integers(0, 97, 14).tolist() for _ in range(3))]
    mixed = rows_of(model, options, *padded(others, "right", 1), [names[0], "a", "b", "c"])
    assert same(mixed[0], expected[0], options != "lookup")
    if options != "lookup":
        alone = rows_of(model, options, np.array([rows[1]]), None, names[1:2], cache_implementation="static")
        full = rows_of(model, options, *padded(rows, "left", 0), names, cache_implementation="static")
        assert same(alone[0], full[1], exactly=False)


def test_prefill_and_steps_are_one_pass_over_the_text(model: Any):
    """A prompt, single tokens and several at once, beyond the original context, against the whole text read at once."""
    ids = np.random.default_rng(1).integers(0, 97, (2, 48))
    whole = logits(model, ids)
    tokens, lengths = jnp.asarray(ids[:, :30], jnp.int32), jnp.array([30, 30])
    last, cache = model.prefill(tokens, lengths, 64)
    np.testing.assert_allclose(last, whole[:, 29], atol=1e-4)
    for column in range(30, 40):
        last, cache = model.step(jnp.asarray(ids[:, column], jnp.int32), jnp.full(2, column), cache)
        np.testing.assert_allclose(last, whole[:, column], atol=1e-4)
    hidden, _ = model.extend(jnp.asarray(ids[:, 40:], jnp.int32), jnp.full(2, 40), jnp.full(2, 8), cache)
    np.testing.assert_allclose(model.logits(hidden), whole[:, 40:], atol=1e-4)


def test_an_assistant_of_another_family(model: Any, tmp_path: Path):
    assistant = load(written(tmp_path, next(name for name in BOTH if model.config.model_type not in name)))
    ids = np.array([[5, 9, 7, 5, 9]])
    options = {"max_new_tokens": 20, "eos_token_id": None}
    expected = model.generate(ids, **options)
    np.testing.assert_array_equal(model.generate(ids, assistant_model=assistant, **options), expected)


@pytest.mark.parametrize("name", NAMES)
def test_int4_is_the_model_of_the_rounded_weights(name: str, tmp_path: Path):
    path = written(tmp_path / "plain", name, hidden_size=64, intermediate_size=128, head_dim=32)
    loaded, plain, ids = load(path, quantization_config=Int4Config(group_size=64)), load(path), [[5, 9, 7, 30, 41, 2]]
    rounded = logits(loaded, ids)
    for here, there in zip(plain.model.layers, loaded.model.layers, strict=True):
        for module in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            owner, linear = module.split(".")
            weight = getattr(getattr(there, owner), linear).weight[...]
            assert isinstance(weight, Int4)
            getattr(getattr(here, owner), linear).weight = nnx.Param(weight.dequantize())
    np.testing.assert_allclose(rounded, logits(plain, ids), atol=1e-4)
    converted = convert_checkpoint(path, tmp_path / "int4", group_size=64)
    np.testing.assert_allclose(logits(load(converted), ids), rounded, atol=1e-4)


def gguf_metadata(config: Any, architecture: str) -> dict[str, Any]:
    own = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    return {"general.architecture": architecture, "general.name": "Tiny"} | {
        f"{architecture}.{name}": value for name, value in own.items()
    }


def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in llama.cpp's order. Source: `LlamaModel.permute` of `convert_hf_to_gguf.py`."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


@pytest.mark.slow
def test_gguf_of_llama_3(tmp_path: Path):
    """With rows in llama.cpp's order, and scaled frequencies as the tensor that llama.cpp makes of them."""
    scaling = LLAMA3 | {"original_max_position_embeddings": 8192}
    fields = CONFIGS["llama, as Llama 3.2"] | {"rope_scaling": scaling, "head_dim": 64}
    config = config_from_hf(fields)
    tensors = tensors_of(config)
    write_hf(tmp_path / "hf", fields, tensors)
    # As llama.cpp's `generate_extra_tensors` computes it.
    factors = []
    for frequency in 1 / config.rope_theta ** (np.arange(0, 64, 2) / 64):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    stored = {
        name: rotated(tensor, 4 if "q_proj" in name else 2) if "q_proj" in name or "k_proj" in name else tensor
        for name, tensor in tensors.items()
    } | {"rope_freqs.weight": np.array(factors, np.float32)}
    (tmp_path / "m.gguf").write_bytes(gguf_file(gguf_metadata(config, "llama"), stored))
    model = load(tmp_path / "m.gguf")
    assert model.config.rope_scaling == Llama3(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = np.random.default_rng(2).integers(0, 97, (1, 100))
    np.testing.assert_array_equal(logits(model, ids), logits(load(tmp_path / "hf"), ids))

    stored["rope_freqs.weight"][-1] *= 1.5
    (tmp_path / "other.gguf").write_bytes(gguf_file(gguf_metadata(config, "llama"), stored))
    with pytest.raises(UnsupportedError, match="scaled otherwise than Llama 3"):
        load(tmp_path / "other.gguf")


def test_a_window_of_some_layers_is_not_read_from_gguf(tmp_path: Path):
    config = config_from_hf(CONFIGS["qwen3"])
    metadata = gguf_metadata(config, "qwen3") | {"qwen3.attention.sliding_window": 16}
    (tmp_path / "m.gguf").write_bytes(gguf_file(metadata, tensors_of(config)))
    with pytest.raises(UnsupportedError, match=r"sliding_window=16 is not supported with Qwen3ForCausalLM"):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize("factors, base, message", [
    (np.ones(5), 1e4, "each pair of head_dim"),
    (np.ones((2, 32)), 1e4, "each pair of head_dim"),
    (np.zeros(8), 1e4, "at least 1"),
    (np.full(8, np.nan), 1e4, "at least 1"),
    (np.full(8, np.inf), 1e4, "scaled otherwise"),
    (np.ones(8), 0.0, "rope_theta=0.0 must be a positive number"),
])  # fmt: skip
def test_gguf_with_damaged_factors(factors: np.ndarray, base: float, message: str, tmp_path: Path):
    config = config_from_hf(CONFIGS["llama, as Llama 3.2"])
    stored = tensors_of(config) | {"rope_freqs.weight": factors.astype(np.float32)}
    metadata = gguf_metadata(config, "llama") | {"llama.rope.freq_base": base}
    (tmp_path / "m.gguf").write_bytes(gguf_file(metadata, stored))
    with pytest.raises(JaxgenError, match=message):
        load(tmp_path / "m.gguf")


def test_gguf_that_does_not_say_the_size_of_heads(tmp_path: Path):
    """It is what llama.cpp takes, and not the default of the family."""
    config = config_from_hf(CONFIGS["qwen3"] | {"head_dim": 12})
    said = gguf_metadata(config, "qwen3").items()
    metadata = {key: value for key, value in said if not key.endswith((".key_length", ".value_length"))}
    (tmp_path / "m.gguf").write_bytes(gguf_file(metadata, tensors_of(config)))
    assert open_checkpoint(tmp_path / "m.gguf")[0].head_size == 12


@pytest.mark.parametrize(
    "name, architecture, rotate",
    [
        ("qwen2", "qwen2", False),
        ("qwen3", "qwen3", False),
        ("llama, as Llama 2", "llama", True),
        ("smollm3", "smollm3", True),
        ("granite", "granite", True),
    ],
)
def test_gguf_of_others(name: str, architecture: str, rotate: bool, tmp_path: Path):
    # llama.cpp has SmolLM3's fourth layer without rotary positions, whatever the file says.
    fields = CONFIGS[name] | ({"num_hidden_layers": 4, "no_rope_layers": None} if name == "smollm3" else {})
    config = config_from_hf(fields)
    tensors = tensors_of(config)
    write_hf(tmp_path / "hf", fields, tensors)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    stored = {
        key: rotated(tensor, heads[key.split(".")[-2]]) if rotate and key.split(".")[-2] in heads else tensor
        for key, tensor in tensors.items()
    }
    metadata = gguf_metadata(config, architecture)
    layout: Any = family_of(config).gguf
    for key, field in layout.fields.items():
        metadata[f"{architecture}.{key}"] = getattr(config, field)
    (tmp_path / "m.gguf").write_bytes(gguf_file(metadata, stored))
    model, ids = load(tmp_path / "m.gguf"), [[5, 9, 7, 30, 41, 2]]
    assert type(model) is family_of(config)
    np.testing.assert_array_equal(logits(model, ids), logits(load(tmp_path / "hf"), ids))


@pytest.mark.parametrize(
    "name", ["qwen3", *some_slow(["qwen2", "llama, as Llama 3.2"], lambda name: True), *SLOW_KINDS[:3:2]]
)
@pytest.mark.parametrize("rows", some_slow([1, 3], soak=lambda rows: rows == 3))
def test_a_decode_step_of_kernels(name: str, rows: int):
    """In bfloat16, so as near as two orders of rounding are."""
    config = config_from_hf(CONFIGS[name] | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32})
    model = family_of(config)(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    for layer in model.model.layers:
        if config.qk_norm:  # which are ones otherwise
            layer.self_attn.q_norm.weight = nnx.Param(jnp.linspace(0.5, 2, 32, dtype=jnp.bfloat16))
            layer.self_attn.k_norm.weight = nnx.Param(jnp.linspace(2, 0.5, 32, dtype=jnp.bfloat16))
    assert model._fits_kernels
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 64, (rows, 6)), jnp.int32)
    lengths = jnp.arange(4, 4 + rows) % 3 + 3
    _, cache = model.prefill(tokens, lengths, 24)
    copies = jax.tree.map(jnp.copy, cache)
    expected, _ = model.step(tokens[:, -1], lengths, cache)
    got, _ = step.decode_step(model, tokens[:, -1], lengths, copies, interpret=True)
    error = np.linalg.norm(np.asarray(got - expected)) / np.linalg.norm(np.asarray(expected))
    assert error < 2e-2


@pytest.mark.parametrize("name, sizes", [
    ("llama, all biases, linear", {}), ("smollm3", {}), ("granite", {}), ("gemma2, no limits", {}), ("gemma3", {}),
    ("phi3", {"partial_rotary_factor": 0.5}), ("olmo2", {}), ("olmo3", {}),
])  # fmt: skip
def test_what_no_kernel_computes_keeps_to_xla(name: str, sizes: dict[str, Any]):
    config = config_from_hf(CONFIGS[name] | {"hidden_size": 128, "head_dim": 32} | sizes)
    model = nnx.eval_shape(lambda: family_of(config)(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    assert not model._fits_kernels
    plain = LlamaConfig(hidden_size=128, num_attention_heads=4, num_hidden_layers=1, vocab_size=9, intermediate_size=8)
    assert nnx.eval_shape(lambda: family_of(plain)(plain, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))._fits_kernels


@pytest.mark.parametrize("form", ["language_model.model.{}", "model.language_model.{}"])
def test_the_text_part_of_gemma_3(form: str, tmp_path: Path):
    fields = CONFIGS["gemma3, linear"] | {"tie_word_embeddings": True}
    tensors = tensors_of(config_from_hf(fields))
    write_hf(tmp_path / "text", fields, tensors)
    named = {form.format(name.removeprefix("model.")): tensor for name, tensor in tensors.items()}
    whole = {"model_type": "gemma3", "text_config": fields, "vision_config": {"patch_size": 14}}
    write_hf(tmp_path / "whole", whole, named | {"vision_tower.a.weight": np.ones(3, np.float32)})
    model, ids = load(tmp_path / "whole"), [[5, 9, 7, 30, 41, 2]]
    assert type(model).__name__ == "Gemma3ForCausalLM"
    np.testing.assert_array_equal(logits(model, ids), logits(load(tmp_path / "text"), ids))


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_a_model_that_overflows_float16(name: str, tmp_path: Path):
    path = written(tmp_path, name)
    with pytest.raises(UnsupportedError, match=r"dtype=float16: the activations of Gemma.* beyond float16's 65504"):
        load(path, dtype="float16")
    t4 = Mock(spec=jax.Device, platform="gpu", compute_capability="7.5")
    assert auto_dtype(t4, config_from_hf(CONFIGS[name]).overflows_float16) == jnp.float32
    assert auto_dtype(t4) == jnp.float16


@every
def test_every_parameter_has_axes_and_a_place(name: str):
    config = config_from_hf(CONFIGS[name])
    abstract = nnx.eval_shape(lambda: family_of(config)(config, rngs=nnx.Rngs(0)))
    shapes = {".".join(map(str, path)): value.shape for path, value in nnx.to_flat_state(nnx.state(abstract))}
    parts, axes = parameter_parts(config), {key: logical_axes(config, key) for key in shapes}
    assert shapes.keys() == parts.keys()
    for key, shape in shapes.items():
        assert len(axes[key]) == len(shape)
        assert math.prod(shape) == sum(math.prod(part.shape) for part in parts[key])
        if len(shape) == 2 or key.endswith(".bias"):
            assert any(axes[key]), key


@pytest.mark.parametrize("fields, message", [
    ({}, "model_type is missing; jaxgen implements 'g"),
    ({"model_type": "qwen3_next"}, "'qwen3_next' is not supported: most of its layers are gated linear.*; jax"),
    ({"model_type": "qwen3_5"}, "gated linear attention"),
    ({"model_type": "gemma4"}, "embeddings of their own and share keys and values; jaxgen implements 'g"),
    ({"model_type": "gemma3n"}, "share keys and values"),
    ({"model_type": "lfm2"}, "short convolutions"),
    ({"model_type": "granitemoehybrid"}, "Mamba layers"),
    ({"model_type": "mistral4"}, r"latent vectors in the cache \(MLA\)"),
    ({"model_type": "deepseek_v3"}, r"latent vectors in the cache \(MLA\)"),
    ({"model_type": "gpt_oss"}, "sinks.*MXFP4"),
    ({"model_type": "phi"}, "model_type='phi' is not supported; jaxgen implements 'g"),
    ({"model_type": ["llama"]}, "is not supported; jaxgen implements"),
    ({"model_type": "llama", "sliding_window": 5}, "sliding_window=5 is not a field of LlamaConfig"),
    ({"model_type": "llama", "rope_interleaved": True}, "rope_interleaved=True is not supported"),
    ({"model_type": "llama", "pretraining_tp": 2}, "pretraining_tp=2 is not supported"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='yarn'"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor='2' must be a positive"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": True}}, "factor=True must be"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0, "betas": 1}}, "betas=1 is not"),
    ({"model_type": "llama", "rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor=1.0 must"),
    ({"model_type": "llama", "rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"factor": 2.0}}, "contradicting"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 10**400}}, "must be a positive number"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "default"}, "rope_parameters": YARN}, "contradicting"),
    ({"model_type": "llama", "rope_scaling": YARN, "rope_parameters": {"rope_theta": 10000.0}}, "contradicting"),
    ({"model_type": "llama", "rope_scaling": YARN, "rope_parameters": YARN | {"rope_theta": 5.0}}, "RoPE bases"),
    ({"model_type": "llama", "rope_scaling": YARN | {"truncate": None}}, "truncate=None must be true or false"),
    ({"model_type": "llama", "rope_theta": 1, "rope_scaling": YARN}, "rope_theta=1 must not be 1 with"),
    ({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 16}, "heads=16 is more than hidden"),
    ({"model_type": "llama", "rope_scaling": 7}, "rope_scaling=7 must be an object or null"),
    ({"model_type": "qwen3", "use_sliding_window": 1}, "use_sliding_window=1 must be true or false"),
    ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "names 2 layers, num_hidden"),
    ({"model_type": "qwen2", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "there is no sliding_win"),
    ({"model_type": "qwen2", "num_hidden_layers": 1, "layer_types": ["linear_attention"]}, "layer_types=.*must be one"),
    ({"model_type": "qwen2", "max_window_layers": -1}, "max_window_layers=-1 must be an int from 0 on"),
    ({"model_type": "ministral", "sliding_window": None, "layer_types": ["sliding_attention"] * 32}, "no sliding_win"),
    ({"model_type": "mistral", "num_hidden_layers": 3, "layer_types": ["full_attention"]}, "MinistralConfig: layer_ty"),
    ({"model_type": "ministral3", "layer_types": ["sliding_attention"]}, "layer_types=.* is not supported"),
    ({"model_type": "mixtral", "sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types=.* is not"),
    ({"model_type": "ministral3", "rope_parameters": LLAMA_4 | {"rope_type": "linear"}}, "rope_type='yarn'"),
    ({"model_type": "ministral3", "rope_parameters": LLAMA_4 | {"llama_4_scaling_beta": "1"}}, "beta='1' must be"),
    ({"model_type": "llama", "rope_parameters": LLAMA_4}, "llama_4_scaling_beta=0.1 is of Ministral 3"),
    ({"model_type": "qwen3", "layer_types": 3}, "layer_types=3"),
    ({"model_type": "qwen3", "attention_bias": 1}, "attention_bias=1 must be true or false"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, r"no_rope_layers=\(1, 2\) must be a 0 or a 1 for each"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers names 2 layers, num_hidden_layers=36"),
    ({"model_type": "smollm3", "num_hidden_layers": 2**30}, "num_hidden_layers=1073741824 is more than 10000"),
    ({"model_type": "granite", "residual_multiplier": 0}, "residual_multiplier=0 must be a positive number"),
    ({"model_type": "granite", "logits_scaling": None}, "logits_scaling=None must be a positive number"),
    ({"model_type": "gemma2", "hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported"),
    ({"model_type": "gemma2", "attn_logit_softcapping": 0.0}, "attn_logit_softcapping=0.0 must be a positive"),
    ({"model_type": "gemma2", "num_hidden_layers": 2**30}, "num_hidden_layers=1073741824 is more than 10000"),
    ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention=True is not"),
    ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
    ({"model_type": "gemma3_text", "sliding_window": None}, "there is no sliding_window"),
    ({"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": YARN}}, "rope_type='yarn' is not"),
    ({"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": 3}}, "sliding_attention=3 must be an"),
    ({"model_type": "phi3", "rope_scaling": YARN}, "rope_type='longrope'"),
    ({"model_type": "phi3", "rope_scaling": LONG | {"short_factor": [1.0]}}, "short_factor has 1 numbers, and 48 p"),
    ({"model_type": "phi3", "rope_scaling": LONG | {"long_factor": ["x"]}}, "long_factor=.* must be a list of pos"),
    ({"model_type": "phi3", "partial_rotary_factor": 2}, "partial_rotary_factor=2 must be a number above 0"),
    ({"model_type": "olmo2", "clip_qkv": 8.0}, "clip_qkv=8.0 is not a field of Olmo2Config"),
    ({"model_type": "qwen3", "num_experts": 8}, "num_experts=8 is not a field of Qwen3Config"),
])  # fmt: skip
def test_what_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(JaxgenError, match=message):
        config_from_hf(fields)


@pytest.mark.parametrize("name", HUB)
def test_configs_of_the_hub_are_read(name: str, caplog: pytest.LogCaptureFixture):
    config = config_from_hf(HUB[name])
    assert config_from_hf(config.to_hf()) == config
    assert family_of(config).__name__ == HUB[name]["architectures"][0]
    told = {key: value for key, value in HUB[name].items() if hasattr(config, key) and key not in ("model_type",)}
    for key, value in told.items():
        if key not in ("rope_scaling", "rope_parameters", "sliding_window", "layer_types", "use_cache"):
            assert getattr(config, key) == (tuple(value) if isinstance(value, list) else value), key
    assert ("attn_factor" in caplog.text) == (name == "DeepSeek-R1-0528-Qwen3-8B")


def test_what_a_constructor_refuses():
    with pytest.raises(JaxgenError, match=r"LlamaConfig: .*factor is missing"):
        LlamaConfig(rope_scaling={"rope_type": "llama3"})
    with pytest.raises(JaxgenError, match="contradicting RoPE bases"):
        LlamaConfig(rope_scaling=LLAMA3 | {"rope_theta": 5e5})
    with pytest.raises(JaxgenError, match="head_dim=7 must be even"):
        Qwen3Config(head_dim=7)
    assert hash(LlamaConfig(rope_scaling=LLAMA3)) == hash(LlamaConfig(rope_scaling=dict(LLAMA3)))
    assert LlamaConfig(rope_scaling=LLAMA3) != LlamaConfig()


def test_auto_config_is_of_the_family(tmp_path: Path):
    config = AutoConfig.from_pretrained(written(tmp_path, "qwen3"), num_hidden_layers=1)
    assert isinstance(config, Qwen3Config) and config.num_hidden_layers == 1
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    with pytest.raises(JaxgenError, match="Qwen3Config has no field 'hiden_size'"):
        AutoConfig.from_pretrained(tmp_path, hiden_size=3)


def test_models_are_what_generation_asks_for(model: Any):
    assert isinstance(model, CausalLM)
    assert not isinstance(object(), CausalLM)


def test_families_say_what_the_readers_need():
    assert len({kind.config_class.model_type for kind in families()}) == len(families())
    kinds: list[Any] = families()
    for kind in kinds:
        assert kind.config_class.architecture == kind.__name__
        assert kind.config_class().to_hf()["architectures"] == [kind.__name__]


def test_plain_frequencies_are_those_of_the_paper():
    np.testing.assert_allclose(plain_frequencies(8, 10000.0), [1, 0.1, 0.01, 0.001], rtol=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "ministral3", "mixtral", "phi3", "qwen3_moe"])
def test_layers_that_are_all_full_say_nothing_where_there_is_no_window(model_type: str):
    fields = {"model_type": model_type, "num_hidden_layers": 2, "sliding_window": None}
    if model_type == "llama":  # which has no windows
        del fields["sliding_window"]
    assert config_from_hf(fields | {"layer_types": ["full_attention"] * 2}) == config_from_hf(fields)
