"""Offline conversion: what is in the files, and that they appear complete or not at all, whatever interrupts it."""

import importlib
import json
import math
import os
import resource
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import jaxgen
from jaxgen import AutoModelForCausalLM, CheckpointError, JaxgenError, cli, demo
from jaxgen.arguments import parser
from jaxgen.convert import convert, convert_checkpoint
from jaxgen.convert.calibration import read_calibration
from jaxgen.convert.checkpoint import Checkpoint
from jaxgen.quant import int4, quantize
from jaxgen.text.tokenizer import load_tokenizer
from tests.helpers import SOAK, some_slow
from tests.hf_files import CONFIG, DTYPES, hf_tensors, write_hf

ROOT = Path(__file__).parents[1]
WIDE = CONFIG | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 40}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_hf(tmp_path / "source", WIDE, hf_tensors(WIDE, "BF16"), shards=2)
    return tmp_path / "source"


def tensors_in(directory: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(str(path), framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    return found


def files_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def test_words_scales_and_shape_worked_out_by_hand(tmp_path):
    """Rows that only one scale fits exactly: a quarter, with codes -8 to 7 twice over, and minus a quarter."""
    tensors = hf_tensors(WIDE, "F32")
    name = "model.layers.1.self_attn.k_proj.weight"
    up = np.tile(np.arange(-8, 8, dtype=np.float32) / 4, 8)
    tensors[name] = np.where(np.arange(64)[:, None] % 2, -up, up)
    write_hf(tmp_path / "source", WIDE, tensors)
    written = tensors_in(convert_checkpoint(tmp_path / "source", tmp_path / "out", group_size=32))
    words = [0x76543210, 0xFEDCBA98 - 2**32]  # unsigned codes 0 to 15, the first one lowest
    np.testing.assert_array_equal(written[f"{name}_packed"], np.tile(np.array(words, np.int32), (64, 8)))
    assert written[f"{name}_packed"].dtype == np.int32
    np.testing.assert_array_equal(written[f"{name}_scale"], np.tile([[0.25] * 4, [-0.25] * 4], (32, 1)))
    assert (written[f"{name}_shape"].tolist(), written[f"{name}_shape"].dtype) == ([64, 128], np.int64)


@pytest.mark.parametrize("code, group_size", [("F32", 32), ("BF16", 64), ("F16", 128), ("BF16", -1)])
@pytest.mark.parametrize("lm_head, tied", [(False, False), (True, False), (False, True)])
def test_every_tensor(tmp_path, code, group_size, lm_head, tied):
    config = WIDE | {"tie_word_embeddings": tied}
    hf = hf_tensors(config, code)
    hf["model.norm.weight"] = hf["model.norm.weight"].astype(np.float32)  # each keeps its own dtype
    write_hf(tmp_path / "source", config, hf, shards=3)
    path = convert_checkpoint(tmp_path / "source", tmp_path / "out", group_size=group_size, lm_head=lm_head)
    written = tensors_in(path)
    for name, tensor in hf.items():
        if is_linear(name) or (lm_head and name == "lm_head.weight"):
            expected = quantize(tensor, group_size)
            unsigned = np.stack([expected.packed & 15, expected.packed >> 4], -1).reshape(tensor.shape) ^ 8
            words = (unsigned.reshape(len(tensor), -1, 8).astype(np.uint32) << np.arange(8, dtype=np.uint32) * 4).sum(
                -1
            )
            np.testing.assert_array_equal(written.pop(f"{name}_packed").view(np.uint32), words)
            scale = written.pop(f"{name}_scale")
            assert scale.dtype == DTYPES["BF16"]
            np.testing.assert_array_equal(scale, expected.scale)
            assert written.pop(f"{name}_shape").tolist() == list(tensor.shape)
        else:
            copy = written.pop(name)
            assert copy.dtype == tensor.dtype
            assert copy.tobytes() == tensor.tobytes()
    assert not written
    said = json.loads((path / "config.json").read_text())
    scheme = said.pop("quantization_config")
    assert said == config
    assert scheme["ignore"] == ([] if lm_head else ["lm_head"])
    weights = scheme["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"]) == (
        ("channel", None) if group_size == -1 else ("group", group_size)
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", some_slow([{}, {"group_size": 32, "lm_head": True}, {"group_size": -1}], soak=bool))
def test_the_converted_demo_is_the_one_quantised_while_loading(tmp_path, options):
    path = convert_checkpoint(demo.path(), tmp_path / "out", max_shard_size="500KB", **options)
    quantization = jaxgen.Int4Config(**options)
    converted = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    loaded = AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32", quantization_config=quantization)
    inputs = load_tokenizer(path)(["A list of colors: red, blue"], return_tensors="np")
    np.testing.assert_array_equal(converted(inputs["input_ids"]).logits, loaded(inputs["input_ids"]).logits)
    if options == {}:
        np.testing.assert_array_equal(converted.generate(**inputs), loaded.generate(**inputs))


def test_tensors_lie_aligned(tmp_path):
    """The six scales of k_proj take 12 bytes, and what follows may want 8 or 4."""
    config = WIDE | {"head_dim": 6, "num_key_value_heads": 1}
    write_hf(tmp_path / "source", config, hf_tensors(config, "BF16"))
    checkpoint = Checkpoint(convert_checkpoint(tmp_path / "source", tmp_path / "out", group_size=-1))
    assert checkpoint.tensors["model.layers.0.self_attn.k_proj.weight_scale"].nbytes == 12
    for info in checkpoint.tensors.values():
        assert info.begin % {"I64": 8, "I32": 4, "BF16": 2}[info.dtype] == 0


def test_files_are_no_larger_than_asked(source, tmp_path):
    path = convert_checkpoint(source, tmp_path / "out", max_shard_size="30KB")
    checkpoint = Checkpoint(path)  # checks headers, index and total size
    assert checkpoint.problems == []
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        sizes[info.shard] = sizes.get(info.shard, 0) + info.nbytes
    assert len(sizes) > 3
    assert max(sizes.values()) <= 30_000
    metadata = json.loads((path / "model.safetensors.index.json").read_text())["metadata"]
    assert metadata["total_parameters"] == sum(tensor.size for tensor in hf_tensors(WIDE).values())


def test_it_goes_through_a_tensor_by_rows(source, tmp_path, monkeypatch):
    convert_checkpoint(source, tmp_path / "whole", group_size=32)
    sizes = []

    def spy(rows: Any, *arguments: Any, **options: Any) -> Any:
        sizes.append(rows.size)
        return quantize(rows, *arguments, **options)

    monkeypatch.setattr(convert, "_WEIGHTS_AT_ONCE", 4096)
    monkeypatch.setattr(int4, "quantize", spy)
    convert_checkpoint(source, tmp_path / "rows", group_size=32)
    assert set(sizes) == {4096}
    assert files_in(tmp_path / "rows") == files_in(tmp_path / "whole")


def test_files_beside_the_weights_are_copied(source, tmp_path):
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "special_tokens_map.json"):
        (source / name).write_text(name)
    (source / "notes.txt").write_text("not a model's")
    (source / "tokenizer.d").mkdir()
    templates = source / "additional_chat_templates"
    templates.mkdir()
    (templates / "short.jinja").write_text("{{ messages[0]['content'] }}")
    (templates / "notes.md").write_text("not a template")
    path = convert_checkpoint(source, tmp_path / "out")
    names = "chat_template.jinja generation_config.json special_tokens_map.json tokenizer.json tokenizer.model".split()
    assert {str(found.relative_to(path / templates.name)) for found in (path / templates.name).rglob("*")} == {
        "short.jinja"
    }
    assert (path / templates.name / "short.jinja").read_text() == (templates / "short.jinja").read_text()
    shutil.rmtree(path / templates.name)
    assert sorted(files_in(path)) == sorted([*names, "config.json", "model.safetensors"])
    assert all((path / name).read_bytes() == (source / name).read_bytes() for name in names)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"bits": 8}, "bits=8 must be 4"),
    "group": ({"group_size": 16}, "group_size=16 must be 32, 64, 128, or -1"),
    "method": ({"method": "awq"}, "method='awq' must be one of rtn, gptq, autoround"),
    "no text": ({"method": "gptq"}, "method='gptq' needs calibration text"),
    "text": ({"calibration": "text.txt"}, "method='rtn' looks at no text"),
    "lm_head": ({"lm_head": 1}, "lm_head=1 must be True or False"),
    "shards": ({"max_shard_size": "1.5GB"}, "max_shard_size='1.5GB' must be"),
    "no file": ({"method": "gptq", "calibration": "/nowhere/text.txt"}, "no tokenizer"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(source, tmp_path, case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(JaxgenError, match=message):
        convert_checkpoint(source, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_sources_that_are_refused_before_anything_is_written(source, tmp_path):
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(JaxgenError, match=message):
            convert_checkpoint(source, tmp_path / "out", **options)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def rewrite(**fields: Any) -> None:
        config = WIDE | fields
        write_hf(source, config, hf_tensors({"tie_word_embeddings": False, **config}), shards=2)

    for field in ("quantization_config", "compression_config", "quantization"):
        rewrite(**{field: {"bits": 4}})
        refused(f"already quantised .config.json has '{field}'.*give it the original")
    (source / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(JaxgenError, match=r"model\.gguf is a GGUF file; jaxgen converts float32"):
        convert_checkpoint(source / "model.gguf", tmp_path / "out")
    rewrite(tie_word_embeddings=True)
    refused("lm_head=True, but this model's head is its embedding", lm_head=True)
    rewrite(intermediate_size=132)
    refused(r"'model\.layers\.0\.mlp\.down_proj\.weight' has rows of 132 weights, which groups of 128")
    refused(r"has rows of 132 weights; compressed-tensors packs 8 to a word", group_size=-1)
    rewrite()
    shard = source / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused("model-00002-of-00002.safetensors .* is truncated")


def test_weights_that_are_not_finite(tmp_path):
    for value in (np.nan, np.inf):
        tensors = hf_tensors(WIDE, "F16")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        write_hf(tmp_path / "source", WIDE, tensors)
        with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' has weights that are not"):
            convert_checkpoint(tmp_path / "source", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nothing_is_overwritten(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("mine")
    with pytest.raises(JaxgenError, match=r"full is not empty \(precious, \.\.\.\); choose a new directory"):
        convert_checkpoint(source, tmp_path / "full")
    with pytest.raises(JaxgenError, match="source is not empty"):
        convert_checkpoint(source, source)
    with pytest.raises(JaxgenError, match="is not a directory"):
        convert_checkpoint(source, source / "config.json")
    (tmp_path / "empty").mkdir()
    convert_checkpoint(source, tmp_path / "empty")
    convert_checkpoint(source, tmp_path / "new" / "parents")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "full", "empty", "new"}
    assert files_in(tmp_path / "full") == {"precious": b"mine"}


def test_the_mode_of_a_directory_made_for_it_stays(source, tmp_path):
    (tmp_path / "out").mkdir(0o700)
    assert convert_checkpoint(source, tmp_path / "out").stat().st_mode & 0o777 == 0o700


def test_a_target_that_is_filled_meanwhile_is_left_alone(source, tmp_path, monkeypatch):
    def intrude(*arguments: Any, **options: Any) -> Any:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "precious").write_text("mine")
        return quantize(*arguments, **options)

    monkeypatch.setattr(int4, "quantize", intrude)
    with pytest.raises(JaxgenError, match="was not written"):
        convert_checkpoint(source, tmp_path / "out")
    assert files_in(tmp_path / "out") == {"precious": b"mine"}


def test_a_second_process_is_refused(source, tmp_path, monkeypatch):
    refusals = []

    def second(*arguments: Any, **options: Any) -> Any:
        with pytest.raises(JaxgenError, match=r"\.out\.converting is in use: another process") as caught:
            convert_checkpoint(source, tmp_path / "out")
        refusals.append(caught)
        return quantize(*arguments, **options)

    monkeypatch.setattr(int4, "quantize", second)
    convert_checkpoint(source, tmp_path / "out")
    assert refusals


def test_the_disk_is_checked_to_the_byte(source, tmp_path, monkeypatch):
    expected = files_in(convert_checkpoint(source, tmp_path / "first", max_shard_size="30KB"))
    needed = sum(map(len, expected.values()))
    usage = types.SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(JaxgenError, match=f"{needed:,} bytes are to be written, but the disk has {needed - 1:,} free"):
        convert_checkpoint(source, tmp_path / "out", max_shard_size="30KB")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "first"}
    usage.free = needed
    assert files_in(convert_checkpoint(source, tmp_path / "out", max_shard_size="30KB")) == expected


class Interrupted(Exception):
    """Raised in the middle of a conversion."""


def interrupt(monkeypatch: pytest.MonkeyPatch, source: Path, target: Path, after: int, **options: Any) -> set[Path]:
    """Convert, but stop after so many tensors; returns the finished shards."""
    calls = []

    def stop(*arguments: Any, **keywords: Any) -> Any:
        calls.append(None)
        if len(calls) > after:
            raise Interrupted
        return quantize(*arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(int4, "quantize", stop)
        convert_checkpoint(source, target, **options)
    assert not target.exists()
    staging = target.with_name(f".{target.name}.converting")
    assert not list(staging.rglob("*.partial"))
    return set(staging.rglob("*.safetensors"))


def test_an_interrupted_conversion_goes_on_where_it_was(source, tmp_path, monkeypatch):
    options = {"group_size": 32, "max_shard_size": "30KB"}
    expected = files_in(convert_checkpoint(source, tmp_path / "reference", **options))
    finished = interrupt(monkeypatch, source, tmp_path / "out", 9, **options)
    assert 1 < len(finished) < len(expected) - 4
    inodes = {path.name: path.stat().st_ino for path in finished}
    assert files_in(convert_checkpoint(source, tmp_path / "out", **options)) == expected
    assert {path.name: path.stat().st_ino for path in (tmp_path / "out").iterdir() if path.name in inodes} == inodes
    assert not (tmp_path / ".out.converting").exists()


@pytest.mark.parametrize(
    "change",
    [
        "weights", "weights of one tensor", "weights to come", "weights exchanged", "one bit", "config", "tokenizer",
        "group_size", "max_shard_size",
    ],
)  # fmt: skip
def test_another_source_or_other_options_start_afresh(source, tmp_path, monkeypatch, caplog, change):
    options: dict[str, Any] = {"group_size": 32, "max_shard_size": "30KB"}
    assert interrupt(monkeypatch, source, tmp_path / "out", 9, **options)
    times = {path: path.stat().st_mtime_ns for path in source.iterdir()}
    if change == "weights":
        write_hf(source, WIDE, hf_tensors(WIDE, "BF16", seed=1), shards=2)
    elif change in ("weights of one tensor", "weights to come"):
        tensors = hf_tensors(WIDE, "BF16")
        layer = 0 if change == "weights of one tensor" else 1
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] *= 2
        write_hf(source, WIDE, tensors, shards=2)
    elif change == "weights exchanged":  # two tensors of one shape under each other's name
        tensors = hf_tensors(WIDE, "BF16")
        one, other = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
        tensors[one], tensors[other] = tensors[other], tensors[one]
        write_hf(source, WIDE, tensors, shards=2)
    elif change == "one bit":
        (shard, first) = next((source / info.shard, info) for info in Checkpoint(source).tensors.values())
        data = bytearray(shard.read_bytes())
        data[first.begin + first.nbytes // 2 + 1] ^= 1
        shard.write_bytes(data)
    elif change == "config":
        write_hf(source, WIDE | {"rope_theta": 5e5}, hf_tensors(WIDE, "BF16"), shards=2)
    elif change == "tokenizer":
        (source / "tokenizer.json").write_text("{}")
    else:
        options |= {change: {"group_size": 64, "max_shard_size": "50KB"}[change]}
    for path, time in times.items():  # as archives and copies restore them
        os.utime(path, ns=(time, time))
    written = files_in(convert_checkpoint(source, tmp_path / "out", **options))
    assert ("starting afresh" in caplog.text) == (change != "weights to come")
    assert written == files_in(convert_checkpoint(source, tmp_path / "reference", **options))


def test_the_same_weights_elsewhere_and_later_are_the_same_source(source, tmp_path, monkeypatch, caplog):
    options = {"group_size": 32, "max_shard_size": "30KB"}
    finished = interrupt(monkeypatch, source, tmp_path / "out", 9, **options)
    inodes = {path.name: path.stat().st_ino for path in finished}
    shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copyfile)
    path = convert_checkpoint(tmp_path / "copy", tmp_path / "out", **options)
    assert inodes and inodes == {name: (path / name).stat().st_ino for name in inodes}
    assert "afresh" not in caplog.text


def test_a_method_that_goes_by_layers_depends_on_all_of_a_layer(tmp_path, monkeypatch, caplog):
    """A file may end within a layer, whose weights are made together."""
    text = tmp_path / "text.txt"
    text.write_text("A list of colors: red, blue, green. " * 200)
    shutil.copytree(demo.path(), tmp_path / "source")
    stub_blocks(monkeypatch)
    options: dict[str, Any] = {"group_size": 64, "method": "gptq", "calibration": text, "max_shard_size": "200KB"}
    shards = convert._Conversion(tmp_path / "source", jaxgen.Int4Config(group_size=64), "gptq", text, 200_000).shards
    names = [[part.name for part in parts] for parts in shards.values()]
    cut = next(i for i, those in enumerate(names) if those[-1].startswith("model.layers.0."))
    assert names[cut + 1][0].startswith("model.layers.0.")
    appended = convert.ShardWriter.append

    def stop(self: Any, name: str, piece: np.ndarray) -> None:
        if name.startswith(names[cut + 1][0]):
            raise Interrupted
        appended(self, name, piece)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(convert.ShardWriter, "append", stop)
        convert_checkpoint(tmp_path / "source", tmp_path / "out", **options)
    info = Checkpoint(tmp_path / "source").tensors[names[cut + 1][0]]
    with (tmp_path / "source" / info.shard).open("r+b") as file:
        file.seek(info.begin + info.nbytes // 3)
        file.write(b"\0\0")
    written = files_in(convert_checkpoint(tmp_path / "source", tmp_path / "out", **options))
    assert "starting afresh" in caplog.text
    assert written == files_in(convert_checkpoint(tmp_path / "source", tmp_path / "reference", **options))


def test_a_full_disk_keeps_what_is_finished(source, tmp_path):
    """Files may not grow beyond what the first shards need; the fourth then fails as on a full disk."""
    options = {"group_size": 32, "max_shard_size": "30KB"}
    expected = files_in(convert_checkpoint(source, tmp_path / "reference", **options))
    sizes = [len(expected[name]) for name in sorted(expected) if name.endswith(".safetensors")]
    room = sizes[0]
    first_too_large = next(i for i, size in enumerate(sizes) if size > room)
    assert first_too_large > 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(JaxgenError, match=r"out was not written; .* \.?.*converting for the next attempt: .*large"):
            convert_checkpoint(source, tmp_path / "out", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = [path.name for path in (tmp_path / ".out.converting" / "files").iterdir()]
    assert len(kept) == first_too_large
    assert files_in(convert_checkpoint(source, tmp_path / "out", **options)) == expected


# Imports once, then forks a process for each attempt, before JAX has started any thread.
_KILLS = """
import json, os, pathlib, random, signal, sys, time, traceback
from jaxgen.convert import convert_checkpoint

source, root, wanted = *map(pathlib.Path, sys.argv[1:3]), int(sys.argv[3])
root.mkdir()

def start(target):
    pid = os.fork()
    if pid == 0:
        try:
            convert_checkpoint(source, target, group_size=32, max_shard_size="60KB")
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid

def finish(pid):
    assert os.waitpid(pid, 0)[1] == 0

def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}

finish(start(root / "warm"))  # fills the compilation cache, as whole
began = time.monotonic()
finish(start(root / "reference"))
duration, expected = time.monotonic() - began, files(root / "reference")

rng, kills, moments = random.Random(0), 0, []
for number in range(100):
    target = root / f"out{number}"
    staging = root / f".out{number}.converting"
    for attempt in range(3):
        pid = start(target)
        time.sleep(rng.uniform(0.1, 1) * duration)
        os.kill(pid, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        kills += killed
        if target.exists():
            assert files(target) == expected
            break
        assert killed
        shards = [path.name for path in staging.glob("files/*")]
        moments.append((len([name for name in shards if not name.endswith(".partial")]), len(shards)))
    else:
        finish(start(target))
        assert files(target) == expected
        assert not staging.exists()
    if kills >= wanted:
        break
print(json.dumps({"kills": kills, "moments": moments}))
"""


@pytest.mark.parametrize("kills", [pytest.param(3, marks=pytest.mark.slow), pytest.param(20, marks=SOAK)])
def test_killed_at_random_moments(kills, tmp_path):
    config = WIDE | {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    write_hf(tmp_path / "source", config, hf_tensors(config, "BF16"), shards=2)
    compiled_once = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    result = subprocess.run(
        [sys.executable, "-c", _KILLS, str(tmp_path / "source"), str(tmp_path / "killed"), str(kills)],
        cwd=ROOT,
        env=os.environ | compiled_once,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["kills"] >= kills
    if kills == 20:
        assert any(0 < finished < entries for finished, entries in report["moments"]), "none in the middle of a file"
        assert len({finished for finished, _ in report["moments"]}) > 5, "all at the same place"


def stub_blocks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In place of gptq and autoround: rounding by absmax, layer by layer; returns what it was called with."""
    seen: dict[str, Any] = {"made": [], "given": []}

    def quantized_blocks(checkpoint, config, calibration, *, group_size, method, finished):
        seen.update(calibration=calibration, method=method)
        for layer in range(config.num_hidden_layers):
            names = [name for name in checkpoint.tensors if name.startswith(f"model.layers.{layer}.")]
            known = finished(layer)
            fresh = {
                name: quantize(checkpoint.read(name), group_size, search=False) for name in names if is_linear(name)
            }
            if known is not None:
                assert known.keys() == fresh.keys()
                for name, weight in fresh.items():
                    np.testing.assert_array_equal(known[name].packed, weight.packed)
                    np.testing.assert_array_equal(known[name].scale, weight.scale)
            seen["made" if known is None else "given"].append(layer)
            yield layer, fresh if known is None else known

    blocks = types.SimpleNamespace(quantized_blocks=quantized_blocks)
    monkeypatch.setitem(sys.modules, "jaxgen.convert.quantize.blocks", blocks)
    return seen


@pytest.mark.parametrize("method", ["gptq", "autoround"])
def test_methods_that_go_layer_by_layer(tmp_path, monkeypatch, method):
    text = tmp_path / "text.txt"
    text.write_text("A list of colors: red, blue, green. " * 200)
    seen = stub_blocks(monkeypatch)
    options = {"group_size": 64, "method": method, "calibration": text, "max_shard_size": "200KB", "lm_head": True}
    path = convert_checkpoint(demo.path(), tmp_path / "out", **options)
    expected, written = files_in(path), tensors_in(path)
    assert (seen["made"], seen["given"], seen["method"]) == ([0, 1, 2, 3], [], method)
    assert seen["calibration"].dtype == np.int32
    assert seen["calibration"].shape[1] == 512  # the model's context
    checkpoint = Checkpoint(demo.path())
    for name in ("model.layers.2.mlp.up_proj.weight", "lm_head.weight"):
        weight = quantize(checkpoint.read(name), 64, search=name == "lm_head.weight")
        np.testing.assert_array_equal(written[f"{name}_packed"].view(np.uint8), weight.packed ^ 0x88)

    seen = stub_blocks(monkeypatch)
    appended = convert.ShardWriter.append

    def stop(self: Any, name: str, piece: np.ndarray) -> None:
        if name == "model.layers.2.self_attn.o_proj.weight_packed":
            raise Interrupted
        appended(self, name, piece)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(convert.ShardWriter, "append", stop)
        convert_checkpoint(demo.path(), tmp_path / "again", **options)
    seen = stub_blocks(monkeypatch)
    assert files_in(convert_checkpoint(demo.path(), tmp_path / "again", **options)) == expected
    assert seen["given"] + seen["made"] == [0, 1, 2, 3]
    assert seen["given"]
    assert 2 in seen["made"]


@pytest.mark.slow
def test_gptq_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    """The method itself, resumed on a layer that is read back from a finished file."""
    square = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 4, "vocab_size": 40}
    source = tmp_path / "source"
    write_hf(source, CONFIG | square, hf_tensors(CONFIG | square, "BF16"))  # few shapes: little to compile
    ids = np.random.default_rng(0).integers(0, 40, (4, 12)).astype(np.int32)
    monkeypatch.setattr(convert, "_calibration", lambda directory, path, config: ids)
    options = {"group_size": 32, "method": "gptq", "calibration": "any", "max_shard_size": "8KB"}
    expected = files_in(convert_checkpoint(source, tmp_path / "reference", **options))
    appended, last = convert.ShardWriter.append, "model.layers.1.mlp.down_proj.weight_packed"

    def stop(self: Any, name: str, piece: np.ndarray) -> None:
        if name == last:
            raise Interrupted
        appended(self, name, piece)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(convert.ShardWriter, "append", stop)
        convert_checkpoint(source, tmp_path / "out", **options)
    given = []
    blocks = importlib.import_module("jaxgen.convert.quantize.blocks")
    real = blocks.quantized_blocks

    def spy(*arguments: Any, finished: Any, **keywords: Any) -> Any:
        def noting(layer: int) -> Any:
            given.append(finished(layer) is not None)
            return finished(layer)

        return real(*arguments, finished=noting, **keywords)

    monkeypatch.setattr(blocks, "quantized_blocks", spy)
    assert files_in(convert_checkpoint(source, tmp_path / "out", **options)) == expected
    assert given == [True, False]
    rounded = files_in(convert_checkpoint(source, tmp_path / "rtn", group_size=32, max_shard_size="8KB"))
    assert rounded.keys() == expected.keys()
    assert rounded != expected


def test_calibration_is_cut_from_the_text(tmp_path):
    tokenizer, config = (
        load_tokenizer(demo.path()),
        jaxgen.MistralConfig.from_hf(json.loads((demo.path() / "config.json").read_text())),
    )
    text = "".join(f"{number}: a list of colors. " for number in range(2000))
    path = tmp_path / "text.txt"
    path.write_text("\ufeff" + text, encoding="utf-8")
    ids = tokenizer(text)["input_ids"]
    rows = len(ids) // 512
    every = read_calibration(path, tokenizer, config)
    np.testing.assert_array_equal(every, np.reshape(ids[: rows * 512], (rows, 512)))
    np.testing.assert_array_equal(read_calibration(path, tokenizer, config, sequences=2), every[[0, -1]])
    assert read_calibration(path, tokenizer, config, tokens=100).shape == (min(128, len(ids) // 100), 100)
    path.write_text("too short")
    with pytest.raises(JaxgenError, match=r"text\.txt has \d tokens; one sequence takes 512"):
        read_calibration(path, tokenizer, config)
    path.write_bytes(b"\xff\xff")
    with pytest.raises(JaxgenError, match=r"text\.txt: line 1, byte 1 \(0xff\) is not UTF-8 text"):
        read_calibration(path, tokenizer, config)


def test_the_command(source, tmp_path, capsys):
    target = tmp_path / "out"
    assert cli.main(["convert", str(source), str(target), "--group-size", "-1", "--lm-head"]) == 0
    expected = convert_checkpoint(source, tmp_path / "expected", group_size=-1, lm_head=True)
    assert files_in(target) == files_in(expected)
    first, second = capsys.readouterr().out.splitlines()
    before, after = (Checkpoint(place).total_bytes for place in (source, target))
    assert first == f"{target}: {after / 1e6:.2f} MB of weights, where {source} has {before / 1e6:.2f} MB"
    assert shlex.split(second)[-2:] == ["--model", str(target)]
    parser().parse_args(shlex.split(second)[1:])
    for arguments, message in (
        ([str(target), str(tmp_path / "again")], "already quantised"),
        ([str(source), str(target)], "is not empty"),
        ([str(source), str(tmp_path / "again"), "--bits", "3"], "bits=3"),
        ([str(source), str(tmp_path / "again"), "--method", "gptq"], "--calibration FILE"),
    ):
        assert cli.main(["convert", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("jaxgen: ")
        assert captured.err.count("\n") == 1
        assert message in captured.err


def test_bits_per_weight(source, tmp_path):
    """Group 128: 4 bits and a bfloat16 scale in 128, so 4.125."""
    checkpoint = Checkpoint(convert_checkpoint(source, tmp_path / "out"))
    quantised = {name: info for name, info in checkpoint.tensors.items() if name.endswith(("_packed", "_scale"))}
    weights = sum(math.prod(tensor.shape) for name, tensor in hf_tensors(WIDE).items() if is_linear(name))
    assert 8 * sum(info.nbytes for info in quantised.values()) == 4.125 * weights
