"""LoRA adapters: merged exactly, in the layers and with the scales they name, and kept beside quantised weights."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.errors import CheckpointError
from jaxgen.quant import Int4, Int4Config
from jaxgen.quant.adapted import Adapted
from tests.hf_files import CONFIG, DTYPES, hf_tensors, parameters, same_bits, write_hf
from tests.lora_files import (
    FUSED,
    IDS,
    LINEAR,
    O_PROJ,
    Scales,
    adapter_tensors,
    key,
    linear,
    load,
    scales,
    use_quarters,
    write_adapter,
    write_quarters,
)


def merged(hf: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray], adapted: Scales) -> dict[str, np.ndarray]:
    """The definition, one weight at a time, in float64."""
    result = dict(hf)
    for name, (_, scale) in adapted.items():
        down, up = (tensors[key(name, letter)].astype(np.float64) for letter in "AB")
        result[name] = (hf[name].astype(np.float64) + scale * (up @ down)).astype(np.float32)
    return result


def close(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray], tolerance: float = 2e-6) -> None:
    assert left.keys() == right.keys()
    for name, values in left.items():
        np.testing.assert_allclose(values, right[name], atol=tolerance, rtol=tolerance, err_msg=name)


# Which layers, and with what scale.

LAYER_1 = r"model\.layers\.1\..*_proj\.weight"
TARGETS: dict[str, tuple[dict[str, Any], str, float]] = {
    "every layer": ({}, r".*_proj\.weight", 3.0),
    "all-linear leaves the head": ({"target_modules": "all-linear"}, r".*_proj\.weight", 3.0),
    "some": ({"target_modules": ["q_proj", "mlp.down_proj", "p_proj"]}, r".*(q|down)_proj\.weight", 3.0),
    "whole names": ({"target_modules": ["model.layers.1.mlp.up_proj"]}, r"model\.layers\.1\.mlp\.up_proj\.weight", 3.0),
    "head": ({"target_modules": ["lm_head", "v_proj"]}, r"lm_head\.weight|.*v_proj\.weight", 3.0),
    "regex": ({"target_modules": r"model\.layers\.1\..*"}, LAYER_1, 3.0),
    "excluded": ({"exclude_modules": r".*layers\.0\..*"}, LAYER_1, 3.0),
    "excluded by name": ({"exclude_modules": ["mlp.up_proj", "k_proj"]}, r".*(q|v|o|gate|down)_proj\.weight", 3.0),
    "layers": ({"layers_to_transform": [1], "layers_pattern": "layers"}, LAYER_1, 3.0),
    "one layer": ({"layers_to_transform": 1}, LAYER_1, 3.0),
    "rslora": ({"use_rslora": True, "lora_alpha": 2**0.5}, r".*_proj\.weight", 1.0),
    "fan_in_fan_out is for Conv1D": ({"fan_in_fan_out": True, "bias": "none"}, r".*_proj\.weight", 3.0),
}


@pytest.mark.parametrize("fields, wanted, scale", TARGETS.values(), ids=TARGETS)
def test_every_target_is_merged_and_nothing_else(tmp_path, fields, wanted, scale):
    hf = hf_tensors(CONFIG)
    adapted = scales(hf, wanted, scale=scale)
    tensors = adapter_tensors(hf, adapted)
    write_hf(tmp_path / "base", CONFIG, hf)
    write_hf(tmp_path / "merged", CONFIG, merged(hf, tensors, adapted))
    adapter = write_adapter(tmp_path / "adapter", tensors, **fields)
    close(parameters(load(tmp_path / "base", adapter=str(adapter))), parameters(load(tmp_path / "merged")))


@pytest.mark.parametrize("rslora", [False, True])
def test_the_first_pattern_that_fits_decides_rank_and_alpha(tmp_path, rslora):
    hf = hf_tensors(CONFIG)
    ranks = {"layers.0.self_attn.q_proj": 4, "self_attn.q_proj": 1, "_proj": 7, "^model.layers.1.mlp.*": 3}
    alphas = {"mlp.(up|down)_proj": 0.5, "model.layers.*": 8}
    adapted = {}
    for name in scales(hf):
        rank = 2
        if "q_proj" in name:
            rank = 4 if "layers.0" in name else 1
        elif "layers.1.mlp" in name:
            rank = 3
        alpha = 0.5 if "up_proj" in name or "down_proj" in name else 8
        adapted[name] = rank, alpha / (rank**0.5 if rslora else rank)
    tensors = adapter_tensors(hf, adapted)
    write_hf(tmp_path / "base", CONFIG, hf)
    write_hf(tmp_path / "merged", CONFIG, merged(hf, tensors, adapted))
    fields = {"rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": rslora}
    adapter = write_adapter(tmp_path / "adapter", tensors, **fields)
    close(parameters(load(tmp_path / "base", adapter=adapter)), parameters(load(tmp_path / "merged")))


# Merging: in float32, before any rounding.


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_sum_is_rounded_once(tmp_path, monkeypatch, code, dtype):
    hf = hf_tensors(CONFIG, code)
    adapted = scales(hf)
    tensors = adapter_tensors(hf, adapted, code)
    # Small integers and multiples of 2**-14: float32 holds every sum exactly, bfloat16 and float16 do not.
    tensors = {name: np.round(tensor.astype(np.float32)).astype(DTYPES[code]) for name, tensor in tensors.items()}
    hf = {
        name: (np.round(2**12 * tensor.astype(np.float32)) / 2**14).astype(DTYPES[code]) for name, tensor in hf.items()
    }
    write_hf(tmp_path / "base", CONFIG, hf)
    write_hf(tmp_path / "merged", CONFIG, merged(hf, tensors, adapted))
    adapter = write_adapter(tmp_path / "adapter", tensors)
    expected = parameters(load(tmp_path / "merged", dtype=dtype))
    assert same_bits(parameters(load(tmp_path / "base", dtype=dtype, adapter=adapter)), expected)
    monkeypatch.setattr("jaxgen.convert.adapter._CHUNK", 20)  # a row or two at a time
    assert same_bits(parameters(load(tmp_path / "base", dtype=dtype, adapter=adapter)), expected)


def test_float16_overflow_of_the_sum_is_an_error(tmp_path):
    hf = hf_tensors(CONFIG, "F16")
    write_hf(tmp_path / "base", CONFIG, hf)
    tensors = adapter_tensors(hf, scales(hf))
    tensors[key(O_PROJ, "B")][:] = 1e5
    adapter = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(CheckpointError, match=rf"'{re.escape(O_PROJ)}' has values beyond float16's 65504"):
        load(tmp_path / "base", dtype="float16", adapter=adapter)
    load(tmp_path / "base", dtype="bfloat16", adapter=adapter)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"lm_head": True}])
def test_merged_before_it_is_quantised(tmp_path, options):
    config = CONFIG | {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8, "head_dim": 16}
    hf = hf_tensors(config, "BF16")
    adapted = scales(hf, r".*_proj\.weight|lm_head\.weight")
    tensors = adapter_tensors(hf, adapted)
    write_hf(tmp_path / "base", config, hf)
    write_hf(tmp_path / "merged", config, merged(hf, tensors, adapted))
    adapter = write_adapter(tmp_path / "adapter", tensors, target_modules=[*LINEAR, "lm_head"])
    if "lm_head" in options:
        options = {"quantization_config": Int4Config(**options)}
    ours = load(tmp_path / "base", adapter=adapter, **options)
    expected = load(tmp_path / "merged", **options)
    for path in FUSED:
        mine, theirs = (linear(model, path) for model in (ours, expected))
        assert isinstance(mine, Int4)
        # float32 against float64 sums: a weight half-way between two codes may go either way
        assert (np.asarray(mine.packed) == np.asarray(theirs.packed)).mean() > 0.999
    np.testing.assert_allclose(ours(IDS).logits, expected(IDS).logits, atol=0.02)


# Beside weights that the checkpoint holds quantised.


@pytest.mark.parametrize(
    "wanted", [r".*_proj\.weight", r".*(q|v)_proj\.weight", r".*(k|gate)_proj\.weight", r".*(up|down|o)_proj\.weight"]
)
def test_kept_beside_quantised_weights(tmp_path, monkeypatch, wanted):
    hf = write_quarters(tmp_path / "base")
    adapted = scales(hf, wanted)
    adapted |= {name: (1, 6.0) for name in adapted if re.search(r"(v|up)_proj", name)}
    tensors = adapter_tensors(hf, adapted)
    write_hf(tmp_path / "merged", CONFIG, merged(hf, tensors, adapted))
    names = [name for name in LINEAR if any(f".{name}." in full for full in adapted)]
    fields = {"target_modules": names, "rank_pattern": {"v_proj": 1, "up_proj": 1}}
    adapter = write_adapter(tmp_path / "adapter", tensors, **fields)
    expected = load(tmp_path / "merged")
    use_quarters(monkeypatch)
    bare, ours = load(tmp_path / "base"), load(tmp_path / "base", adapter=adapter)
    for path, parts in FUSED.items():
        weight, base, plain = (linear(model, path) for model in (ours, bare, expected))
        touched = [part for part in parts if part in names]
        kept = weight.base if isinstance(weight, Adapted) else weight
        assert kept.packed.tobytes() == base.packed.tobytes() and kept.scale.tobytes() == base.scale.tobytes()
        assert isinstance(weight, Adapted) == bool(touched)
        if isinstance(weight, Adapted):
            assert len(weight.down) == sum(1 if part in ("v_proj", "up_proj") else 2 for part in touched)
            assert weight.shape == plain.shape and weight.nbytes > base.nbytes
        np.testing.assert_allclose(weight.dequantize(), plain, atol=1e-5)
    np.testing.assert_allclose(ours(IDS).logits, expected(IDS).logits, atol=1e-4)


@pytest.mark.slow
def test_generation_reads_what_is_beside(tmp_path, monkeypatch):
    hf = write_quarters(tmp_path / "base")
    adapted = scales(hf)
    tensors = adapter_tensors(hf, adapted)
    write_hf(tmp_path / "merged", CONFIG, merged(hf, tensors, adapted))
    adapter = write_adapter(tmp_path / "adapter", tensors)
    expected = load(tmp_path / "merged")
    use_quarters(monkeypatch)
    models = expected, load(tmp_path / "base", adapter=adapter), load(tmp_path / "base")
    wanted, ours, bare = (model.generate(np.asarray(IDS), max_new_tokens=4).tolist() for model in models)
    assert ours == wanted != bare


def test_a_layer_of_which_some_parts_are_quantised_is_merged(tmp_path, monkeypatch):
    hf = write_quarters(tmp_path / "base")
    adapted = scales(hf)
    tensors = adapter_tensors(hf, adapted)
    write_hf(tmp_path / "merged", CONFIG, merged(hf, tensors, adapted))
    adapter = write_adapter(tmp_path / "adapter", tensors)
    expected = parameters(load(tmp_path / "merged"))
    use_quarters(monkeypatch, r".*(k|up)_proj\.weight")
    close(parameters(load(tmp_path / "base", adapter=adapter)), expected)


def test_factors_have_the_compute_dtype(tmp_path, monkeypatch):
    hf = write_quarters(tmp_path / "base", "BF16")
    adapted = scales(hf)
    tensors = adapter_tensors(hf, adapted)
    tensors[key(O_PROJ, "A")][1, 3] = 1e5
    adapter = write_adapter(tmp_path / "adapter", tensors)
    use_quarters(monkeypatch)
    model = load(tmp_path / "base", adapter=adapter, dtype="bfloat16")
    weight = model.model.layers[0].self_attn.o_proj.weight[...]
    name = "model.layers.0.self_attn.o_proj.weight"
    assert isinstance(weight, Adapted) and weight.down.dtype == weight.up.dtype == jnp.bfloat16
    np.testing.assert_array_equal(weight.down, tensors[key(name, "A")].astype(jnp.bfloat16))
    np.testing.assert_array_equal(weight.up, (3 * tensors[key(name, "B")]).astype(jnp.bfloat16))
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.o_proj': values beyond float16's 65504"):
        load(tmp_path / "base", adapter=adapter, dtype="float16")


@pytest.mark.parametrize("code", ["F32", "BF16", "F16"])
def test_a_copy_of_the_bases_head_is_taken_if_it_is_one(tmp_path, code):
    hf = hf_tensors(CONFIG)
    write_hf(tmp_path / "base", CONFIG, hf)
    tensors = adapter_tensors(hf, scales(hf, r"lm_head\.weight"))
    copy = hf["lm_head.weight"].astype(DTYPES[code])
    name = "base_model.model.lm_head.base_layer.weight"
    adapter = write_adapter(tmp_path / "adapter", tensors | {name: copy}, target_modules=["lm_head"])
    with_copy = load(tmp_path / "base", adapter=adapter)
    without = load(tmp_path / "base", adapter=write_adapter(tmp_path / "plain", tensors, target_modules=["lm_head"]))
    np.testing.assert_array_equal(with_copy.lm_head.weight[...], without.lm_head.weight[...])
    copy[0, 0] *= 2
    write_adapter(adapter, tensors | {name: copy}, target_modules=["lm_head"])
    with pytest.raises(CheckpointError, match=rf"'{name}' differs from the base's 'lm_head.weight': is this the base"):
        load(tmp_path / "base", adapter=adapter)


def test_patterns_that_fit_nothing_are_told(tmp_path, caplog):
    hf = hf_tensors(CONFIG)
    write_hf(tmp_path / "base", CONFIG, hf)
    fields = {"alpha_pattern": {"q_prok": 5, "v_proj": 6}, "rank_pattern": {"up_proj": 2}}  # of rank 2 all the same
    load(tmp_path / "base", adapter=write_adapter(tmp_path / "adapter", adapter_tensors(hf, scales(hf)), **fields))
    assert caplog.messages == ["adapter_config.json: alpha_pattern names no adapted layer in 'q_prok'"]


def test_fields_that_need_or_exclude_each_other(tmp_path):
    hf = hf_tensors(CONFIG)
    write_hf(tmp_path / "base", CONFIG, hf)
    for fields, message in (
        ({"layers_pattern": "layers"}, "layers_pattern='layers' needs layers_to_transform"),
        (
            {"target_modules": "all-linear", "layers_to_transform": [0]},
            r"layers_to_transform=\[0\] needs a list of target",
        ),
        ({"target_modules": ".*q_proj", "layers_pattern": []}, r"layers_pattern=\[\] needs a list of target_modules"),
    ):
        adapter = write_adapter(tmp_path / "adapter", adapter_tensors(hf, scales(hf)), **fields)
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "base", adapter=adapter)
