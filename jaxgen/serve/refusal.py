"""What a server answers when it does not do what was asked: a status, and OpenAI's body of errors."""

import json
from typing import Any

from starlette.responses import Response

from jaxgen.errors import EngineClosedError, EngineFullError, JaxgenError, NonFiniteLogitsError

_LONGEST = 2000  # characters of a message
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class Refusal(JaxgenError):
    """A request is not carried out: `status` is HTTP's, `param` the field that is wrong, `code` a word for programs."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    def body(self, hidden: dict[str, str]) -> dict[str, Any]:
        """OpenAI's body. What is `hidden`, such as paths, is replaced."""
        message = " ".join(str(self).split())
        for secret, shown in hidden.items():
            message = message.replace(secret, shown)
        message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}..."
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def refusal_of(error: Exception) -> Refusal | None:
    """How to answer an error; None if it says nothing that a client should know."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, EngineFullError):
        return Refusal(str(error), status=429, code="queue_full")
    if isinstance(error, EngineClosedError):
        return Refusal("the server is closing, or its engine has failed", status=503, code="closing")
    if isinstance(error, NonFiniteLogitsError):
        return Refusal("the model's logits are not finite in this request", status=500, code="not_finite")
    return Refusal(str(error)) if isinstance(error, JaxgenError) else None


def as_json(content: Any, status: int = 200, **headers: str) -> Response:
    """A JSON answer; in ASCII, so that whatever a text holds can be sent."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(json.dumps(content, allow_nan=False), status, names, "application/json")
