"""`jaxgen bench`: everything it promises is measured, in a process for each kind, and bad arguments say so."""

import json

import pytest

from jaxgen import bench, demo
from jaxgen.cli import main

SMALL = ["--new-tokens", "4", "--prompt-tokens", "8"]


def test_everything_is_measured_apart(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "--json", "--kinds", "float32,int4", "--batches", "1,2", *SMALL]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [run["kind"] for run in report["runs"]] == ["float32", "int4"]
    assert report["model"] == "demo" and report["new_tokens"] == 4 and report["jax"] and report["device"]
    for run in report["runs"]:
        assert run["load_seconds"] > 0 and run["peak_bytes"] > 10**7
        assert [row["batch"] for row in run["batches"]] == [1, 2]
        for row in run["batches"]:
            assert min(row[x] for x in ("first_call_seconds", "first_token_seconds", "tokens_per_second")) > 0
    assert bench.table(report).count("\n") == 5


def test_a_batch_without_memory_ends_its_kind(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    times = bench._times

    def short_of_memory(model: object, batch: int, *sizes: int) -> dict[str, float]:
        if batch > 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return times(model, batch, *sizes)

    monkeypatch.setattr(bench, "_times", short_of_memory)
    run = bench.measure(demo.path(), "float32", [1, 2, 4], prompt_tokens=8, new_tokens=4)
    assert [row.get("error") for row in run["batches"]] == [None, "the memory does not suffice"]
    assert "| 2 | the memory does not suffice |" in bench.table({"runs": [run]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kinds", "int3"], "--kinds 'int3': choose among float32, bfloat16, float16, int4"),
        (["--batches", "1,x"], "--batches='x' must be an int of at least 1"),
        (["--batches", ","], "--batches ',' names no batch"),
        (["--new-tokens", "1"], "--new-tokens=1 must be an int of at least 2"),
        (["--kinds", "float32", "--batches", "1", "--prompt-tokens", "900"], "more than the model's context of 512"),
        (["--kinds", "float32,int4", "--batches", "1", "--prompt-tokens", "900"], "float32: max_cache_len=964"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
