"""GGUF files: every count, offset, name and field is held against the rest of the file."""

import struct
from pathlib import Path

import numpy as np
import pytest

from jaxgen.convert.formats.ggml_blocks import FLOATS, FOUR_BITS
from jaxgen.convert.formats.gguf_header import BLOCKS
from jaxgen.convert.load import AutoModelForCausalLM, check_tensors, open_checkpoint
from jaxgen.errors import CheckpointError, JaxgenError, UnsupportedError
from tests.gguf_files import METADATA, SHAPE, gguf_bytes, write_gguf
from tests.hf_files import hf_tensors


def opened(path: Path):
    config, checkpoint, stored_as = open_checkpoint(path)
    check_tensors(checkpoint, config, stored_as)
    return config, checkpoint, stored_as


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_a_file_is_the_model_that_it_says(tmp_path, kind, tied):
    write_gguf(tmp_path / "m.gguf", kind=kind, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype="float32", device_map="cpu")
    config = model.config
    assert (config.rope_theta, config.tie_word_embeddings, config.max_position_embeddings) == (1e6, tied, 64)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    expected = hf_tensors(SHAPE | {"tie_word_embeddings": tied})["model.layers.1.mlp.down_proj.weight"]
    weight = model.model.layers[1].mlp.down_proj.weight[...]
    values = np.asarray(weight) if kind == "F32" else np.asarray(weight.dequantize())
    np.testing.assert_allclose(values, expected, atol=0 if kind == "F32" else 0.5)


def test_every_kind_of_block_is_read():
    assert BLOCKS.keys() == {*FOUR_BITS, *FLOATS}


def count_of_tensors(data: bytes, change: int) -> bytes:
    return data[:8] + struct.pack("<Q", struct.unpack_from("<Q", data, 8)[0] + change) + data[16:]


def count_of_fields(data: bytes, change: int) -> bytes:
    return data[:16] + struct.pack("<Q", struct.unpack_from("<Q", data, 16)[0] + change) + data[24:]


@pytest.mark.parametrize("change", [-2, -1, 1, 2, 1 << 60])
@pytest.mark.parametrize("count", [count_of_tensors, count_of_fields])
@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_believed_only_if_the_file_ends_where_they_say(tmp_path, count, change, tied):
    path = tmp_path / "m.gguf"
    path.write_bytes(count(gguf_bytes(tied=tied), change))
    with pytest.raises(JaxgenError, match=r"m\.gguf"):
        opened(path)


@pytest.mark.parametrize("more", [1, 32, 4096, -1, -32])
def test_a_file_ends_where_its_last_tensor_ends(tmp_path, more):
    path, data = tmp_path / "m.gguf", gguf_bytes()
    path.write_bytes(data + bytes(more) if more > 0 else data[:more])
    with pytest.raises(CheckpointError, match=r"ends at byte \d+, and not where the file ends"):
        opened(path)


def test_the_last_tensor_need_not_be_padded(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    end = max(info.end for info in opened(path)[1].tensors.values())
    assert end < path.stat().st_size
    path.write_bytes(path.read_bytes()[:end])
    opened(path)


@pytest.mark.parametrize("name, other, message", [
    ("llama.rope.freq_base", "mlama.rope.freq_base", "'mlama.rope.freq_base' is of no known kind"),
    ("llama.rope.freq_base", "llama.rope.freq_bare", "llama.rope.freq_bare=.* is not supported"),
    ("llama.rope.freq_base", None, "llama.rope.freq_base is missing"),
    ("llama.context_length", None, "llama.context_length is missing"),
    ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eos_tokem_id", "eos_token_id is missing"),
    ("tokenizer.ggml.eos_token_id", None, "eos_token_id is missing"),
    ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.bns_token_id", "bos_token_id is missing, and .*bns_token_id"),
    ("tokenizer.ggml.padding_token_id", "tokenizer.ggmm.padding_token_id", "padding_token_id is missing"),
    ("general.architecture", "general.arquitecture", "general.architecture=None is not supported"),
    ("general.name", "split.cound", "'split.cound' is of no known kind"),
    ("general.name", "general\nname", "a field is called"),
    ("general.name", "", "a field is called ''"),
])  # fmt: skip
def test_damaged_names_of_fields_are_noticed(tmp_path, name, other, message):
    metadata = {name: None} | ({} if other is None else {other: METADATA[name]})
    with pytest.raises(JaxgenError, match=message):
        opened(write_gguf(tmp_path / "m.gguf", metadata))


@pytest.mark.parametrize("name, value, message", [
    ("llama.rope.freq_base", 10000, "freq_base=10000 must be a floating-point number"),
    ("llama.rope.freq_base", float("nan"), "rope_theta=nan"),
    ("llama.attention.head_count", [4, 4], "num_attention_heads=GgufArray"),
    ("llama.attention.head_count", 4.0, r"num_attention_heads=4\.0"),
    ("tokenizer.ggml.tokens", ["a"], "the vocabulary has 1 tokens, but 24 embeddings"),
    ("tokenizer.ggml.eos_token_id", 2**32 - 1, "eos_token_id=4294967295"),
    ("general.alignment", 48, "general.alignment=48 is not a power of two"),
    ("general.alignment", 64, "begins at byte|where the file ends"),
    ("split.count", 2, "split"),
])  # fmt: skip
def test_values_that_cannot_be(tmp_path, name, value, message):
    with pytest.raises(JaxgenError, match=message):
        opened(write_gguf(tmp_path / "m.gguf", {name: value}))


@pytest.mark.parametrize("fields", [
    {"quantize.imatrix.file": "x.dat"}, {"mradermacher.quantize_version": 2}, {"general.url": "x"},
    {"tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": "{{ x }}"},
    {"tokenizer.ggml.padding_token_id": None, "tokenizer.ggml.unknown_token_id": 0}, {"split.count": 0},
    {"llama.rope.scaling.type": "none", "llama.expert_count": 0, "llama.attention.key_length": 8},
])  # fmt: skip
def test_fields_that_real_files_have_besides(tmp_path, fields):
    opened(write_gguf(tmp_path / "m.gguf", fields))


@pytest.mark.parametrize("version, error, message", [
    (2, None, ""), (1, CheckpointError, "version 1"), (4, CheckpointError, "version 4"),
    (3 << 24, UnsupportedError, "big-endian"),
])  # fmt: skip
def test_versions(tmp_path, version, error, message):
    path, data = tmp_path / "m.gguf", gguf_bytes()
    path.write_bytes(data[:4] + struct.pack("<I", version) + data[8:])
    if error is None:
        opened(path)
    else:
        with pytest.raises(error, match=message):
            opened(path)


def test_an_array_without_end_is_refused_at_once(tmp_path):
    path, data = tmp_path / "m.gguf", gguf_bytes()
    for name in (b"tokenizer.ggml.scores", b"tokenizer.ggml.tokens"):
        place = data.index(name) + len(name) + 8  # behind the type and that of the items
        path.write_bytes(data[:place] + struct.pack("<Q", 1 << 60) + data[place + 8 :])
        with pytest.raises(CheckpointError, match=r"the file ends before|ends early"):
            opened(path)


def test_millions_of_entries_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxgen.convert.formats.gguf_header._MOST_ENTRIES", 100)
    with pytest.raises(CheckpointError, match="more than 100 entries of metadata"):
        opened(write_gguf(tmp_path / "m.gguf"))


def test_a_text_as_long_as_the_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxgen.convert.formats.gguf_header._MOST_TEXT", 1000)
    with pytest.raises(CheckpointError, match=r"a text of 1001 bytes at byte .* is longer than 1000"):
        opened(write_gguf(tmp_path / "m.gguf", {"general.name": "x" * 1001}))
