"""The sampling stream does not change unnoticed: keys, noise and tokens are the committed ones, on every JAX.

The tests build on each other, so the first that fails says where a change came in:

- `test_keys`, `test_bits`: JAX's PRNG, or how jaxgen derives its keys, is another;
- `test_gumbel`, `test_draws`: how noise is made of the bits, or a token of the noise, is another;
- `test_tokens` alone: the logits are others, or how filters, beams or speculation use them.

If the change is meant: raise `SAMPLER_VERSION` in generation/choosing/sample.py, name it in CHANGELOG.md, and run
`python -m tests.reference.golden`. If it came with a new JAX, the promise that a seed gives the same tokens on every
supported version is broken: that is a bug to be worked around in sample.py, not a file to be made anew.
"""

import json
from typing import Any

import numpy as np
import pytest

from jaxgen.generation.choosing.sample import SAMPLER_VERSION
from tests.reference.golden import GOLDEN, RUNS, generate, load, new_tokens, noise

COMMITTED: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
ADVICE = f"sampler_version is {SAMPLER_VERSION} and must change with the stream; see the head of this file"


@pytest.fixture(scope="module")
def stream() -> dict[str, Any]:
    return noise()


@pytest.fixture(scope="module")
def models():
    loaded = {form: load(form) for form in ("float32", "int4")}
    return loaded.__getitem__


def test_the_version_is_the_committed_one():
    assert COMMITTED["sampler_version"] == SAMPLER_VERSION, "run `python -m tests.reference.golden`"


@pytest.mark.parametrize("part", ["random_key", "row_id_words", "row_keys", "fold_in"])
def test_keys(stream, part):
    assert stream[part] == COMMITTED["noise"][part], ADVICE


@pytest.mark.parametrize("part", ["bits", "bits_sha256"])
def test_bits(stream, part):
    assert stream[part] == COMMITTED["noise"][part], ADVICE


def test_gumbel(stream):
    """To 2e-6: two logarithms, whose last bits a processor may round differently."""
    np.testing.assert_allclose(stream["gumbel"], COMMITTED["noise"]["gumbel"], rtol=0, atol=2e-6, err_msg=ADVICE)


def test_draws(stream):
    assert stream["draws"] == COMMITTED["noise"]["draws"], ADVICE


@pytest.mark.parametrize("name", RUNS)
def test_tokens(models, name):
    committed = COMMITTED["runs"][name]
    rows = new_tokens(generate(models, COMMITTED["prompts"], RUNS[name]))
    assert rows == committed["rows"], f"{ADVICE}; the closest decision led by {committed['smallest_lead']}"


def test_the_committed_runs_are_the_ones_tested():
    assert {name: run["options"] for name, run in COMMITTED["runs"].items()} == RUNS
    rows = [row for run in COMMITTED["runs"].values() for row in run["rows"]]
    assert len(set(rows)) > 0.7 * len(rows)  # or seeds would decide nothing
