"""Two replicas of the server behind one address, by the code of docs/howto/serve.md: `.ci/run --only ray`."""

import concurrent.futures
import importlib
import os
import re
import signal
import socket
import time

import httpx2 as httpx
import pytest
import ray
from ray import serve

from tests.pages import DOCS

pytestmark = pytest.mark.slow

BODY = {"model": "demo", "prompt": "Portugal is", "max_tokens": 24, "temperature": 1.5, "seed": 7}


def replicas():
    """The processes of the replicas, by their ids."""
    found = set()
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                said = file.read()
            if entry.isdecimal() and said.startswith(b"ray::ServeReplica:default:Replica"):
                found.add(int(entry))
        except OSError:  # no process, or one that ended
            continue
    return found


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    directory = tmp_path_factory.mktemp("replicas")
    [code] = re.findall(r'```python title="replicas.py"\n(.*?)```', (DOCS / "howto" / "serve.md").read_text(), re.S)
    (directory / "replicas.py").write_text(code)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(importlib.import_module("replicas").app)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                yield client
        finally:
            serve.shutdown()
            ray.shutdown()


def ask(client, number):
    """The different answers to so many requests that are all the same, most of them at a time."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(lambda _: client.post("/v1/completions", json=BODY), range(number))]
    assert {answer.status_code for answer in answers} == {200}
    return {(answer.json()["choices"][0]["text"], answer.json()["system_fingerprint"]) for answer in answers}


def answered(client):
    """How many requests each replica has answered, of those that are asked now."""
    counts = set()
    for _ in range(50):
        counts.add(int(re.findall(r"jaxgen_request_seconds_count (\d+)", client.get("/metrics").text)[0]))
    return sorted(counts)


def test_the_same_request_gives_the_same_text_from_either(client):
    assert {client.get(path).status_code for path in ("/health", "/ready") for _ in range(10)} == {200}
    assert len(replicas()) == 2
    assert len(ask(client, 25)) == 1  # an odd number: neither has answered as many as the other
    first, second = answered(client)
    assert first > 0 and first + second == 25


def test_one_that_dies_is_replaced(client):
    before, texts = replicas(), ask(client, 1)
    gone = min(before)
    os.kill(gone, signal.SIGKILL)
    wait_for(lambda: len(replicas() - before) == 1)
    wait_for(lambda: serve.status().applications["default"].deployments["Replica"].replica_states == {"RUNNING": 2})
    assert ask(client, 24) == texts
    assert len(answered(client)) == 2 and gone not in replicas()
