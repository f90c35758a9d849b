"""Paths that are none, at every door: one line that names the argument, and nothing is written."""

import functools
import os
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

import jaxgen
from jaxgen import AutoModelForCausalLM, GenerationConfig, JaxgenError, MistralConfig, demo, enable_compile_cache
from jaxgen.convert import convert_checkpoint
from jaxgen.records.record import Record
from jaxgen.text.tokenizer import tokenizer_for


def save(model: Any, path: Any) -> None:
    model.save_pretrained(path)


@functools.cache
def record_of(model: Any) -> Record:
    return model.generate([[1, 2]], max_new_tokens=1, return_dict_in_generate=True).record


DOORS: dict[str, Any] = {
    "from_pretrained": lambda model, path: AutoModelForCausalLM.from_pretrained(path),
    "adapter": lambda model, path: AutoModelForCausalLM.from_pretrained(demo.path(), adapter=path),
    "generation config": lambda model, path: GenerationConfig.from_pretrained(path),
    "generation config of a file": lambda model, path: GenerationConfig.from_hf(path),
    "config": lambda model, path: MistralConfig.from_hf(path),
    "tokenizer": tokenizer_for,
    "source": lambda model, path: convert_checkpoint(path, "out"),
    "calibration": lambda model, path: convert_checkpoint(demo.path(), "out", method="gptq", calibration=path),
    "target": lambda model, path: convert_checkpoint(demo.path(), path, group_size=32),
    "save": save,
    "compile cache": lambda model, path: enable_compile_cache(path),
    "record": lambda model, path: Record.load(path),
    "record that is saved": lambda model, path: record_of(model).save(path),
}
PATHS: dict[str, Any] = {
    "nobody's home": "~nouser/x",
    "NUL": "a\0b",
    "surrogate": "\ud800",
    "loop": "loop/x",
    "loop itself": "loop",
    "too long": "x" * 5000,
    "name too long": "x" * 300,
    "file": "file/x",
    "number": 3,
    "bytes": b"x",
    "None": None,
}
FINE = {  # and mean something else
    ("None", "adapter"),  # none
    ("None", "compile cache"),  # the usual one
    ("None", "calibration"),
    ("number", "tokenizer"),  # objects of another kind are tokenizers
    ("None", "tokenizer"),  # the model's
    ("bytes", "tokenizer"),
    *((path, door) for path in ("None", "number", "bytes") for door in ["generation config of a file"]),
}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo.path(), device_map="cpu")


@pytest.fixture(autouse=True)
def as_users_run_it():
    """Without the checks of annotations that the tests add: they would refuse what is no path before the library."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.parametrize("path, door", [(path, door) for path in PATHS for door in DOORS if (path, door) not in FINE])
def test_no_path_is_followed_by_a_raw_error(tmp_path, monkeypatch, model, path, door):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("file").write_text("")
    with pytest.raises(JaxgenError) as caught:
        DOORS[door](model, PATHS[path])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert {name.name for name in Path().iterdir()} == {"loop", "file"}


@pytest.mark.parametrize("target", ["/", "//", "/.."])
def test_the_root_is_no_target(target):
    with pytest.raises(JaxgenError, match="/ cannot be replaced; give a new directory in it"):
        convert_checkpoint(demo.path(), target, group_size=32)
    with pytest.raises(JaxgenError, match="/ cannot be replaced; give a new directory in it"):
        AutoModelForCausalLM.from_pretrained(demo.path(), device_map="cpu").save_pretrained(target, overwrite=True)


def test_messages_name_the_argument(tmp_path):
    (tmp_path / "file").write_text("")
    os.symlink("nowhere", tmp_path / "link")
    for use, message in {
        lambda: AutoModelForCausalLM.from_pretrained(None): r"name_or_path=None must be a directory or a hub id",  # pyright: ignore
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "link"): "link is a link that leads nowhere",
        lambda: enable_compile_cache(tmp_path / "file"): "file cannot be a directory of compiled programs: .*exists",
        lambda: jaxgen.convert.save_pretrained(None, 3): "save_pretrained: directory=3 must be a path",  # pyright: ignore
    }.items():
        with pytest.raises(JaxgenError, match=message):
            use()
