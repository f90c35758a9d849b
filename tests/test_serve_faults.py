"""A server whose clients die, do not read, come all at once, or ask what fails; and how it ends."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2 as httpx
import jax.numpy as jnp
import pytest
from starlette.testclient import TestClient

import jaxgen
from jaxgen import demo
from jaxgen.serve.app import application
from jaxgen.serve.service import Service

LONG = {"prompt": "1, 2, 3", "max_tokens": 480, "ignore_eos": True, "stream": True, "temperature": 0}
SHORT = {"prompt": "1, 2, 3", "max_tokens": 4, "temperature": 0}
TEXT = ", 4,"


CLIENT = """
import json, sys
import httpx2
with httpx2.stream("POST", sys.argv[1], json=json.loads(sys.argv[2])) as answer:
    for line in answer.iter_lines():
        print(line, flush=True)
"""


@contextlib.contextmanager
def server(*arguments):
    command = [sys.executable, "-m", "jaxgen", "serve", "--port", "0", "--slots", "512", "--dtype", "float32"]
    with subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            url = process.stderr.readline().split()[1]
            with httpx.Client(base_url=url, timeout=60) as client:
                while client.get("/ready").status_code != 200:
                    time.sleep(0.1)
                yield process, client
        finally:
            process.kill()


def asked(client, body):
    """A connection on which something was asked, and nothing read."""
    data = json.dumps(body).encode()
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=60)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def counted(client, name):
    return int(re.findall(rf"^jaxgen_{name} (\d+)$", client.get("/metrics").text, re.M)[0])


def wait_until(what):
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_well(client):
    wait_until(lambda: counted(client, "busy") == counted(client, "queue") == 0)
    assert client.post("/v1/completions", json=SHORT).json()["choices"][0]["text"] == TEXT


def memory(process):
    with open(f"/proc/{process.pid}/status") as file:
        return int(re.findall(r"VmRSS:\s+(\d+) kB", file.read())[0]) / 1024


@pytest.mark.slow
def test_clients_that_die_and_clients_that_do_not_read():
    with server("--rows", "32", "--max-connections", "300") as (process, client):
        is_well(client)
        url = f"{str(client.base_url).rstrip('/')}/v1/completions"
        command = [sys.executable, "-c", CLIENT, url, json.dumps(LONG | {"n": 4})]
        before = counted(client, "tokens_total")
        with subprocess.Popen(command, stdout=subprocess.PIPE) as dying:
            assert dying.stdout is not None and dying.stdout.readline()
            dying.kill()
        is_well(client)
        assert counted(client, "tokens_total") - before < 4 * 480  # its rows did not run to their end

        for connection in [asked(client, LONG) for _ in range(100)]:  # all go away at once
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.close()
        is_well(client)

        slow = [asked(client, LONG | {"logprobs": 0}) for _ in range(60)]
        is_well(client)
        used = memory(process)
        slow += [asked(client, LONG | {"logprobs": 0}) for _ in range(60)]
        is_well(client)
        assert memory(process) - used < 100
        for connection in slow:
            connection.close()
        is_well(client)


@pytest.mark.slow
def test_what_is_too_much_is_refused_and_what_takes_too_long_ends():
    with server("--rows", "1", "--max-connections", "2", "--max-time", "0.01") as (_, client):
        done = client.post("/v1/completions", json=LONG | {"stream": False, "max_tokens": 490})
        assert done.status_code in (200, 503)
        if done.status_code == 200:
            assert done.json()["usage"]["completion_tokens"] < 490
        two = [socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) for _ in range(2)]
        for connection in two:  # whose bodies do not come, though the server waits for them
            asks = "Host: localhost\r\nContent-Length: 9\r\nExpect: 100-continue"
            connection.sendall(f"POST /tokenize HTTP/1.1\r\n{asks}\r\n\r\n".encode())
            assert b"100 Continue" in connection.recv(100)

        def refused():
            return client.post("/tokenize", json={"prompt": "1"}).status_code == 429

        assert refused()
        assert client.post("/tokenize", json={"prompt": "1"}).headers["retry-after"] == "1"
        assert client.get("/health").status_code == 200
        for connection in two:
            connection.close()
        wait_until(lambda: not refused())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("seconds", ["30", "0"])
def test_a_signal_ends_it_well(number, seconds):
    """A request that runs is finished, or told by the deadline that it is not."""
    with server("--rows", "1", "--closing-time", seconds) as (process, client):
        with client.stream("POST", "/v1/completions", json=LONG) as answer:
            lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
            said = [next(lines)]
            process.send_signal(number)
            said += lines
        assert said[-1] == "[DONE]"
        last = json.loads(said[-2])
        assert "error" in last if seconds == "0" else last["choices"][0]["finish_reason"] == "length"
        assert process.wait(60) == 0
        assert process.stderr is not None and "Traceback" not in process.stderr.read()


def test_what_fails_in_the_model_fails_alone_and_says_nothing_of_the_inside():
    model = jaxgen.AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")
    weight = model.model.embed_tokens.weight
    weight[...] = weight[...].at[600].set(jnp.nan)
    engine = jaxgen.Engine(model, rows=4, slots=128, chunk=16, top_logprobs=5)
    with TestClient(application(Service(engine, "demo")), base_url="http://localhost") as client:
        engine.wait_until_ready()
        batch, real, answers, go_on = engine._batch, engine._batch._programs, [], threading.Event()
        batch._programs = real._replace(decode=lambda *given: go_on.wait(60) and real.decode(*given))
        never = {"logit_bias": {"600": -100}}

        def ask(prompt):
            answers.append(client.post("/v1/completions", json=SHORT | never | {"prompt": prompt}))

        together = [threading.Thread(target=ask, args=(prompt,)) for prompt in ("1, 2, 3", [1, 600, 5], "1, 2, 3")]
        for thread in together:
            thread.start()
        wait_until(lambda: engine.stats()["busy"] + engine.stats()["queue"] == 3)
        go_on.set()
        for thread in together:
            thread.join()
        assert sorted(answer.status_code for answer in answers) == [200, 200, 500]
        for answer in answers:
            if answer.status_code == 200:
                assert answer.json()["choices"][0]["text"] == TEXT
            else:
                assert answer.json()["error"]["code"] == "not_finite"

        def fails(*_):
            raise RuntimeError(f"the device at {os.getcwd()} is on fire")

        batch._programs = real._replace(decode=fails)
        answer = client.post("/v1/completions", json=SHORT | never)
        assert answer.status_code == 500 and "fire" not in answer.text
        batch._programs = real
        assert client.get("/ready").status_code == 200
        assert client.post("/v1/completions", json=SHORT | never).json()["choices"][0]["text"] == TEXT
        batch._programs = real._replace(decode=fails)  # twice without a token between: it is broken
        wait_until(lambda: client.post("/v1/completions", json=SHORT | never).status_code == 503)
        assert client.get("/ready").json() == {"status": "failed"}
