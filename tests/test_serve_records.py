"""Records of what a server answered: `jaxgen.replay` finds them identical, and finds what was changed in them."""

import json
import time

import numpy as np
import pytest
from starlette.testclient import TestClient

import jaxgen
from jaxgen import Record, demo
from jaxgen.serve.app import application
from jaxgen.serve.service import Limits, Service

CHAT = [{"role": "user", "content": "How many helicopters can a human eat in one sitting?"}]
BODIES = {
    "a chat": {"messages": CHAT, "temperature": 1.5, "top_p": 0.9, "seed": -3, "max_tokens": 9},
    "no seed": {"messages": CHAT, "max_completion_tokens": 5, "logprobs": True, "top_logprobs": 3},
    "several prompts and samples": {
        **{"prompt": ["1, 2, 3", [1, 35, 40, 52]], "n": 2, "seed": 1 << 70, "max_tokens": 8},
        **{"temperature": 1.3, "stop": ["7"], "min_tokens": 2, "logit_bias": {"5": -100}, "repetition_penalty": 1.1},
    },
    "greedy": {"prompt": "1, 2, 3", "n": 2, "temperature": 0, "max_tokens": 20},
    "a shape": {
        **{"prompt": "1, 2, 3", "n": 2, "seed": 3, "max_tokens": 30, "structured_outputs": {"regex": "(, [0-9a-f]+)+"}},
        **{"frequency_penalty": 0.5, "presence_penalty": -0.5},
    },
    "to the end of a row": {"messages": CHAT, "temperature": 0.7, "top_k": 3, "seed": 2, "ignore_eos": True},
}


@pytest.fixture(scope="module")
def model():
    return jaxgen.AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")


@pytest.fixture(scope="module")
def service(model):
    engine = jaxgen.Engine(model, rows=4, slots=128, chunk=16, top_logprobs=5)
    return Service(engine, "demo", Limits(records=3000))


@pytest.fixture(scope="module")
def client(service):
    with TestClient(application(service), base_url="http://localhost") as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.05)
        yield client


def asked(client, body, **more):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answer = client.post(path, json={**body, **more})
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize("what", BODIES)
def test_an_answer_is_replayed(client, model, what):
    answer = asked(client, BODIES[what]).json()
    text = client.get(f"/v1/records/{answer['id']}").text
    record = Record.from_json(text)
    assert jaxgen.replay(record, model).message == "identical"
    new = sum(len(row) for entry in record.generations for row in entry["output_ids"])
    assert new == answer["usage"]["completion_tokens"]
    assert str(demo.path()) not in text and record.generations[0]["seed"] == answer["seed"]
    record.generations[-1]["output_ids"][-1][1] += 1
    assert jaxgen.replay(record, model).status == "different"


def test_a_streamed_answer_has_one_too(client, model, tmp_path):
    lines = asked(client, BODIES["a chat"], stream=True).text.splitlines()
    streamed = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    [name] = {event["id"] for event in streamed}
    (tmp_path / "run.json").write_text(client.get(f"/v1/records/{name}").text)
    assert jaxgen.replay(tmp_path / "run.json").exit_code == 0
    whole = client.get("/v1/records/" + asked(client, BODIES["a chat"]).json()["id"]).json()
    assert whole["generations"][0]["output_ids"] == Record.load(tmp_path / "run.json").generations[0]["output_ids"]


def test_who_gets_none(client, service, model):
    """Who does not know the id or the key, who comes late, and who asks for more than one call of generate gives."""
    name = asked(client, BODIES["a chat"]).json()["id"]
    other = TestClient(application(service, key="secret"), base_url="http://localhost")
    assert other.get(f"/v1/records/{name}").status_code == 401
    assert other.get(f"/v1/records/{name}", headers={"authorization": "Bearer secret"}).status_code == 200
    assert client.get(f"/v1/records/{name}").status_code == 200
    many = asked(client, {**BODIES["greedy"], "n": 8}).json()["id"]  # of an engine of 4 rows
    refused = client.get(f"/v1/records/{many}").json()["error"]
    assert refused["param"] == "id" and "4 rows" in refused["message"]
    for _ in range(20):  # 50 tokens, and twice as many characters of options
        asked(client, BODIES["greedy"])
    for unknown in (name, "chatcmpl-0", "%2e%2e"):
        answer = client.get(f"/v1/records/{unknown}")
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "record_not_found"
    assert service.records._size <= 3000 < 20 * 160
    service.engine.submit([1, 5], max_new_tokens=3).result()  # of no request: not kept


def test_weights_that_have_changed_since_are_not_written_down(client, service, model):
    name = asked(client, BODIES["greedy"]).json()["id"]
    weights = model.lm_head.weight
    before = weights[...]
    weights[...] = before + np.float32(0)
    try:
        answer = client.get(f"/v1/records/{name}")
        assert answer.status_code == 400 and "changed" in answer.json()["error"]["message"]
    finally:
        weights[...] = before
