"""The routes of a server, as an ASGI application."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from jaxgen.serve import tgi
from jaxgen.serve.answers import check_name
from jaxgen.serve.chat import chat_completions, read_chat, template_of
from jaxgen.serve.checks import flag, ids, text
from jaxgen.serve.completions import completions, read_completion
from jaxgen.serve.fields import Fields, body_of
from jaxgen.serve.follow import ClientGoneError, unless_gone
from jaxgen.serve.guard import Guard
from jaxgen.serve.openapi import document
from jaxgen.serve.refusal import Refusal, as_json
from jaxgen.serve.service import Service

_PAGE = Path(__file__).with_name("page.html")
_SAFE = {
    # The page's script and style stand in it; it talks to its own server only.
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Posted(NamedTuple):
    """A route that takes a body: what reads its fields, and what answers."""

    read: Callable[[Fields, Service], Any]
    answer: Callable[[Service, Any], Awaitable[Any]]


def application(service: Service, *, key: str | None = None, local: bool = True, closing_seconds: float = 30.0) -> Any:
    """A server's ASGI application; its lifespan prepares the service and closes it.

    `key` is what clients must bring, `local` whether only names of this machine are answered. At the end requests have
    `closing_seconds` to finish.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        threading.Thread(target=_prepare, args=(service,), name="jaxgen prepare", daemon=True).start()
        try:
            yield
        finally:
            service.close(closing_seconds)

    async def metrics(_: Request) -> Response:
        said = service.metrics.text(service.engine.stats(), guard.connections)
        return PlainTextResponse(said, media_type="text/plain; version=0.0.4")

    async def openapi(_: Request) -> Response:
        reads = {path: posted.read for path, posted in POSTS.items()}
        return as_json(document(service, reads, key=key is not None))

    routes = [
        *(Route(path, _get(service, what)) for path, what in _GETS.items()),
        *(Route(path, _post(service, what), methods=["POST"]) for path, what in POSTS.items()),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
        Route("/v1/models/{id:path}", functools.partial(_model, service)),
        Route("/v1/records/{id}", functools.partial(_record, service)),
    ]
    handlers: Any = {HTTPException: functools.partial(_no_route, service)}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    guard = Guard(app, key=key, local=local, most=service.limits.connections, refused=service.failed)
    return guard


def _prepare(service: Service) -> None:
    try:
        service.prepare()
    except Exception as error:  # /ready says that it is not, and requests say why
        service.failure(error)


def _post(service: Service, what: Posted) -> Callable[[Request], Awaitable[Any]]:
    async def endpoint(request: Request) -> Any:
        limits = service.limits
        try:
            if service.engine.closed:
                raise Refusal("the server is closing, or its engine has failed", status=503, code="closing")
            body = await body_of(request, limits.body, limits.body_seconds)
            return await unless_gone(request.receive, what.answer(service, what.read(Fields(body), service)))
        except ClientGoneError:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            refusal = service.failure(error)
            headers = {"retry-after": "1"} if refusal.status in (429, 503) else {}
            return as_json(refusal.body(service.hidden), refusal.status, **headers)

    return endpoint


def _get(service: Service, what: Callable[[Service], Response]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(_: Request) -> Response:
        return what(service)

    return endpoint


async def _record(service: Service, request: Request) -> Response:
    try:
        outputs = await service.prompts(service.records.outputs, request.path_params["id"])
        record = await asyncio.to_thread(service.records.record, outputs)
    except Exception as error:
        refusal = service.failure(error)
        return as_json(refusal.body(service.hidden), refusal.status)
    return Response(record.to_json(), media_type="application/json")


async def _no_route(service: Service, request: Request, error: HTTPException) -> Response:
    said = f"{request.method} {request.url.path[:200]}: {error.detail}"
    refusal = Refusal(said, status=error.status_code, code="no_such_route")
    return as_json(service.failed(refusal), error.status_code, **{str(k): v for k, v in (error.headers or {}).items()})


def _models(service: Service) -> Response:
    return as_json({"object": "list", "data": [_entry(service)]})


async def _model(service: Service, request: Request) -> Response:
    try:
        check_name(request.path_params["id"], service)
    except Refusal as refusal:
        return as_json(service.failed(refusal), refusal.status)
    return as_json(_entry(service))


def _entry(service: Service) -> dict[str, Any]:
    entry = {"id": service.name, "object": "model", "created": service.created, "owned_by": "jaxgen"}
    shape = service.engine.strict
    known = {"max_model_len": shape.tokens, "max_top_logprobs": service.engine.top_logprobs}
    return entry | known | {"system_fingerprint": service.fingerprint, "fingerprint_of": service.facts}


def _ready(service: Service) -> Response:
    if service.state == "ready":
        return as_json({"status": "ready"})
    return as_json({"status": service.state}, 503, retry_after="1")


def _read_tokenize(fields: Fields, service: Service) -> Callable[[], list[int]]:
    ways = {"prompt": functools.partial(_of_text, service), "messages": functools.partial(_of_chat, service)}
    return fields.either(ways)


def _of_text(service: Service, fields: Fields) -> Callable[[], list[int]]:
    _shown_with(fields)
    prompt, special = (
        fields.need("prompt", text, "A text."),
        fields.take("add_special_tokens", flag, "As the tokenizer's option.", True),
    )
    fields.end()
    return lambda: service.encoded("prompt", prompt, add_special_tokens=special)


def _of_chat(service: Service, fields: Fields) -> Callable[[], list[int]]:
    _shown_with(fields)
    messages, options, _ = template_of(fields)
    fields.end()
    return lambda: service.encoded("messages", messages, **options)


def _shown_with(fields: Fields) -> None:
    fields.take("model", text, "Changes nothing.")
    fields.take("return_token_strs", flag, "Changes nothing: they are always there.")


async def _tokenize(service: Service, work: Callable[[], list[int]]) -> Response:
    """vLLM's interface: the ids of a `prompt`, or of a chat's `messages`."""
    found = await service.prompts(work)
    texts = [service.texts.text_of(token) for token in found]
    return as_json(
        {"tokens": found, "count": len(found), "max_model_len": service.engine.strict.tokens, "token_strs": texts}
    )


def _read_detokenize(fields: Fields, service: Service) -> list[int]:
    fields.take("model", text, "Changes nothing.")
    given = fields.need("tokens", ids(service.model.config.vocab_size), "Ids of tokens.")
    fields.end()
    return given


async def _detokenize(service: Service, given: list[int]) -> Response:
    """vLLM's interface: the text of `tokens`."""
    return as_json({"prompt": await service.prompts(service.tokenizer.decode, given)})


_GETS: dict[str, Callable[[Service], Response]] = {
    "/": lambda _: HTMLResponse(_PAGE.read_bytes(), headers=_SAFE),
    "/health": lambda _: as_json({"status": "alive"}),
    "/ready": _ready,
    "/v1/models": _models,
    "/info": tgi.info,
}
POSTS: dict[str, Posted] = {
    "/v1/chat/completions": Posted(read_chat, chat_completions),
    "/v1/completions": Posted(read_completion, completions),
    "/tokenize": Posted(_read_tokenize, _tokenize),
    "/detokenize": Posted(_read_detokenize, _detokenize),
    "/generate": Posted(tgi.read_inputs, tgi.generate),
    "/generate_stream": Posted(tgi.read_inputs, tgi.generate_stream),
}
