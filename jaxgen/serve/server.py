"""A server as a process: an engine behind a port, until a signal ends it."""

import dataclasses
import functools
import logging
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from jaxgen.engine.engine import Engine
from jaxgen.errors import JaxgenError
from jaxgen.records.provenance import model_of
from jaxgen.serve.app import application
from jaxgen.serve.guard import is_local
from jaxgen.serve.service import Limits, Service

logger = logging.getLogger("jaxgen")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where a server listens, whom it answers, and how it ends."""

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    name: str | None = None  # what clients call the model
    closing_seconds: float = 30.0  # in which requests may finish after a signal


def checked_limits(body: int, samples: int, seconds: float, connections: int, records: int = Limits.records) -> Limits:
    """Limits as the command line gives them. Raises `JaxgenError`."""
    for name, value in {"body": body, "n": samples, "time": seconds, "connections": connections}.items():
        if not 0 < value < 1 << 31:
            raise JaxgenError(f"--max-{name} {value:g} must be more than 0, and less than {1 << 31}")
    if not 0 <= records < 1 << 31:
        raise JaxgenError(f"--records {records} must be at least 0, and less than {1 << 31}")
    return Limits(body=body, samples=samples, seconds=seconds, connections=connections, records=records)


def serve(model: Any, tokenizer: Any, settings: Settings, limits: Limits, **sizes: Any) -> None:
    """Serve a model until SIGINT or SIGTERM; `sizes` are those of `Engine`.

    Requests that run then may finish within `closing_seconds`; what is left is cancelled. Raises `JaxgenError` for an
    address that cannot be had.
    """
    if not 0 <= settings.port < 1 << 16:
        raise JaxgenError(f"--port {settings.port}: a port is 0 to 65535")
    if not 0 <= settings.closing_seconds < 1 << 31:
        raise JaxgenError(f"--closing-time {settings.closing_seconds:g} must be at least 0")
    if settings.key is not None and not (settings.key.isascii() and settings.key.isprintable() and settings.key):
        raise JaxgenError("--api-key: a key is printable ASCII, and not empty")
    local = is_local(settings.host)
    if not local and settings.key is None:
        logger.warning("--host %s without --api-key: whoever reaches this address may use it", settings.host)
    with Engine(model, tokenizer, **sizes) as engine:
        service = Service(engine, settings.name or name_of(model), limits)
        app = application(service, key=settings.key, local=local, closing_seconds=1)
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=math.ceil(settings.closing_seconds) + 5,  # when the engine has ended them all
            limit_concurrency=2 * limits.connections + 16,  # beyond what the application answers with 429
        )
        server = _Server(config, functools.partial(engine.close, settings.closing_seconds))
        try:
            server.run()
        except SystemExit as error:  # it has said why
            raise JaxgenError(f"--host {settings.host} --port {settings.port}: cannot listen there") from error


class _Server(uvicorn.Server):
    """Says where it listens; at a signal it does what `closing` says, and ends well."""

    def __init__(self, config: uvicorn.Config, closing: Callable[[], None]):
        super().__init__(config)
        self._closing = closing

    def handle_exit(self, sig: int, frame: Any) -> None:
        """As there, but it does not die of the signal when all is done."""
        super().handle_exit(sig, frame)
        self._captured_signals.clear()
        threading.Thread(target=self._closing, name="jaxgen closing", daemon=True).start()

    async def startup(self, sockets: Any = None) -> None:
        """As there."""
        await super().startup(sockets=sockets)
        for server in self.servers:
            for socket in server.sockets:
                host, port = socket.getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                logger.warning("http://%s:%d answers; it is compiling until /ready says so", shown, port)


def name_of(model: Any) -> str:
    """What a model is called: by its hub id, or by the last part of its directory."""
    known = model_of(model)["id"] if model.name_or_path is not None else None
    return known or (Path(model.name_or_path).name if model.name_or_path else type(model).__name__)
