"""Shared fixtures: the reference checkpoints on disk, and the models loaded from them, once per session."""

import gc
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.reference.cases import CASES
from tests.reference.weights import write_checkpoint

if TYPE_CHECKING:
    from jaxgen.model import MistralForCausalLM

# The oracle modules import torch, which the light test environment does not have on purpose: what they check
# live, the light tests check against the committed reference.
collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["oracle/*"]
# Likewise JAX's CUDA plugin, 400 MB: aot/ compiles for a GPU that need not be there.
if not importlib.util.find_spec("jax_plugins"):
    collect_ignore_glob.append("aot/*")

pytest.register_assert_rewrite("tests.helpers")

# XLA:CPU maps some memory for every function it compiles, and crashes when Linux gives no more: 65530 maps by default.
_MOST_MAPS = 30_000


def pytest_configure(config: pytest.Config) -> None:
    """What is compiled is kept for the other workers and the next run: `pytest --cache-clear` forgets it.

    Processes that tests start keep theirs here too, and not in the user's directory.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = getattr(config, "cache", None)  # None with `-p no:cacheprovider`
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache.mkdir("compiled")) if cache else ""
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_runtest_teardown() -> None:
    """Forget what was compiled before there is too much of it."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a reference case's Hugging Face checkpoint, written on first use."""
    root, written = tmp_path_factory.mktemp("reference"), {}

    def get(name: str) -> Path:
        if name not in written:
            case = CASES[name]
            written[name] = write_checkpoint(root / name, case.config, case.seed)
        return written[name]

    return get


@pytest.fixture(scope="session")
def reference_model(checkpoint: Callable[[str], Path]) -> Callable[[str], "MistralForCausalLM"]:
    """A reference case's model in float32, loaded through the public loader on first use."""
    from jaxgen.convert.load import AutoModelForCausalLM

    loaded: dict[str, MistralForCausalLM] = {}

    def get(name: str) -> "MistralForCausalLM":
        if name not in loaded:
            loaded[name] = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype="float32")
        return loaded[name]

    return get
