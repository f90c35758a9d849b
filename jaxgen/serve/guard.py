"""Who may ask: the key, the browser's page of another site, and how many at a time."""

import hmac
import ipaddress
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxgen.serve.refusal import Refusal, as_json

OPEN = ("/", "/health", "/ready")  # what needs no key: they say nothing that matters


class Guard:
    """Stands before an application, and lets in what may come in.

    With a `key`, requests bring it as `Authorization: Bearer KEY`. A browser's page from elsewhere is refused: it could
    ask what the person before it may ask. `local` says that the server is for this machine only: then names that are
    not its own are refused, since a foreign name may be made to point here.
    """

    def __init__(
        self, app: ASGIApp, *, key: str | None, local: bool, most: int, refused: Callable[[Refusal], dict[str, object]]
    ):
        self._app, self._key, self._local, self._most, self._refused = app, key, local, most, refused
        self.connections = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if (refusal := self._check(scope)) is not None:
            headers = {"www-authenticate": "Bearer"} if refusal.status == 401 else {"retry-after": "1"}
            answer = as_json(self._refused(refusal), refusal.status, **headers)
            await answer(scope, receive, send)
            return
        self.connections += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.connections -= 1

    def _check(self, scope: Scope) -> Refusal | None:
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if self._local and host and not is_local(_without_port(host)):
            return Refusal("this server answers to names of this machine only", status=403, code="host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return Refusal("pages of other sites may not use this server", status=403, code="origin")
        if self._key is not None and path not in OPEN:
            given = headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
                return Refusal("the API key is missing or wrong", status=401, code="invalid_api_key")
        if self.connections >= self._most and path not in OPEN:
            return Refusal(f"{self._most} requests are being answered already", status=429, code="too_many")
        return None


def is_local(host: str) -> bool:
    """Whether a name or an address means this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host
