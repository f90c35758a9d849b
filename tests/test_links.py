"""Links, and folders that others prepared: nothing is copied from outside of a checkpoint or written through them."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxgen import AutoModelForCausalLM, JaxgenError, demo
from jaxgen.convert import convert_checkpoint
from tests.hf_files import CONFIG, hf_tensors, write_hf

WIDE = CONFIG | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 40}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_hf(tmp_path / "source", WIDE, hf_tensors(WIDE, "BF16"))
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path / "source"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("mine")
    return tmp_path / "secret"


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("name", ["tokenizer.md", "tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_what_a_link_out_of_a_checkpoint_points_to_is_not_copied(source, secret, tmp_path, name, absolute):
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret if absolute else "../secret")
    with pytest.raises(JaxgenError, match=rf"{name} is a link out of the directory, to '.*secret'"):
        convert_checkpoint(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "secret"}


def test_nor_the_config_or_what_a_chain_of_links_or_a_linked_folder_leads_to(source, tmp_path):
    shutil.copytree(source, tmp_path / "other")
    (source / "config.json").unlink()
    (source / "config.json").symlink_to("../other/config.json")
    with pytest.raises(JaxgenError, match=r"config\.json is a link out"):
        convert_checkpoint(source, tmp_path / "out")
    shutil.copy(tmp_path / "other" / "config.json", tmp_path / "new.json")
    (source / "config.json").unlink()
    (tmp_path / "new.json").rename(source / "config.json")
    (source / "merges.txt").symlink_to("one")
    (source / "one").symlink_to("folder/tokenizer.json")
    (source / "folder").symlink_to("../other")
    with pytest.raises(JaxgenError, match=r"merges\.txt is a link out"):
        convert_checkpoint(source, tmp_path / "out")


def test_links_within_a_checkpoint_and_to_one(source, tmp_path):
    expected = convert_checkpoint(source, tmp_path / "expected")
    (source / "tokenizer.json").rename(source / "kept.json")
    (source / "tokenizer.json").symlink_to("kept.json")
    (tmp_path / "link").symlink_to("source")
    for number, place in enumerate((source, tmp_path / "link")):
        out = convert_checkpoint(place, tmp_path / f"out{number}")
        assert all((out / path.name).read_bytes() == path.read_bytes() for path in expected.iterdir())


@pytest.mark.parametrize("linked", [False, True])
def test_the_hubs_cache_is_made_of_links(source, secret, tmp_path, linked):
    expected = convert_checkpoint(source, tmp_path / "expected")
    repository = tmp_path / "disk" / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    if linked:  # the cache on another disk
        (tmp_path / "cache").symlink_to("disk")
        snapshot = tmp_path / "cache" / snapshot.relative_to(tmp_path / "disk")
    out = convert_checkpoint(snapshot, tmp_path / "out")
    assert all((out / path.name).read_bytes() == path.read_bytes() for path in expected.iterdir())
    (repository / "blobs" / "link").symlink_to("../../../secret")
    for target in ("../../../../secret", "../../blobs/link"):
        (snapshot / "tokenizer.md").unlink(missing_ok=True)
        (snapshot / "tokenizer.md").symlink_to(target)
        assert (snapshot / "tokenizer.md").read_text() == "mine"
        with pytest.raises(JaxgenError, match=r"tokenizer\.md is a link out"):
            convert_checkpoint(snapshot, tmp_path / "again")


@pytest.mark.parametrize(
    "prepared", ["for all to write", "a link", "of another user", "a link as lock", "linked files"]
)
def test_a_folder_that_others_prepared_is_refused(source, secret, tmp_path, monkeypatch, prepared):
    place, elsewhere = tmp_path / ".out.converting", tmp_path / "elsewhere"
    elsewhere.mkdir(0o700)
    if prepared == "a link":
        place.symlink_to("elsewhere")
    else:
        place.mkdir(0o700)
    if prepared == "for all to write":
        place.chmod(0o777)
    elif prepared == "of another user":
        monkeypatch.setattr(os, "geteuid", lambda: place.lstat().st_uid + 1)
    elif prepared == "linked files":
        (place / "files").symlink_to("../elsewhere")
    (place / "lock").symlink_to(secret)
    if prepared != "a link as lock":
        (place / "lock").unlink()
    with pytest.raises(JaxgenError, match=r"\.out\.converting"):
        convert_checkpoint(source, tmp_path / "out")
    assert secret.read_text() == "mine" and not list(elsewhere.iterdir()) and not (tmp_path / "out").exists()


def test_a_note_is_not_written_through_a_link(source, secret, tmp_path):
    place = tmp_path / ".out.converting"
    place.mkdir(0o700)
    (place / "made_from.json").symlink_to(secret)
    convert_checkpoint(source, tmp_path / "out")
    assert secret.read_text() == "mine"


def test_a_conversion_waits_where_others_cannot_write(source, tmp_path, monkeypatch):
    def stop(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxgen.convert.convert._Conversion._check_room", stop)
    previous, seen = os.umask(0), []
    try:
        monkeypatch.setattr(shutil, "rmtree", lambda place, **options: seen.append(place.stat().st_mode & 0o777))
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(source, tmp_path / "out")
    finally:
        os.umask(previous)
    assert seen == [0o700]


@pytest.mark.parametrize("prepared", ["for all to write", "a link", "of another user"])
def test_what_looks_like_a_killed_save_and_is_of_others_is_left_alone(tmp_path, monkeypatch, prepared):
    model = AutoModelForCausalLM.from_pretrained(demo.path())
    model.save_pretrained(tmp_path / "out")
    old = tmp_path / ".out.old-1"
    (tmp_path / "theirs").mkdir(0o700)
    (tmp_path / "theirs" / "tokenizer.json").write_text("theirs")
    if prepared == "a link":
        old.symlink_to("theirs")
    else:
        (tmp_path / "theirs").rename(old)
    if prepared == "for all to write":
        old.chmod(0o777)
    elif prepared == "of another user":
        monkeypatch.setattr(os, "geteuid", lambda: old.lstat().st_uid + 1)
    model.save_pretrained(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "tokenizer.json").exists() and (old / "tokenizer.json").read_text() == "theirs"
