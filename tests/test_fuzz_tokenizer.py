"""Damaged tokenizer files: a tokenizer that can be used, or one typed error; never anything else."""

import json
import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxgen import JaxgenError, demo
from jaxgen.text.inputs import encode
from jaxgen.text.tokenizer import load_tokenizer
from tests.mutate import mutate_bytes, mutate_json

CHAT = [{"role": "user", "content": "Hello!"}]


@pytest.fixture
def directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Path:
    caplog.set_level(logging.CRITICAL)
    shutil.copytree(demo.path(), tmp_path, dirs_exist_ok=True)
    return tmp_path


def used(directory: Path) -> bool:
    """Whether the tokenizer loads, and text goes through it; False for typed errors, which name the directory."""
    try:
        tokenizer = load_tokenizer(directory)
        for text in ("A list of colors: red, blue", "", "é\n 🙂", CHAT):
            ids = encode(tokenizer, text)["input_ids"]
            assert all(isinstance(token, int) for token in ids)
            assert isinstance(tokenizer.decode(ids), str)
        return True
    except JaxgenError as error:
        assert str(directory) in str(error) and len(str(error)) < 2000
        return False


@pytest.mark.slow
def test_damaged_settings(directory):
    path, draw = directory / "tokenizer_config.json", random.Random(0)
    fields = json.loads(path.read_text()) | {"padding_side": "right", "model_max_length": 512, "legacy": False}
    good = 0
    for _ in range(200):
        path.write_text(mutate_json(draw, fields))
        good += used(directory)
    assert 20 < good < 190


def test_damaged_configs_beside_it(directory):
    path, draw = directory / "config.json", random.Random(0)
    fields = json.loads(path.read_text())
    for _ in range(100):
        path.write_text(mutate_json(draw, fields))
        used(directory)


@pytest.mark.parametrize(
    "part", ["model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "all"]
)
def test_damaged_tokenizers(directory, part):
    path, draw = directory / "tokenizer.json", random.Random(part)
    fields = json.loads(path.read_text())
    for _ in range(40):
        # The vocabulary is most of the file; what reads it is the rest.
        changed: Any = (
            fields if part == "all" else fields | {part: json.loads(mutate_json(draw, {part: fields[part]})).get(part)}
        )
        path.write_text(mutate_json(draw, changed) if part == "all" else json.dumps(changed))
        used(directory)


def test_damaged_bytes(directory):
    draw = random.Random(0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        data = (directory / name).read_bytes()
        for _ in range(60):
            (directory / name).write_bytes(mutate_bytes(draw, data))
            used(directory)
        (directory / name).write_bytes(data)


def test_files_that_are_none(directory):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        path, kept = directory / name, directory / "kept"
        if path.exists():
            path.rename(kept)
        for make in (
            os.mkfifo,
            lambda p: p.symlink_to("/dev/zero"),
            lambda p: p.symlink_to(directory / "no"),
        ):
            make(path)
            if path.exists() or name != "special_tokens_map.json":  # which may be a link to nothing
                assert not used(directory)
            path.unlink()
        with path.open("wb") as file:
            file.truncate(10**11)
        assert not used(directory)
        path.unlink()
        if kept.exists():
            kept.rename(path)
    assert used(directory)


LONGER = {
    "replacements": {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 12}},
    "of expressions": {"decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"Regex": ""}, "content": "aa"}] * 30}},
    "of bytes": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 60}},
    "nested": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}] * 2}] * 2}},
}  # fmt: skip


@pytest.mark.parametrize("case", LONGER)
def test_texts_that_grow_without_end(directory, case):
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | LONGER[case]))
    with pytest.raises(JaxgenError, match=r"tokenizer\.json: (normalizer|decoder): makes a text more than 10000 times"):
        load_tokenizer(directory)


def test_expressions_that_backtrack_are_ended_by_their_library(directory):
    path = directory / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": split}))
    with pytest.raises(JaxgenError, match=r"the tokenizer cannot encode this text: PanicException: .*retry-limit"):
        encode(load_tokenizer(directory), "x" * 40)
