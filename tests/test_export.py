"""Saving checkpoints: bit for bit, and complete or not at all."""

import json
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from jaxgen import demo
from jaxgen.convert import atomic, convert_checkpoint
from jaxgen.convert.load import AutoModelForCausalLM
from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.models.mistral import MistralForCausalLM
from jaxgen.text.tokenizer import load_tokenizer
from tests.hf_files import CONFIG, hf_tensors, parameters, same_bits, write_hf

ROOT = Path(__file__).parents[1]


def build(dtype="float32", **fields) -> MistralForCausalLM:
    """A model with random weights; loaded, since compiling the random numbers takes most of a test's time."""
    config = CONFIG | fields
    with tempfile.TemporaryDirectory() as directory:
        write_hf(Path(directory), config, hf_tensors(config))
        model = load(Path(directory), dtype=dtype)
    model.generation_config = GenerationConfig()
    return model


def load(directory: Path, **options):
    return AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", **options)


def tensors_in(directory: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(str(path), framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 6), (4, 4, 2), (6, 1, 4)])
@pytest.mark.parametrize("max_shard_size", [5_000_000_000, 1000])
def test_round_trip_bit_for_bit(tmp_path, dtype, tied, heads, kv_heads, head_dim, max_shard_size):
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    model = build(dtype, tie_word_embeddings=tied, **shape)
    model.save_pretrained(tmp_path / "out", max_shard_size=max_shard_size)
    loaded = load(tmp_path / "out", dtype=dtype)
    assert same_bits(parameters(loaded), parameters(model))
    assert loaded.config == model.config
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > (1 if max_shard_size == 1000 else 0)


@pytest.mark.parametrize("code", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_files_hold_exactly_the_tensors_that_were_loaded(tmp_path, code, shards):
    dtype = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[code]
    hf = hf_tensors(CONFIG, code)
    write_hf(tmp_path / "hf", CONFIG, hf, shards)
    model = load(tmp_path / "hf", dtype=dtype)
    model.save_pretrained(tmp_path / "out", max_shard_size="1KB")
    assert same_bits(tensors_in(tmp_path / "out"), hf)

    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total = sum(tensor.nbytes for tensor in hf.values())
    assert index["metadata"] == {"total_size": total, "total_parameters": total // jnp.dtype(dtype).itemsize}
    assert index["weight_map"].keys() == hf.keys()
    sizes = {}
    for name, shard in index["weight_map"].items():
        sizes.setdefault(shard, []).append(hf[name].nbytes)
    count = len(sizes)
    assert sorted(sizes) == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert all(sum(tensors) <= 1000 or len(tensors) == 1 for tensors in sizes.values())

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": [2, 3],
        "pad_token_id": 0,
    }


def test_generation_config_round_trips_and_an_empty_one_writes_no_file(tmp_path):
    model = build()
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=True, top_p=0.5)
    model.save_pretrained(tmp_path / "a")
    assert load(tmp_path / "a").generation_config == model.generation_config
    model.generation_config = GenerationConfig()
    model.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b" / "generation_config.json").exists()


def test_files_have_the_usual_permissions(tmp_path):
    build().save_pretrained(tmp_path / "out")
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}


def test_written_dtype(tmp_path):
    model = build("float32")
    model.save_pretrained(tmp_path / "half", dtype="bfloat16")
    written = tensors_in(tmp_path / "half")
    assert {tensor.dtype for tensor in written.values()} == {jnp.dtype("bfloat16")}
    expected = {name: array.astype(jnp.bfloat16) for name, array in parameters(model).items()}
    assert same_bits(parameters(load(tmp_path / "half", dtype="bfloat16")), expected)
    model.model.norm.weight[...] = jnp.full(8, 1e5)
    with pytest.raises(JaxgenError, match=r"'model\.norm\.weight' has values beyond float16's 65504"):
        model.save_pretrained(tmp_path / "overflow", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_existing_targets(tmp_path):
    model, other = build(), build(num_hidden_layers=1)
    empty = tmp_path / "empty"
    empty.mkdir()
    model.save_pretrained(empty)
    with pytest.raises(JaxgenError, match=r"empty is not empty \(config\.json, .*overwrite=True"):
        model.save_pretrained(empty)
    with pytest.raises(JaxgenError, match="is not a directory"):
        model.save_pretrained(empty / "config.json")
    (empty / "tokenizer.json").write_text("kept")
    model.save_pretrained(empty, overwrite=True, max_shard_size=500)
    other.save_pretrained(empty, overwrite=True)
    assert {path.name for path in empty.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (empty / "tokenizer.json").read_text() == "kept"
    assert load(empty).config.num_hidden_layers == 1
    (empty / "generation_config.json").mkdir()
    with pytest.raises(JaxgenError, match=r"holds 'generation_config\.json', which is no file"):
        model.save_pretrained(empty, overwrite=True)
    assert (empty / "generation_config.json").is_dir()
    model.save_pretrained(tmp_path / "new" / "parents" / "too")
    assert load(tmp_path / "new" / "parents" / "too").config == model.config
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "new"}


def test_bad_arguments(tmp_path):
    model = build()
    for size in (0, -1, True, "5", "GB", "0GB", "1.5GB"):
        with pytest.raises(JaxgenError, match="max_shard_size="):
            model.save_pretrained(tmp_path / "out", max_shard_size=size)
    with pytest.raises(JaxgenError, match="dtype='int4' is not one of"):
        model.save_pretrained(tmp_path / "out", dtype="int4")
    model.model.norm.bias = nnx.Param(jnp.zeros(8))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UnsupportedError, match=r"model\.norm\.bias"):
        model.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("function", ["writer.os.pwrite", "atomic._sync", "atomic._swap"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_everything_as_it_was(tmp_path, monkeypatch, overwrite, function, error):
    target = tmp_path / "out"
    if overwrite:
        build(num_hidden_layers=1).save_pretrained(target)
    before = {path.name: path.read_bytes() for path in target.glob("*")}

    def fail(*arguments):
        raise error

    monkeypatch.setattr(f"jaxgen.convert.{function}", fail)
    expected = JaxgenError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left on device" if isinstance(error, OSError) else None):
        build().save_pretrained(target, overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in target.glob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if overwrite else [])


def test_the_mode_of_an_empty_directory_stays(tmp_path):
    for mode in (0o700, 0o750):
        target = tmp_path / f"{mode:o}"
        target.mkdir(mode)
        build().save_pretrained(target)
        assert target.stat().st_mode & 0o777 == mode


def test_the_tokenizer_first_and_then_the_model(tmp_path):
    load_tokenizer(demo.path()).save_pretrained(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    model = build()
    model.save_pretrained(tmp_path / "out", push_to_hub=False, safe_serialization=True, state_dict=None)
    with pytest.raises(JaxgenError, match=r"out is not empty \(config\.json, model\.safetensors, \.\.\.\)"):
        model.save_pretrained(tmp_path / "out")
    assert same_bits(parameters(load(tmp_path / "out")), parameters(model))
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert before and after == before | {name: after[name] for name in ("config.json", "model.safetensors")}


def test_chat_templates_in_a_folder_stay_and_are_converted(tmp_path):
    """transformers writes all but one of several templates into additional_chat_templates/."""
    tokenizer, model = load_tokenizer(demo.path()), build(intermediate_size=16, head_dim=8)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "short": "{{ messages[0]['content'] }}"}
    tokenizer.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "short.jinja").exists()
    for overwrite in (False, True):
        model.save_pretrained(tmp_path / "out", overwrite=overwrite)
        assert load_tokenizer(tmp_path / "out").chat_template == tokenizer.chat_template
    convert_checkpoint(tmp_path / "out", tmp_path / "int4", group_size=-1)
    assert load_tokenizer(tmp_path / "int4").chat_template == tokenizer.chat_template


def test_options_of_transformers(tmp_path):
    model = build()
    for (name, value), message in {
        ("push_to_hub", True): "push_to_hub=True: not supported; upload the directory with `hf upload`",
        ("safe_serialization", False): "safe_serialization=False: not supported",
        ("variant", "fp16"): "variant='fp16': not supported",
        ("shards", 3): "there is no option 'shards'",
    }.items():
        with pytest.raises(JaxgenError, match=message):
            model.save_pretrained(tmp_path / "out", **{name: value})
    assert not list(tmp_path.iterdir())


def test_a_failed_second_rename_puts_the_old_directory_back(tmp_path, monkeypatch):
    target = tmp_path / "out"
    build(num_hidden_layers=1).save_pretrained(target)
    rename = Path.rename

    def fail_on_temporary(self, goal):
        if ".tmp-" in self.name:
            raise OSError("disk gone")
        return rename(self, goal)

    monkeypatch.setattr(Path, "rename", fail_on_temporary)
    with pytest.raises(JaxgenError, match="disk gone"):
        build().save_pretrained(target, overwrite=True)
    monkeypatch.undo()
    assert load(target).config.num_hidden_layers == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    model = build(vocab_size=20_000)  # an embedding of 640 kB
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(JaxgenError, match="was not written, and nothing of it is left behind"):
            model.save_pretrained(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


# Imports once, then forks a process for each attempt, before JAX has started any thread.
_KILLED_SAVES = """
import itertools, os, pathlib, random, signal, sys, time
from jaxgen.convert.load import AutoModelForCausalLM

def save_forever(place):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="cpu")
    for i in itertools.count():
        model.save_pretrained(place / f"out{i}", max_shard_size="200KB")

rng = random.Random(0)
for attempt in range(8):
    place = pathlib.Path(sys.argv[2]) / str(attempt)
    pid = os.fork()
    if pid == 0:
        save_forever(place)
    while not (place / "out0").exists():
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


@pytest.mark.slow
def test_a_killed_save_leaves_its_target_absent_or_complete(tmp_path):
    build(vocab_size=20_000).save_pretrained(tmp_path / "source")
    command = [sys.executable, "-c", _KILLED_SAVES, str(tmp_path / "source"), str(tmp_path / "killed")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    source, left = parameters(load(tmp_path / "source")), []
    for place in (tmp_path / "killed").iterdir():
        finished = [path for path in place.iterdir() if not path.name.startswith(".")]
        left += [path.name for path in place.iterdir() if path.name.startswith(".")]
        newest = max(finished, key=lambda path: int(path.name.removeprefix("out")))
        assert same_bits(parameters(load(newest)), source)
    assert left, "no save was killed in the middle"
    assert all(re.fullmatch(r"\.out\d+\.tmp-\d+", name) for name in left)


def test_what_comes_into_the_directory_meanwhile_is_kept_and_so_is_its_mode(tmp_path, monkeypatch):
    target = tmp_path / "out"
    build(num_hidden_layers=1).save_pretrained(target)
    (target / "log.txt").write_text("before")
    (target / "runs" / "1").mkdir(parents=True)
    target.chmod(0o700)
    swap = atomic._swap

    def write_meanwhile(temporary, target, replaceable):
        (target / "late.txt").write_text("mine")
        with (target / "log.txt").open("a") as log:
            log.write(", after")
        (target / "runs" / "1" / "late").write_text("mine")
        swap(temporary, target, replaceable)

    monkeypatch.setattr(atomic, "_swap", write_meanwhile)
    build().save_pretrained(target, overwrite=True)
    assert (target / "late.txt").read_text() == (target / "runs" / "1" / "late").read_text() == "mine"
    assert (target / "log.txt").read_text() == "before, after"
    assert target.stat().st_mode & 0o777 == 0o700
    assert load(target).config.num_hidden_layers == CONFIG["num_hidden_layers"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
