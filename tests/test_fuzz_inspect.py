"""`jaxgen inspect` of damaged checkpoints: a table or one typed error, whatever config.json and headers claim."""

import json
import random
import shutil
from pathlib import Path

import pytest

from jaxgen.convert.inspect import describe
from jaxgen.errors import CheckpointError, JaxgenError
from tests.formats.files import UNIFORM
from tests.gguf_files import gguf_bytes
from tests.helpers import some_slow
from tests.hf_files import CONFIG, hf_tensors, write_hf
from tests.mutate import mutate_bytes, mutate_json

QUANTISED = ("gptq-v1-symmetric", "awq", "autoround-gptq", "compressed-g-idx")


def described(directory: Path) -> str:
    """What inspect says, or the error that it has; anything else fails."""
    try:
        return describe(directory)
    except JaxgenError as error:
        return str(error)


def test_as_many_layers_as_the_config_claims(tmp_path):
    write_hf(tmp_path, CONFIG | {"num_hidden_layers": 10**6}, hf_tensors(CONFIG))
    with pytest.raises(CheckpointError, match="num_hidden_layers=1000000, the weights have 2"):
        describe(tmp_path)


def test_tensors_that_the_config_does_not_imply(tmp_path):
    write_hf(tmp_path, CONFIG | {"hidden_size": 16}, hf_tensors(CONFIG))
    with pytest.raises(CheckpointError, match=r"has shape \[11, 8\], but config\.json implies \[11, 16\]"):
        describe(tmp_path)


@pytest.mark.parametrize("case", some_slow(["floats", *QUANTISED], soak=lambda case: case != "floats"))
def test_damaged_configs(tmp_path, case):
    if case == "floats":
        fields = CONFIG | {"rope_theta": 1e4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
        write_hf(tmp_path, fields, hf_tensors(CONFIG))
    else:
        shutil.copytree(UNIFORM / case, tmp_path, dirs_exist_ok=True)
    path, draw = tmp_path / "config.json", random.Random(case)
    fields, said = json.loads(path.read_text()), set()
    for _ in range(120):
        path.write_text(mutate_json(draw, fields))
        said.add(described(tmp_path))
    assert len(said) > 40 and max(map(len, said)) < 5000


def test_damaged_headers(tmp_path):
    write_hf(tmp_path, CONFIG, hf_tensors(CONFIG))
    path, draw = tmp_path / "model.safetensors", random.Random(0)
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    for _ in range(300):
        path.write_bytes(mutate_bytes(draw, data[:length]) + data[length:])
        described(tmp_path)


def test_damaged_gguf(tmp_path):
    path, draw, data = tmp_path / "model.gguf", random.Random(0), gguf_bytes()
    path.write_bytes(data)
    assert "GGUF" in describe(path)
    for _ in range(200):
        path.write_bytes(mutate_bytes(draw, data[:2000]) + data[2000:])
        described(path)


def test_damaged_indexes(tmp_path):
    write_hf(tmp_path, CONFIG, hf_tensors(CONFIG), 3)
    path, draw = tmp_path / "model.safetensors.index.json", random.Random(0)
    fields = json.loads(path.read_text())
    for _ in range(150):
        path.write_text(mutate_json(draw, fields))
        described(tmp_path)
