"""A client that goes away before its text has begun: what would be done for it is not, and holds up nobody."""

import asyncio
import json
import threading
import time

import pytest

import jaxgen
from jaxgen import demo
from jaxgen.serve.app import application
from jaxgen.serve.service import Service

TEXT = "1, 2, 3"


class Steps:
    """A function that waits in each call until it may go on; `calls` are what it was given first."""

    def __init__(self, real):
        self.real, self.calls, self.results = real, [], []
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, first, *rest, **options):
        self.calls.append(first)
        self.begun.set()
        assert self.go_on.wait(60)
        self.results.append(self.real(first, *rest, **options))
        return self.results[-1]


@pytest.fixture(scope="module")
def service():
    model = jaxgen.AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")
    with jaxgen.Engine(model, rows=2, slots=512, chunk=16, top_logprobs=1) as engine:
        engine.wait_until_ready()
        yield Service(engine, "demo")


@pytest.fixture(scope="module")
def loop():
    """An event loop, as a server has one for all requests."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def goes_away(loop, service, path, body, after):
    """Ask, and go away when `after` is set: a future of when the server is done with it."""
    left = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive():
        if left:
            return left.pop()
        await asyncio.to_thread(after.wait, 60)
        return {"type": "http.disconnect"}

    async def send(message):
        assert message.get("status", 499) == 499 and not message.get("body")

    headers = [(b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    return asyncio.run_coroutine_threadsafe(application(service)(scope, receive, send), loop)


def wait_until(what):
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


ROUTES = {
    "/v1/completions": {"prompt": TEXT, "structured_outputs": {"regex": "y{3}"}},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": TEXT}],
        "response_format": {"type": "json_object"},
        "stream": True,
    },
    "/generate": {"inputs": TEXT, "parameters": {"grammar": {"type": "regex", "value": "y{3}"}}},
}


@pytest.mark.parametrize("path", ROUTES)
def test_a_shape_that_waits_is_forgotten(loop, service, monkeypatch, path):
    slow = Steps(service.shapes._checked)
    monkeypatch.setattr(service.shapes, "_checked", slow)
    first = goes_away(loop, service, path, ROUTES[path], slow.go_on)
    assert slow.begun.wait(60)
    goes_away(loop, service, path, ROUTES[path], slow.begun).result(30)
    assert service.shapes._waiting == 1
    slow.go_on.set()
    first.result(30)
    wait_until(lambda: service.shapes._waiting == 0)
    assert len(slow.calls) == 1


def test_prompts_that_wait_are_not_scored(loop, service, monkeypatch):
    slow = Steps(service.scores.of)
    monkeypatch.setattr(service.scores, "of", slow)
    prompts = [[1, 5], [1, 6], [1, 7]]
    body = {"prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 1}
    goes_away(loop, service, "/v1/completions", body, slow.begun).result(30)
    slow.go_on.set()
    service._scoring.submit(int).result(60)  # behind all that was left
    assert slow.calls == prompts[:1]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_submitted_meanwhile_is_cancelled(loop, service, monkeypatch, stream):
    slow = Steps(service.engine.submit)
    monkeypatch.setattr(service.engine, "submit", slow)
    body = {"prompt": [TEXT, TEXT], "max_tokens": 480, "ignore_eos": True, "stream": stream}
    goes_away(loop, service, "/v1/completions", body, slow.begun).result(30)
    slow.go_on.set()
    wait_until(lambda: len(slow.results) == 2)
    assert [handle.result(60).finish_reason for handle in slow.results] == ["cancelled"] * 2
