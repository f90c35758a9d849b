"""The notebooks: make their outputs, and compare what another run of them printed with the committed outputs.

    python -m tests.notebooks.check --write [NAME ...]   execute notebooks/NAME.py, write notebooks/NAME.ipynb
    python -m tests.notebooks.check DIRECTORY            compare executed copies with the committed notebooks

CI copies notebooks/, executes the copy with `pytest --nbmake --overwrite`, and compares: every token id that a
notebook prints (lines with `ids:`) must be the committed one, and none may have taken far too long. What a committed
notebook must be like (`problems_of`) is tested by `test_notebooks.py`.
"""

import argparse
import datetime
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat

ROOT = Path(__file__).parents[2] / "notebooks"
NAMES = sorted(path.stem for path in ROOT.glob("*.py"))
LONGEST_SECONDS = 600  # for CI, which executes two at a time and may be busy; alone, each is to take less than 120
LARGEST_BYTES = 1_000_000
# What a first cell installs: the clone around it, until the package has an index to be found in.
INSTALLED = ".."
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
FORMATS = "ipynb,py:percent"
_LOCAL = re.compile(r"(?<![\w.])/(?:root|home|tmp|Users|work|var|opt|usr|mnt|content)/|\b[A-Z]:\\|site-packages")
# What an environment says about itself, and not about the notebook: never kept.
_NOISE = re.compile(r"TqdmWarning|autonotebook|PyTorch was not found|it/s\]|B/s\]|Loading weights")


def texts_of(cell: Any) -> Iterator[str]:
    """Everything that can be read in a cell's outputs (images cannot)."""
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            yield output.text
        for kind, data in output.get("data", {}).items():
            if not kind.startswith("image/"):
                yield data if isinstance(data, str) else str(data)


def ids_of(notebook: Any) -> list[str]:
    """The printed token ids, in order: what follows `ids:` on a line."""
    lines = [
        line
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stdout"
        for line in output.text.splitlines()
    ]
    return [line.partition("ids:")[2].strip() for line in lines if "ids:" in line]


def problems_of(name: str, notebook: Any, paired: Any) -> list[str]:
    """What is wrong with a committed notebook, beside the one that `jupytext` reads from its .py file."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    text = "\n".join(text for cell in code for text in texts_of(cell))
    outputs = [output for cell in code for output in cell.outputs]
    first_two = [cell.source for cell in code[:2]] + ["", ""]
    streams = {output.get("name") for output in outputs}
    checks = {
        f"{name}.py has other cells: python -m tests.notebooks.check --write {name}": _cells(notebook)
        == _cells(paired),
        f"metadata say jupytext formats {FORMATS} in both files": all(
            book.metadata.get("jupytext", {}).get("formats") == FORMATS for book in (notebook, paired)
        ),
        "kernelspec is python3": notebook.metadata.get("kernelspec", {}).get("name") == KERNEL["name"],
        "no link to open it from a repository that is not there": "/github/" not in notebook.cells[0].source,
        "the first code cell imports jaxgen, or installs it and nothing else": _installs(first_two[0]),
        "the second code cell sets MODEL to the demo and names a real one": "MODEL = jaxgen.demo.path()" in first_two[1]
        and '"mistralai/' in first_two[1],
        "cells are numbered 1, 2, 3, ...: run from top to bottom": [cell.execution_count for cell in code]
        == list(range(1, len(code) + 1)),
        "there are outputs": bool(outputs),
        "no output is an error": all(output.output_type != "error" for output in outputs),
        "nothing on stderr": "stderr" not in streams,
        "some token ids are printed": bool(ids_of(notebook)),
        "no timestamps in the cells' metadata": all("execution" not in cell.metadata for cell in code),
    }
    found = [f"not so: {what}" for what, good in checks.items() if not good]
    if place := _LOCAL.search(text):
        found.append(f"an output has a path of this machine: {text[max(0, place.start() - 20) : place.end() + 40]!r}")
    return found


def _cells(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


def _installs(source: str) -> bool:
    commands = re.findall(r"^\s*[%!]\s*pip\s+(.*)$", source, re.MULTILINE)
    tried = re.search(r"^try:\n(?:    import \w+ .*\n\n)?    import jaxgen.*\nexcept ImportError", source, re.MULTILINE)
    return bool(tried) and commands in ([f"install -q {INSTALLED}"], [f'install -q "{INSTALLED}[constraints]"'])


def seconds_of(notebook: Any) -> float:
    """From the start of the first cell to the end of the last, by the time stamps of nbclient."""
    times = [
        datetime.datetime.fromisoformat(stamp)
        for cell in notebook.cells
        for stamp in cell.metadata.get("execution", {}).values()
    ]
    return (max(times) - min(times)).total_seconds() if times else float("nan")


def differences(committed: Any, executed: Any) -> list[str]:
    """What another execution of a notebook shows that the committed one does not."""
    found, (expected, actual) = [], (ids_of(committed), ids_of(executed))
    if len(expected) != len(actual):
        found.append(f"{len(actual)} lines of token ids, {len(expected)} are committed")
    for index, (old, new) in enumerate(zip(expected, actual, strict=False)):
        if old != new:
            found.append(f"line {index} of token ids:\n    committed {old}\n    now       {new}")
    if not seconds_of(executed) <= LONGEST_SECONDS:  # NaN: was it executed at all?
        found.append(f"took {seconds_of(executed):.0f} s, more than {LONGEST_SECONDS}")
    return found


def compare(directory: Path) -> int:
    """Print what is different in the executed copies, of which there is at least one; how many are different."""
    bad, names = 0, sorted(path.stem for path in directory.glob("*.ipynb"))
    assert names, directory
    for name in names:
        executed = nbformat.read(directory / f"{name}.ipynb", as_version=4)
        found = differences(nbformat.read(ROOT / f"{name}.ipynb", as_version=4), executed)
        bad += bool(found)
        print(f"{name}: {seconds_of(executed):.0f} s, {len(ids_of(executed))} lines of token ids", *found, sep="\n  ")
    return bad


def write(name: str) -> None:
    """Execute a notebook's .py file, and write the .ipynb with outputs that another run can reproduce."""
    from nbclient import NotebookClient

    notebook: Any = jupytext.read(ROOT / f"{name}.py")
    NotebookClient(notebook, timeout=600, kernel_name=KERNEL["name"], record_timing=False).execute()
    notebook.metadata = nbformat.from_dict(
        {"jupytext": {"formats": FORMATS}, "kernelspec": KERNEL, "language_info": {"name": "python"}}
    )
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02}"  # random otherwise: another diff each time
        if cell.cell_type == "code":
            cell.outputs = _merged(cell.outputs)
    nbformat.write(notebook, ROOT / f"{name}.ipynb")


def _merged(outputs: list[Any]) -> list[Any]:
    """The outputs without noise; a stream that came in several pieces is one."""
    kept: list[Any] = []
    for output in outputs:
        noise = output.output_type == "stream" and output.name == "stderr"
        if noise and (not output.text.strip() or _NOISE.search(output.text)):
            continue
        last = kept[-1] if kept else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            kept.append(output)
    return kept


def kernel_python() -> str:
    """The interpreter that the kernel `python3` starts here."""
    from jupyter_client.manager import KernelManager

    return KernelManager(kernel_name=KERNEL["name"]).format_kernel_cmd()[0]


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description="Make the notebooks' outputs, or compare executed copies with them.")
    parser.add_argument("--write", nargs="*", metavar="NAME", help="execute and write these notebooks (none: all)")
    parser.add_argument("directory", nargs="?", type=Path, help="executed copies to compare")
    options = parser.parse_args()
    if (options.write is None) == (options.directory is None):
        parser.error("give either --write or a directory")
    if Path(kernel_python()) != Path(sys.executable):
        parser.error(f"the kernel python3 is {kernel_python()}, not {sys.executable}")
    if options.directory is not None:
        raise SystemExit(min(compare(options.directory), 1))
    for name in options.write or NAMES:
        write(name)
        notebook, paired = nbformat.read(ROOT / f"{name}.ipynb", as_version=4), jupytext.read(ROOT / f"{name}.py")
        print(name, *(problems_of(name, notebook, paired) or ["good"]), sep="\n  ")


if __name__ == "__main__":
    main()
