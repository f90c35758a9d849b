"""Shared fixtures: the reference checkpoints on disk, and the models loaded from them, once per session."""

import gc
import importlib.util
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.reach import Reach, watched
from tests.reference.cases import CASES
from tests.reference.weights import write_checkpoint

if TYPE_CHECKING:
    from jaxgen.models.mistral import MistralForCausalLM

# The oracle modules import torch, which the light test environment does not have on purpose: what they check
# live, the light tests check against the committed reference.
collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["oracle/*"]
# Likewise JAX's CUDA plugin, 400 MB: aot/ compiles for a GPU that need not be there.
if not importlib.util.find_spec("jax_plugins"):
    collect_ignore_glob.append("aot/*")

# And what drives a browser.
if not importlib.util.find_spec("selenium"):
    collect_ignore_glob.append("browser/*")

# Several replicas, and real clients of `jaxgen serve`.
if not importlib.util.find_spec("ray"):
    collect_ignore_glob.append("replicas/*")
if not importlib.util.find_spec("openai"):
    collect_ignore_glob.append("clients/*")

# And what reads OpenAPI documents.
if not importlib.util.find_spec("schemathesis"):
    collect_ignore_glob.append("fuzz/*")

pytest.register_assert_rewrite("tests.helpers", "tests.lm_eval_tasks", "tests.oracle.beams")

# XLA:CPU maps some memory for every function it compiles, and crashes when Linux gives no more: 65530 maps by default.
_MOST_MAPS = 30_000
# Seconds between looks, which take longer than most tests where there are many maps.
_BETWEEN_LOOKS = 5.0
_looked = 0.0


def _jax_version() -> tuple[int, ...]:
    return tuple(int(part) for part in version("jax").split(".")[:2])


def pytest_configure(config: pytest.Config) -> None:
    """What is compiled is kept for the other workers and the next run: `pytest --cache-clear` forgets it.

    Processes that tests start keep theirs here too, and not in the user's directory. Most of a test's time is the
    compiler's, so that it is asked for little: `.ci/run` tests programs as users have them in parts of their own.
    """
    little = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"
    # It compiles twice as fast. Newer versions of XLA do not know the flag, and end at one like that.
    if little and (0, 7) <= _jax_version() < (0, 11):
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = getattr(config, "cache", None)  # None with `-p no:cacheprovider`
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache.mkdir("compiled")) if cache else ""
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # simulated ones, for meshes; all else is on the first
    if watched(config):
        config.pluginmanager.register(Reach())


def pytest_runtest_teardown() -> None:
    """Forget what was compiled before there is too much of it."""
    global _looked
    if time.monotonic() < _looked + _BETWEEN_LOOKS:
        return
    _looked, maps = time.monotonic(), Path("/proc/self/maps")
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


@pytest.fixture(scope="session")
def llama_tokenizer():
    """Of Llama's kind: spaces as U+2581, the first one dropped, bytes as tokens of their own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁▁", "▁a", "▁word", "b", "é", "界", "▁世", "\n", ".", ","]
    raw = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
