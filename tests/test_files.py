"""Which files are there: a name that stands for no file is never taken for an absent file."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgen import AutoModelForCausalLM, GenerationConfig, JaxgenError, demo
from jaxgen.convert import convert_checkpoint
from jaxgen.convert.checkpoint import INDEX, OLD_GPTQ, WEIGHTS
from jaxgen.convert.inspect import describe
from jaxgen.models.mistral import MistralConfig
from jaxgen.records.record import Record
from jaxgen.text.tokenizer import load_tokenizer
from tests.gguf_files import gguf_bytes
from tests.hf_files import CONFIG, hf_tensors, parameters, same_bits, write_hf
from tests.lora_files import adapter_tensors, scales, write_adapter


def load(directory: Path, **options: Any):
    return AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", **options)


def put(kind: str, path: Path) -> None:
    """Something under a file's name that is no file."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)


@pytest.fixture
def ends() -> Iterator[None]:
    """What waits for a pipe, or reads a device to its end, fails."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def write_model(place: Path) -> None:
    write_hf(place, CONFIG, hf_tensors(CONFIG))


def write_lora(place: Path) -> None:
    base = hf_tensors(CONFIG)
    write_hf(place / "base", CONFIG, base)
    write_adapter(place, adapter_tensors(base, scales(base)))


NO_FILES = {
    "dangling link": "is a link to 'nowhere', which is not there",
    "link to itself": "cannot be looked up: Too many levels of symbolic links",
    "directory": "is a directory",
    "pipe": "is not a regular file",
    "device": "is not a regular file",
}
SHARD = "model-00002-of-00002.safetensors"
TEMPLATE = "additional_chat_templates/short.jinja"
OF_WEIGHTS = ["config.json", WEIGHTS, INDEX, SHARD, OLD_GPTQ]
OF_TOKENIZERS = [
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "chat_template.jinja", TEMPLATE,
]  # fmt: skip
# The files that each way in may look for, whether or not it needs them.
WAYS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "load": (load, [*OF_WEIGHTS, "generation_config.json"]),
    "inspect": (describe, OF_WEIGHTS),
    "tokenizer": (load_tokenizer, ["config.json", *OF_TOKENIZERS]),
    "convert": (
        lambda place: convert_checkpoint(place, place.parent / "out", group_size=-1),
        [*OF_WEIGHTS, "generation_config.json", *OF_TOKENIZERS],
    ),
    "calibrate": (
        lambda place: convert_checkpoint(
            place, place.parent / "out", group_size=-1, method="gptq", calibration=place / "text.txt"
        ),
        ["text.txt", "tokenizer.json"],
    ),
    "adapt": (
        lambda place: load(place, adapter=place / "adapter"),
        ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"],
    ),
    "gguf": (lambda place: load(place, gguf_file="a.gguf"), ["a.gguf", "generation_config.json"]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for all ways in, of which each works."""
    place = tmp_path_factory.mktemp("whole") / "model"
    config = CONFIG | {"intermediate_size": 16, "head_dim": 8}
    write_hf(place, config, tensors := hf_tensors(config))
    for path in demo.path().glob("*token*"):
        shutil.copy(path, place)
    write_adapter(place / "adapter", adapter_tensors(tensors, scales(tensors)))
    (place / "a.gguf").write_bytes(gguf_bytes())
    (place / "text.txt").write_text("too short")
    (place / "additional_chat_templates").mkdir()
    (place / TEMPLATE).write_text("{{ messages[0]['content'] }}")
    return place


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_no_file_is_not_an_absent_one(whole, tmp_path, ends, way, kind):
    enter, names = WAYS[way]
    for number, name in enumerate(names):
        place = tmp_path / str(number) / "model"
        shutil.copytree(whole, place)
        if name == SHARD:
            (place / WEIGHTS).unlink()
            (place / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": SHARD}}))
        put(kind, place / name)
        message = NO_FILES[kind] if name != "text.txt" else ""
        with pytest.raises(JaxgenError, match=f"(?s){re.escape(name)}.*{re.escape(message)}"):
            enter(place)
        assert [path.name for path in place.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["dangling link", "link to itself", "pipe", "device"])
@pytest.mark.parametrize("way", ["tokenizer", "convert"])
def test_nor_what_is_no_folder(whole, tmp_path, ends, way, kind):
    shutil.copytree(whole, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "additional_chat_templates")
    put(kind, tmp_path / "model" / "additional_chat_templates")
    with pytest.raises(JaxgenError, match=r"additional_chat_templates: (is no directory|cannot be read)"):
        WAYS[way][0](tmp_path / "model")


def test_nor_where_the_settings_of_gptq_are_needed(tmp_path):
    tensors = {**hf_tensors(CONFIG), "model.layers.0.self_attn.q_proj.qweight": np.zeros((1, 24), np.int32)}
    write_hf(tmp_path, CONFIG, tensors)
    put("pipe", tmp_path / OLD_GPTQ)
    with pytest.raises(JaxgenError, match=r"quantize_config\.json.*is not a regular file"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.md", "tokenizer.json", TEMPLATE, "text.txt"])
def test_nothing_of_any_length_is_copied_or_tokenised(whole, tmp_path, name):
    place = tmp_path / "model"
    shutil.copytree(whole, place)
    with (place / name).open("ab") as file:
        file.truncate(200_000_000)
    way, limit = ("calibrate", 20_000_000) if name == "text.txt" else ("convert", 100_000_000)
    with pytest.raises(JaxgenError, match=rf"{name}.* longer than the limit of {limit} bytes"):
        WAYS[way][0](place)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_copied_is_what_was_there(whole, tmp_path, monkeypatch):
    def change(self: Any, place: Path, missing: list[str]) -> None:
        (whole / TEMPLATE).write_text("other")

    before = (whole / TEMPLATE).read_text()
    monkeypatch.setattr("jaxgen.convert.convert._Conversion._check_room", change)
    with pytest.raises(JaxgenError, match=f"{TEMPLATE} has changed meanwhile"):
        convert_checkpoint(whole, tmp_path / "out", group_size=-1)
    (whole / TEMPLATE).write_text(before)
    assert not (tmp_path / "out").exists()


# What makes a directory that is whole and has a file of this name, and what reads that.
DOORS: dict[str, tuple[Callable[[Path], Any], str, Callable[[Path], Any]]] = {
    "config": (write_model, "config.json", lambda place: MistralConfig.from_hf(place / "config.json")),
    "defaults": (write_model, "generation_config.json", GenerationConfig.from_pretrained),
    "defaults by name": (
        write_model, "generation_config.json", lambda place: GenerationConfig.from_hf(place / "generation_config.json")
    ),
    "adapter": (write_lora, "adapter_config.json", lambda place: load(place / "base", adapter=place)),
    "adapter's weights": (write_lora, "adapter_model.safetensors", lambda place: load(place / "base", adapter=place)),
    "gguf": (
        lambda place: (place / "a.gguf").write_bytes(gguf_bytes()), "a.gguf", lambda place: load(place / "a.gguf")
    ),
    "record": (lambda place: None, "record.json", lambda place: Record.load(place / "record.json")),
    "tokenizer": (
        lambda place: shutil.copytree(demo.path(), place, dirs_exist_ok=True), "tokenizer.json", load_tokenizer
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["pipe", "device", "link to itself", "long"])
@pytest.mark.parametrize("door", DOORS)
def test_no_reader_waits_or_reads_without_end(tmp_path, ends, door, kind):
    write, name, read = DOORS[door]
    write(tmp_path)
    path = tmp_path / name
    if kind == "long":
        with path.open("ab") as file:
            file.truncate(110_000_000)
    else:
        put(kind, path)
    with pytest.raises(JaxgenError, match=re.escape(name)) as caught:
        read(tmp_path)
    assert len(str(caught.value)) < 1000


def test_headers_of_any_length_are_not_read(tmp_path):
    write_hf(tmp_path, CONFIG, hf_tensors(CONFIG))
    header = b'{"a":' + b"[" * 90_000_000
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(JaxgenError, match="its header of 90000005 bytes is longer than the limit"):
        load(tmp_path)


def test_a_message_is_as_long_as_people_read(tmp_path):
    write_hf(tmp_path, CONFIG, hf_tensors(CONFIG))
    for unit, text in {"[],": '{"a": [%s[]]}', '"a":{},': '{%s"b": 1}', "x": '{"%s": 1}', "[": '{"b": %s'}.items():
        (tmp_path / "config.json").write_text(text % (unit * (1_000_000 // len(unit))))
        with pytest.raises(JaxgenError) as caught:
            load(tmp_path)
        assert len(str(caught.value)) < 20_010
    assert len(str(JaxgenError("x" * 10**6))) < 20_010


def test_the_hubs_cache_consists_of_links(tmp_path):
    """snapshots/REVISION/NAME is a link to blobs/HASH, two directories up."""
    write_hf(tmp_path / "plain", CONFIG, hf_tensors(CONFIG), shards=2)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("0" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        shutil.copy(path, blobs / f"{number:064}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064}")
    linked, plain = load(snapshot), load(tmp_path / "plain")
    assert same_bits(parameters(linked), parameters(plain))
    assert linked.generation_config == plain.generation_config
    (snapshot / "generation_config.json").resolve().unlink()  # a cache from which somebody cleaned
    with pytest.raises(JaxgenError, match=r"generation_config\.json: is a link to .* download the checkpoint again"):
        load(snapshot)


def test_a_directory_without_a_model_is_not_called_bad_json(tmp_path):
    write_hf(tmp_path / "model", CONFIG, hf_tensors(CONFIG))
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("")
    for name, message in {
        "empty": "the directory is empty; give the directory of a model, which holds config.json",
        "notes": "there is no config.json; give the directory of a model",
    }.items():
        for use in (load, lambda path: convert_checkpoint(path, tmp_path / "out")):
            with pytest.raises(JaxgenError, match=message):
                use(tmp_path / name)
    with pytest.raises(JaxgenError, match=r"the directory is empty; give the directory of an adapter.*adapter_config"):
        load(tmp_path / "model", adapter=tmp_path / "empty")
