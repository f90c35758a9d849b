"""What each device of a layout has, as it is said before anything is loaded; and which layout "auto" takes."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from jaxgen import Int4Config, cli
from jaxgen.convert.assemble import Assembler
from jaxgen.convert.load import open_checkpoint
from jaxgen.convert.shapes import shapes_of
from jaxgen.errors import JaxgenError
from jaxgen.generation.prompts.memory import usual_length
from jaxgen.parallel import fit
from tests.family_files import load, written
from tests.formats.files import UNIFORM
from tests.helpers import some_slow
from tests.hf_files import CONFIG, hf_tensors, write_hf

GROUPS = CONFIG | {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
CASES: dict[str, Any] = {
    "llama, as Llama 3.2": None,
    "olmo2": None,  # which has norms of all heads
    "mixtral": None,
    "phi3": None,  # whose projections are stacked in the files
    "groups": Int4Config(group_size=32),
    "rows": Int4Config(group_size=-1),
    "awq": None,
}


def place_of(case: str, directory: Path) -> Path:
    if case == "awq":
        return UNIFORM / case
    if case in ("groups", "rows"):
        write_hf(directory, GROUPS, hf_tensors(GROUPS))
        return directory
    return written(directory, case)


def shares(place: Path, quantization: Any = None) -> tuple[Any, list[fit.Share]]:
    config, checkpoint, stored_as = open_checkpoint(place)
    shapes = shapes_of(Assembler(checkpoint, np.dtype("float32"), stored_as, quantization), config)
    return config, fit.shares(config, shapes, 4, 8)


@pytest.mark.parametrize("case", some_slow(CASES, lambda case: case not in ("mixtral", "groups", "awq")))
def test_each_device_has_the_bytes_that_were_said(case: str, tmp_path: Path):
    place = place_of(case, tmp_path)
    config, (_, two, *_) = shares(place, CASES[case])
    assert (two.sizes, two.refusal) == ({"model": 2, "data": 4}, None)
    model = load(place, device_map=two.sizes, quantization_config=CASES[case])
    on_devices: Counter[Any] = Counter()
    for array in jax.tree.leaves(nnx.state(model)):
        for shard in array.addressable_shards:
            on_devices[shard.device] += shard.data.nbytes
    assert set(on_devices.values()) == {two.weights}
    assert len(on_devices) == 8
    slots = config.cache_slots(usual_length(config))
    cache = jax.jit(lambda: model.as_traced().empty_cache(two.data, slots))()
    assert sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(cache)) == two.cache


def test_what_is_refused_says_why_as_loading_does(tmp_path: Path):
    refused = [share.refusal for share in shares(place_of("awq", tmp_path))[1]]
    assert refused[:2] == [None, None]
    assert "are not to be divided by 4: a device would not hold whole groups" in (refused[2] or "")
    with pytest.raises(JaxgenError, match=re.escape(refused[2] or "")):
        load(UNIFORM / "awq", device_map={"model": 4, "data": 2})


def test_inspect_says_what_fits_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place = written(tmp_path, "qwen3")  # of 97 tokens
    _, found = shares(place)
    memory = found[1].weights + found[1].cache
    assert cli.main(["inspect", str(place), "--devices", "8", "--memory", str(memory / 1e9)]) == 0
    _, table = capsys.readouterr().out.split("\n\n")
    assert "cache of a row of 128 tokens" in table
    lines = dict(line.strip().split(": ", 1) for line in table.splitlines()[1:] if " x " in line)
    assert list(lines) == ["model 1 x data 8", "model 2 x data 4", "model 4 x data 2", "model 8 x data 1"]
    assert "too much for" in lines["model 1 x data 8"]
    assert "; 4 rows fit" in lines["model 2 x data 4"]  # one in each of four groups
    assert "97 (vocab) are not to be divided by 2: each device has all" in table
    assert cli.main(["inspect", str(place), "--devices", "3"]) == 0
    assert "rows fit" not in capsys.readouterr().out  # of which simulated devices have none of their own
    assert cli.main(["inspect", str(place), "--devices", "0"]) == 2
    assert "--devices 0 must be from 1 to" in capsys.readouterr().err
    for memory in ("nan", "inf", "-1", "0"):
        assert cli.main(["inspect", str(place), "--devices", "2", "--memory", memory]) == 2
        assert f"--memory {memory} must be a number of gigabytes" in capsys.readouterr().err
    assert cli.main(["inspect", str(place), "--memory", "80"]) == 2
    assert "--memory is that of each of --devices" in capsys.readouterr().err


# What "auto" takes.


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """To have so many bytes free on every device."""
    return lambda size: monkeypatch.setattr(fit, "own_memory", lambda device: size)


@pytest.mark.parametrize("model", [1, 2, 4])
def test_auto_takes_the_fewest_parts_that_fit(
    model: int, tmp_path: Path, pretend: Any, caplog: pytest.LogCaptureFixture
):
    place = written(tmp_path, "llama, as Llama 3.2")
    config, found = shares(place)
    need = {share.model: fit.with_one_row(config, 4, share) for share in found}
    assert need[1] > need[2] > need[4]
    pretend(need[model])
    loaded = load(place, device_map="auto")
    if model == 1:
        assert loaded.layout is None
        assert not caplog.records
        return
    assert loaded.layout.mesh.size == 8
    assert loaded.layout.parts("mlp") == model
    assert f"device_map={{'model': {model}, 'data': {8 // model}}} takes all 8" in caplog.text
    assert caplog.text.count("device_map") == 2


def test_auto_asks_for_no_memory_of_cpus(tmp_path: Path):
    assert [fit.own_memory(device) for device in jax.devices()] == [None] * 8
    assert load(written(tmp_path, "llama, as Llama 3.2"), device_map="auto").layout is None


def test_auto_goes_by_what_a_family_allows(tmp_path: Path, pretend: Any):
    """AWQ's groups allow two parts: that is taken where only the weights fit, and named where not even they do."""
    place = UNIFORM / "awq"
    _, (_, two, *_) = shares(place)
    pretend(two.weights)
    assert load(place, device_map="auto").layout.parts("mlp") == 2
    pretend(two.weights - 1)
    message = rf"at least {two.weights / 1e9:.2f} GB on each of 8 devices.*\{{'model': 4, 'data': 2\}} is refused: "
    with pytest.raises(JaxgenError, match=message):
        load(place, device_map="auto")
