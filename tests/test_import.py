"""What `import jaxgen` costs and brings along: a notebook's first cell must not wait for what it may never use."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"transformers", "torch", "matplotlib", "pandas"}
EVERY_NAME = "import jaxgen; [getattr(jaxgen, name) for name in jaxgen.__all__]"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True).stdout


def new_modules(first: str, code: str) -> set[str]:
    """The modules that `code` imports after `first`."""
    return set(run(f"import sys; {first}; old = {{*sys.modules}}; {code}; print(*{{*sys.modules}} - old)").split())


def test_the_import_itself_brings_nothing_along():
    assert new_modules("import jax", "import jaxgen") == {"jaxgen"}


def test_every_public_name_brings_two_small_packages_along():
    packages = {module.split(".")[0] for module in new_modules("import jax, flax.nnx", EVERY_NAME)}
    assert packages - sys.stdlib_module_names == {"jaxgen", "jaxtyping", "safetensors"}


@pytest.mark.parametrize("code", [EVERY_NAME, "import jaxgen.plot"])
def test_nothing_heavy_is_imported(code: str):
    assert not HEAVY & new_modules("pass", code)


def test_import_time_beside_that_of_jax():
    """Less than 0.3 s after `import jax`, in one process of five at least: others may want the processor."""
    code = "import time, jax; start = time.perf_counter(); import jaxgen; print(time.perf_counter() - start)"
    assert any(float(run(code)) < 0.3 for _ in range(5))


# A checkout is called jaxgen as the package is: from the folder that holds it, Python could take it for the package.

CHECK = "import jaxgen, jaxgen.convert.load as load; assert jaxgen.demo.path().is_dir() and jaxgen.convert.load is load"
LOOK = (
    "import importlib.util, jaxgen; assert jaxgen.demo.path().is_dir() and importlib.util.find_spec('jaxgen.convert')"
)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree in a folder called jaxgen, with a script and tests of a user beside it and a test of its own."""
    home = tmp_path_factory.mktemp("home")
    clone = home / "jaxgen"
    for name in ("jaxgen", "convert"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    (clone / "tests").mkdir()
    (clone / "tests" / "__init__.py").touch()
    for script in (home / "script.py", home / "test_mine.py", clone / "tests" / "test_own.py"):
        script.write_text(f"{LOOK}\n\n\ndef test_it():\n    pass\n")
    return clone


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["editable", "wheel"])
def test_it_imports_from_everywhere_around_the_clone(kind: str, clone: Path, tmp_path: Path):
    """As after `pip install`, which does the same: has setuptools build, and unpacks that into the environment."""
    build = f"from setuptools.build_meta import build_{kind} as build; build({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, timeout=120, capture_output=True)
    venv.create(tmp_path / "v", symlinks=True)
    site = next((tmp_path / "v").glob("lib/python3*/site-packages"))
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    if kind == "wheel":
        sources = {path.relative_to(clone) for path in clone.glob("jaxgen/**/*.py") if path.parent.name != "convert"}
        sources |= {Path("jaxgen", path.relative_to(clone)) for path in clone.glob("convert/**/*.py")}
        assert sources == {path.relative_to(site) for path in site.glob("jaxgen/**/*.py")}
        assert (site / "jaxgen" / "py.typed").is_file()  # or type checkers of users see nothing of it
    dependencies = [path for path in sys.path if path.endswith("-packages")]
    (site / "dependencies.pth").write_text("\n".join(dependencies))  # and not what .pth files there add
    home, elsewhere = clone.parent, tmp_path
    pytest_it = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=")
    runs = [
        (clone, ("-c", CHECK)),
        (home, ("-c", CHECK)),
        (elsewhere, ("-c", LOOK)),
        (home, ("script.py",)),
        (elsewhere, (str(home / "script.py"),)),
        (clone, (*pytest_it, "tests/test_own.py")),
        (home, (*pytest_it, "jaxgen/tests/test_own.py", "test_mine.py")),
        (elsewhere, (*pytest_it, str(home / "test_mine.py"))),
    ]
    python = str(tmp_path / "v" / "bin" / "python")
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # they import JAX
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    processes = [subprocess.Popen([python, *command], cwd=where, **options) for where, command in runs]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(runs), "\n".join(said)
