"""What fits on a GPU of 14.5 GB: the page has what inspect's arithmetic says of the hub's configs."""

from pathlib import Path

import pytest

from jaxgen import Int4Config
from jaxgen.convert.inspect import needed
from jaxgen.models.families import config_from_hf
from tests.families import HUB

PAGE = Path(__file__).parent.parent / "docs" / "howto" / "memory.md"
ROOM, TOKENS = 14.5, 4096


def table() -> str:
    lines = ["| model | float16 | int4 | cache | fits in 14.5 GB |", "|---|---|---|---|---|"]
    for name, fields in HUB.items():
        config = config_from_hf(fields)
        tokens = min(TOKENS, config.max_position_embeddings)
        plain, cache = (size / 1e9 for size in needed(config, 2, tokens))
        group = 128 if config.hidden_size % 128 == 0 and config.intermediate_size % 128 == 0 else 64
        packed = needed(config, 2, tokens, Int4Config(group_size=group))[0] / 1e9
        fits = [what for what, size in (("float16", plain), ("int4", packed)) if size + cache < ROOM]
        lines.append(f"| {name} | {plain:.1f} | {packed:.1f} | {cache:.2f} | {', '.join(fits) or 'no'} |")
    return "\n".join(lines)


@pytest.mark.slow  # of every layer of every model, and every expert
def test_the_page_says_what_the_arithmetic_says():
    told = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    computed = table().splitlines()
    strange = [line for line in told if line not in computed]
    assert len(told) > 10 and not strange, "\n".join([f"{PAGE.name} has what is not computed:", *strange])
