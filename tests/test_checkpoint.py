"""Every problem that a checkpoint can have, damaged files, and the memory that loading takes."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jaxgen.convert.load import AutoModelForCausalLM
from jaxgen.errors import CheckpointError, JaxgenError
from tests.hf_files import (
    CONFIG,
    hf_tensors,
    parameters,
    safetensors_bytes,
    same_bits,
    write_hf,
    write_index,
)

ROOT = Path(__file__).parents[1]
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def load(directory: Path, **options: Any):
    return AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", **options)


def problems(directory: Path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    return caught.value.problems


# What can be wrong.


def test_all_mismatches_are_reported_at_once(tmp_path):
    hf = hf_tensors(CONFIG)
    del hf["lm_head.weight"]
    hf[NORM] = np.ones(9, np.float32)
    hf["model.layers.0.input_layernorm.weight"] = np.ones(8, np.int32)
    hf["model.layers.0.extra.weight"] = np.ones(1, np.float32)
    write_hf(tmp_path, CONFIG, hf)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert sorted(caught.value.problems) == [
        "'model.layers.0.input_layernorm.weight' has dtype I32; jaxgen reads BF16, F16, F32",
        "'model.norm.weight' has shape [9], but config.json implies [8]",
        "tensor 'lm_head.weight' is missing",
        "tensor 'model.layers.0.extra.weight' is not part of the model that config.json describes",
    ]
    assert str(caught.value).startswith(str(tmp_path))
    assert all(problem in str(caught.value) for problem in caught.value.problems)


def test_tied_checkpoints_may_repeat_the_embedding_but_not_contradict_it(tmp_path):
    config = CONFIG | {"tie_word_embeddings": True}
    hf = hf_tensors(config)
    embedding = hf["model.embed_tokens.weight"]
    embedding[0, 0] = np.nan
    write_hf(tmp_path / "without", config, hf)
    write_hf(tmp_path / "same", config, hf | {"lm_head.weight": embedding})
    write_hf(tmp_path / "other", config, hf | {"lm_head.weight": -embedding})
    write_hf(tmp_path / "half", config, hf | {"lm_head.weight": embedding.astype(np.float16)})
    assert "lm_head.weight" not in parameters(load(tmp_path / "without"))
    assert same_bits(parameters(load(tmp_path / "same")), parameters(load(tmp_path / "without")))
    for name in ("other", "half"):
        (problem,) = problems(tmp_path / name)
        assert "'lm_head.weight' differs from 'model.embed_tokens.weight'" in problem


def test_layer_count_that_config_exaggerates_is_one_problem_more(tmp_path):
    write_hf(tmp_path, CONFIG | {"num_hidden_layers": 10**9}, hf_tensors(CONFIG))
    assert problems(tmp_path) == ["config.json has num_hidden_layers=1000000000, the weights have 2"]
    write_hf(tmp_path, CONFIG | {"num_hidden_layers": 1}, hf_tensors(CONFIG))
    assert len(problems(tmp_path)) == 9


def test_missing_and_truncated_shards_do_not_hide_other_problems(tmp_path):
    hf = hf_tensors(CONFIG)
    hf[NORM] = np.ones(9, np.float32)
    write_hf(tmp_path, CONFIG, hf, shards=4)
    (tmp_path / "model-00001-of-00004.safetensors").unlink()
    second = tmp_path / "model-00002-of-00004.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    missing, truncated, shape = problems(tmp_path)
    assert missing == "shard model-00001-of-00004.safetensors is missing; download the checkpoint again"
    assert truncated.startswith(f"model-00002-of-00004.safetensors ({second.stat().st_size} bytes) is truncated")
    assert shape == "'model.norm.weight' has shape [9], but config.json implies [8]"


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b.safetensors", "x.bin", "",
     "\0.safetensors", "\ud800.safetensors", "..safetensors", "a" * 300 + ".safetensors"],
)  # fmt: skip
def test_shard_names_stay_in_the_directory(tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    inside = tmp_path / "inside"
    weight_map = write_hf(inside, CONFIG, hf_tensors(CONFIG), shards=2)
    write_index(inside, weight_map | {NORM: name}, 0)
    found = problems(inside)
    assert f"{INDEX}: shard name {name!r} is not a .safetensors file of this directory" in found


def test_index_and_shards_must_agree(tmp_path):
    hf = hf_tensors(CONFIG)
    weight_map = write_hf(tmp_path, CONFIG, hf, shards=2)
    first, second = dict.fromkeys(weight_map.values())
    total = sum(tensor.nbytes for tensor in hf.values())

    write_index(tmp_path, weight_map | {NORM: first}, total)
    assert problems(tmp_path) == [f"{INDEX} places {NORM!r} in {first}, but {second} holds it"]
    write_index(tmp_path, weight_map | {"x.weight": first}, total)
    assert problems(tmp_path) == [f"{INDEX} places 'x.weight' in {first}, but no shard holds it"]
    write_index(tmp_path, {name: shard for name, shard in weight_map.items() if name != NORM}, total)
    assert problems(tmp_path) == [f"{second} holds {NORM!r}, which {INDEX} does not list"]
    write_index(tmp_path, weight_map | {NORM: 5}, total)
    assert problems(tmp_path)[0] == f"{INDEX}: shard of {NORM!r} is 5, not a file name"


def test_what_an_index_says_beside_the_tensors_is_only_noted(tmp_path, caplog):
    hf = hf_tensors(CONFIG)
    weight_map = write_hf(tmp_path, CONFIG, hf, shards=2)
    first, total = next(iter(weight_map.values())), sum(tensor.nbytes for tensor in hf.values())
    for right in (total, float(total), None):
        write_index(tmp_path, weight_map, right)
        expected = parameters(load(tmp_path))
    assert not caplog.records
    for wrong in (total + 1, "many", True, [total], 10**400):
        caplog.clear()
        write_index(tmp_path, weight_map, wrong)
        assert same_bits(parameters(load(tmp_path)), expected)
        (record,) = caplog.records
        text = f"{INDEX}: metadata.total_size={wrong!r:.80}, but the shards hold {total} bytes of tensors"
        assert record.getMessage() == text
    caplog.clear()
    buffers = ("model.layers.1.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    write_index(tmp_path, weight_map | dict.fromkeys(buffers, first), total)
    assert same_bits(parameters(load(tmp_path)), expected)
    (record,) = caplog.records
    assert f"lists {buffers[0]!r} (2 of this kind), which no shard holds and no model reads" in record.getMessage()


def test_all_problems_are_listed_and_as_many_shown_as_can_be_read(tmp_path):
    strange = {f"{index:05}" * 1000: np.ones(1, np.float32) for index in range(200)}
    write_hf(tmp_path, CONFIG, hf_tensors(CONFIG) | strange)
    with pytest.raises(CheckpointError, match=r"; and 170 more$") as caught:
        load(tmp_path)
    assert len(caught.value.problems) == 200 and len(str(caught.value)) < 20_000


def test_a_weight_that_no_shard_holds_stays_an_error(tmp_path):
    hf = hf_tensors(CONFIG)
    weight_map = write_hf(tmp_path, CONFIG, hf, shards=2)
    last = list(weight_map.values())[-1]
    (tmp_path / last).write_bytes(
        safetensors_bytes({n: hf[n] for n, s in weight_map.items() if s == last and n != NORM})
    )
    assert problems(tmp_path) == [f"{INDEX} places {NORM!r} in {last}, but no shard holds it"]


def test_duplicates(tmp_path):
    hf = hf_tensors(CONFIG)
    weight_map = write_hf(tmp_path, CONFIG, hf, shards=2)
    first, second = dict.fromkeys(weight_map.values())
    mine = {name: hf[name] for name, shard in weight_map.items() if shard == first} | {NORM: hf[NORM]}
    (tmp_path / first).write_bytes(safetensors_bytes(mine))
    assert f"{NORM!r} is in both {first} and {second}" in problems(tmp_path)

    text = (tmp_path / INDEX).read_text()
    (tmp_path / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "{first}", '))
    assert problems(tmp_path) == [f"{NORM!r} is given twice"]

    data = safetensors_bytes(hf)
    header = data[8 : _header_end(data)].decode()
    entry = json.dumps({NORM: json.loads(header)[NORM]})[1:-1]
    doubled = f"{header[:-1]}, {entry}}}".encode()
    whole = len(doubled).to_bytes(8, "little") + doubled + data[_header_end(data) :]
    (tmp_path / "model.safetensors").write_bytes(whole)
    assert problems(tmp_path) == [f"model.safetensors holds {NORM!r} twice"]
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    (problem,) = problems(tmp_path)
    assert problem.startswith(f"model.safetensors ({len(whole) - 1} bytes) is truncated")


def test_pickles_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert problems(tmp_path) == [f"no weights: neither model.safetensors nor {INDEX} is there"]
    for name in ("pytorch_model.bin", "consolidated.00.pth"):
        (tmp_path / name).write_bytes(b"")
        (problem,) = problems(tmp_path)
        assert name in problem and "save_pretrained(new_path, safe_serialization=True)" in problem
    with pytest.raises(CheckpointError, match=r"there is no config\.json; give the directory of a model"):
        (tmp_path / "config.json").unlink()
        load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b'{"a": 1, "a": 2}', b"\xff\xfe\x00", b"[" * 100_000, b"9" * 5000]
)
def test_json_damage(tmp_path, name, text):
    write_hf(tmp_path, CONFIG, hf_tensors(CONFIG), shards=2)
    (tmp_path / name).write_bytes(text)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load(tmp_path)


# Damaged files. A flipped bit inside tensor data is a different, valid tensor: the format has no checksum, so no
# reader can tell, and such damage is not part of this.


def _header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _flip(data: bytes, rng: random.Random, start: int, stop: int) -> bytes:
    position = rng.randrange(start, stop)
    return data[:position] + bytes([data[position] ^ (1 << rng.randrange(8))]) + data[position + 1 :]


def _edit_header(data: bytes, rng: random.Random) -> bytes:
    end = _header_end(data)
    header = json.loads(data[8:end])
    name = rng.choice(list(header))
    field = rng.choice(["dtype", "shape", "data_offsets", "name", "all"])
    strange = rng.choice([0, -1, 2**63, 1e400, None, "F64", [], [2**40, 2**40], {}, "\udc00", True, [[1]]])
    if field == "name":
        header[rng.choice(["", "x", NORM, "\0", "model.layers.99.mlp.up_proj.weight"])] = header.pop(name)
    elif field == "all":
        header[name] = strange
    else:
        header[name][field] = strange
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def _edit_json(data: bytes, rng: random.Random) -> bytes:
    fields = json.loads(data)
    inside = fields["weight_map"] if "weight_map" in fields and rng.random() < 0.8 else fields
    name = rng.choice(list(inside))
    how = rng.randrange(3)
    if how == 0:
        del inside[name]
    elif how == 1:
        inside[rng.choice(["x", "", "\ud800", name + " "])] = inside.pop(name)
    else:
        values = [0, -1, 10**30, 1e400, None, "", "x", "../x", [], [1], {}, {"a": []}, True, "\ud800", 3.5]
        inside[name] = rng.choice(values)
    return json.dumps(fields).encode()


def _damage(directory: Path, rng: random.Random) -> str:
    """Damage one file of a checkpoint in place; says how."""
    weights = sorted(directory.glob("*.safetensors"))
    jsons = sorted(directory.glob("*.json"))
    how = rng.choice(["length", "header", "truncate", "append", "entry", "swap", "json byte", "json edit", "cut"])
    path = rng.choice(jsons if "json" in how or how == "cut" else weights)
    data = path.read_bytes()
    if how == "length":
        data = _flip(data, rng, 0, 8)
    elif how == "header":
        data = _flip(data, rng, 8, _header_end(data))
    elif how in ("truncate", "cut"):
        data = data[: rng.randrange(len(data))]
    elif how == "append":
        data += rng.randbytes(rng.randrange(1, 100))
    elif how == "entry":
        data = _edit_header(data, rng)
    elif how == "json byte":
        data = _flip(data, rng, 0, len(data))
    elif how == "json edit":
        data = _edit_json(data, rng)
    else:
        other = rng.choice(weights)
        other_data = other.read_bytes()
        other.write_bytes(data)
        data = other_data
    path.write_bytes(data)
    return f"{how}: {path.name}"


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_damaged_files_raise_jaxgen_errors_or_do_no_harm(tmp_path, shards):
    write_hf(tmp_path / "good", CONFIG, hf_tensors(CONFIG, "BF16"), shards)
    good = parameters(load(tmp_path / "good"))
    refused = 0
    for seed in range(150):
        damaged = tmp_path / f"damaged{seed}"
        shutil.copytree(tmp_path / "good", damaged)
        how = _damage(damaged, random.Random(seed))
        try:
            model = load(damaged)
        except JaxgenError as error:
            refused += 1
            assert str(error).isprintable(), (seed, how)
        except TypeCheckError as error:
            # Only in tests: beartype refuses a field of the wrong type before MistralConfig's own check is reached.
            assert "MistralConfig.__init__" in str(error), (seed, how)
            refused += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, {how}: {error!r}") from error
        else:
            assert same_bits(parameters(model), good), (seed, how)
    assert refused > 100  # the rest are flips in values that loading does not depend on


@pytest.mark.slow
def test_memory_stays_within_the_parameters_and_two_tensors():
    command = [sys.executable, "benchmarks/loading.py", "--gigabytes", "0.2", "--shards", "2", "--width", "1024"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pass" in done.stdout
