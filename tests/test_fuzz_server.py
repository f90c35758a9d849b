"""Whatever a server is sent, it answers as its OpenAPI document says, and goes on."""

import json
import random
import time

import pytest
from starlette.testclient import TestClient

from jaxgen.serve.app import application
from jaxgen.serve.service import Limits
from tests.helpers import some_slow
from tests.server_bodies import BODIES, Document, mutated, served


@pytest.fixture(scope="module")
def service():
    return served(96, Limits(body=100_000, samples=4, sequences=8))


@pytest.fixture(scope="module")
def client(service):
    with TestClient(application(service), base_url="http://localhost", raise_server_exceptions=False) as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.05)
        yield client


@pytest.fixture(scope="module")
def document(client):
    return Document(client.get("/openapi.json").json())


def idle(service):
    """Whether nothing is left over, after a moment in which it may end."""
    deadline = time.monotonic() + 30
    while service.engine.stats()["busy"] or service.engine.stats()["queue"]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_every_route_is_in_the_document(service, client):
    said = client.get("/openapi.json").json()["paths"]
    routes = {route.path.replace(":path", ""): route.methods - {"HEAD"} for route in application(service)._app.routes}
    del routes["/openapi.json"]
    assert {path: {method.upper() for method in methods} for path, methods in said.items()} == routes


def test_names_of_operations_are_names(client):
    paths = client.get("/openapi.json").json()["paths"]
    names = [operation["operationId"] for methods in paths.values() for operation in methods.values()]
    assert len({*names}) == len(names) and all(map(str.isidentifier, names))


def test_every_field_that_is_taken_is_described(client):
    def undescribed(schema, where):
        for name, field in schema.get("properties", {}).items():
            yield from [] if field.get("description") else [f"{where}.{name}"]
            yield from undescribed(field, f"{where}.{name}")
        for inner in (*schema.get("anyOf", ()), *filter(None, [schema.get("items")])):
            yield from undescribed(inner, where)

    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    requests = [name for name in schemas if name.endswith("Request")]
    assert len(requests) == 6 and [*undescribed({"properties": {"x": {"items": {"properties": {"y": {}}}}}}, "")]
    assert [field for name in requests for field in undescribed(schemas[name], name)] == []


def test_another_method_is_refused_as_the_document_says(client, document):
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        answer = client.put(path.replace("{id}", "x"), json={})
        [method] = methods
        assert answer.status_code == 405 and method.upper() in answer.headers["allow"].split(", ")
        assert not document.wrong(path, answer, method)


def test_what_is_got_is_as_the_document_says(client, document):
    done = client.post("/v1/completions", json={"prompt": "1", "max_tokens": 1}).json()["id"]
    for path in ("/", "/health", "/ready", "/metrics", "/info", "/v1/models", f"/v1/records/{done}", "/v1/records/x"):
        known = "/v1/records/{id}" if "records" in path else path
        answer = client.get(path)
        assert answer.status_code == (404 if path.endswith("/x") else 200)
        assert not document.wrong(known, answer, "get")


@pytest.mark.parametrize("place", range(len(BODIES)))
def test_the_document_says_what_is_taken_and_answered(client, document, place):
    path, body = BODIES[place]
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert document.accepts(path, body) and not document.wrong(path, answer)
    assert not document.accepts(path, {**body, "temprature": 1})
    assert client.post(path, json={**body, "temprature": 1}).status_code == 400


def test_ids_are_those_of_the_model(client, document):
    """The document says how many tokens there are, and a wrong id is named with its place."""
    for path, field, rest in (("/detokenize", "tokens", {}), ("/v1/completions", "stop_token_ids", {"prompt": "1"})):
        assert document.accepts(path, {**rest, field: [0, 639]})
        assert client.post(path, json={**rest, field: [0, 639]}).status_code == 200
        for wrong in (640, -1, 1.5, True, "1"):
            assert not document.accepts(path, {**rest, field: [0, wrong]})
            error = client.post(path, json={**rest, field: [0, wrong]}).json()["error"]
            assert error["param"] == field and f"{field}[1]=" in error["message"] and "640" in error["message"]


@pytest.mark.parametrize(
    ("seed", "count"),
    some_slow([(0, 300), *((seed, 1000) for seed in range(1, 11))], lambda case: case[0] > 0, lambda case: case[0] > 1),
)
def test_bad_bodies_are_refused_as_the_document_says(client, service, document, seed, count):
    """Each is answered; one that the document does not allow is refused; nothing is left in the engine."""
    draw, taken = random.Random(seed), 0
    for turn in range(count):
        path, data, kind = mutated(draw)
        answer = client.post(path, content=data, headers={"content-type": kind})
        wrong = document.wrong(path, answer)
        assert not wrong, (turn, path, data[:2000], answer.status_code, answer.text[:2000], wrong)
        if answer.status_code == 200:
            taken += 1
            assert document.accepts(path, json.loads(data)), (turn, path, data[:2000])
    assert taken > count // 10
    assert idle(service)
    path, body = BODIES[0]
    assert client.post(path, json=body).status_code == 200
