"""The table of support knows every field of transformers, and names tests that exist and mention the option."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgen import GenerationConfig
from jaxgen.generation.fields import CHECKS, METADATA, REFUSED
from jaxgen.generation.request import Extras
from jaxgen.generation.support import ARGUMENTS, SHOWN_BY, table, unknown

ROOT = Path(__file__).parents[1]


def test_every_field_of_transformers_is_known():
    import transformers

    fields = set(vars(transformers.GenerationConfig()))
    assert len(fields) > 50
    assert unknown(fields) == set()
    assert unknown(fields | {"a_field_of_tomorrow"}) == {"a_field_of_tomorrow"}


def test_every_argument_of_generate_is_known():
    arguments = {field.name for field in dataclasses.fields(Extras)} | {"streamer"}
    assert arguments == ARGUMENTS.keys()


def test_supported_and_refused_are_told_apart():
    assert {field.name for field in dataclasses.fields(GenerationConfig)} == CHECKS.keys() == SHOWN_BY.keys()
    assert not CHECKS.keys() & (REFUSED.keys() | METADATA)


@pytest.mark.parametrize("name", SHOWN_BY | ARGUMENTS)
def test_the_test_that_is_named_is_about_the_option(name: str):
    test = ROOT / (SHOWN_BY | ARGUMENTS)[name]
    assert name in test.read_text(encoding="utf-8")


def test_the_command_prints_the_table():
    command = [sys.executable, "-m", "jaxgen.generation.support"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert printed == table() + "\n"
    assert "| `top_h` | supported | `tests/oracle/test_processors_oracle.py` |" in printed
    assert "| `dola_layers` | refused: transformers moved it to the hub |" in printed
