"""Saves that are killed at any step: under their name is one whole model afterwards, whatever uses the name first."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxgen import AutoModelForCausalLM, JaxgenError, demo
from jaxgen.convert import convert_checkpoint, inspect, leftovers
from jaxgen.text.tokenizer import load_tokenizer
from tests.hf_files import CONFIG, hf_tensors, parameters, same_bits, write_hf
from tests.killed import DIES

ROOT = Path(__file__).parents[1]
MODEL = {"config.json", "generation_config.json", "model.safetensors"}
TEMPLATE = "additional_chat_templates/short.jinja"

# Imports once, then forks a process for each attempt, which ends before its next step number N on the file system.
_KILLS = """
import pathlib, shutil
from jaxgen.convert import atomic
from jaxgen.convert.atomic import new_directory
from jaxgen.convert.leftovers import MODEL_FILES

new, before, place = map(pathlib.Path, sys.argv[1:4])
if sys.argv[4] == "two renames":
    atomic._exchange = lambda one, other: False
STEPS = ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "open", "fsync")

for number in range(1000):
    out = place / f"{number:03}" / "out"
    if before.exists():
        shutil.copytree(before, out, symlinks=True)
    else:
        out.parent.mkdir(parents=True)
    if (pid := os.fork()) == 0:
        left = number
        with new_directory(out, owned=MODEL_FILES, overwrite=True) as files:
            for path in new.iterdir():
                shutil.copyfile(path, files / path.name)
        os._exit(0)
    if not os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
        break
"""


def load(place: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, device_map="cpu")


def contents(place: Path) -> dict[str, Any]:
    return {str(path.relative_to(place)): path.is_file() and path.read_bytes() for path in sorted(place.rglob("*"))}


def model_in(files: dict[str, Any]) -> dict[str, Any]:
    return {name: data for name, data in files.items() if name in MODEL}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`new` of two layers; `old` of one, in a directory with all that may be beside a model."""
    place = tmp_path_factory.mktemp("models")
    for name, layers in (("new", 2), ("old", 1)):
        config = CONFIG | {"num_hidden_layers": layers, "intermediate_size": 16}
        write_hf(place / name, config, hf_tensors(config))
    for path in demo.path().glob("*token*"):
        shutil.copy(path, place / "old")
    (place / "old" / TEMPLATE).parent.mkdir()
    (place / "old" / TEMPLATE).write_text("{{ messages[0]['content'] }}")
    (place / "old" / "checkpoint-1" / "logs").mkdir(parents=True)
    (place / "old" / "checkpoint-1" / "logs" / "log").write_text("kept")
    (place / "old" / "link").symlink_to("nowhere")
    return place


@pytest.fixture(scope="module", params=["exchanged", "two renames"])
def killed(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What was left by saves that were killed, each step at which something else was left once."""
    left = kill(models / "new", models / "old", tmp_path_factory.mktemp("killed"), request.param)
    absent = [place for place in left if not (place / "out").exists()]
    # Where directories can be exchanged, other programs find a whole model at every moment, too.
    assert bool(absent) == (request.param == "two renames")
    whole = [model_in(contents(models / side)) for side in ("old", "new")]
    assert all(model_in(contents(place / "out")) in whole for place in left if place not in absent)
    return left


def kill(new: Path, before: Path, place: Path, how: str) -> list[Path]:
    command = [sys.executable, "-c", DIES + _KILLS, *map(str, (new, before, place)), how]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120)
    return list({_shape(left): left for left in sorted(place.iterdir())}.values())


def _shape(left: Path) -> str:
    """What is there, without the ids of processes."""
    sizes = {str(path.relative_to(left)): path.lstat().st_size * path.is_file() for path in left.rglob("*")}
    return re.sub(r"(\.out\.(tmp|old))-\d+", r"\1", json.dumps(sizes, sort_keys=True))


def refused(use: Callable[[], Any], message: str) -> None:
    with pytest.raises(JaxgenError, match=message):
        use()


DOORS: dict[str, Callable[[Path, Path], Any]] = {
    "load": lambda out, new: load(out),
    "a tokenizer": lambda out, new: load_tokenizer(out),
    "inspect": lambda out, new: inspect.describe(out),
    "save": lambda out, new: refused(lambda: load(new).save_pretrained(out), "out is not empty"),
    "convert to it": lambda out, new: refused(lambda: convert_checkpoint(new, out, group_size=-1), "out is not empty"),
    "convert it": lambda out, new: refused(lambda: convert_checkpoint(out, out.parent / "other"), "rows of 8 weights"),
}


@pytest.mark.parametrize("door", DOORS)
def test_one_whole_model_is_there_whatever_comes_first(models, killed, tmp_path, door):
    expected = {name: contents(models / name) for name in ("old", "new")}
    found = []
    for left in killed:
        place = tmp_path / left.name
        shutil.copytree(left, place, symlinks=True)
        DOORS[door](place / "out", models / "new")
        after = contents(place / "out")
        assert [name for name in os.listdir(place) if not name.startswith(".out.")] == ["out"]
        found += [side for side in expected if after == expected["old"] | model_in(expected[side])]
    assert len(found) == len(killed) and found == sorted(found, reverse=True) and set(found) == {"old", "new"}


def test_the_next_save_leaves_nothing_beside_it(models, killed, tmp_path):
    model = load(models / "new")
    for left in killed:
        place = tmp_path / left.name
        shutil.copytree(left, place, symlinks=True)
        model.save_pretrained(place / "out", overwrite=True)
        assert os.listdir(place) == ["out"]
        assert same_bits(parameters(load(place / "out")), parameters(model))
        assert contents(place / "out").keys() == contents(models / "old").keys()


def test_a_first_save_leaves_nothing_or_a_whole_model(models, tmp_path):
    whole = 0
    for left in kill(models / "new", tmp_path / "nothing", tmp_path / "killed", "exchanged"):
        if (left / "out").exists():
            assert contents(left / "out") == contents(models / "new")
            whole += 1
        else:
            refused(lambda left=left: load(left / "out"), "no such directory")
        load(models / "new").save_pretrained(left / "out", overwrite=True)
        assert os.listdir(left) == ["out"]
    assert whole


def test_a_link_to_the_name_is_followed(models, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/out")
    shutil.copytree(models / "old", tmp_path / "disk" / ".out.old-1", symlinks=True)
    assert load(tmp_path / "out").config.num_hidden_layers == 1


@pytest.fixture
def between(models: Path, tmp_path: Path) -> Path:
    """A place where a save was killed between its renames."""
    shutil.copytree(models / "old", tmp_path / ".out.old-1", symlinks=True)
    shutil.copytree(models / "new", tmp_path / ".out.tmp-1")
    return tmp_path


def test_a_directory_that_another_program_made_meanwhile_is_no_reason_to_remove_a_model(between, caplog):
    (between / "out" / TEMPLATE).parent.mkdir(parents=True)
    (between / "out" / TEMPLATE).write_text("mine")
    (between / "out" / "mine.txt").write_text("mine")
    assert load(between / "out").config.num_hidden_layers == 2
    assert "this is the new model" in caplog.text
    assert (between / "out" / "mine.txt").read_text() == "mine"
    assert (between / "out" / "checkpoint-1" / "logs" / "log").read_text() == "kept"
    assert [path.name for path in between.iterdir()] == ["out"]


@pytest.mark.parametrize("made", ["a model", "half a model", "a file"])
def test_nor_is_what_may_be_a_model_replaced(between, models, caplog, made):
    before = {name: contents(between / name) for name in (".out.old-1", ".out.tmp-1")}
    if made == "a model":
        shutil.copytree(models / "old", between / "out", symlinks=True)
    elif made == "half a model":
        (between / "out").mkdir()
        (between / "out" / "config.json").write_text("{}")
    else:
        (between / "out").write_text("mine")
    for use in (lambda: load(between / "out"), lambda: load(models / "new").save_pretrained(between / "out")):
        with contextlib.suppress(JaxgenError):
            use()
        assert "whose model is .out.tmp-1, beside it: rename or remove that" in caplog.text
        assert before == {name: contents(between / name) for name in before}
        caplog.clear()
    if made == "a model":
        load(models / "new").save_pretrained(between / "out", overwrite=True)
        assert before == {name: contents(between / name) for name in before}


def test_an_old_model_stays_where_another_program_wrote_no_whole_one(models, tmp_path):
    shutil.copytree(models / "old", tmp_path / ".out.old-1", symlinks=True)
    write_hf(tmp_path / "out", CONFIG, hf_tensors(CONFIG), shards=2)
    (tmp_path / "out" / "model-00002-of-00002.safetensors").unlink()
    refused(lambda: load(tmp_path / "out"), "shard model-00002-of-00002.safetensors is missing")
    assert contents(tmp_path / ".out.old-1") == contents(models / "old")


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o775, 0o2775, 0o777, 0o1777])
def test_the_mode_of_what_is_left_does_not_matter(between, mode):
    for path in between.iterdir():
        path.chmod(mode)
    assert load(between / "out").config.num_hidden_layers == 2
    assert (between / "out").stat().st_mode & 0o7777 == mode
    assert [path.name for path in between.iterdir()] == ["out"]


def test_it_is_waited_for_another_process_between_two_renames(between, monkeypatch):
    monkeypatch.setattr(leftovers, "_PATIENCE", 0.1)
    with leftovers.held(between / ".out.old-1"):
        refused(lambda: load(between / "out"), "no such directory")
    names = []

    def rename(seconds: float) -> None:
        names.append(os.listdir(between))
        if len(names) == 2:
            (between / ".out.tmp-1").rename(between / "out")

    with leftovers.held(between / ".out.old-1"), monkeypatch.context() as patch:
        patch.setattr(leftovers, "_PATIENCE", 60.0)
        patch.setattr(leftovers.time, "sleep", rename)
        assert load(between / "out").config.num_hidden_layers == 2
    assert len(names) == 2


def test_what_another_user_left_is_named(between, monkeypatch, caplog):
    monkeypatch.setattr(os, "geteuid", lambda: between.lstat().st_uid + 1)
    refused(lambda: load(between / "out"), "no such directory")
    assert "there is .out.old-1, of a killed save and not this user's: rename it" in caplog.text


@pytest.mark.parametrize("kind", ["tmp", "old"])
def test_who_reads_removes_no_save_of_another_machine(models, tmp_path, kind):
    """It may be living, about to rename what it has written."""
    left = tmp_path / f".out.{kind}-1"
    shutil.copytree(models / "new", left)
    if kind == "tmp":
        refused(lambda: load(tmp_path / "out"), "no such directory")
    else:
        shutil.copytree(models / "old", tmp_path / "out", symlinks=True)
        assert load(tmp_path / "out").config.num_hidden_layers == 1
    assert contents(left) == contents(models / "new")
    load(models / "new").save_pretrained(tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


def test_where_nothing_can_be_renamed_a_model_that_is_there_is_loaded(models, tmp_path, monkeypatch, caplog):
    shutil.copytree(models / "new", tmp_path / "out")
    shutil.copytree(models / "old", tmp_path / ".out.old-1", symlinks=True)

    def fail(*arguments: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "rename", fail)
    monkeypatch.setattr(Path, "replace", fail)
    assert load(tmp_path / "out").config.num_hidden_layers == 2
    assert "Read-only file system" in caplog.text and (tmp_path / ".out.old-1").exists()
