"""Automata on disk: another process reads what one has built; damage is built anew; nothing else can get in."""

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgen
from jaxgen.constraints.patterns import Constraint
from jaxgen.generation.choosing import constrained, kept
from jaxgen.generation.choosing.constrained import Automata
from tests.tokenizers import VOCAB, byte_level, characters

pytest.importorskip("outlines_core", reason="builds the automata, and has no wheel for this Python")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where automata are kept in this test."""
    kept.keep_in(tmp_path / "constraints")
    yield tmp_path / "constraints"
    kept.keep_in(None)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The patterns that were built, and not read."""
    patterns: list[str] = []
    build = constrained._built
    monkeypatch.setattr(constrained, "_built", lambda pattern, *rest: patterns.append(pattern) or build(pattern, *rest))
    return patterns


def automata(pattern: str = "(ab|st)+", tokenizer: object = None, eos: int = 2, vocab: int = VOCAB) -> Automata:
    """As the next process has them, which remembers none."""
    constrained._automaton.cache_clear()
    return Automata.of(Constraint(pattern), tokenizer or characters(), 1, vocab, (eos,))


def same(one: Automata, other: Automata) -> bool:
    return all(bool(jnp.array_equal(a, b)) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_the_next_process_reads_what_this_one_has_built(place: Path, built: list[str]):
    first, again = automata(), automata()
    assert built == ["(ab|st)+"]
    assert same(first, again)
    assert first.sha256() == again.sha256()
    [file] = place.iterdir()
    assert place.stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600


def test_whatever_decides_what_may_come_is_in_the_key(place: Path, built: list[str]):
    changes: list[dict[str, Any]] = [
        {},
        {"pattern": "ab"},
        {"tokenizer": byte_level()},
        {"eos": 3},
        {"vocab": VOCAB + 1},
    ]
    for change in changes:
        automata(**change)
    assert len(built) == len([*place.iterdir()]) == 5


def test_nothing_is_kept_unless_it_is_asked_for(tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    automata()
    automata()
    assert len(built) == 2
    assert [*tmp_path.iterdir()] == []


def test_it_goes_with_compiled_programs(tmp_path: Path, built: list[str]):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    try:
        directory = jaxgen.enable_compile_cache(tmp_path / "cache")
        automata()
        automata()
        assert len(built) == len([*(directory / "constraints").iterdir()]) == 1
    finally:
        kept.keep_in(None)
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)


class Runs:
    """What a pickle runs when it is read."""

    def __reduce__(self):
        return os.putenv, ("RAN", "yes")


def arrays_of(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}


def rewritten(file: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    arrays: dict[str, Any] = {**arrays_of(file)}
    arrays[name] = change(arrays[name])
    np.savez(file, **arrays)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-40]),
    "a bit": lambda file: file.write_bytes(bytes(b ^ (i == 200) for i, b in enumerate(file.read_bytes()))),
    "another file": lambda file: file.write_bytes(b"PK" + bytes(1000)),
    "a pickle": lambda file: file.write_bytes(pickle.dumps(Runs())),
    "objects": lambda file: np.savez(file, classes=np.array([Runs()], object)),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "other names": lambda file: np.savez(file, key=arrays_of(file)["key"]),
    "another key": lambda file: rewritten(file, "key", lambda x: x[::-1]),
    "places outside": lambda file: rewritten(file, "table", lambda x: x + 1000),
    "classes outside": lambda file: rewritten(file, "classes", lambda x: x + 1000),
    "another vocabulary": lambda file: rewritten(file, "classes", lambda x: x[:-1]),
    "other numbers": lambda file: rewritten(file, "table", lambda x: x.astype(np.int64)),
    "other shapes": lambda file: rewritten(file, "ends", lambda x: x[None]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_built_anew(name: str, place: Path, built: list[str]):
    first = automata()
    [file] = place.iterdir()
    DAMAGE[name](file)
    assert same(automata(), first)
    assert len(built) == 2
    if name != "a folder":  # and whole again
        assert same(automata(), first)
        assert len(built) == 2


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "constraints").write_text("a file")
    kept.keep_in(tmp_path / "constraints")
    try:
        automata()
    finally:
        kept.keep_in(None)
    assert "was not kept for the next process" in caplog.text


def test_a_full_disk_leaves_no_pieces(place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    automata("a")

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("jaxgen.generation.choosing.kept.os.fsync", full)
    automata("b")
    assert "no space left" in caplog.text
    assert len([*place.iterdir()]) == 1


def test_the_oldest_go(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kept, "MOST_FILES", 2)
    for number, pattern in enumerate("abct"):
        automata(pattern)
        for file in place.iterdir():
            if file.stat().st_mtime > 1000:
                os.utime(file, (number, number))
    newest = {file.stat().st_mtime for file in place.iterdir()}
    assert newest == {2, 3}
