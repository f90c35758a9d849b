"""Records and replays: the JSON says what happened, and running it again says whether it happens again."""

import dataclasses
import gc
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from flax import nnx

import jaxgen
from jaxgen import JaxgenError, Record, Strict, cli, demo, replay
from jaxgen.records import record as record_module
from jaxgen.records.check import logprobs_sha256
from jaxgen.text.tokenizer import load_tokenizer
from tests.helpers import some_slow

SCHEMA = json.loads((Path(record_module.__file__).parent / "record.schema.json").read_text())
OLD = Path(__file__).parent / "reference" / "record_v1.json"


@pytest.fixture(scope="module")
def model():
    return jaxgen.AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(demo.path())


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return tokenizer(["A list of colors: red, blue", "Portugal is"], padding=True, return_tensors="np")


def test_what_is_in_it(model, inputs):
    """The JSON passes the schema, and its hashes are those that the system's own tool gives."""
    out = model.generate(**inputs, do_sample=True, seed=5, top_p=0.9, max_new_tokens=12, return_dict_in_generate=True)
    fields = json.loads(out.record.to_json())
    jsonschema.validate(fields, SCHEMA)
    weights = demo.path() / "model.safetensors"
    assert fields["model"]["files"] == {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}
    [entry] = fields["generations"]
    assert entry["prompt_ids"][1] == inputs["input_ids"][1][inputs["attention_mask"][1] == 1].tolist()
    width = inputs["input_ids"].shape[1]
    assert entry["output_ids"] == [r[width:][:n].tolist() for r, n in zip(out.sequences, out.lengths, strict=True)]
    assert entry["config"]["top_p"] == 0.9
    assert entry["key"] == {"impl": "threefry2x32", "data": [0, 5]}
    assert (entry["seed"], entry["row_ids"]) == (5, [0, 1])
    rows = [np.array(row, np.float32) for row in entry["logprobs"]]
    assert all((row == out.model_logprobs[i, : len(row)]).all() for i, row in enumerate(rows))
    assert entry["logprobs_sha256"] == hashlib.sha256(b"".join(row.tobytes() for row in rows)).hexdigest()


def test_no_names_of_this_machine(model, inputs, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/home/somebody --xla_cpu_enable_fast_math=false")
    text = model.generate(**inputs, return_dict_in_generate=True).record.to_json()
    for name in (socket.gethostname(), str(demo.path()), os.getcwd(), "/home/"):
        assert name not in text
    assert "--xla_cpu_enable_fast_math=false" in text


OPTIONS = {
    "greedy": {},
    "sampled": {"do_sample": True, "seed": 2**70, "row_ids": ["a", 2**63], "temperature": 1.5},
    "seeds": {"do_sample": True, "seed": [3, 4], "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "processors": {"bad_words_ids": [[14]], "sequence_bias": {(25, 3): -1.5}, "repetition_penalty": 1.2},
    "watermark": {"watermarking_config": jaxgen.WatermarkingConfig(bias=3.0)},
    "guided": {"guidance_scale": 1.5, "negative_prompt_ids": [[1, 25]]},
    "eos switched off": {"eos_token_id": None, "max_new_tokens": 30},
    "strict": {"strict": Strict(rows=4, tokens=64)},
    "drafted": {"prompt_lookup_num_tokens": 3},
    "int8 cache": {"cache_implementation": "quantized"},
}


@pytest.mark.parametrize(
    "name", some_slow(OPTIONS, ("beams", "drafted", "watermark", "guided", "int8 cache", "processors").__contains__)
)
def test_replays_identically(model, inputs, name):
    """From the JSON alone, whatever the options."""
    out = model.generate(**inputs, **{"max_new_tokens": 10, "return_dict_in_generate": True, **OPTIONS[name]})
    record = Record.from_json(out.record.to_json())
    jsonschema.validate(json.loads(record.to_json()), SCHEMA)
    result = replay(record, model)
    assert (result.status, result.exit_code) == ("identical", 0)


def changed(record, **fields):
    """The same record with other things in its only generation."""
    [entry] = record.generations
    return dataclasses.replace(record, generations=[{**entry, **fields}])


@pytest.mark.slow
def test_says_what_differs(model, inputs):
    out = model.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True)
    record, [entry] = out.record, out.record.generations
    ids = [row[:] for row in entry["output_ids"]]
    now, ids[1][2] = ids[1][2], 77
    result = replay(changed(record, output_ids=ids), model)
    assert (result.status, result.exit_code) == ("different", 1)
    before = [*entry["prompt_ids"][1], *ids[1][:2]]
    log_probs = np.asarray(model(jnp.array([before])).logits)[0, -1].astype(np.float64)
    probabilities = np.exp(log_probs - log_probs.max())
    probabilities /= probabilities.sum()
    assert result.message.startswith("first difference at row 1, token 2: recorded 77 (probability now ")
    assert f"now {now} (probability {probabilities[now]:.4g})" in result.message

    shorter = [entry["output_ids"][0][:4], entry["output_ids"][1]]
    message = replay(changed(record, output_ids=shorter), model).message
    assert message == "first difference at row 0, token 4: the record ends there, the replay goes on"

    logprobs = [[x - 0.25 for x in row] for row in entry["logprobs"]]
    result = replay(changed(record, logprobs=logprobs, logprobs_sha256="0" * 64), model)
    assert (result.exit_code, result.message) == (0, "same tokens, log-probabilities differ by 2.5e-01")


def test_rows_that_the_clock_stopped(model, inputs):
    """What they have is compared, and no more."""
    out = model.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True)
    [entry] = out.record.generations
    stopped = {name: [row[:3] for row in entry[name]] for name in ("output_ids", "logprobs")}
    stopped |= {"finish_reason": ["time"] * 2, "logprobs_sha256": logprobs_sha256(stopped["logprobs"])}
    timed = {"config": {**entry["config"], "max_time": 0.5}}
    assert replay(changed(out.record, **stopped, **timed), model).status == "identical"
    message = replay(changed(out.record, **stopped), model).message  # no clock was asked for
    assert message == "first difference at row 0, token 3: the record ends there, the replay goes on"
    whole = {"finish_reason": ["time", *entry["finish_reason"][1:]]}  # a row that is whole was not stopped
    message = replay(changed(out.record, **whole, **timed), model).message
    assert message == "finish_reason of row 0: recorded time, now length"


FIELDS: dict[str, dict[str, Any]] = {
    "finish_reason": {"finish_reason": ["eos", "length"]},
    "logprobs beside their digest": {"logprobs": [[-0.5] * 4] * 2},
    "a digest alone": {"logprobs_sha256": "0" * 64},
    "seed": {"seed": 4},
    "shapes": {"shapes": {"total": 4096}},
    "compiler_options": {"compiler_options": {"xla_flag": True}},
}


@pytest.mark.parametrize("name", FIELDS)
def test_identical_is_all_that_is_stated(model, inputs, name):
    """Not the tokens alone: an answer names what was altered, and where reading shows it the record is refused."""
    record = model.generate(**inputs, seed=3, max_new_tokens=4, return_dict_in_generate=True).record
    altered = {k: {**record.generations[0][k], **v} if isinstance(v, dict) else v for k, v in FIELDS[name].items()}
    result = replay(changed(record, **altered), model)
    assert result.status == ("different" if name == "finish_reason" else "same tokens")
    [field] = FIELDS[name]
    assert field.replace("logprobs", "log", 1).partition("_sha")[0] in result.message


@pytest.mark.parametrize("name", ["architecture", "config_sha256", "dtype", "weights"])
def test_identical_is_the_model_too(model, inputs, name):
    record = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True).record
    altered = dataclasses.replace(record, model={**record.model, name: "another"})
    result = replay(altered, model)
    assert result.status == "same tokens" and f"model.{name}: recorded" in result.message


class TestWhichModelIsLoaded:
    """Nothing that a record names, unless one says so; and it says what that would be, and from where."""

    REVISION = "0123456789" * 4

    @pytest.fixture
    def loaded(self, monkeypatch) -> list[Any]:
        """What is asked of the loader, which finds nothing."""
        asked: list[Any] = []

        def from_pretrained(place: Any, **options: Any) -> Any:
            asked.append((place, options.get("revision")))
            raise JaxgenError("not there")

        monkeypatch.setattr(jaxgen.AutoModelForCausalLM, "from_pretrained", from_pretrained)
        return asked

    def record(self, name: str | None, revision: str | None = None) -> Record:
        record = Record.load(OLD)
        return dataclasses.replace(record, model={**record.model, "id": name, "revision": revision})

    def test_a_hub_id_needs_a_word(self, loaded):
        record = self.record("some/model", self.REVISION)
        result = replay(record)
        assert result.exit_code == 2 and loaded == []
        for part in (f"/some/model, revision {self.REVISION}", "load_model=True", "--load-model", "pass the model"):
            assert part in result.message
        assert "its newest revision" in replay(self.record("some/model")).message
        assert "not there" in replay(record, load_model=True).message
        assert loaded == [("some/model", self.REVISION)]

    @pytest.mark.parametrize("name", ["/tmp", "../models", "a/../..", "~/model", "C:\\model", "a/b/c", "", "x\n"])
    def test_a_path_is_never_loaded(self, loaded, name):
        for word in (False, True):
            result = replay(self.record(name), load_model=word)
            assert result.exit_code == 2 and "no id of the Hugging Face hub" in result.message
        assert loaded == []

    def test_a_directory_is_not_taken_for_a_hub_id(self, loaded, tmp_path, monkeypatch):
        (tmp_path / "some" / "model").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        result = replay(self.record("some/model"), load_model=True)
        assert result.exit_code == 2 and str(tmp_path / "some" / "model") in result.message
        assert loaded == []

    def test_on_the_command_line(self, loaded, tmp_path, capsys):
        path = tmp_path / "record.json"
        self.record("some/model", self.REVISION).save(path)
        assert cli.main(["replay", str(path)]) == 2
        assert "--load-model" in capsys.readouterr().out and loaded == []
        assert cli.main(["replay", str(path), "--load-model"]) == 2
        assert f"/some/model, revision {self.REVISION}" in capsys.readouterr().err
        assert loaded == [("some/model", self.REVISION)]


def test_what_cannot_be_compared(model, inputs):
    def no_commas(tokens, lengths, logits):
        return logits.at[:, 14].set(-jnp.inf)

    out = model.generate(**inputs, logits_processor=no_commas, max_new_tokens=6, return_dict_in_generate=True)
    result = replay(out.record, model)
    assert result.exit_code == 2
    assert result.message.startswith("cannot compare because generations[0] used logits_processor")
    assert replay(out.record, model, logits_processor=no_commas).status == "identical"

    sampled = model.generate(**inputs, do_sample=True, seed=1, return_dict_in_generate=True).record
    assert "sampler version 0" in replay(changed(sampled, sampler_version=0), model).message
    nameless = dataclasses.replace(sampled, model={**sampled.model, "id": None})
    assert "pass the model" in replay(nameless).message
    other = dataclasses.replace(sampled, model={**sampled.model, "parameters_sha256": "0" * 64})
    assert "the weights are not the recorded ones" in replay(other, model).message


def test_what_the_default_was_is_written_down(inputs, model):
    """20 new tokens, if a row's context has room for them; else as many as it has, which no field says."""
    out = model.generate(**inputs, return_dict_in_generate=True)
    assert out.record.generations[0]["config"]["max_new_tokens"] == 20
    assert replay(out.record, model).status == "identical"
    nearly_full = np.full((1, model.config.max_position_embeddings - 3), 5)
    record = model.generate(nearly_full, return_dict_in_generate=True).record
    assert "max_new_tokens" not in record.generations[0]["config"]
    assert [len(row) for row in record.generations[0]["output_ids"]] == [3]
    assert replay(record, model).status == "identical"


def test_trained_weights_are_other_weights(inputs):
    """What counts is what is in memory, not what the files say."""
    model: Any = jaxgen.AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")
    record = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True).record
    model.lm_head.weight = nnx.Param(model.lm_head.weight[...] + 1e-3)
    assert replay(record, model).exit_code == 2
    assert replay(record).status == "identical"  # by its id: the demo


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group_size", "said"),
    some_slow([(64, "Int4, groups of 64"), (-1, "Int4, groups of 256")], soak=lambda case: case[0] < 0),
)
def test_quantised_while_loading(inputs, group_size, said):
    """The record says so, and replay does it again; -1 is a group per row, as wide as that is."""
    model = jaxgen.AutoModelForCausalLM.from_pretrained(
        demo.path(), dtype="float32", quantization_config=jaxgen.Int4Config(group_size=group_size)
    )
    record = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True).record
    assert said in record.model["weights"]
    assert replay(record).status == "identical"


def test_bad_records(tmp_path):
    path = tmp_path / "record.json"
    for text, message in (
        ("{", "no JSON"),
        ("[1]", "jaxgen.record"),
        ('{"schema": "jaxgen.record", "version": 2}', "version 2.*1 to 1"),
        ('{"schema": "jaxgen.record", "version": 1}', "model is missing"),
        ('{"schema": "jaxgen.record", "version": 1, "model": {}, "tokenizer": {}, "environment": {}, '
         '"generations": [{}]}', r"generations\[0\]\.config is missing|model\.id is missing"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(JaxgenError, match=message) as caught:
            Record.load(path)
        assert str(path) in str(caught.value)
    with pytest.raises(JaxgenError, match="cannot be read"):
        Record.load(tmp_path / "missing.json")


def test_a_file_is_whole_or_not_there(model, inputs, tmp_path, monkeypatch):
    record = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True).record
    path = tmp_path / "record.json"
    path.write_text("before")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record_module.os, "fsync", full)
    with pytest.raises(JaxgenError, match="not written"):
        record.save(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_old_record_still_says_the_same():
    """Written by version 1; the tokens are those of every supported JAX."""
    assert replay(OLD).status in ("identical", "same tokens")


def test_command_line(tmp_path, capsys):
    path = tmp_path / "record.json"
    prompts = ["1, 2, 3", "Portugal is", "A list of colors: red, blue"]
    options = ["--do-sample", "--seed", "3", "--batch-size", "2", "--max-new-tokens", "8"]
    assert cli.main(["generate", *prompts, *options, "--record", str(path)]) == 0
    capsys.readouterr()
    assert [len(entry["prompt_ids"]) for entry in Record.load(path).generations] == [2, 1]
    assert cli.main(["replay", str(path)]) == 0
    assert capsys.readouterr().out == "identical\n"
    text = path.read_text()
    fields = json.loads(text)
    fields["generations"][1]["output_ids"][0][0] += 1
    path.write_text(json.dumps(fields))
    assert cli.main(["replay", str(path)]) == 1
    assert capsys.readouterr().out.startswith("generation 1: first difference at row 0, token 0: ")
    fields["model"]["id"] = None
    path.write_text(json.dumps(fields))
    assert cli.main(["replay", str(path)]) == 2
    assert cli.main(["replay", str(path), "--model", str(demo.path())]) == 1
    assert cli.main(["generate", "1, 2", "--stream", "--record", str(path)]) == 2


def test_pipeline_has_one_too(model, tokenizer):
    generator = jaxgen.pipeline("text-generation", model=model, tokenizer=tokenizer)
    results = generator(["1, 2, 3", "Portugal is", "4, 5"], batch_size=2, seed=1, max_new_tokens=5)
    assert [len(entry["output_ids"]) for entry in results.record.generations] == [2, 1]
    assert replay(results.record, model).status == "identical"
    assert isinstance(results, list)
    assert generator("1, 2, 3", max_new_tokens=5, do_sample=False).record.generations[0]["config"]["do_sample"] is False


@pytest.mark.slow
def test_another_process_says_the_same(model, inputs, tmp_path):
    path = tmp_path / "record.json"
    model.generate(**inputs, do_sample=True, seed=9, return_dict_in_generate=True).record.save(path)
    command = [sys.executable, "-m", "jaxgen.cli", "replay", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "identical\n")


class TestWhatADamagedRecordSays:
    """Every field that replay reads is looked at first: an error names it, and nothing is taken for identical."""

    @pytest.fixture
    def fields(self) -> dict[str, Any]:
        return json.loads(OLD.read_text(encoding="utf-8"))

    @pytest.mark.parametrize(
        "name", ["finish_reason", "strict", "python", "logprobs_sha256", "key", "output_ids", "negative_prompt_ids"]
    )
    def test_a_field_is_missing(self, fields, name):
        del fields["generations"][0][name]
        with pytest.raises(JaxgenError, match=name):
            Record.from_json(json.dumps(fields))

    def test_nothing_is_not_identical(self, fields):
        with pytest.raises(JaxgenError, match=r"generations.*fewer than 1"):
            Record.from_json(json.dumps(fields | {"generations": []}))

    def test_a_short_row_of_logprobs(self, fields):
        fields["generations"][0]["logprobs"][0].pop()
        with pytest.raises(JaxgenError, match="different lengths"):
            Record.from_json(json.dumps(fields))

    def test_another_prng(self, fields):
        fields["generations"][0]["key"]["impl"] = "nothing"
        result = replay(Record.from_json(json.dumps(fields)))
        assert result.exit_code == 2 and "'key'" in result.message


def test_only_a_plain_file_is_replaced(inputs, model, tmp_path):
    record = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True).record
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    link.symlink_to(real)
    record.save(link)
    assert link.is_symlink() and Record.load(real) == record
    with pytest.raises(JaxgenError, match="no plain file"):
        record.save(os.devnull)
    assert list(tmp_path.iterdir()) == [link, real] or list(tmp_path.iterdir()) == [real, link]


@pytest.fixture
def own():
    """A model that no other test uses."""
    return jaxgen.AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")


def test_weights_that_changed_since_are_not_recorded(own, inputs):
    out = own.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    own.lm_head.weight = nnx.Param(own.lm_head.weight[...] * 2)
    with pytest.raises(JaxgenError, match="have changed"):
        _ = out.record


@pytest.mark.slow
def test_a_record_keeps_no_weights(inputs):
    model = jaxgen.AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")
    weight = weakref.ref(model.lm_head.weight[...])
    _ = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True).record
    del model
    gc.collect()
    assert weight() is None


def test_two_models_have_two_records(own, inputs, model):
    outputs = [m.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True) for m in (model, own)]
    with pytest.raises(JaxgenError, match="another model"):
        Record.of(outputs)


def test_replay_knows_its_arguments(inputs, model):
    record = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True).record
    with pytest.raises(JaxgenError, match="logit_processor"):
        replay(record, model, logit_processor=print)


def test_the_stream_is_the_same_whatever_jax_is_told(inputs, model):
    """`jax_threefry_partitionable` changes how JAX splits up random bits, and not what a seed gives."""
    options = {"do_sample": True, "temperature": 2.0, "seed": 3, "max_new_tokens": 12}
    expected = model.generate(**inputs, **options)
    with jax.threefry_partitionable(False):
        found = model.generate(**inputs, **options)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_a_beam_search_that_the_clock_ended_cannot_be_compared(inputs, model):
    out = model.generate(**inputs, num_beams=2, max_new_tokens=4, max_time=1e-9, return_dict_in_generate=True)
    assert "time" in out.finish_reason
    result = replay(out.record, model)
    assert result.exit_code == 2 and "max_time" in result.message


def test_flags_that_name_paths(inputs, model, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=alice /home/alice/flags --xla_cpu_multi_thread_eigen=false")
    record = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True).record
    flags = ["--xla_dump_to=(a path)", "(a path)", "--xla_cpu_multi_thread_eigen=false"]
    assert record.environment["xla_flags"] == flags
    assert "alice" not in record.to_json()


def test_a_pipelines_record_is_of_its_own_tokenizer(model, tokenizer):
    pipe = jaxgen.pipeline("text-generation", model=model, tokenizer=tokenizer)
    before = pipe("1, 2, 3", max_new_tokens=2, seed=1).record.tokenizer
    pipe.tokenizer = load_tokenizer(demo.path())
    pipe.tokenizer.chat_template = "another"
    after = pipe("1, 2, 3", max_new_tokens=2, seed=1).record.tokenizer
    assert before["files"] == after["files"] != {}
    assert after["chat_template_sha256"] == hashlib.sha256(b"another").hexdigest() != before["chat_template_sha256"]


def test_the_command_line_records_what_there_was(tmp_path, capsys, monkeypatch):
    """Also where the reader of the text has left; and a directory that is missing is noticed before the generating."""
    options = ["generate", "1, 2, 3", "I am a cat.", "--max-new-tokens", "2", "--batch-size", "1", "--record"]
    assert cli.main([*options, str(tmp_path / "none" / "r.json")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "there is no directory" in captured.err

    class Gone(io.FileIO):
        def write(self, _: Any) -> int:
            raise BrokenPipeError

    with Gone(tmp_path / "text", "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert cli.main([*options, str(tmp_path / "r.json")]) == 0
    assert len(Record.load(tmp_path / "r.json").generations) == 1
