"""What `benchmarks/reproducibility.py` measures, in small: seeds, processes, devices and strict, on the demo."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgen import GenerateOutput, JaxgenError, Strict, demo
from jaxgen.convert.load import AutoModelForCausalLM
from jaxgen.text.tokenizer import load_tokenizer
from tests.helpers import some_slow

REPOSITORY = Path(__file__).parent.parent
TEXTS = ["I am a cat.", "Portugal is", "A list of colors: red", "A, B, C", "1, 2, 3, 4, 5", "Helicopters"]
HOT: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "top_k": 0}
OPTIONS: dict[str, Any] = {"max_new_tokens": 16, "eos_token_id": None, "return_dict_in_generate": True, **HOT}
STRICT = Strict(rows=8, tokens=48)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(demo.path())
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def padded(rows: list[list[int]], side: str, extra: int = 0) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, rows)) + extra
    ids, mask = np.full((len(rows), width), 9), np.zeros((len(rows), width), int)
    for row, tokens in enumerate(rows):
        place = slice(width - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    return ids, mask


def new(output: Any) -> tuple[np.ndarray, np.ndarray]:
    assert isinstance(output, GenerateOutput)
    return output.sequences[:, -16:], output.logprobs


@pytest.fixture(scope="module")
def together(model, prompts):
    """1,000 seeds of one prompt, in 4 batches: what `seed=seed` gives is in row `seed`."""
    tokens, logprobs = np.empty((2, 1000, 16))
    for start in range(4):
        tokens[start::4], logprobs[start::4] = new(
            model.generate(prompts[:1], seed=list(range(1000)[start::4]), **OPTIONS)
        )
    return tokens, logprobs


class TestManySeeds:
    """Vectorised experiments: one prompt, 1,000 seeds, in few batches; seed 417 alone gives the same text."""

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", some_slow([417, 0, 1, 2, 3, 999], lambda seed: seed != 417))
    def test_a_seed_alone_gives_the_same(self, model, prompts, together, seed):
        tokens, logprobs = new(model.generate(prompts[:1], seed=seed, **OPTIONS))
        np.testing.assert_array_equal(tokens[0], together[0][seed])
        np.testing.assert_allclose(logprobs[0], together[1][seed], rtol=0, atol=1e-4)

    def test_the_seeds_do_not_share_their_noise(self, together):
        assert len({tuple(row) for row in together[0].tolist()}) > 950  # a few seeds give the greedy tokens

    @pytest.mark.slow
    def test_seeds_and_prompts_go_in_pairs(self, model, prompts):
        seeds = [5, 2**70, -3, 5, 0, 417]
        ids, mask = padded(prompts, "left")
        tokens, _ = new(model.generate(ids, mask, seed=seeds, **OPTIONS))
        for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            alone, _ = new(model.generate([prompt], seed=seed, **OPTIONS))
            np.testing.assert_array_equal(tokens[row], alone[0])

    @pytest.mark.slow
    def test_strict_to_the_last_bit(self, model, prompts):
        seeds = [417, 1, 2, 3, 4]
        tokens, logprobs = new(model.generate(prompts[:1], seed=seeds, strict=STRICT, **OPTIONS))
        alone, exact = new(model.generate(prompts[:1], seed=417, strict=STRICT, **OPTIONS))
        np.testing.assert_array_equal(tokens[0], alone[0])
        assert logprobs[0].tobytes() == exact[0].tobytes()

    def test_a_wrong_number_is_refused(self, model, prompts):
        ids, mask = padded(prompts[:2], "left")
        with pytest.raises(JaxgenError, match="holds 3"):
            model.generate(ids, mask, seed=[1, 2, 3], **OPTIONS)


@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=pytest.mark.slow), {"do_sample": False}], ids=["sampled", "greedy"]
)
class TestStrict:
    """Batch size, order, mates and padding: tokens and log-probabilities are equal to the last bit."""

    @pytest.fixture
    def rows(self, model, prompts, options):
        """What a call gives each of the prompts that it names."""

        def rows(order: list[int], side: str = "left", extra: int = 0) -> dict[int, tuple[list[int], bytes]]:
            ids, mask = padded([prompts[i] for i in order], side, extra)
            call = {**OPTIONS, "seed": 3, "row_ids": order, **options}
            tokens, logprobs = new(model.generate(ids, mask, strict=STRICT, **call))
            return {i: (tokens[row].tolist(), logprobs[row].tobytes()) for row, i in enumerate(order)}

        return rows

    def test_everything_at_once_and_one_by_one(self, rows):
        whole = rows([0, 1, 2, 3, 4, 5])
        for order in ([0], [1], [5], [3, 2], [4, 0, 2], [5, 4, 3, 2, 1, 0]):
            found = rows(order, side="right", extra=len(order))
            assert found == {i: whole[i] for i in order}


def job(spec: dict[str, Any], directory: Path) -> dict[str, np.ndarray]:
    """A job of the benchmark, in its own process."""
    request, answer = directory / "spec.json", directory / "out.npz"
    request.write_text(json.dumps(spec), encoding="utf-8")
    script = REPOSITORY / "benchmarks" / "reproducibility_jobs.py"
    subprocess.run([sys.executable, script, request, answer], check=True, capture_output=True)
    with np.load(answer) as archive:
        return dict(archive)


@pytest.fixture
def spec(prompts) -> dict[str, Any]:
    short = [*prompts, prompts[0][:2], prompts[1][:2]]
    modes = {"sampled": HOT}
    return {"prompts": short, "long": [], "new_tokens": 16, "modes": modes, "seeds": [3], "weights": ["float32"]}


@pytest.mark.slow
def test_eight_devices_and_another_process(model, spec, tmp_path):
    """Rows over a mesh of eight simulated devices, in another process: the tokens that this process gives."""
    result = job({**spec, "job": "mesh"}, tmp_path)
    ids, mask = padded(spec["prompts"], "left")
    tokens, logprobs = new(model.generate(ids, mask, seed=3, **OPTIONS))
    for name in ("one", "eight"):
        np.testing.assert_array_equal(result[f"float32/sampled/{name}/tokens"][0], tokens)
        np.testing.assert_allclose(result[f"float32/sampled/{name}/logprobs"][0], logprobs, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_cold_and_warm_compile_cache(model, spec, tmp_path):
    """Executables from the disk give the same bits as those just compiled, and as those of this process."""
    variation = {"base": {"batches": [list(range(8))]}}
    ids, mask = padded(spec["prompts"], "left")
    tokens, logprobs = new(model.generate(ids, mask, seed=3, **OPTIONS))
    for warm in (False, True):
        result = job({**spec, "job": "generate", "variations": variation, "cache": str(tmp_path / "cache")}, tmp_path)
        assert bool(json.loads(str(result["about"]))["cache_hits"]) == warm
        np.testing.assert_array_equal(result["float32/sampled/base/tokens"][0], tokens)
        assert result["float32/sampled/base/logprobs"][0].tobytes() == logprobs.tobytes()


@pytest.mark.slow
def test_draws_from_given_logits(spec, tmp_path):
    """L0: given equal logits, equal tokens, however the draws are arranged."""
    result = job({**spec, "job": "draws", "draws": "all", "positions": 128}, tmp_path)
    base = result.pop("base")
    result.pop("about")
    assert len(np.unique(base)) > 100
    assert len(result) == 6
    for name, tokens in result.items():
        np.testing.assert_array_equal(tokens, base, err_msg=name)
