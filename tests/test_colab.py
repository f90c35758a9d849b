"""Google Colab: its packages are left as they are, and Mistral-7B fits its free GPU (a T4) in four bits.

`.ci/colab` asks pip; what is here needs no network. The budgets are calculated from the config, with no weight made.
"""

import math
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

from jaxgen.errors import JaxgenError
from jaxgen.generation.programs.inputs import BatchLayout, StaticOptions
from jaxgen.generation.prompts import memory
from jaxgen.generation.prompts.layout import bucket
from jaxgen.models.mistral import MistralConfig, MistralForCausalLM
from jaxgen.models.tensors import parameter_parts
from jaxgen.quant import Int4Config
from tests.hf_files import HUB

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ROOT / "tests" / "colab" / "constraints.txt"

GPU, HOST = 15_000_000_000, 12_700_000_000  # bytes of a T4 and of the machine around it
CONFIG = MistralConfig.from_hf(HUB["7B-Instruct-v0.2"])  # no sliding window: the cache grows with every token
ITEM = 2  # bytes of a float16


def colab() -> dict[str, str]:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    assert len({canonical(name) for name, _ in pairs}) == len(pairs)
    return {canonical(name): version for name, version in pairs}


def test_what_colab_has_is_new_enough():
    has = colab()
    assert (has["jax"], has["jaxlib"], has["flax"], has["transformers"]) == ("0.7.2", "0.7.2", "0.11.2", "5.15.0")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        name = canonical(requirement.name)
        if name == "jaxtyping":  # the one that is missing there
            assert name not in has
        else:
            assert requirement.specifier.contains(has[name]), f"{requirement}: Colab has {has[name]}"


def float16_bytes() -> int:
    model = nnx.eval_shape(lambda: MistralForCausalLM(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float16))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def int4_bytes() -> int:
    """Half a byte per weight of a linear layer and a scale of two for each 128; the rest in float16."""
    parts = [part for group in parameter_parts(CONFIG).values() for part in group]
    sizes = {part.name: math.prod(part.shape) for part in parts}
    quantizes = Int4Config().quantizes
    return sum(size // 2 + 2 * size // 128 if quantizes(name) else ITEM * size for name, size in sizes.items())


def check(rows: int, total: int, int8_cache: bool = False, chunk: int = 0) -> None:
    """`check_memory` for prompts of half of `total` tokens."""
    length = total // 2
    assert length == bucket(length)
    slots = CONFIG.cache_slots(total, ahead=chunk)
    layout = BatchLayout(
        StaticOptions(do_sample=False), samples=1, total=total, slots=slots, int8_cache=int8_cache, chunk=chunk
    )
    model = SimpleNamespace(config=CONFIG, dtype=np.dtype(np.float16), device=SimpleNamespace(platform="gpu"))
    memory.check_memory(model, (rows, length), layout)


def test_parameters():
    assert float16_bytes() == 14_483_464_192  # of 7,241,732,096 parameters
    assert int4_bytes() == 4_123_533_312
    assert memory.kv_bytes_per_token(CONFIG, ITEM) == 2 * 32 * 8 * 128 * 2 == 131_072
    assert memory.kv_bytes_per_token(CONFIG, ITEM, int8=True) == 2 * 32 * 8 * (128 + 4) == 67_584


@pytest.mark.parametrize("int8_cache", [False, True])
@pytest.mark.parametrize(("total", "rows"), [(4096, 1), (4096, 4), (4096, 8), (8192, 1), (8192, 4)])
def test_int4_fits_a_t4(total: int, rows: int, int8_cache: bool, monkeypatch: pytest.MonkeyPatch):
    """Weights, cache and prefill, with what `check_memory` does not count taken off before.

    That is a weight that the prefill unpacks, and the prompt's fresh keys and values before they reach the cache.
    """
    largest_weight = ITEM * 2 * CONFIG.intermediate_size * CONFIG.hidden_size
    fresh = rows * (total // 2) * memory.kv_bytes_per_token(CONFIG, ITEM)
    free = GPU - int4_bytes() - largest_weight - fresh
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    check(rows, total, int8_cache)


def test_eight_long_rows_need_an_int8_cache_and_a_prompt_in_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: GPU - int4_bytes())
    for int8_cache in (False, True):
        with pytest.raises(JaxgenError, match=r"8 rows of 8192 tokens .* need 1\d\.\d\d GB .*, and 10\.88 GB are free"):
            check(8, 8192, int8_cache)
    check(8, 8192, int8_cache=True, chunk=128)


def test_float16_does_not_fit_a_t4(monkeypatch: pytest.MonkeyPatch):
    """Its weights leave half a gigabyte: one row of 4096 tokens needs another one, and is refused with both numbers."""
    free = GPU - float16_bytes()
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    with pytest.raises(JaxgenError, match=r"1 rows of 4096 tokens .* need 0\.99 GB .*, and 0\.52 GB are free"):
        check(1, 4096)


def test_loading_in_four_bits_fits_the_host():
    """What `from_pretrained` promises where the parameters are on the GPU: two of the largest tensor."""
    stored = [math.prod(part.shape) * ITEM for group in parameter_parts(CONFIG).values() for part in group]
    assert sum(stored) > HOST  # the checkpoint itself, in bfloat16, is larger than the host
    assert max(stored) == 262_144_000  # the embedding
    assert 2 * max(stored) < HOST / 20
