"""`/openapi.json`: what a server takes, as the code says that reads it, and what it answers."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxgen.serve.answer_schemas import SCHEMAS, TEXT, ref
from jaxgen.serve.checks import Schema
from jaxgen.serve.fields import Fields, schema_of
from jaxgen.serve.guard import OPEN
from jaxgen.serve.service import Service, version

Read = Callable[[Fields, Service], Any]


class _Post(NamedTuple):
    says: str
    asked: str  # the component that is asked
    answer: str  # the one that is answered, unless
    events: str = ""  # there is a stream of these


_POSTS = {
    "/v1/chat/completions": _Post(
        "The next message of a chat, as at OpenAI.", "ChatRequest", "ChatCompletion", "ChatCompletionChunk"
    ),
    "/v1/completions": _Post("What follows texts, as at OpenAI.", "CompletionRequest", "Completion", "CompletionChunk"),
    "/tokenize": _Post("The ids of a text or of a chat, as in vLLM.", "TokenizeRequest", "Tokens"),
    "/detokenize": _Post("The text of ids, as in vLLM.", "DetokenizeRequest", "Text"),
    "/generate": _Post("What follows a text, as in TGI.", "GenerateRequest", "Generated", "GeneratedToken"),
    "/generate_stream": _Post("The same as events, one per token.", "GenerateStreamRequest", "", "GeneratedToken"),
}
_GETS = {
    "/health": ("Alive.", "State"),
    "/ready": ("Compiled, and taking requests; 503 if not.", "State"),
    "/v1/models": ("The model, and what its fingerprint stands for.", "Models"),
    "/v1/models/{id}": ("The model of that name.", "Model"),
    "/info": ("The limits, as TGI says them.", "Info"),
    "/v1/records/{id}": ("The record of an answer, by its id.", "Record"),
}
_REFUSALS = {
    400: "A field is wrong: the message says why, `param` which.",
    401: "The API key is missing or wrong.",
    403: "A page of another site asks, or the server is for its own machine only.",
    404: "There is no such thing.",
    405: "Another method was used.",
    408: "The body did not come in time.",
    413: "The body is too long.",
    429: "As much is being asked as may be; come again later.",
    500: "The request failed, and it is not its own fault.",
    503: "The server is closing, or too slow for what is asked.",
}


def document(service: Service, reads: Mapping[str, Read], *, key: bool) -> dict[str, Any]:
    """The OpenAPI document of a server; `reads` are what reads the bodies of its routes, `key` says if it has one."""
    asked = {_POSTS[path].asked: _asked(read, service) for path, read in reads.items()}
    paths = {path: {"post": _post(path, _POSTS[path], key)} for path in reads}
    paths |= {path: {"get": _get(path, *said, key)} for path, said in _GETS.items()}
    paths["/metrics"] = {"get": _operation("/metrics", "Counters, for Prometheus.", _content("text/plain", TEXT), key)}
    paths["/"] = {"get": _operation("/", "A page to chat.", _content("text/html", TEXT), key)}
    components: dict[str, Any] = {"schemas": {**asked, **SCHEMAS}}
    if key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    says = "In a body null is as good as not given. Unknown fields are refused by name. Texts have no half characters."
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxgen serve", "version": version(), "description": says},
        "paths": paths,
        "components": components,
    }


def _asked(read: Read, service: Service) -> Schema:
    return schema_of(lambda fields: read(fields, service))


def _post(path: str, post: _Post, key: bool) -> dict[str, Any]:
    answers = _content("application/json", ref(post.answer)) if post.answer else {}
    if post.events:
        data = {"type": "string", "contentMediaType": "application/json", "contentSchema": ref(post.events)}
        says = "Server-sent events; after an error it is the last one. OpenAI's routes end with the data [DONE]."
        event = {"type": "object", "description": says, "properties": {"data": data}, "required": ["data"]}
        answers |= _content("text/event-stream", event)
    operation = _operation(path, post.says, answers, key, 400, 404, 408, 413, 500, 503)
    return {"requestBody": {"required": True, "content": _content("application/json", ref(post.asked))}} | operation


def _get(path: str, says: str, answer: str, key: bool) -> dict[str, Any]:
    operation = _operation(path, says, _content("application/json", ref(answer)), key)
    if path == "/ready":
        operation["responses"]["503"] = operation["responses"]["200"] | {"description": "Not ready."}
    if "{id}" in path:
        operation = _operation(path, says, _content("application/json", ref(answer)), key, 400, 404, 500)
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": TEXT}]
    return operation


def _operation(path: str, says: str, answers: Schema, key: bool, *statuses: int) -> dict[str, Any]:
    """An operation with what it answers, and how it refuses."""
    closed = path not in OPEN
    statuses = (*statuses, 403, 405, *((429,) if closed else ()), *((401,) if closed and key else ()))
    responses: dict[str, Any] = {"200": {"description": says, "content": answers}}
    responses |= {str(status): _refusal(status) for status in sorted(statuses)}
    named = path.strip("/").translate(str.maketrans("/", "_", "{}")) or "page"
    operation = {"summary": says, "operationId": named, "responses": responses}
    return operation | ({"security": [{"key": []}]} if closed and key else {})


def _refusal(status: int) -> dict[str, Any]:
    said: dict[str, Any] = {"description": _REFUSALS[status], "content": _content("application/json", ref("Error"))}
    if status in (429, 503):
        said["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "string"}}}
    return said


def _content(kind: str, schema: Schema) -> dict[str, Any]:
    return {kind: {"schema": schema}}
