"""What is fetched by hub id is what loading uses in a directory, of every kind of repository."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from huggingface_hub.utils import filter_repo_objects

from jaxgen import AutoModelForCausalLM, demo
from jaxgen.convert import hub
from jaxgen.convert.checkpoint import INDEX
from jaxgen.files import read_json
from jaxgen.text import tokenizer_files
from jaxgen.text.tokenizer import tokenizer_for
from tests.formats.files import changed
from tests.gguf_files import write_gguf
from tests.hf_files import CONFIG, hf_tensors, write_hf, write_index

COMMIT = "0" * 40
_opened: list[list[str]] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened and isinstance(arguments[0], str):
        _opened[-1].append(arguments[0])


sys.addaudithook(_note)  # stays until the process ends, and notes nothing outside `files_used`


def files_used(use: Any, directory: Path) -> set[str]:
    """The files of a directory that Python opens meanwhile, by their names in it."""
    _opened.append([])
    try:
        use(directory)
    finally:
        paths = [Path(path) for path in _opened.pop()]
    return {str(path.relative_to(directory)) for path in paths if path.is_relative_to(directory)}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that is the hub's "owner/name", beside files that are in repositories and are not wanted."""
    import huggingface_hub

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str], **options: Any) -> str:
        assert (repo_id, revision in (None, COMMIT)) == ("owner/name", True)
        snapshot = tmp_path / "cache" / COMMIT
        snapshot.mkdir(parents=True, exist_ok=True)
        names = [str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (snapshot / name).parent.mkdir(exist_ok=True)
            shutil.copy(place / name, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    place = tmp_path / "repository"
    shutil.copytree(demo.path(), place)  # for its tokenizer
    (place / "model.safetensors").unlink()
    for name in UNWANTED:
        (place / name).write_bytes(b"")
    (place / "additional_chat_templates").mkdir()
    (place / "additional_chat_templates" / "short.jinja").write_text("{{ messages[0]['content'] }}")
    yield place
    assert not [name for name in UNWANTED if (tmp_path / "cache" / COMMIT / name).exists()]


UNWANTED = ("consolidated.safetensors", "pytorch_model.bin", "README.md", "model.fp16.safetensors")


def plain(place: Path) -> dict[str, Any]:
    write_hf(place, CONFIG, hf_tensors(CONFIG))
    return {}


def sharded(place: Path) -> dict[str, Any]:
    write_hf(place, CONFIG, hf_tensors(CONFIG), shards=3)
    return {}


def freely_named_shards(place: Path) -> dict[str, Any]:
    weight_map = write_hf(place, CONFIG, hf_tensors(CONFIG), shards=2)
    names = {name: name.replace("model-", "ft-model-") for name in set(weight_map.values())}
    for old, new in names.items():
        (place / old).rename(place / new)
    total = read_json(place / INDEX)["metadata"]["total_size"]
    write_index(place, {tensor: names[name] for tensor, name in weight_map.items()}, total)
    return {}


def old_gptq(place: Path) -> dict[str, Any]:
    changed(place, "gptq-v1-asymmetric")
    config = read_json(place / "config.json")
    (place / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (place / "config.json").write_text(json.dumps(config))
    return {}


def gguf(place: Path) -> dict[str, Any]:
    write_gguf(place / "m.gguf")
    return {"gguf_file": "m.gguf"}


@pytest.mark.parametrize("kind", [plain, sharded, freely_named_shards, old_gptq, gguf])
def test_by_hub_id_as_from_a_directory(repository, tmp_path, kind):
    options = kind(repository)

    def load(name: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(name, device_map="cpu", **options)

    used = files_used(load, repository) | files_used(lambda place: tokenizer_for(None, place), repository)
    assert {"config.json", "tokenizer_config.json", "additional_chat_templates/short.jinja"} <= used
    local, fetched = load(repository), load("owner/name")
    for one, other in zip(*(jax.tree.leaves(nnx.state(model)) for model in (local, fetched)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert local.generation_config == fetched.generation_config
    snapshot = tmp_path / "cache" / COMMIT
    assert not [name for name in used if not (snapshot / name).exists()]
    ours, theirs = tokenizer_for(fetched), tokenizer_for(None, repository)
    assert ours("A text.")["input_ids"] == theirs("A text.")["input_ids"]
    assert ours.chat_template == theirs.chat_template


def test_a_tokenizers_files_come_without_weights(repository, tmp_path):
    sharded(repository)
    tokenizer_for(None, "owner/name")
    assert not list((tmp_path / "cache" / COMMIT).glob("*.safetensors"))


def test_every_file_that_a_tokenizer_is_checked_for_is_fetched():
    assert set(tokenizer_files._FILES) <= set(hub.WANTED)
