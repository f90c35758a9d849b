"""The table of families: the page has what the code says, and each family has the test that the table names."""

from pathlib import Path

import pytest

from jaxgen.models.__main__ import table
from jaxgen.models.families import families
from tests.families import CONFIGS

ROOT = Path(__file__).parent.parent


def test_the_page_has_the_table_of_the_code():
    page = (ROOT / "docs" / "howto" / "models.md").read_text()
    missing = [line for line in table().splitlines() if line not in page]
    assert not missing, "\n".join(["docs/howto/models.md lacks, of `python -m jaxgen.models`:", *missing])
    classes = {kind.__name__ for kind in families()}
    told = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `") and "test_" in line}
    assert told == classes


@pytest.mark.parametrize("kind", families(), ids=lambda kind: kind.__name__)
def test_a_family_is_compared_with_transformers(kind: type):
    """In three configs at least; Mistral's are those of the whole test suite."""
    [row] = [line for line in table().splitlines() if f"`{kind.__name__}`" in line]
    path, _, model_type = row.rstrip(" |").rpartition("| ")[2].partition(": ")
    assert (ROOT / path).is_file()
    if model_type:
        assert sum(config["model_type"] == model_type for config in CONFIGS.values()) >= 3
