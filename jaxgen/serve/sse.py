"""Server-sent events: an answer that is sent while it comes about."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from starlette.types import Receive, Scope, Send

from jaxgen.engine.handle import Handle
from jaxgen.serve.follow import ClientGoneError, held, unless_gone

logger = logging.getLogger("jaxgen")
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies pass each event on
]


class Events:
    """An answer of events, as an ASGI application. The handles behind it are cancelled when the client goes away.

    `events` are what to send as JSON; an error among them becomes `failed(error)`, the last one. `last` is a text that
    ends it, if there is one. After `seconds` it ends whatever happens: a client may read as slowly as it likes.
    """

    def __init__(
        self,
        events: AsyncGenerator[Any, None],
        handles: Sequence[Handle],
        failed: Callable[[Exception], Any],
        seconds: float,
        last: str | None = None,
    ):
        self._events, self._handles, self._failed = events, handles, failed
        self._seconds, self._last = seconds, last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with held(self._handles):
            try:
                async with asyncio.timeout(self._seconds):
                    await unless_gone(receive, self._send(send))
            except ClientGoneError:
                pass
            except TimeoutError:
                logger.warning("an answer was not read within %g s; it ends", self._seconds)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            async with contextlib.aclosing(self._events) as events:
                async for event in events:
                    await _put(send, json.dumps(event, allow_nan=False))
        except Exception as error:
            await _put(send, json.dumps(self._failed(error)))
        if self._last is not None:
            await _put(send, self._last)
        await send({"type": "http.response.body", "body": b""})


async def _put(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
