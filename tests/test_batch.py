"""`jaxgen batch`: what becomes of every row, and that nothing else decides it than the row, the seed and the model."""

import errno
import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxgen
from jaxgen import JaxgenError, demo
from jaxgen.batch import Generator, command
from jaxgen.batch.generator import Result
from jaxgen.batch.plan import Task
from jaxgen.batch.rows import read, row_of
from jaxgen.batch.run import Part, Run, digest_of_model
from jaxgen.cli import main
from jaxgen.engine.engine import Engine
from jaxgen.generation.prompts.layout import bucket
from tests.engines import tiny
from tests.helpers import SOAK, counted
from tests.killed import DIES

ROOT = Path(__file__).parents[1]
OPTIONS = ["--do-sample", "--seed", "7", "--temperature", "1.5", "--max-new-tokens", "9", "--dtype", "float32"]
LONG = "Portugal is a country. " * 12
ROWS: list[dict[str, Any]] = [
    {"id": "count", "prompt": "1, 2, 3"},
    {"id": "long", "prompt": LONG, "source": "a field of the user's"},
    {"id": "colors", "prompt": "A list of colors: red, blue", "options": {"max_new_tokens": 4, "do_sample": False}},
    {"id": "chat", "messages": [{"role": "user", "content": "Hello"}]},
    {"id": "other seed", "prompt": "I am a cat.", "options": {"seed": 11}},
    {"id": "cat", "prompt": "I am a cat."},
    {"id": "overflow", "prompt": "I am a cat.", "options": {"sequence_bias": [[[5], 3e38]], "temperature": 0.1}},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def batch(source: Path, output: Path, *more: str) -> int:
    return main(["batch", str(source), "--output", str(output), "--batch-size", "4", *OPTIONS, *more])


def shown(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if not path.name.startswith(".")}


def parts(output: Path) -> dict[str, bytes]:
    return {name: data for name, data in shown(output).items() if name.startswith("part-")}


def rows_in(output: Path) -> dict[Any, dict[str, Any]]:
    lines = [json.loads(line) for data in parts(output).values() for line in data.splitlines()]
    assert len({row["id"] for row in lines}) == len(lines)
    return {row["id"]: row for row in lines}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    assert batch(write(place / "in.jsonl", ROWS), place / "out", "--part-rows", "2", "--logprobs") == 1
    return place


def test_a_row_is_what_generate_gives_for_it_alone(whole: Path):
    model = jaxgen.AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")
    tokenizer = jaxgen.AutoTokenizer.from_pretrained(demo.path())
    found = rows_in(whole / "out")
    assert found.keys() == {row["id"] for row in ROWS} - {"overflow"} and len(parts(whole / "out")) == 4
    for row in ROWS[:-1]:
        if "prompt" in row:
            ids = tokenizer(row["prompt"])["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True)["input_ids"]
        options = {"do_sample": True, "seed": 7, "temperature": 1.5, "max_new_tokens": 9, **row.get("options", {})}
        strict = jaxgen.Strict(rows=4, tokens=bucket(len(ids) + options["max_new_tokens"], 64))
        assert (strict.tokens > 64) == (row["id"] == "long")
        out = model.generate([ids], row_ids=[row["id"]], strict=strict, return_dict_in_generate=True, **options)
        tokens = out.sequences[0, len(ids) : len(ids) + int(out.lengths[0])].tolist()
        told = found[row["id"]]
        assert (told["token_ids"], told["finish_reason"]) == (tokens, out.finish_reason[0])
        assert told["logprobs"] == out.logprobs[0, : len(tokens)].tolist()
        assert told["completion"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert found["cat"]["token_ids"] != found["other seed"]["token_ids"]


def test_what_overflows_is_one_row_alone(whole: Path):
    [bad] = map(json.loads, (whole / "out" / "errors.jsonl").read_text().splitlines())
    assert (bad["line"], bad["id"]) == (7, "overflow") and "logits are not finite" in bad["reason"]


def test_order_and_parts_change_no_byte_of_a_row(whole: Path, tmp_path: Path):
    rows = random.Random(1).sample(ROWS, len(ROWS))
    assert batch(write(tmp_path / "in.jsonl", rows), tmp_path / "out", "--logprobs") == 1
    assert rows_in(tmp_path / "out") == rows_in(whole / "out")


@pytest.mark.slow
def test_the_batch_size_changes_no_token(whole: Path, tmp_path: Path):
    for size in ("1", "3", "16"):
        assert batch(whole / "in.jsonl", tmp_path / size, "--batch-size", size) == 1
        found, expected = rows_in(tmp_path / size), rows_in(whole / "out")
        assert {k: row["token_ids"] for k, row in found.items()} == {k: v["token_ids"] for k, v in expected.items()}


def test_a_run_goes_on_where_it_was(whole: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    before = shown(whole / "out")
    (whole / "out" / "part-00001.jsonl").unlink()
    (whole / "out" / ".part-00001.jsonl.tmp-99").write_bytes(b"half of it")
    done: list[int] = []
    generate = Generator.run

    def watched(self, tasks):
        for task, result in generate(self, tasks):
            done.append(task.row.line)
            yield task, result

    monkeypatch.setattr(Generator, "run", watched)
    again = ["--part-rows", "2", "--logprobs"]
    assert batch(whole / "in.jsonl", whole / "out", *again) == 1
    assert len(done) == 2 and shown(whole / "out") == before
    assert not [*(whole / "out").glob(".*.tmp-*")]
    monkeypatch.setattr(command, "Generator", None)  # nothing is left to do: no model is loaded
    assert batch(whole / "in.jsonl", whole / "out", *again) == 1
    assert capsys.readouterr().out.endswith("out: 6 rows, 4 parts; bad rows, which errors.jsonl names: 1\n")
    assert shown(whole / "out") == before
    for more, said in {("--top-p", "0.5"): "its top_p was None, and not 0.5", (): "its logprobs was True"}.items():
        assert batch(whole / "in.jsonl", whole / "out", *(again if more else again[:2]), *more) == 2
        assert said in capsys.readouterr().err
    assert batch(write(whole / "less.jsonl", ROWS[:-1]), whole / "out", *again) == 2
    assert "holds the output of another run: its input was" in capsys.readouterr().err
    assert shown(whole / "out") == before


def test_a_run_does_not_go_on_elsewhere(tmp_path: Path, capsys):
    """Where dtype, device or versions are others, the parts would not have the bits of one run."""
    source = write(tmp_path / "in.jsonl", ROWS[:1])
    assert batch(source, tmp_path / "out") == 0
    note = tmp_path / "out" / "run.json"
    made_from, before = json.loads(note.read_text()), shown(tmp_path / "out")
    others = {"dtype": "bfloat16", "device": "NVIDIA H200", "jax": "0.1", "jaxgen": "0.0.1"}
    for name, other in others.items():
        note.write_text(json.dumps(made_from | {name: other}))
        assert batch(source, tmp_path / "out") == 2
        assert f"its {name} was {other!r}, and not {made_from[name]!r}" in capsys.readouterr().err
    note.write_bytes(before["run.json"])
    assert batch(source, tmp_path / "out", "--dtype", "auto") == 0  # which is float32 here
    assert shown(tmp_path / "out") == before


def test_other_weights_of_the_same_size_are_another_model(tmp_path: Path):
    shutil.copytree(demo.path(), tmp_path / "copy")
    as_it_was = digest_of_model(demo.path())
    assert digest_of_model(tmp_path / "copy") == as_it_was
    [weights] = (tmp_path / "copy").glob("*.safetensors")
    data = weights.read_bytes()
    blob = tmp_path / hashlib.sha256(data).hexdigest()
    weights.rename(blob)
    weights.symlink_to(blob)  # as the hub's cache has it
    assert digest_of_model(tmp_path / "copy") == as_it_was
    weights.unlink()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert digest_of_model(tmp_path / "copy") != as_it_was


def test_a_full_disk_loses_nothing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    sync, left = os.fsync, [3]  # run.json, errors.jsonl or a part

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    options = ["--part-rows", "2", "--logprobs"]
    monkeypatch.setattr(os, "fsync", full)
    assert batch(whole / "in.jsonl", tmp_path / "out", *options) == 2
    assert "was not written: No space left on device" in capsys.readouterr().err
    assert 0 < len(parts(tmp_path / "out")) < 4
    assert parts(tmp_path / "out").items() < parts(whole / "out").items()
    monkeypatch.setattr(os, "fsync", sync)
    assert batch(whole / "in.jsonl", tmp_path / "out", *options) == 1
    assert shown(tmp_path / "out") == shown(whole / "out")


BAD = {
    "nonsense": "it is no JSON: Expecting value",
    "[1]": "it is no JSON object",
    '{"prompt": "a", "options": {"top_k": 5, "top_k": 6}}': "it is no JSON: 'top_k' is given twice",
    "{}": "a row has a prompt or messages",
    '{"prompt": "a", "messages": []}': "and not both",
    '{"prompt": ""}': "the prompt is empty",
    '{"prompt": 5}': "prompt=5 is no text",
    '{"messages": "Hello"}': "messages='Hello' is no list",
    '{"messages": [{"role": "user"}]}': "neither a string nor a list of messages",
    '{"prompt": "\\ud800"}': "is not Unicode text",
    '{"prompt": "a", "id": 1.5}': "id=1.5 must be an int or a text",
    '{"prompt": "a", "id": "first"}': "line 1 has the same id",
    '{"prompt": "a", "top_k": 5}': "top_k stands beside the prompt",
    '{"prompt": "a", "options": []}': "options=[] is no mapping",
    '{"prompt": "a", "options": {"topk": 5}}': "did you mean 'top_k'?",
    '{"prompt": "a", "options": {"num_beams": 5}}': "num_beams=5: not in this engine",
    '{"prompt": "a", "options": {"seed": [1, 2]}}': "seed: a row has one",
    '{"prompt": "a", "options": {"seed": [[[5], 1]]}}': "seed[0]=[[5], 1] must be an int",
    '{"prompt": "a", "options": {"top_logprobs": 2}}': "top_logprobs=2 is more than the 0",
    '{"prompt": "a", "options": {"num_return_sequences": 2}}': "a row has one completion",
    '{"prompt": "a", "options": {"max_time": 9}}': "max_time: what a row gets would depend on the others",
    '{"prompt": "a", "options": {"max_new_tokens": 100000}}': "exceed the model's context",
    json.dumps({"prompt": "1, " * 5000}): "leaves no room for more",
}


def test_bad_rows_are_told_and_the_others_done(tmp_path: Path, capsys):
    (tmp_path / "in.jsonl").write_text("\n".join(['{"id": "first", "prompt": "1, 2"}', "", *BAD]))
    assert batch(tmp_path / "in.jsonl", tmp_path / "out", "--max-new-tokens", "2") == 1
    assert capsys.readouterr().out.endswith(f"out: 1 rows, 1 parts; bad rows, which errors.jsonl names: {len(BAD)}\n")
    told = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in told] == [*range(3, len(BAD) + 3)]
    for entry, reason in zip(told, BAD.values(), strict=True):
        assert reason in entry["reason"]
    assert rows_in(tmp_path / "out").keys() == {"first"}


def test_what_is_wrong_with_all_rows_ends_the_run(whole: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "ray" else find(name, *of))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    for output, more, said in [
        ("out", ["--num-beams", "2"], "num_beams=2: not in this engine; use model.generate"),
        ("out", ["--set", "max_time=9"], "max_time: what a row gets would depend on the others"),
        ("out", ["--batch-size", "0"], "--batch-size=0 must be an int of at least 1"),
        ("out", ["--set", "strict=true"], "strict: not in an engine"),
        ("out", ["--engine", "ray", "--workers", "0"], "--workers=0 must be an int of at least 1"),
        ("out", ["--engine", "ray"], '--engine ray needs ray: pip install -e ".[ray]"'),
        ("mine", [], "mine is not empty, and holds no run"),
        ("mine/file", [], "file: it cannot be made: File exists"),
    ]:
        assert batch(whole / "in.jsonl", tmp_path / output, *more) == 2
        assert said in capsys.readouterr().err
    # Where nothing was done yet, the directory is free for something else.
    assert batch(whole / "in.jsonl", tmp_path / "new", "--dtype", "nonsense") == 2
    assert "dtype='nonsense'" in capsys.readouterr().err
    assert batch(write(tmp_path / "none.jsonl", []), tmp_path / "new") == 0
    (tmp_path / "in.txt").touch()
    for source, said in [("in.txt", "the name must end with .jsonl, .csv"), ("no.jsonl", "cannot be read")]:
        assert batch(tmp_path / source, tmp_path / "out") == 2
        assert said in capsys.readouterr().err


def test_one_process_at_a_time(whole: Path, tmp_path: Path, capsys):
    fcntl = pytest.importorskip("fcntl", reason="POSIX only")
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert batch(whole / "in.jsonl", tmp_path / "out") == 2
    assert "out is in use: another process is writing it" in capsys.readouterr().err


def test_csv_says_the_same(tmp_path: Path):
    rows = [
        {"prompt": '1, 2\n"3"', "id": "a"},
        {"prompt": "b", "id": "b", "options": {"top_k": 5}},
        {"messages": [{"role": "user", "content": "Hello"}], "id": "c"},
        {"prompt": "", "id": "d"},
    ]
    (tmp_path / "in.csv").write_text(
        '\ufeffid,prompt,messages,options\na,"1, 2\n""3""",,\nb,b,,"{""top_k"": 5}"\n'
        'c,,"[{""role"": ""user"", ""content"": ""Hello""}]",\nd,,,\ne,short\nf,x,{,\n'
    )
    found, bad = read(tmp_path / "in.csv")
    expected, empty = read(write(tmp_path / "in.jsonl", rows))
    assert [(row.id, row.prompt, row.options) for row in found] == [
        (row.id, row.prompt, row.options) for row in expected
    ]
    assert [(entry.line, entry.id) for entry in bad] == [(6, "d"), (7, None), (8, None)]  # where they end
    assert (bad[0].reason, len(empty)) == (empty[0].reason, 1)


def test_a_cell_of_csv_may_be_long(tmp_path: Path):
    (tmp_path / "in.csv").write_text(f"prompt\n{'a' * 200_000}\nb\n")
    assert [len(row.prompt) for row in read(tmp_path / "in.csv")[0]] == [200_000, 1]


def test_parquet_says_the_same(whole: Path, tmp_path: Path):
    pa = pytest.importorskip("pyarrow", reason="an extra")
    pytest.importorskip("pyarrow.parquet", reason="an extra")
    # In a struct all rows have all fields: those that are null say nothing.
    columns = {name: [row.get(name) for row in ROWS[:-1]] for name in ("id", "prompt", "messages", "options")}
    pa.parquet.write_table(pa.table(columns), tmp_path / "in.parquet")
    assert read(tmp_path / "in.parquet") == read(write(tmp_path / "in.jsonl", ROWS[:-1]))
    options = ["--part-rows", "2", "--logprobs", "--format", "parquet"]
    assert batch(tmp_path / "in.parquet", tmp_path / "out", *options) == 0
    written = sorted((tmp_path / "out").glob("part-*.parquet"))
    found = [row for path in written for row in pa.parquet.read_table(path).to_pylist()]
    assert len(written) == 3 and {row["id"]: row for row in found} == rows_in(whole / "out")
    (tmp_path / "no.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(JaxgenError, match="it cannot be read"):
        read(tmp_path / "no.parquet")


def test_parts_in_parquet_have_ids_of_one_type(tmp_path: Path):
    pa = pytest.importorskip("pyarrow", reason="an extra")
    pytest.importorskip("pyarrow.parquet", reason="an extra")
    for ids, kind in {("a", "b"): pa.string(), (2**63 - 1, 5): pa.int64(), (2**63, 5): pa.string()}.items():
        rows, _ = read(write(tmp_path / "in.jsonl", [{"id": name, "prompt": "a"} for name in ids]))
        first, second = (Task(row, np.array([5]), 64) for row in rows)
        run = Run(tmp_path, {}, ".parquet", 1)
        parts = [Part(tmp_path / f"part-{number}", [task]) for number, task in enumerate((first, second))]
        # Of the second part no row is done.
        list(run.collect(parts, [(first, Result("b", [6], "eos")), (second, JaxgenError("not finite"))]))
        assert [pa.parquet.read_schema(part.path).field("id").type for part in parts] == [kind] * 2


def test_ids_are_ints_only_if_all_are(tmp_path: Path):
    rows = [{"prompt": "a"}, {"prompt": "b", "id": 7}]
    assert [row.id for row in read(write(tmp_path / "in.jsonl", rows))[0]] == [0, 7]
    found, [bad] = read(write(tmp_path / "in.jsonl", [*rows, {"prompt": "c", "id": "7"}]))
    assert [row.id for row in found] == ["0", "7"] and bad.reason == "line 2 has the same id"


class Letters:
    """A tokenizer: a word of `a` is a token."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [5] * len(text.split())}

    def decode(self, ids: Any, **_: Any) -> str:
        return "a " * len(ids)


@pytest.mark.parametrize("count", [60, pytest.param(10_000, marks=SOAK)])
def test_ragged_prompts_compile_what_one_of_each_bucket_does(count: int):
    def run(lengths: list[int]) -> dict[str, Any]:
        prompts = [" ".join(["a"] * length) for length in lengths]
        return generator({"id": [*range(len(lengths))], "prompt": prompts})

    generator = Generator(tiny(), Letters(), batch_size=16, max_new_tokens=2, do_sample=True)
    run([3, 70])  # which end within 64 tokens, and within 96
    lengths = np.random.default_rng(0).integers(1, 91, count).tolist()
    slots = {generator.planner.plan(row_of(0, {"id": 0, "prompt": "a " * length})).slots for length in lengths}
    assert slots == {64, 96}
    with counted() as compilations:
        found = run(lengths)
    assert compilations == []
    assert {len(ids) for ids in found["token_ids"]} <= {1, 2} and set(found["error"]) == {None}
    assert run(lengths[:1])["token_ids"][0] == found["token_ids"][0]
    generator.close()


def test_a_column_of_ids_is_needed():
    generator = Generator(tiny(), lambda text: {"input_ids": [5]})
    [said] = generator({"prompt": ["a"]})["error"]
    assert said == "id=None must be an int or a text; every row has one"


# Runs end at each step on the file system in turn, with something in place of a model.
_KILLS = """
import json, pathlib
from jaxgen.batch.generator import Result
from jaxgen.batch.plan import Task
from jaxgen.batch.rows import Bad, Row
from jaxgen.batch.run import Run
from jaxgen.errors import JaxgenError

place = pathlib.Path(sys.argv[1])
ROWS = [Row(line, line, "", {}) for line in range(7)]
STEPS = ("os.rename", "os.mkdir", "os.remove", "open", "fsync", "row")

class Planner:
    def plan(self, row):
        if row.line == 3:
            raise JaxgenError("too long")
        return Task(row, None, 64)

def outcomes(parts):
    for part in parts:
        for task in part.tasks:
            step("row", ())
            print(task.row.line, file=sys.stderr)
            yield task, JaxgenError("not finite") if task.row.line == 5 else Result(f"text {task.row.line}", [1], "eos")

def run(out):
    run = Run(out, {"seed": 7}, ".jsonl", 2)
    with run.held():
        parts = run.plan(Planner(), ROWS, [Bad(100, None, "nonsense")])
        for _ in run.collect(parts, outcomes(parts)):
            pass

run(place / "whole")
for number in range(1000):
    out = place / f"{number:03}"
    if (pid := os.fork()) == 0:
        left = number
        run(out)
        os._exit(0)
    if not os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
        break
    for path in out.glob("[!.]*"):  # what is there is whole
        whole = (place / "whole" / path.name).read_bytes()
        assert path.read_bytes() == whole or path.name == "errors.jsonl", path
    run(out)
print(number)
"""


def test_killed_at_every_step_it_goes_on(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DIES + _KILLS, str(tmp_path)],
        check=True, capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert int(done.stdout) > 25
    outputs = [shown(place) for place in sorted(tmp_path.iterdir())]
    assert len(outputs) == int(done.stdout) + 2 and all(output == outputs[-1] for output in outputs)
    assert [json.loads(line)["line"] for line in outputs[0]["errors.jsonl"].splitlines()] == [3, 5, 100]
    rows = [
        json.loads(line)["id"]
        for name in sorted(outputs[0])
        if "part" in name
        for line in outputs[0][name].splitlines()
    ]
    assert rows == [0, 1, 2, 4, 6]


@pytest.mark.parametrize(
    "points", [pytest.param([1, 11], marks=pytest.mark.slow), pytest.param([*range(20)], marks=SOAK)], ids=len
)
def test_killed_at_any_point_every_row_is_done_once(points: list[int], whole: Path, tmp_path: Path):
    """The command itself, by kill -9 when so many files and rows have come; then started again."""
    # Imports once, then forks a process for each point, before JAX has started any thread.
    code = """
import os, signal, sys
import jaxgen.convert.load
from jaxgen.batch.generator import Generator
from jaxgen.cli import main
left, generate, sync = 0, Generator.run, os.fsync

def step():
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

def run(self, tasks):
    for outcome in generate(self, tasks):
        step()
        yield outcome

Generator.run, os.fsync = run, lambda descriptor: (step(), sync(descriptor), step())
for left in map(int, sys.argv[1].split()):
    output = f"{sys.argv[2]}/{left}"
    if (pid := os.fork()) == 0:
        os._exit(main([*sys.argv[3:], "--output", output]))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
"""
    options = ["--batch-size", "4", *OPTIONS, "--part-rows", "1", "--logprobs"]
    source = str(whole / "in.jsonl")
    whole_run = tmp_path / "whole"
    command = ["batch", source, *options]
    assert main([*command, "--output", str(whole_run)]) == 1
    arguments = [sys.executable, "-W", "ignore", "-c", code, " ".join(map(str, points)), str(tmp_path), *command]
    subprocess.run(arguments, check=True, cwd=ROOT, timeout=600)
    for point in points:
        assert parts(tmp_path / str(point)).items() < parts(whole_run).items()
        assert main([*command, "--output", str(tmp_path / str(point))]) == 1
        assert shown(tmp_path / str(point)) == shown(whole_run)


def test_an_option_that_is_null_is_not_given(monkeypatch: pytest.MonkeyPatch):
    """A seed of None would be another one each time; structs of a dataset have null for what other rows have."""
    assert row_of(1, {"id": 1, "prompt": "a", "options": {"seed": None, "top_k": 5}}).options == {"top_k": 5}
    monkeypatch.setattr(
        Generator, "run", lambda self, tasks: ((task, JaxgenError(f"{task.options}")) for task in tasks)
    )
    generator = Generator(tiny(), lambda text: {"input_ids": [5]})
    options = [{"seed": None, "eos_token_id": np.array([3, 4])}]
    assert generator({"id": [1], "prompt": ["a"], "options": options})["error"].tolist() == ["{'eos_token_id': [3, 4]}"]


def test_ints_that_a_column_made_floats_are_ints(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Generator, "run", lambda self, tasks: ((t, JaxgenError(f"{t.options}")) for t in tasks))
    generator = Generator(tiny(), lambda text: {"input_ids": [5]})
    one = {"max_new_tokens": 3.0, "temperature": 0.5, "top_k": float("nan"), "eos_token_id": np.array([3.0, 4.0])}
    options = np.array([one, {"max_new_tokens": 3.5}, {"sequence_bias": [[[5.0], 3e38]]}], object)
    found = generator({"id": [1, 2, 3], "prompt": ["a"] * 3, "options": options})["error"]
    assert found[0] == "{'max_new_tokens': 3, 'temperature': 0.5, 'eos_token_id': [3, 4]}"
    assert "max_new_tokens=3.5 must be an int" in found[1]
    assert found[2] == "{'sequence_bias': [[[5], 3e+38]]}"


def test_rows_that_only_an_engine_refuses_are_bad_one_by_one(monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Engine, ids: Any, **options: Any) -> None:
        raise JaxgenError(f"not {options['row_id']}")

    generator = Generator(tiny(), lambda text: {"input_ids": [5]}, batch_size=1)
    monkeypatch.setattr(Engine, "submit", refuse)
    monkeypatch.setattr(generator, "_engine_of", lambda slots: Engine.__new__(Engine))
    found = generator({"id": [*range(8)], "prompt": ["a"] * 8})  # more than are submitted at a time
    assert found["error"].tolist() == [f"not {number}" for number in range(8)]


def test_an_engine_that_ends_is_no_bad_row(monkeypatch: pytest.MonkeyPatch):
    generator = Generator(tiny(), lambda text: {"input_ids": [5]}, batch_size=8, max_new_tokens=4)
    from jaxgen.engine.batch import Batch

    def broken(self: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Batch, "warmup", broken)
    with pytest.raises((JaxgenError, RuntimeError), match="the device is gone"):
        generator({"id": [1], "prompt": ["a"]})
    generator.close()
