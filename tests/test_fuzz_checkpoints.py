"""Some 6,500 damaged checkpoints of every format: one typed error, or exactly the model that the files still describe.

Nothing is compiled: tensors are read as loading reads them, and compared bit by bit with those of the whole checkpoint.
"""

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgen.convert.load import check_tensors, open_checkpoint
from jaxgen.errors import JaxgenError
from jaxgen.models.families import config_from_hf
from jaxgen.models.mistral import MistralConfig
from jaxgen.models.rope import plain_frequencies
from jaxgen.models.tensors import parameter_parts
from tests.families import CONFIGS as FAMILIES
from tests.formats.files import UNIFORM
from tests.formats.tables import BNB, MLX, bnb_tensors, is_linear, mlx_tensors, write_both
from tests.gguf_files import METADATA, gguf_bytes
from tests.helpers import some_slow
from tests.hf_files import CONFIG, hf_tensors, write_hf
from tests.mutate import mutate_bytes, mutate_json
from tests.reference.cases import v4_rope, v5_rope

INDEX = "model.safetensors.index.json"
FIELDS = CONFIG | {
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "sliding_window": 9, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float32", "hidden_act": "silu", "attention_bias": False,
}  # fmt: skip
Model = tuple[MistralConfig, dict[str, Any]]


def read(place: Path) -> Model | None:
    """Config and tensors, these as what they hold in order; None for a typed error. Anything else fails the test."""
    try:
        config, checkpoint, stored_as = open_checkpoint(place)
        check_tensors(checkpoint, config, stored_as)
        tensors = {}
        for part in (part for parts in parameter_parts(config).values() for part in parts):
            if stored_as is not None and stored_as.stored(part) is not None:
                weight = stored_as.weight(part)
                names = ("packed", "scale", "offset", "permutation", "table")
                tensors[part.name] = [bits(getattr(weight, name, None)) for name in names]
            else:
                buffer = np.empty(part.shape, np.float32)
                checkpoint.read_into(part.name, buffer)
                tensors[part.name] = bits(buffer)
    except JaxgenError as error:
        assert len(str(error)) < 6000 and "\n" not in str(error)
        return None
    return config, tensors


def bits(array: Any) -> Any:
    return None if array is None else (str(array.dtype), array.shape, np.ascontiguousarray(array).tobytes())


def described(fields: dict[str, Any]) -> dict[str, Any]:
    """The settings in a config.json, read without looking at what they mean."""
    defaults = dict(vars(MistralConfig()))
    said = {name: fields.get(name, default) for name, default in defaults.items()}
    thetas = (fields.get("rope_theta"), (fields.get("rope_parameters") or {}).get("rope_theta"))
    said["rope_theta"] = next((theta for theta in thetas if theta is not None), defaults["rope_theta"])
    if fields.get("head_dim") is None:
        said["head_dim"] = said["hidden_size"] // said["num_attention_heads"]
    said |= {name: float(said[name]) for name in ("rms_norm_eps", "rope_theta")}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}


class Tally:
    """Counts outcomes, so that a test of nothing does not pass."""

    def __init__(self):
        self.errors = self.same = self.other = 0

    def judge(self, found: Model | None, whole: Model, may_say: Callable[[MistralConfig], bool], what: str) -> None:
        """Fails unless `found` is an error, the `whole` model, or its tensors under settings that the file says."""
        if found is None:
            self.errors += 1
            return
        changed = [name for name in found[1] if found[1][name] != whole[1].get(name)]
        assert not changed and found[1].keys() == whole[1].keys(), f"other tensors {changed}: {what}"
        if found[0] == whole[0]:
            self.same += 1
            return
        assert may_say(found[0]), f"{found[0]}: {what}"
        self.other += 1


def judge_config(tally: Tally, directory: Path, text: str | bytes, whole: Model) -> None:
    (directory / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    found = read(directory)

    def says(config: MistralConfig) -> bool:
        return vars(config) == described(json.loads(text))

    tally.judge(found, whole, says, repr(text))
    if found is not None:  # also where the settings are those of before: they are what the file says
        assert says(found[0]), text


@pytest.mark.parametrize("spelling", some_slow([v4_rope, v5_rope], soak=lambda spelling: spelling is v4_rope))
def test_config_json(tmp_path, spelling):
    fields = FIELDS | spelling(1e6)
    write_hf(tmp_path, fields, hf_tensors(fields))
    whole, tally, draw = read(tmp_path), Tally(), random.Random(0)
    assert whole is not None
    text = json.dumps(fields).encode()
    for place in range(len(text)):  # one bit of every byte
        changed = text[:place] + bytes([text[place] ^ 1 << draw.randrange(8)]) + text[place + 1 :]
        judge_config(tally, tmp_path, changed, whole)
    for _ in range(250):
        judge_config(tally, tmp_path, mutate_json(draw, fields), whole)
    assert tally.errors > 400 and tally.other > 20, vars(tally)


@pytest.mark.parametrize("name", some_slow([*FAMILIES], lambda name: name in ("llama, yarn", "qwen3")))
def test_config_json_of_other_families(name):
    """An error of one line, or a config that its own spelling gives again, with positions that are numbers."""
    whole, tally, draw = config_from_hf(FAMILIES[name]), Tally(), random.Random(name)
    for _ in range(60):
        text = mutate_json(draw, FAMILIES[name])
        try:
            config = config_from_hf(json.loads(text))
        except JaxgenError as error:
            assert len(str(error)) < 6000 and "\n" not in str(error)
            tally.errors += 1
            continue
        assert config_from_hf(config.to_hf()) == config, text
        plain = plain_frequencies(config.rotary_size, config.rope_theta)
        if config.rope_scaling is not None:
            plain = config.rope_scaling.frequencies(plain, config.rope_theta)
        assert np.isfinite(plain).all(), text
        tally.same += config == whole
        tally.other += config != whole
    assert tally.errors > 20 and tally.other > 0, vars(tally)


@pytest.mark.slow
def test_a_tied_model(tmp_path):
    fields = FIELDS | {"tie_word_embeddings": True, "rope_theta": 1e6}
    write_hf(tmp_path, fields, hf_tensors(fields))
    whole, tally, draw = read(tmp_path), Tally(), random.Random(1)
    assert whole is not None
    for _ in range(150):
        judge_config(tally, tmp_path, mutate_json(draw, fields), whole)
    assert tally.errors > 50


def test_headers_of_safetensors(tmp_path):
    write_hf(tmp_path, CONFIG, hf_tensors(CONFIG, "BF16"))
    path, draw, tally = tmp_path / "model.safetensors", random.Random(2), Tally()
    whole, data = read(tmp_path), path.read_bytes()
    assert whole is not None
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])

    def judge(changed: bytes) -> None:
        path.write_bytes(changed)
        tally.judge(read(tmp_path), whole, lambda config: False, repr(changed[:length]))

    for change in (-8, -1, 1, 8, 1 << 20, 1 << 62):
        judge(max(0, length - 8 + change).to_bytes(8, "little") + data[8:])
    for text in (*numbers_by_one(header), *(mutate_json(draw, header) for _ in range(200))):
        judge(len(text.encode()).to_bytes(8, "little") + text.encode() + data[length:])
    for _ in range(300):
        judge(mutate_bytes(draw, data[:length]) + data[length:])
    for changed in (data[:-1], data + b"\0", data + data, data[:length], data[:7], b""):
        judge(changed)
    assert tally.errors > 400


def numbers_by_one(header: dict[str, Any]) -> Iterator[str]:
    """A header of safetensors with one of its numbers one more or less."""
    for entry in (entry for name, entry in header.items() if name != "__metadata__"):
        for numbers in (entry["shape"], entry["data_offsets"]):
            for place, number in enumerate(numbers):
                for change in (-1, 1):
                    numbers[place] = number + change
                    yield json.dumps(header)
                numbers[place] = number


@pytest.mark.slow
def test_indices(tmp_path):
    weight_map = write_hf(tmp_path, CONFIG, hf_tensors(CONFIG), shards=3)
    whole, draw, tally = read(tmp_path), random.Random(3), Tally()
    assert whole is not None
    index = {"metadata": {"total_size": 2 * 1000}, "weight_map": weight_map}
    text = json.dumps(index).encode()
    for attempt in range(500):
        changed = mutate_json(draw, index).encode() if attempt % 2 else mutate_bytes(draw, text)
        (tmp_path / INDEX).write_bytes(changed)
        tally.judge(read(tmp_path), whole, lambda config: False, repr(changed))
    assert tally.errors > 200 and tally.same > 20, vars(tally)


def test_quantize_config_json(tmp_path):
    fields = json.loads((UNIFORM / "gptq-v1-asymmetric" / "config.json").read_text())
    settings = fields.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "model.safetensors").write_bytes((UNIFORM / "gptq-v1-asymmetric" / "model.safetensors").read_bytes())
    path, draw, tally = tmp_path / "quantize_config.json", random.Random(4), Tally()
    text = json.dumps({name: settings[name] for name in ("bits", "group_size", "desc_act", "sym")}).encode()
    path.write_bytes(text)
    whole = read(tmp_path)
    assert whole is not None
    for attempt in range(150):
        path.write_bytes(mutate_bytes(draw, text) if attempt % 2 else mutate_json(draw, json.loads(text)).encode())
        tally.judge(read(tmp_path), whole, lambda config: False, repr(path.read_bytes()))
    assert tally.errors > 80 and tally.same > 0, vars(tally)


QUANTISED = [path.name for path in sorted(UNIFORM.iterdir()) if path.is_dir()]


def bitsandbytes(directory: Path) -> Path:
    return write_both(directory, {"quantization_config": BNB}, bnb_tensors, is_linear)[0]


def mlx(directory: Path) -> Path:
    return write_both(directory, {"quantization": MLX, "quantization_config": MLX}, mlx_tensors, lambda name: True)[0]


@pytest.mark.parametrize("case", some_slow([*QUANTISED, bitsandbytes, mlx], soak=lambda case: case not in ("awq", mlx)))
def test_quantisation_configs(tmp_path, case):
    if isinstance(case, str):
        directory = tmp_path
        for name in ("config.json", "model.safetensors"):
            (directory / name).write_bytes((UNIFORM / case / name).read_bytes())
    else:
        directory = case(tmp_path)
    fields = json.loads((directory / "config.json").read_text())
    whole, tally, draw = read(directory), Tally(), random.Random(str(case)[:20] if isinstance(case, str) else 5)
    assert whole is not None
    name = "quantization" if "quantization" in fields else "quantization_config"
    settings = fields[name]
    for attempt in range(100):
        if attempt % 2:
            changed = json.loads(mutate_json(draw, settings))
            if lost := LAYOUTS & settings.keys() - {key for key in changed if changed[key] is not None}:
                changed |= {key: settings[key] for key in lost if not renamed(key, changed)}
        else:
            changed = renaming(draw, settings)
        for field in (name, "quantization_config") if name == "quantization" else (name,):
            fields[field] = changed
        judge_config(tally, directory, json.dumps(fields), whole)
    assert tally.errors >= 15, vars(tally)


# Of which layout zero points are is said here only: a file without is one of the default layout.
LAYOUTS = {"checkpoint_format", "format", "packing_format"}


def renamed(key: str, fields: dict[str, Any]) -> bool:
    return any(len(name) == len(key) and sum(map(str.__ne__, name, key)) == 1 for name in fields)


def renaming(draw: random.Random, value: dict[str, Any]) -> dict[str, Any]:
    """One key, of this object or one inside, with a bit flipped."""
    value = json.loads(json.dumps(value))
    holders = [value, *(inner for inner in value.values() if isinstance(inner, dict) and inner)]
    holder = draw.choice(holders)
    key = draw.choice(list(holder))
    place = draw.randrange(len(key))
    holder[key[:place] + chr(ord(key[place]) ^ 1 << draw.randrange(5)) + key[place + 1 :]] = holder.pop(key)
    return value


def nested(name: str, shape: tuple[int, int], seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """As `bnb_tensors`, with scales that are quantised too; the values are not needed."""
    tensors, values = bnb_tensors(name, shape, seed)
    blocks = len(tensors[f"{name}.absmax"])
    state = json.loads(tensors.pop(f"{name}.quant_state.bitsandbytes__nf4").tobytes())
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
    tensors |= {
        f"{name}.absmax": np.arange(blocks).astype(np.uint8),
        f"{name}.nested_absmax": np.ones(-(-blocks // 256), np.float32),
        f"{name}.nested_quant_map": np.linspace(-1, 1, 256, dtype=np.float32),
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    return tensors, values


@pytest.mark.slow
@pytest.mark.parametrize("encode", [bnb_tensors, nested])
def test_what_bitsandbytes_says_of_a_tensor(tmp_path, encode):
    directory = write_both(tmp_path, {"quantization_config": BNB}, encode, is_linear)[0]
    path, draw, tally = directory / "model.safetensors", random.Random(6), Tally()
    whole, data = read(directory), path.read_bytes()
    assert whole is not None
    start = data.index(b'{"quant_type"')
    state = data[start : data.index(b"}", start) + 1]
    bit = (state[:at] + bytes([state[at] ^ 1 << draw.randrange(8)]) + state[at + 1 :] for at in range(len(state)))
    values = (mutate_json(draw, json.loads(state)).encode() for _ in range(100))
    for changed in (*bit, *(text.ljust(len(state)) for text in values if len(text) <= len(state))):
        path.write_bytes(data[:start] + changed + data[start + len(state) :])
        found = read(directory)
        if found is not None and json.loads(changed).get("nested_offset") != json.loads(state).get("nested_offset"):
            continue  # any number may be one
        tally.judge(found, whole, lambda config: False, repr(changed))
    assert tally.errors > 80, vars(tally)


# GGUF.

_GGUF_FIELDS = {
    "llama.context_length": "max_position_embeddings",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "llama.rope.freq_base": "rope_theta",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}


def gguf_says(data: bytes, whole: bytes) -> Callable[[MistralConfig], bool]:
    """Whether a config has the values that stand in the file at the places of the fields."""
    said = {}
    for name, field in _GGUF_FIELDS.items():
        place = whole.index(name.encode()) + len(name) + 4
        said[field] = struct.unpack_from("<f" if isinstance(METADATA[name], float) else "<I", data, place)[0]
    return lambda config: all(getattr(config, field) == value for field, value in said.items())


def damaged_gguf(data: bytes, header: int, odd: int, draw: random.Random) -> Iterator[bytes]:
    """One bit of every second byte of the header, numbers in it by one, and the file cut and continued."""
    for place in range(odd, header, 2):
        yield data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
    places = [8, 16, *(place for place in range(24, header - 8) if not any(data[place + 4 : place + 8]))]
    for place in places[odd::4]:
        (number,) = struct.unpack_from("<Q", data, place)
        for change in (-1, 1):
            yield data[:place] + struct.pack("<Q", (number + change) % 2**64) + data[place + 8 :]
    for _ in range(150):
        yield mutate_bytes(draw, data[:header]) + data[header:]
    for more in (1, 31, 32, 64, 1000):
        yield data + bytes(more)
        yield data[:-more]


@pytest.mark.slow
@pytest.mark.parametrize("kind, tied", [("Q4_0", False), ("F32", True)])
def test_gguf(tmp_path, kind, tied):
    path, data, tally = tmp_path / "m.gguf", gguf_bytes(kind=kind, tied=tied), Tally()
    path.write_bytes(data)
    whole, draw = read(path), random.Random(7)
    assert whole is not None
    last = data.rindex(b".weight") + len(b".weight")  # its name; then dimensions, type and offset
    header = last + 4 + 8 * struct.unpack_from("<I", data, last)[0] + 12
    for changed in damaged_gguf(data, header, tied, draw):
        path.write_bytes(changed)
        tally.judge(read(path), whole, gguf_says(changed, data), "a field of the file")
    assert tally.errors > 1000 and tally.same > 20 and tally.other > 5, vars(tally)
