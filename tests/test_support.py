"""The table of support knows every field of transformers, and names tests that exist and mention the option."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgen import GenerationConfig
from jaxgen.generation.options.refused import METADATA, REFUSED
from jaxgen.generation.options.support import STREAMER, table, unknown
from jaxgen.generation.options.table import ARGUMENTS, OPTIONS, Extras
from tests.shown_by import SHOWN_BY

ROOT = Path(__file__).parents[1]


def test_every_field_of_transformers_is_known():
    import transformers

    fields = set(vars(transformers.GenerationConfig()))
    assert len(fields) > 50
    assert unknown(fields) == set()
    assert unknown(fields | {"a_field_of_tomorrow"}) == {"a_field_of_tomorrow"}


def test_every_option_has_a_test():
    assert (OPTIONS | ARGUMENTS | REFUSED | STREAMER).keys() == SHOWN_BY.keys()


def test_supported_and_refused_are_told_apart():
    assert [field.name for field in dataclasses.fields(GenerationConfig)] == [*OPTIONS]
    assert [field.name for field in dataclasses.fields(Extras)] == [*ARGUMENTS]
    assert not (OPTIONS | ARGUMENTS).keys() & (REFUSED.keys() | METADATA)


@pytest.mark.parametrize("name", OPTIONS | ARGUMENTS | STREAMER)
def test_the_test_that_is_named_is_about_the_option(name: str):
    test = ROOT / SHOWN_BY[name]
    assert name in test.read_text(encoding="utf-8")


def test_the_command_prints_the_table():
    command = [sys.executable, "-m", "jaxgen.generation.options.support"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert printed == table() + "\n"
    assert "| `top_h` | supported: entropy-bounded truncation |\n" in printed
    assert "| `dola_layers` | refused: transformers moved it to the hub |\n" in printed
    assert "| `top_h` | supported: entropy-bounded truncation | `tests/oracle/test_processors_oracle.py` |" in table(
        SHOWN_BY
    )
