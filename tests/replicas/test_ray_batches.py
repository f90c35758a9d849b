"""Batches on Ray Data, with two workers: the bytes that come without Ray, also where a worker is killed."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import ray

from jaxgen.cli import main
from tests.pages import DOCS

pytestmark = pytest.mark.slow

PROMPTS = ["1, 2, 3", "A list of colors: red, blue", "I am a cat.", "Portugal is a country. " * 12]
OPTIONS = ["--do-sample", "--seed", "7", "--max-new-tokens", "9", "--batch-size", "4", "--part-rows", "3", "--logprobs"]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    paths = os.environ.get("PYTHONPATH", "")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("batches")
    rows = [{"id": number, "prompt": PROMPTS[number % 4]} for number in range(30)]
    rows += [{"id": 30, "prompt": "a", "options": {"sequence_bias": [[[5], 3e38]], "temperature": 0.1}}, {"prompt": ""}]
    (place / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert batch(place, "whole") == 1
    return place


def batch(place: Path, output: str, *more: str) -> int:
    return main(["batch", str(place / "in.jsonl"), "--output", str(place / output), *OPTIONS, *more])


def shown(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if not path.name.startswith(".")}


def workers() -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            said = entry.read_bytes()
        except OSError:  # it has ended
            continue
        if said.startswith(b"ray::MapWorker"):
            found.append(int(entry.parent.name))
    return found


def test_two_workers_write_the_same_bytes(whole):
    assert batch(whole, "two", "--engine", "ray", "--workers", "2") == 1
    assert shown(whole / "two") == shown(whole / "whole")
    assert len(shown(whole / "two")) == 13  # 11 parts, errors.jsonl, run.json


def test_a_worker_that_is_killed_is_replaced(whole):
    killed = []

    def kill():
        deadline = time.monotonic() + 120
        while not killed and time.monotonic() < deadline:
            if [*(whole / "killed").glob("part-*")]:
                killed.extend(workers()[:1])
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    assert batch(whole, "killed", "--engine", "ray", "--workers", "2") == 1
    thread.join()
    assert killed and shown(whole / "killed") == shown(whole / "whole")


def test_what_ray_began_goes_on_without(whole):
    assert batch(whole, "begun", "--engine", "ray", "--workers", "2") == 1
    for name in ("part-00000.jsonl", "part-00007.jsonl"):
        (whole / "begun" / name).unlink()
    assert batch(whole, "begun") == 1
    assert shown(whole / "begun") == shown(whole / "whole")


def test_the_pages_pipeline_gives_the_same(tmp_path):
    [code] = re.findall(r'```python title="pipeline.py"\n(.*?)```', (DOCS / "howto" / "scale.md").read_text(), re.S)
    names = {}
    exec(compile(code, "pipeline.py", "exec"), names)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS[:3]))
    assert batch(tmp_path, "out") == 0
    lines = (tmp_path / "out" / "part-00000.jsonl").read_text().splitlines()
    assert {row["id"]: row["completion"] for row in map(json.loads, lines)} == names["rows"]
    assert len(names["rows"]) == 3
