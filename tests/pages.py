"""The documentation's pages, and what their Python prints."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"


ADDRESS = "http://127.0.0.1:8000"  # of `jaxgen serve`, in pages


def run_blocks(page: Path, capsys: pytest.CaptureFixture[str], url: str | None = None) -> int:
    """Run a page's Python in one namespace and compare what each block prints with its `# -> ` lines; how many ran.

    In the README, which shows transformers' code too, only blocks that import jaxgen begin or go on. Blocks that ask a
    server run where there is one, at `url`.
    """
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    ours = [block for block in blocks if page != README or "import jaxgen" in block]
    ours = [block.replace(ADDRESS, url or "") for block in ours if url or ADDRESS not in block]
    names: dict[str, object] = {}
    for block in ours:
        exec(compile(block, page.name, "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        promised = re.findall(r"^# -> (.*)$", block, re.M)
        assert printed == promised
    return len(ours)
