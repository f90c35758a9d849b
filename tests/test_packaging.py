"""What stands in two files because two tools read it is the same in both; and what need not stand twice does not."""

import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import jaxgen

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_stands_in_one_place():
    """In the package. The changelog has it as its latest heading."""
    assert "version" not in PROJECT and "version" in PROJECT["dynamic"]
    assert version("jaxgen") == jaxgen.__version__, "installed before it changed: pip install -e . again"
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] == jaxgen.__version__


def test_ruff_is_pinned_once():
    (pinned,) = (requirement for requirement in PROJECT["optional-dependencies"]["lint"] if "ruff" in requirement)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"ruff==[\d.]+", hooks)) == {pinned}


def ci(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / ".ci" / "run", *arguments], capture_output=True, text=True, check=False, timeout=60)


def test_the_parts_of_ci_have_names():
    listed = ci("--list").stdout.splitlines()
    names = [line.split()[0] for line in listed]
    assert len(set(names)) == len(names) >= 10
    assert all(len(line.split()) > 2 for line in listed)  # and each says what it does
    said = set(re.findall(r"\.ci/run --only ([\w-]+)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert said <= set(names)


def test_a_part_that_is_none_is_an_error():
    """And not a run of nothing that passes."""
    for arguments in (["--only", "light"], ["--only", ".*"], ["--only"], ["tests"]):
        done = ci(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.count("\n") == 1


def test_the_workflow_runs_the_script():
    """Its parts by name, as the script lists them: the workflow has no list of its own."""
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert ".ci/run --list" in workflow
    assert re.findall(r"run: (\.ci/run .*)", workflow) == [".ci/run --only ${{ matrix.part }}"]


def test_no_test_file_imports_from_another():
    """What several use stands in tests/helpers.py and the files beside it."""
    imports = re.compile(r"^\s*(from|import) tests\.([\w.]+\.)?test_\w+", re.M)
    assert [path.name for path in ROOT.glob("tests/**/*.py") if imports.search(path.read_text(encoding="utf-8"))] == []
