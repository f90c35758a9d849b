"""What the documentation shows is what happens: docstring examples, the README's and the pages' Python, executed."""

import dataclasses
import doctest
import importlib
import json
import logging
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import jaxgen
from jaxgen.arguments import parser
from jaxgen.generation.options.support import table
from jaxgen.generation.options.table import DEFAULT_NEW_TOKENS, OPTIONS
from tests.helpers import some_slow
from tests.pages import DOCS, README, ROOT, run_blocks
from tests.shown_by import SHOWN_BY

PAGES = sorted(DOCS.rglob("*.md"))
PAGES_WITH_CODE = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
NEEDS = {
    "constraints": ("outlines_core", "llguidance"),
    "evaluation": ("lm_eval",),
    "looking": ("matplotlib", "pandas"),
    "training": ("optax",),
}  # pages that need more than jaxgen
# Modules that cannot be imported without a library that is an extra.
WITH = {
    "jaxgen.batch.on_ray": "ray",
    "jaxgen.integrations.harness": "lm_eval",
    "jaxgen.integrations.lm_eval": "lm_eval",
    "jaxgen.integrations.tunix": "tunix",
}
# Pages and modules whose examples compile much.
SLOW = {
    "beams", "chat", "compile", "constraints", "convert", "jit", "looking", "processors", "reuse", "rollouts",
    "scores", "speculation", "stopping",
    "training", "tutorial", "jaxgen.generation.generate", "jaxgen.plot",
}  # fmt: skip
MODULES = [module.name for module in pkgutil.walk_packages(jaxgen.__path__, "jaxgen.") if "demo" not in module.name]


@pytest.fixture(scope="module")
def demo():
    """The demo model and its tokenizer."""
    from jaxgen.text.tokenizer import load_tokenizer

    return jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path()), load_tokenizer(jaxgen.demo.path())


@pytest.mark.parametrize("name", some_slow(MODULES, SLOW.__contains__))
def test_docstring_examples(name: str, request: pytest.FixtureRequest):
    if name in WITH:
        pytest.importorskip(WITH[name], reason="an extra")
    module = importlib.import_module(name)
    names = vars(module) | {"getfixture": request.getfixturevalue}
    for example in doctest.DocTestFinder().find(module, extraglobs=names):
        failures, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
        assert failures == 0, example.name


def test_nothing_is_installed_from_an_index_that_does_not_have_it():
    """From a clone, until the package is published: its name alone is not a place."""
    pages = [
        *Path(__file__).parents[1].glob("docs/**/*.md"),
        *Path(__file__).parents[1].glob("notebooks/*"),
        *Path(jaxgen.__file__).parent.rglob("*.py"),  # what errors advise
        *Path(__file__).parents[1].glob("convert/**/*.py"),
        *Path(__file__).parents[1].glob("*.md"),
    ]
    commands = re.compile(r"pip install (-\S+ )*[\"']?jaxgen\b")
    assert [page.name for page in pages if commands.search(page.read_text(encoding="utf-8"))] == []


def test_the_two_commands_stand_in_the_readme():
    lines = README.read_text().splitlines()
    assert '    pip install -e . && jaxgen generate "A list of colors: red, blue"' in lines
    assert '    pip install -e ".[test]" && pytest' in lines


@pytest.fixture
def as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A directory to write into, figures that no window shows, and a logger that is left as it was found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    logger = logging.getLogger("jaxgen")
    level, filters = logger.level, list(logger.filters)
    yield
    logger.setLevel(level)
    logger.filters[:] = filters
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def test_the_readmes_python_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]):
    assert run_blocks(README, capsys)


@pytest.mark.parametrize("page", some_slow(PAGES_WITH_CODE, lambda page: page.stem in SLOW), ids=lambda page: page.stem)
def test_the_pages_python_runs_and_prints_what_it_says(page: Path, capsys: pytest.CaptureFixture[str], as_it_was: None):
    for package in NEEDS.get(page.stem, ()):
        pytest.importorskip(package)
    assert run_blocks(page, capsys)


def test_a_page_that_says_something_else_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\nprint(x)\n# -> 1\n```\nand\n```python\nprint(x + 1)\n# -> 2\n```\n")
    assert run_blocks(page, capsys) == 2
    page.write_text(page.read_text().replace("-> 2", "-> 3"))
    with pytest.raises(AssertionError):
        run_blocks(page, capsys)


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_the_commands_that_are_shown_exist(page: Path):
    for line in re.findall(r"^    (jaxgen .*)$", page.read_text(encoding="utf-8"), re.M):
        parser().parse_args(shlex.split(line, comments=True)[1:])


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def test_every_public_name_is_in_the_reference():
    shown = re.findall(r"^::: (\S+)$", "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md")), re.M)
    names = {name.removeprefix("jaxgen.").removeprefix("convert.load.") for name in shown}
    assert set(jaxgen.__all__) - {"demo", "distributed", "plot"} <= names
    assert "demo.path" in names


def test_importing_jaxgen_imports_nothing_heavy():
    code = (
        "import sys, jaxgen; "
        "heavy = {'jax', 'flax', 'torch', 'transformers', 'matplotlib', 'pandas'} & set(sys.modules); "
        "assert not heavy, heavy; import jaxgen.generation.generate, jaxgen.convert; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_is_there():
    for name in jaxgen.__all__:
        assert getattr(jaxgen, name) is not None
    assert set(jaxgen.__all__) <= set(dir(jaxgen))
    with pytest.raises(AttributeError, match="Generate"):
        _ = jaxgen.Generate  # pyright: ignore[reportAttributeAccessIssue]


# What the pages are made of when the site is built. The hook needs no MkDocs, so these run everywhere.


FIGURES = (
    "decode_cpu",
    "speculate",
    "beams",
    "processors",
    "constraints",
    "quality",
    "convert",
    "gpu-nvidia-h200",
    "gpu_aot",
    "reproducibility",
    "rollouts",
    "families",
    "engine",
    "engine_steps",
    "mesh",
    "batch",
    "serve",
)


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch):
    """docs/hooks/generated.py, as MkDocs loads it."""
    monkeypatch.syspath_prepend(str(DOCS / "hooks"))
    return importlib.import_module("generated")


@pytest.mark.parametrize("name", ["fields", "levels", "meshes", "rollouts", "throughput", "docstrings"])
def test_the_hooks_examples(hook, name: str):
    if name == "docstrings":
        pytest.importorskip("griffe")
    module = importlib.import_module(name)
    for example in doctest.DocTestFinder().find(module, extraglobs=vars(module)):
        assert doctest.DocTestRunner().run(example).failed == 0, example.name


def test_every_marker_is_made(hook, monkeypatch: pytest.MonkeyPatch):
    for name in ("result", "plots"):  # the code of a page that is run above
        monkeypatch.setitem(hook.PARTS, name, lambda: "")
    markers = [name for page in PAGES for name in hook.MARKER.findall(page.read_text(encoding="utf-8"))]
    assert {name for name in markers if not name.startswith("fields ")} == hook.PARTS.keys()
    for page in PAGES:
        assert "<!-- generated" not in hook.on_page_markdown(page.read_text(encoding="utf-8"))
    with pytest.raises(KeyError, match="nothing"):
        hook.on_page_markdown("<!-- generated: nothing -->")


def test_the_options_page_has_every_field_with_its_default(hook):
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", hook.make("options"), re.M)
    said = dict(rows)
    assert len(rows) == len(said)
    assert said.keys() == {field.name for field in dataclasses.fields(jaxgen.GenerationConfig)}
    defaults = {name: str(option.default) for name, option in OPTIONS.items() if option.default is not None}
    defaults |= {"max_new_tokens": str(DEFAULT_NEW_TOKENS)}
    defaults |= dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"), "the checkpoint's")
    defaults["cache_implementation"] = '"static"'
    assert said == {name: defaults.get(name, "off") for name in said}


def test_the_tables_are_the_libraries_own(hook):
    assert hook.make("support").splitlines()[1:] == table(SHOWN_BY).splitlines()[1:]
    commands = hook.make("command line")
    assert commands.count("\n## jaxgen ") + commands.startswith("## jaxgen ") == commands.count("usage: jaxgen ") >= 5
    assert "| `lengths` | `Int[np.ndarray, ' R']` | new tokens per row |" in hook.make("fields GenerateOutput")


def test_figures_are_rounded_and_have_their_command_beside_them(hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hook, "RESULTS", tmp_path)
    assert [hook.make(name) for name in FIGURES] == [""] * len(FIGURES)  # where nothing was measured, nothing is said
    row = {"model": "demo", "batch": 8, "jaxgen": 1234.5, "transformers": 617.2, "ratio": 2.0002}
    machine = {"read_gb_per_second": 34.6, "versions": {"jax": "1.2", "jaxgen": "0"}}
    (tmp_path / "decode_cpu.json").write_text(json.dumps({"machine": machine, "rows": [row]}))
    text = hook.make("decode_cpu")
    assert "| demo, 2.7M parameters | 8 | 1,234 | 617 | 2.0 |" in text
    assert (
        "`python benchmarks/decode_cpu.py --repeats 7` on 2 cores of an AMD EPYC that reads 35 GB/s; jax 1.2." in text
    )


def test_every_file_of_results_has_its_table(hook):
    known = hook.PARTS.keys() | {"decode_cpu_xeon"}
    assert {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")} <= known


def test_the_reproducibility_table_counts(hook):
    """By hand: 8 + 8 rows with 1 + 0 other; 96 + 104 log-probabilities of which 95 + 104 are the same."""
    greedy = {"rows": 8, "rows_other": 1, "logprobs": 96, "logprobs_same_bits": 95, "largest_difference": 2e-6}
    sampled = {"rows": 8, "rows_other": 0, "logprobs": 104, "logprobs_same_bits": 104, "largest_difference": 0.0}
    one = {"level": "L2", "varied": "batch size 1", "engine": "jaxgen", "weights": "int4", "greedy": greedy}
    torch = one | {"engine": "transformers", "greedy": greedy | {"rows_other": 5}}
    results = {
        "date": "2026-01-02", "machine": {"cpu": "a CPU", "cores": 2}, "versions": {"base": {"jax": "1.2"}},
        "draws": [{"varied": "order", "draws": 1000, "other": 0}, {"varied": "idle", "draws": 500, "other": 2}],
        "lines": [one | {"sampled": sampled}, torch, {"level": "L4", "varied": "golden", "pytest": "9 passed"}],
        "strict_cost_tokens_per_second": [{"batch": 1, "default": 100.4, "strict": 50.0}],
    }  # fmt: skip
    text = hook.reproducibility(results)
    assert "2 of 1,500 draws differ" in text
    assert "| L2 | batch size 1 | int4 | 1 of 16 | 99.5% | 2.0e-06 | 5 of 8 |" in text
    assert "| L4 | golden |  | 9 passed |  |  |  |" in text
    assert "| 1 | 100 | 50 |" in text
    assert "(2026-01-02), 2 cores, a CPU; jax 1.2." in text


@pytest.mark.slow
def test_the_site_builds_and_fetches_nothing(tmp_path: Path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "hooks").exists()
    for file in [*tmp_path.rglob("*.html"), *tmp_path.rglob("*.css")]:
        text = file.read_text(encoding="utf-8")
        fetched = re.findall(r"""(?:\bsrc=|<link[^>]*\bhref=|url\(|@import )["']?((?:https?:)?//[^"')\s>]+)""", text)
        assert fetched == [], file
