"""The server: what clients of OpenAI and of text-generation-inference get, and that it is what `generate` gives."""

import concurrent.futures
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

import jaxgen
from jaxgen import JaxgenError, cli, demo
from jaxgen.serve import server
from jaxgen.serve.app import application
from jaxgen.serve.server import checked_limits, name_of
from jaxgen.serve.service import Limits, Service
from jaxgen.text.inputs import encode
from tests.serving import serving, wait_until_ready

CHAT = [{"role": "user", "content": "How many helicopters can a human eat in one sitting?"}]
TEXT = "1, 2, 3"


@pytest.fixture(scope="module")
def model():
    return jaxgen.AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")


@pytest.fixture(scope="module")
def service(model):
    engine = jaxgen.Engine(model, rows=4, slots=128, chunk=16, top_logprobs=5)
    return Service(engine, name_of(model), Limits(body=20_000, samples=4, sequences=8))


@pytest.fixture(scope="module")
def client(service):
    with TestClient(application(service), base_url="http://localhost") as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.05)
        yield client


def ids_of(service, prompt):
    return encode(service.tokenizer, prompt, *([False] if prompt is CHAT else []))["input_ids"]


def generated(service, ids, **options):
    out = service.model.generate([ids], strict=service.engine.strict, return_dict_in_generate=True, **options)
    return out.sequences[0, len(ids) : len(ids) + int(out.lengths[0])].tolist(), out


def events(client, path, body):
    with client.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        said = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    return [json.loads(line) for line in said if line != "[DONE]"], said[-1]


@pytest.mark.parametrize("seed", [3, -7, 1 << 70])
def test_a_chat_is_what_generate_gives(client, service, seed):
    body = {"model": "demo", "messages": CHAT, "seed": seed, "max_tokens": 9, "temperature": 1.5, "top_p": 0.95}
    answer = client.post("/v1/chat/completions", json={**body, "logprobs": True, "top_logprobs": 2}).json()
    ids = ids_of(service, CHAT)
    options = {"do_sample": True, "temperature": 1.5, "top_k": 0, "top_p": 0.95, "seed": seed, "max_new_tokens": 9}
    tokens, out = generated(service, ids, **options)
    [choice] = answer["choices"]
    assert choice["message"]["content"] == service.tokenizer.decode(tokens, skip_special_tokens=True)
    entries = choice["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == out.model_logprobs[0, : len(tokens)].tolist()
    for entry in entries:
        same = [other["logprob"] for other in entry["top_logprobs"] if other["token"] == entry["token"]]
        assert same in ([], [entry["logprob"]])
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == service.tokenizer.decode(tokens)
    assert answer["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": len(tokens),
        "total_tokens": len(ids) + len(tokens),
    }
    assert answer["seed"] == seed and answer["system_fingerprint"] == service.fingerprint
    streamed, last = events(
        client, "/v1/chat/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert last == "[DONE]" and streamed[-1]["usage"] == answer["usage"]
    pieces = [event["choices"][0]["delta"].get("content", "") for event in streamed[:-1]]
    assert "".join(pieces) == choice["message"]["content"]
    assert streamed[-2]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_several_samples_and_prompts_are_those_of_one_call(client, service):
    body = {"prompt": [TEXT, ids_of(service, "Portugal is")], "n": 2, "seed": 5, "max_tokens": 6, "temperature": 1.3}
    texts = [
        choice["text"]
        for choice in client.post("/v1/completions", json={**body, "prompt": [TEXT] * 2}).json()["choices"]
    ]
    options = {"do_sample": True, "temperature": 1.3, "top_k": 0, "seed": 5, "max_new_tokens": 6}
    ids = ids_of(service, TEXT)
    both = service.model.generate([ids] * 2, num_return_sequences=2, **options)[:, len(ids) :]
    assert texts == [service.tokenizer.decode(row, skip_special_tokens=True) for row in both]
    assert len(client.post("/v1/completions", json=body).json()["choices"]) == 4


def test_prompts_are_scored_as_the_model_scores_them(client, service):
    """What lm-eval asks: ids, `echo`, `logprobs`; and its test for greedy tokens holds."""
    ids = ids_of(service, "A list of colors: red, blue")
    for new in (0, 1):
        body = {"prompt": [ids, TEXT], "echo": True, "logprobs": 1, "max_tokens": new, "temperature": 0, "seed": 1}
        choices = client.post("/v1/completions", json=body).json()["choices"]
        logprobs = choices[0]["logprobs"]
        found = logprobs["token_logprobs"][: len(ids)]
        [score] = service.model.score("A list of colors: red, blue")
        assert found[0] is None
        np.testing.assert_allclose(found[1:], score.logprobs, atol=1e-5)
        assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len(ids) + new
        assert any(own == max(top.values()) for own, top in zip(found[1:], logprobs["top_logprobs"][1:], strict=False))
        assert choices[1]["text"].startswith(TEXT)


def test_options_reach_the_engine(client, service):
    def text(**fields):
        answer = client.post("/v1/completions", json={"prompt": TEXT, "temperature": 0, "max_tokens": 8, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    assert text(stop=["5"])["text"] == ", 4, " and text(stop="5")["finish_reason"] == "stop"
    assert text(stop="5", include_stop_str_in_output=True)["text"] == ", 4, 5"
    comma = ids_of(service, ",")[-1]
    assert "," not in text(logit_bias={str(comma): -100})["text"]
    assert text(max_tokens=2)["finish_reason"] == "length"
    ignored = {"user": "me", "metadata": {}, "prediction": {"type": "content", "content": "4"}}
    assert text(**ignored, frequency_penalty=0.0, best_of=1)["text"] == text()["text"]
    assert text(prompt=ids_of(service, TEXT))["text"] == text()["text"]


def test_tgi(client, service):
    body = {"inputs": TEXT, "parameters": {"max_new_tokens": 4, "details": True, "decoder_input_details": True}}
    answer = client.post("/generate", json=body).json()
    assert answer["generated_text"] == ", 4,"
    assert answer["details"]["finish_reason"] == "length" and answer["details"]["generated_tokens"] == 4
    assert [token["id"] for token in answer["details"]["prefill"]] == ids_of(service, TEXT)
    streamed, _ = events(client, "/generate_stream", {"inputs": TEXT, "parameters": {"max_new_tokens": 4}})
    assert "".join(event["token"]["text"] for event in streamed) == ", 4," == streamed[-1]["generated_text"]
    assert client.get("/info").json()["model_id"] == "demo"


def test_the_other_routes(client):
    [model] = client.get("/v1/models").json()["data"]
    assert model["id"] == "demo" and client.get("/v1/models/demo").json() == model
    unknown = client.get("/v1/models/mistralai/Mistral-7B-v0.1")
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
    ids = client.post("/tokenize", json={"prompt": TEXT}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": ids[1:]}).json() == {"prompt": TEXT}
    assert client.post("/tokenize", json={"messages": CHAT}).json()["count"] > 10
    said = client.get("/metrics").text
    assert "jaxgen_rows 4" in said and "jaxgen_time_to_first_token_seconds_count" in said
    page = client.get("/")
    assert "<script" in page.text and "http://" not in page.text and "https://" not in page.text
    assert client.get("/health").status_code == 200


REFUSED = {
    "unknown": ({"temprature": 1}, "temprature"),
    "model": ({"model": "gpt-4"}, "model"),
    "too long": ({"max_tokens": 1000}, "max_tokens"),
    "temperature": ({"temperature": -1}, "temperature"),
    "bias": ({"logit_bias": {"640": 1}}, "logit_bias"),
    "alternatives": ({"logprobs": True, "top_logprobs": 6}, "top_logprobs"),
    "samples": ({"n": 5}, "n"),
    "role": ({"messages": [{"role": "x", "content": ""}]}, "messages[0].role"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    "tool": ({"tool_choice": "required"}, "tool_choice"),
    "stream": ({"stream_options": {}}, "stream_options"),
    "ends": ({"stop_token_ids": [3, 4, 5, 6]}, "stop_token_ids"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_named(client, what):
    fields, param = REFUSED[what]
    answer = client.post("/v1/chat/completions", json={"messages": CHAT, **fields})
    assert answer.status_code == (404 if what == "model" else 400)
    assert answer.json()["error"]["param"] == param


def test_long_and_deep_bodies(client):
    assert client.post("/v1/chat/completions", content=b"x" * 30_000).status_code == 413
    assert client.post("/v1/chat/completions", content=b"[" * 10_000).status_code == 400


def test_who_may_ask(service):
    guarded = application(service, key="secret")
    client = TestClient(guarded, base_url="http://localhost")  # not entered: the service is another's to close
    assert client.get("/v1/models").status_code == 401 and client.get("/health").status_code == 200
    right = {"authorization": "Bearer secret"}
    assert client.get("/v1/models", headers=right).status_code == 200
    assert client.get("/v1/models", headers={**right, "origin": "http://evil.example"}).status_code == 403
    assert client.get("/v1/models", headers={**right, "host": "evil.example"}).status_code == 403
    assert client.get("/nowhere", headers=right).json()["error"]["code"] == "no_such_route"
    guarded._most = 0
    assert client.get("/v1/models", headers=right).status_code == 429


def test_a_full_queue_and_a_closed_engine(model):
    engine = jaxgen.Engine(model, rows=1, slots=64, chunk=16, queue=1)
    service = Service(engine, "demo")
    client = TestClient(application(service), base_url="http://localhost")
    engine.wait_until_ready()
    real, go_on = engine._batch._programs, threading.Event()
    engine._batch._programs = real._replace(decode=lambda *given: go_on.wait(60) and real.decode(*given))
    body = {"prompt": [TEXT] * 8, "max_tokens": 30, "ignore_eos": True, "temperature": 0}
    answer = client.post("/v1/completions", json=body)
    go_on.set()
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"
    service.close(0)
    assert client.post("/v1/completions", json={"prompt": TEXT}).status_code == 503


def test_limits_are_checked():
    assert checked_limits(10, 1, 2.5, 3).seconds == 2.5
    with pytest.raises(JaxgenError, match="--max-n 0"):
        checked_limits(10, 0, 1, 1)


def test_room_for_constraints_is_chosen_at_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys):
    sizes = []
    monkeypatch.setattr(server, "serve", lambda *_, **given: sizes.append(given["constraints"]))
    for arguments in ([], ["--constraints", "48,24"], ["--constraints", "none"]):
        assert cli.main(["serve", *arguments]) == 0
    assert sizes == [(1024, 384), (48, 24), None]
    for wrong in ("48", "48,x", "48,24,1", "-1,2", ""):
        with pytest.raises(SystemExit):
            cli.main(["serve", f"--constraints={wrong}"])
        assert "STATES,CLASSES" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.soak
def test_under_load_no_answer_is_lost_or_wrong(tmp_path: Path):
    """`benchmarks/serve.py` with fewer requests: every answer is what `generate` gives, and memory does not grow."""
    file = tmp_path / "serve.json"
    command = [sys.executable, "benchmarks/serve.py", "--models", "demo", "--requests", "200", "--json", str(file)]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, timeout=600)
    found = json.loads(file.read_text(encoding="utf-8"))["models"]["demo"]
    assert (found["lost"], found["wrong"]) == (0, 0)
    assert found["requests"] == 200 and found["tokens"] > 1000 and found["compared_logprobs"] > 200
    assert found["memory_mb"]["second_half"] < found["memory_mb"]["first_half"] + 20


def test_a_server_as_a_process():
    """A seed in a crowd, clients that go away, and an end by SIGTERM."""
    with serving("--rows", "2", "--slots", "512", JAXGEN_API_KEY="k") as url:
        wait_until_ready(url)
        with httpx.Client(base_url=url, headers={"authorization": "Bearer k"}, timeout=60) as client:
            long = {"prompt": TEXT, "max_tokens": 480, "ignore_eos": True, "stream": True}
            for _ in range(2):
                with client.stream("POST", "/v1/completions", json=long) as answer:
                    next(answer.iter_lines())  # then it goes away
            deadline = time.monotonic() + 30
            while "jaxgen_busy 0" not in client.get("/metrics").text:
                assert time.monotonic() < deadline
                time.sleep(0.05)

            def text(seed):
                body = {"prompt": TEXT, "seed": seed, "max_tokens": 12, "temperature": 1.5}
                return client.post("/v1/completions", json=body).json()["choices"][0]["text"]

            alone = [text(seed) for seed in range(3)]
            with concurrent.futures.ThreadPoolExecutor(9) as crowd:
                assert [*crowd.map(text, [0, 1, 2] * 3)] == alone * 3
