"""What `import jaxgen` costs and brings along: a notebook's first cell must not wait for what it may never use."""

import subprocess
import sys

import pytest

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
