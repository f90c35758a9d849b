"""What config.json says of packed weights: which format, which modules, and what is refused by name."""

import json
from typing import Any

import pytest

from jaxgen.convert.checkpoint import Checkpoint
from jaxgen.convert.formats import detect
from jaxgen.errors import CheckpointError, JaxgenError, UnsupportedError
from jaxgen.files import read_json
from jaxgen.models.tensors import Part
from tests.formats.files import DOWN, QUERY, UNIFORM, changed, load, read, same
from tests.hf_files import CONFIG, hf_tensors, write_hf


def test_plain_checkpoints_have_no_format(tmp_path):
    write_hf(tmp_path, CONFIG, hf_tensors(CONFIG))
    assert detect(CONFIG, Checkpoint(tmp_path)) == (CONFIG, None)


def test_old_gptq_repositories_have_a_file_of_their_own(tmp_path):
    changed(tmp_path, "gptq-v1-asymmetric")
    config = read_json(tmp_path / "config.json")
    old = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"\.qweight' is quantised.*nor is there a quantize_config\.json"):
        load(tmp_path)
    kept = ("bits", "group_size", "desc_act", "sym")
    (tmp_path / "quantize_config.json").write_text(json.dumps({name: old[name] for name in kept}))
    assert same(read(tmp_path, DOWN), read(UNIFORM / "gptq-v1-asymmetric", DOWN))


def test_packed_tensors_without_any_config_are_refused(tmp_path):
    changed(tmp_path, "compressed-g-idx")
    config = read_json(tmp_path / "config.json")
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"weight_packed' is quantised, but config\.json has no quantization_con"):
        load(tmp_path)


def scheme(**weights: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"} | weights}}


UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    *(("awq", {"quant_method": name}, name) for name in (
        "hqq", "torchao", "fbgemm_fp8", "mxfp4", "nvfp4", "marlin", "aqlm", "exl2", "eetq", "quark", "vptq", "bitnet")),
    *(("awq", {"version": name}, name) for name in ("gemv", "gemv_fast", "llm-awq", "marlin")),
    ("awq", {"backend": "llm-awq"}, "llm-awq"),
    ("awq", {"bits": 8}, "AWQ with 8 bits"),
    *(("gptq-v1-symmetric", {"checkpoint_format": name}, name) for name in ("marlin", "bitblas", "gptq_p", "exllama")),
    ("gptq-v1-symmetric", {"is_marlin_format": True}, "marlin"),
    ("gptq-v1-symmetric", {"pack_dtype": "int64"}, "int64"),
    ("gptq-v1-symmetric", {"adapter": {"rank": 8}}, "adapter"),
    *(("gptq-v1-symmetric", {"bits": bits}, f"GPTQ with {bits} bits") for bits in (2, 3, 8)),
    ("gptq-v1-symmetric", {"dynamic": {".*mlp": {"bits": 8}}}, r"GPTQ with 8 bits \(model\.layers\.0\.mlp"),
    ("autoround-gptq", {"packing_format": "auto_round:llm_compressor"}, "llm_compressor"),
    ("autoround-gptq", {"act_bits": 8}, "activations of 8 bits"),
    ("autoround-gptq", {"data_type": "mx_fp"}, "mx_fp"),
    ("autoround-gptq", {"rotation_config": {"r1": True}}, "rotation_config"),
    ("autoround-gptq", {"extra_config": {DOWN: {"bits": 2}}}, r"GPTQ with 2 bits \(.*down_proj"),
    *(("compressed-g-idx", {"format": name}, name) for name in (
        "dense", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "marlin-24")),
    ("compressed-g-idx", {"config_groups": scheme(num_bits=8)}, "8 bits"),
    ("compressed-g-idx", {"config_groups": scheme(type="float")}, "float"),
    ("compressed-g-idx", {"config_groups": scheme(strategy="tensor")}, "tensor"),
    ("compressed-g-idx", {"config_groups": scheme(strategy="block")}, "block"),
    ("compressed-g-idx", {"config_groups": {"g": scheme()["group_0"] | {"input_activations": {"num_bits": 8}}}},
     "quantised input_activations"),
    ("compressed-g-idx", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ("compressed-g-idx", {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "transform_config"),
    ("compressed-g-idx", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
]  # fmt: skip


@pytest.mark.parametrize("case, fields, named", UNSUPPORTED)
def test_other_formats_are_refused_by_name_and_with_advice(tmp_path, case, fields, named):
    with pytest.raises(UnsupportedError, match=rf"(?s){named}.* load it with load_in_4bit=True"):
        load(changed(tmp_path, case, **fields))


def test_what_is_refused_of_the_model_and_of_its_quantisation_is_said_at_once(tmp_path):
    changed(tmp_path, "awq", bits=8)
    config = read_json(tmp_path / "config.json") | {"mlp_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"mlp_bias=True is not supported.*AWQ with 8 bits"):
        load(tmp_path)


MALFORMED: list[tuple[str, dict[str, Any], str]] = [
    ("gptq-v1-symmetric", {"group_size": "128"}, "group_size='128' .* must be an integer"),
    ("gptq-v1-symmetric", {"group_size": 0}, "group_size=0"),
    ("gptq-v1-symmetric", {"group_size": 7}, "groups of 7 do not divide"),
    ("gptq-v1-symmetric", {"sym": "yes"}, "sym='yes' .* must be true or false"),
    ("gptq-v1-symmetric", {"dynamic": {"(": {}}}, r"'\(' cannot be used as a regular expression"),
    ("gptq-v1-symmetric", {"dynamic": {".*mlp": 3}}, "must be an object"),
    ("gptq-v1-symmetric", {"quant_method": 4}, "quant_method=4"),
    ("gptq-v1-symmetric", {"quant_method": None, "bits": None}, "no quant_method"),
    ("awq", {"modules_to_not_convert": "lm_head"}, "must be a list"),
    ("awq", {"modules_to_not_convert": [None]}, "must hold texts only"),
    ("autoround-gptq", {"extra_config": {DOWN: 8}}, "must be an object"),
    ("compressed-g-idx", {"ignore": [3]}, "must hold texts only"),
    ("compressed-g-idx", {"ignore": ["re:("]}, "cannot be used as a regular expression"),
    ("compressed-g-idx", {"ignore": ["re:(a{99999999999999999999})"]}, "cannot be used as a regular expression"),
    ("compressed-g-idx", {"config_groups": {}}, "quantises nothing"),
    ("compressed-g-idx", {"config_groups": {"group_0": ["Linear"]}}, "must be an object"),
]


@pytest.mark.parametrize("case, fields, message", MALFORMED)
def test_malformed_configs_are_refused_by_field(tmp_path, case, fields, message):
    with pytest.raises(JaxgenError, match=message):
        load(changed(tmp_path, case, **fields))


BOMB = "(([a-z0-9_.]+)+)+!"  # backtracks for ever in Python's re


@pytest.mark.parametrize("case, fields", [
    ("gptq-v1-symmetric", {"dynamic": {BOMB: {"bits": 8}}}),
    ("autoround-gptq", {"extra_config": {
        BOMB: {"bits": 8},
        "model.layers.0.self_attn.o_proj": {"bits": 16}, "model.layers.0.self_attn.v_proj": {"group_size": 32}}}),
    ("compressed-g-idx", {"ignore": ["lm_head", f"re:{BOMB}"]}),
])  # fmt: skip
def test_patterns_that_backtrack_for_ever_are_answered(tmp_path, case, fields):
    load(changed(tmp_path, case, **fields))


@pytest.mark.parametrize("targets, groups", [
    (["Linear"], 1), (["Linear", "re:.*mlp"], 2), (["re:.*mlp", "Linear"], 2), (["Linear", "re:.*mlp", DOWN], 4),
])  # fmt: skip
def test_compressed_targets_prefer_names_to_patterns_to_classes(tmp_path, targets, groups):
    sizes = {"Linear": 24, "re:.*mlp": 12, DOWN: 6}
    config_groups = {
        target: {"targets": [target], "weights": {"num_bits": 4, "group_size": sizes[target]}} for target in targets
    }
    fields = {"quant_method": "compressed-tensors", "config_groups": config_groups}
    _, stored_as = detect({"quantization_config": fields}, Checkpoint(UNIFORM / "compressed-symmetric"))
    assert stored_as is not None
    stored = stored_as.stored(Part(f"{DOWN}.weight", (36, 24), (36, 24)))
    assert stored is not None and stored[f"{DOWN}.weight_scale"].shape == (36, groups)


@pytest.mark.parametrize("field", ["compression_config", "quantization_config"])
def test_compressed_config_is_found_in_either_field(tmp_path, field):
    changed(tmp_path, "compressed-g-idx")
    config = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({**config, field: config.pop("quantization_config")}))
    plain, stored_as = detect(read_json(tmp_path / "config.json"), Checkpoint(tmp_path))
    assert stored_as is not None and field not in plain


@pytest.mark.parametrize("case, lost, damaged", [
    ("gptq-v2-asymmetric", "checkpoint_format", "checkpoint_formas"),
    ("autoround-gptqmodel", "packing_format", "packingformat"),
    ("awq", "group_size", "group__size"),
])  # fmt: skip
def test_a_damaged_name_is_no_absent_field(tmp_path, case, lost, damaged):
    value = json.loads((UNIFORM / case / "config.json").read_text())["quantization_config"][lost]
    with pytest.raises(JaxgenError, match=f"'{damaged}' of the quantisation is no field of it; was it '{lost}'"):
        load(changed(tmp_path, case, **{lost: None, damaged: value}))


CONTRADICTIONS = {
    "ignore": ("compressed-g-idx", {"ignore": ["lm_head", "re:.*q_proj"]}),
    "targets": ("compressed-symmetric", {"config_groups": {"group_0": {
        "targets": ["re:.*mlp"], "weights": {"num_bits": 4, "strategy": "channel"}}}}),
    "dynamic": ("gptq-v2-asymmetric", {"dynamic": {"-:.*self_attn": {}}}),
    "lm_head": ("gptq-v2-asymmetric", {"lm_head": False}),
    "modules_to_not_convert": ("awq", {"modules_to_not_convert": ["q_proj"]}),
    "extra_config": ("autoround-gptq", {"extra_config": {QUERY: {"bits": 16}}}),
}  # fmt: skip


@pytest.mark.parametrize("field", CONTRADICTIONS)
def test_packed_modules_that_the_config_leaves_out_are_refused(tmp_path, field):
    case, fields = CONTRADICTIONS[field]
    module = "lm_head" if field == "lm_head" else r"model\.layers\.0\.self_attn\.q_proj"
    with pytest.raises(CheckpointError, match=f"says that '{module}' is not quantised, but there is '{module}"):
        load(changed(tmp_path, case, **fields))
