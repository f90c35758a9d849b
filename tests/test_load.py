"""Loading: every row where the model reads it, dtypes and devices, and the arguments of from_pretrained."""

import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.convert.load import AutoModelForCausalLM
from jaxgen.errors import CheckpointError, JaxgenError, UnsupportedError
from tests.hf_files import CONFIG, DTYPES, hf_tensors, parameters, same_bits, write_hf

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def load(directory: Path, **options: Any):
    return AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", **options)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 6), (4, 4, 2), (4, 1, 4), (6, 2, 2)])
def test_every_row_lands_where_the_model_reads_it(tmp_path, heads, kv_heads, head_dim, shards):
    config = CONFIG | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    hf = hf_tensors(config)
    write_hf(tmp_path, config, hf, shards)
    loaded = parameters(load(tmp_path))
    groups = heads // kv_heads
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        qkv = loaded.pop(f"{prefix}self_attn.qkv_proj.weight")
        assert qkv.shape == ((heads + 2 * kv_heads) * head_dim, 8)
        for row in range(len(qkv)):
            slot, within = divmod(row, head_dim)
            kv_head, kind = divmod(slot, groups + 2)
            source, head = ("q", kv_head * groups + kind) if kind < groups else ("kv"[kind - groups], kv_head)
            expected = hf[f"{prefix}self_attn.{source}_proj.weight"][head * head_dim + within]
            np.testing.assert_array_equal(qkv[row], expected)
        gate_up = loaded.pop(f"{prefix}mlp.gate_up_proj.weight")
        for row in range(24):
            source = "up" if row % 2 else "gate"
            np.testing.assert_array_equal(gate_up[row], hf[f"{prefix}mlp.{source}_proj.weight"][row // 2])
    assert same_bits(loaded, {name: hf[name] for name in loaded})
    fused = re.compile(r".*(q|k|v|gate|up)_proj.*")
    assert loaded.keys() == {name for name in hf if not fused.fullmatch(name)}


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_convert_as_numpy_does(tmp_path, code, dtype):
    hf = hf_tensors(CONFIG, code)
    write_hf(tmp_path, CONFIG, hf)
    model = load(tmp_path, dtype=dtype)
    assert model.dtype == dtype
    loaded = parameters(model)
    name = "model.layers.1.self_attn.o_proj.weight"
    np.testing.assert_array_equal(loaded[name], hf[name].astype(jnp.dtype(dtype)))
    assert {array.dtype for array in loaded.values()} == {jnp.dtype(dtype)}


def test_chunked_reading_of_large_tensors(tmp_path, monkeypatch):
    hf = hf_tensors(CONFIG, "BF16")
    write_hf(tmp_path, CONFIG, hf)
    whole = parameters(load(tmp_path))
    monkeypatch.setattr("jaxgen.convert.checkpoint._CHUNK_BYTES", 40)  # a few rows, or less than one
    assert same_bits(parameters(load(tmp_path)), whole)


def test_float16_overflow_is_an_error(tmp_path):
    hf = hf_tensors(CONFIG)
    hf[NORM][3] = 1e5
    write_hf(tmp_path, CONFIG, hf)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight'.*float16's 65504"):
        load(tmp_path, dtype="float16")
    load(tmp_path, dtype="bfloat16")


def test_generation_config_comes_from_its_file_or_else_from_config_json(tmp_path):
    write_hf(tmp_path, CONFIG | {"eos_token_id": 7, "pad_token_id": -1}, hf_tensors(CONFIG))
    assert load(tmp_path).generation_config.eos_token_id == (2, 3)
    (tmp_path / "generation_config.json").unlink()
    fallback = load(tmp_path).generation_config
    assert (fallback.bos_token_id, fallback.eos_token_id, fallback.pad_token_id) == (1, 7, None)


def test_old_rotary_buffers_are_ignored(tmp_path):
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32) for i in range(2)}
    write_hf(tmp_path, CONFIG, hf_tensors(CONFIG) | buffers)
    load(tmp_path)


# Arguments.


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"load_in_8bit": True}, UnsupportedError, "load_in_8bit=True: not supported yet"),
        ({"trust_remote_code": True}, UnsupportedError, "trust_remote_code=True: jaxgen never runs code"),
        ({"dtyp": "float32"}, JaxgenError, "no option 'dtyp'; did you mean 'dtype'"),
        ({"zzz": 1}, JaxgenError, "no option 'zzz'; jaxgen has dtype, torch_dtype, device_map"),
        ({"dtype": "int8"}, JaxgenError, "dtype='int8' is not one of float32, bfloat16, float16"),
        ({"dtype": jnp.float64}, JaxgenError, "is not one of float32, bfloat16, float16"),
        ({"dtype": 3}, JaxgenError, "dtype=3 is not one of"),
        ({"dtype": "auto", "torch_dtype": "auto"}, JaxgenError, "are the same option"),
    ],
)
def test_options_that_do_not_exist_raise(tmp_path, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        load(tmp_path, **options)


def test_dtype_and_device_choices(tmp_path):
    write_hf(tmp_path, CONFIG, hf_tensors(CONFIG, "F16"))
    assert load(tmp_path).dtype == jnp.float32
    for half in (
        "bfloat16",
        jnp.bfloat16,
        jnp.dtype("bfloat16"),
        type("T", (), {"__str__": lambda s: "torch.bfloat16"})(),
    ):
        assert load(tmp_path, dtype=half).dtype == load(tmp_path, torch_dtype=half).dtype == jnp.bfloat16
    cpu = jax.local_devices(backend="cpu")[0]
    for place in ("auto", "cpu", "cpu:0", 0, {"": 0}, {"": "cpu"}, cpu):
        model = AutoModelForCausalLM.from_pretrained(str(tmp_path), device_map=place)
        assert model.device == cpu
    for wrong in ("cpu:99", "sequential", "disk", {"": 99}, {"model": 0}, 99, -1, True, None):
        with pytest.raises(JaxgenError, match=r"device_map="):
            AutoModelForCausalLM.from_pretrained(tmp_path, device_map=wrong)


def test_names_that_are_no_directory(tmp_path, monkeypatch):
    for name in (tmp_path / "absent", str(tmp_path / "absent"), "./absent", "a/b/c", "", "a b"):
        with pytest.raises(JaxgenError, match="there is no such directory" if name else "not a hub id|config.json"):
            AutoModelForCausalLM.from_pretrained(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxgenError, match="is a file; give the directory"):
        load(tmp_path / "file")


def test_hub_ids_are_downloaded_and_its_errors_explained(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    write_hf(tmp_path, CONFIG, hf_tensors(CONFIG))
    calls = []

    def download(repo_id, **options):
        calls.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    AutoModelForCausalLM.from_pretrained("owner/name", revision="v1", local_files_only=True, token="t")
    ((repo_id, options),) = calls
    patterns = options.pop("allow_patterns")
    assert repo_id == "owner/name"
    assert options == {"revision": "v1", "local_files_only": True, "cache_dir": None, "token": "t"}
    assert {"config.json", "model.safetensors", "model-*.safetensors", INDEX} <= set(patterns)
    assert not any(pattern.endswith((".bin", ".pth")) or pattern.startswith("*") for pattern in patterns)

    for raised, message in {
        errors.LocalEntryNotFoundError("x"): "not in the cache",
        errors.OfflineModeIsEnabled("x"): "HF_HUB_OFFLINE",
        errors.HFValidationError("x"): "cannot be had: x",
        ConnectionError("no route"): "no route",
    }.items():

        def fail(repo_id, raised=raised, **options):
            raise raised

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(JaxgenError, match=message):
            AutoModelForCausalLM.from_pretrained("owner/name")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("what", ["dangling link", "loop", "directory", "fifo", "endless", "long"])
def test_a_json_file_that_is_no_regular_file_of_usual_length_is_an_error(tmp_path, name, what):
    write_hf(tmp_path, CONFIG, hf_tensors(CONFIG), 2)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    match what:
        case "dangling link":
            path.symlink_to("nowhere.json")
        case "loop":
            path.symlink_to(name)
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "endless":
            path.symlink_to("/dev/zero")
        case "long":
            path.write_text(json.dumps({"a": "b" * 20_000_000}))
    with pytest.raises(CheckpointError) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert name in str(error.value)
    assert len(str(error.value)) < 1000
