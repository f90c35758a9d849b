"""The committed notebooks are what they should be; and the checks that say so notice when one is not."""

import copy
from typing import Any

import jupytext
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.notebooks.check import (
    FORMATS,
    INSTALLED,
    KERNEL,
    LARGEST_BYTES,
    NAMES,
    ROOT,
    _merged,
    differences,
    ids_of,
    problems_of,
    seconds_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # nbformat and jupytext about each other


def test_every_notebook_has_both_files_and_a_line_in_the_index():
    assert sorted(path.stem for path in ROOT.glob("*.ipynb")) == NAMES
    assert [name[:3] for name in NAMES] == [f"{number:02}_" for number in range(1, len(NAMES) + 1)]
    index = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"({name}.ipynb)" not in index] == []


@pytest.mark.parametrize("name", NAMES)
def test_committed(name):
    path = ROOT / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert problems_of(name, notebook, jupytext.read(ROOT / f"{name}.py")) == []
    assert path.stat().st_size < LARGEST_BYTES


INSTALL = f"try:\n    import jaxgen\nexcept ImportError:\n    %pip install -q {INSTALLED}\n    import jaxgen"
MODEL = 'MODEL = jaxgen.demo.path()\n# The real one: "mistralai/Mistral-7B-v0.1"'


def stream(text: str, name: str = "stdout") -> Any:
    return new_output("stream", name=name, text=text)


def good(seconds: int = 30) -> Any:
    """A small notebook without a fault, executed in that time."""
    code = [
        new_code_cell(INSTALL, execution_count=1),
        new_code_cell(MODEL, execution_count=2),
        new_code_cell("print(x)", execution_count=3, outputs=[stream("hello\nids: [1, 2]\nand ids: [3]\n")]),
    ]
    metadata = {"jupytext": {"formats": FORMATS}, "kernelspec": dict(KERNEL)}
    notebook = new_notebook(cells=[new_markdown_cell("# A title"), *code], metadata=metadata)
    for cell, second in zip(code, (0, 1, seconds), strict=True):
        cell.metadata["execution"] = {
            "shell.execute_reply": f"2026-01-01T00:{second // 60:02}:{second % 60:02}.000000+00:00"
        }
    return notebook


def committed() -> Any:
    notebook = good()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    return notebook


def test_a_good_one_has_no_problems():
    assert problems_of("x", committed(), committed()) == []


def test_what_a_notebook_needs_beside_jaxgen_comes_as_its_extra():
    notebook = committed()
    notebook.cells[1].source = INSTALL.replace(INSTALLED, f'"{INSTALLED}[constraints]"')
    assert problems_of("x", notebook, notebook) == []


FAULTS = {
    "other cells": lambda book: book.cells[3].update(source="print(y)"),
    "jupytext formats": lambda book: book.metadata.jupytext.update(formats="ipynb"),
    "kernelspec": lambda book: book.metadata.kernelspec.update(name="venv"),
    "repository": lambda book: book.cells[0].update(source="[Open](https://colab.example/github/x.ipynb)"),
    "imports jaxgen": lambda book: book.cells[1].update(source=INSTALL.replace("-q ..", "-q -U jax ..")),
    "sets MODEL": lambda book: book.cells[2].update(source="MODEL = jaxgen.demo.path()"),
    "numbered": lambda book: book.cells[3].update(execution_count=7),
    "an error": lambda book: book.cells[3].outputs.append(new_output("error", ename="E", evalue="", traceback=[])),
    "stderr": lambda book: book.cells[3].outputs.append(stream("careful", "stderr")),
    "token ids": lambda book: book.cells[3].update(outputs=[stream("hello")]),
    "outputs": lambda book: book.cells[3].update(outputs=[]),
    "timestamps": lambda book: book.cells[3].metadata.update(execution={}),
    "path of this machine": lambda book: book.cells[3].outputs.append(stream("in /home/me/model")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault):
    notebook, paired = committed(), committed()
    FAULTS[fault](notebook)
    assert any(fault in problem for problem in problems_of("x", notebook, paired))


def test_pictures_are_not_searched_for_paths():
    notebook = committed()
    notebook.cells[3].outputs.append(new_output("display_data", data={"image/png": "iVBO /tmp/ Rw0K"}))
    assert problems_of("x", notebook, committed()) == []


def test_ids_and_seconds():
    assert ids_of(good()) == ["[1, 2]", "[3]"]
    assert seconds_of(good(42)) == 42
    assert differences(committed(), good()) == []


def test_another_token_is_a_difference():
    executed = good()
    executed.cells[3].outputs[0].text = "ids: [1, 2]\nids: [4]\n"
    [found] = differences(committed(), executed)
    assert "line 1" in found and "[3]" in found and "[4]" in found


def test_a_missing_line_of_tokens_is_a_difference():
    executed = good()
    executed.cells[3].outputs[0].text = "ids: [1, 2]\n"
    assert differences(committed(), executed) == ["1 lines of token ids, 2 are committed"]


def test_slow_or_never_executed_is_a_difference():
    assert differences(committed(), good(601)) == ["took 601 s, more than 600"]
    assert differences(committed(), committed()) == ["took nan s, more than 600"]


def test_what_is_written():
    """Pieces of one stream are joined, what the environment says is dropped, and any other warning stays."""
    outputs = [stream("a\n"), stream("TqdmWarning: IProgress\n", "stderr"), stream("b\n"), stream("oh\n", "stderr")]
    kept = _merged(copy.deepcopy(outputs))
    assert [(output.name, output.text) for output in kept] == [("stdout", "a\nb\n"), ("stderr", "oh\n")]
