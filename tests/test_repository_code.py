"""No code of a repository runs, whichever door it comes in by, also where an answer to a question would be yes."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxgen
from jaxgen import AutoModelForCausalLM, JaxgenError, UnsupportedError, cli, demo
from jaxgen.convert.convert import convert_checkpoint
from jaxgen.records.replay import replay
from jaxgen.text.tokenizer import load_tokenizer
from tests.lora_files import write_adapter

OWN_CODE = """
open({mark!r}, "w").write("ran")
from transformers import MistralConfig as OwnConfig, MistralForCausalLM as OwnModel, PreTrainedTokenizerFast as Own
"""
# What names the code, in tokenizer_config.json and in config.json; transformers knows a list, too.
NAMED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tokenizer": ({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}, {}),
    "tokenizer, as a list": ({"tokenizer_class": "Own", "auto_map": ["own.Own", None]}, {}),
    "of another repository": ({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["a/b--own.Own", None]}}, {}),
    "config": (
        {"tokenizer_class": None},
        {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}},
    ),
}


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file that the repository's code writes; there is a yes for every question, and no such file in the end."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


def repository(directory: Path, mark: Path, tokenizer: dict[str, Any], config: dict[str, Any]) -> Path:
    """The demo, with code of its own beside it."""
    shutil.copytree(demo.path(), directory)
    (directory / "own.py").write_text(OWN_CODE.format(mark=str(mark)))
    for name, fields in (("tokenizer_config.json", tokenizer), ("config.json", config)):
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo.path())


@pytest.mark.parametrize("named", NAMED)
def test_code_is_refused_by_name_before_transformers_sees_it(tmp_path, mark, monkeypatch, named):
    import transformers

    directory = repository(tmp_path / "own", mark, *NAMED[named])
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
    with pytest.raises(UnsupportedError, match=r"config\.json: auto_map=.*names code in the repository, which jaxgen"):
        load_tokenizer(directory)


@pytest.mark.parametrize("named", NAMED)
def test_transformers_is_told_not_to_run_it_either(tmp_path, mark, monkeypatch, named):
    monkeypatch.setattr("jaxgen.text.tokenizer_files._refuse_code", lambda directory: None)
    try:
        load_tokenizer(repository(tmp_path / "own", mark, *NAMED[named]))
    except JaxgenError as error:
        assert "trust_remote_code" in str(error)


DOORS: dict[str, Callable[[Any, str], Any]] = {
    "stream": lambda model, place: list(model.stream("Hi", tokenizer=place, max_new_tokens=1)),
    "score": lambda model, place: model.score(["Hi there"], tokenizer=place),
    "pipeline": lambda model, place: jaxgen.pipeline("text-generation", model=model, tokenizer=place),
    "pipeline of a path": lambda model, place: jaxgen.pipeline("text-generation", model=place),
    "model": lambda model, place: AutoModelForCausalLM.from_pretrained(place).stream("Hi"),
    "convert": lambda model, place: convert_checkpoint(
        place, Path(place).parent / "out", method="gptq", calibration=Path(place) / "own.py"
    ),
    "replay": lambda model, place: replay(
        model.generate(
            np.array([[5, 6]]),
            max_new_tokens=1,
            stop_strings=["!"],
            tokenizer=load_tokenizer(demo.path()),
            return_dict_in_generate=True,
        ).record,
        model,
        tokenizer=place,
    ),
}


@pytest.mark.parametrize("named", ["tokenizer", "config"])
@pytest.mark.parametrize("door", DOORS)
def test_every_door_is_shut(tmp_path, mark, model, door, named):
    directory = repository(tmp_path / "own", mark, *NAMED[named])
    try:
        said = DOORS[door](model, str(directory))  # a replay says that it cannot be compared
    except UnsupportedError as error:
        said = error
    assert "auto_map" in str(said) or "model_type='own'" in str(said)


def test_beside_a_gguf_file(tmp_path, mark, monkeypatch, model):
    directory = repository(tmp_path / "own", mark, *NAMED["config"])
    monkeypatch.setattr(model, "name_or_path", str(directory))  # all that is left of a .gguf file's repository
    with pytest.raises(UnsupportedError, match=r"config\.json: auto_map="):
        jaxgen.pipeline("text-generation", model=model)("Hi")


def test_beside_an_adapter(tmp_path, mark):
    fields = json.loads((demo.path() / "config.json").read_text())
    width, query = fields["hidden_size"], fields["num_attention_heads"] * fields["head_dim"]
    own = repository(tmp_path / "own", mark, *NAMED["tokenizer"])
    factors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{letter}.weight": np.zeros(shape, np.float32)
        for layer in range(fields["num_hidden_layers"])
        for letter, shape in (("A", (2, width)), ("B", (query, 2)))
    }
    mapping = {"parent_library": "own", "base_model_class": "OwnModel"}
    write_adapter(own, factors, target_modules=["q_proj"], auto_mapping=mapping)
    adapted = AutoModelForCausalLM.from_pretrained(demo.path(), adapter=own)
    assert list(adapted.stream("1, 2", max_new_tokens=2))  # with the base's tokenizer


@pytest.mark.parametrize("command", ["generate", "chat", "inspect", "convert"])
def test_the_command_line(tmp_path, mark, capsys, command):
    directory = repository(tmp_path / "own", mark, *NAMED["config"])
    arguments = {"generate": ["Hi", "--model"], "chat": ["--model"], "inspect": [], "convert": []}[command]
    target = [str(tmp_path / "out")] if command == "convert" else []
    assert cli.main([command, *arguments, str(directory), *target]) == 2
    assert "model_type='own'" in capsys.readouterr().err


def test_the_command_line_in_a_process_of_its_own(tmp_path, mark):
    directory = repository(tmp_path / "own", mark, *NAMED["tokenizer"])
    result = subprocess.run(
        [sys.executable, "-m", "jaxgen.cli", "generate", "Hi", "--model", str(directory)],
        input="y\n" * 99,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2
    assert "auto_map" in result.stderr and result.stderr.count("\n") == 1 and not result.stdout
