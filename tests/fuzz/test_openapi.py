"""The server's OpenAPI document is one, and schemathesis finds no answer that is not as it says."""

import time

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from openapi_spec_validator import validate
from schemathesis.checks import not_a_server_error
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi import checks
from starlette.testclient import TestClient

from jaxgen.serve.app import POSTS, application
from jaxgen.serve.service import Limits
from tests.server_bodies import served

# Not that all is taken which the document allows: what makes no sense together, or does not fit a row, is refused.
CHECKS = [
    *(not_a_server_error, checks.status_code_conformance, checks.content_type_conformance),
    *(checks.response_headers_conformance, checks.response_schema_conformance, checks.negative_data_rejection),
    checks.unsupported_method,
]


@pytest.fixture(scope="module")
def app():
    service = served(64, Limits(samples=4, sequences=8))
    app = application(service, local=False)
    with TestClient(app) as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.05)

        async def without_an_end(scope, receive, send):
            """The same, which does not end when a client does."""
            if scope["type"] == "http":
                await app(scope, receive, send)
            else:
                for what in ("startup", "shutdown"):
                    await receive()
                    await send({"type": f"lifespan.{what}.complete"})

        yield without_an_end
        assert service.engine.stats()["busy"] == service.engine.stats()["queue"] == 0


@pytest.fixture(scope="module")
def document(app):
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_the_document_is_one(document):
    validate(document.raw_schema)


@pytest.mark.parametrize("mode", [*GenerationMode])
@pytest.mark.parametrize("path", [*POSTS, "/v1/models", "/v1/records/{id}", "/info", "/health", "/ready", "/metrics"])
def test_whatever_is_asked_is_answered_as_the_document_says(document, path, mode):
    operation = document[path]["POST" if path in POSTS else "GET"]
    if mode == GenerationMode.NEGATIVE and path not in POSTS:
        return  # nothing is sent there that could be wrong

    @settings(
        max_examples=60 if path in POSTS else 5,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        case.call_and_validate(checks=CHECKS)

    ask()
