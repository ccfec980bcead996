"""Errors in the form that the client's API has: Anthropic's, or OpenAI's.

Requests to /v1/messages, and those with the header `anthropic-version`, get Anthropic's.
"""

import secrets
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

from osmium.errors import ContextError, OsmiumError, RequestError
from osmium.server.openai import error_body, error_status

__all__ = ["anthropic_error", "error_form", "is_anthropic", "request_id"]

_TYPES = {
    401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error", 408: "timeout_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
    529: "overloaded_error",
}  # fmt: skip
"""Names of errors by HTTP status; others are invalid_request_error or api_error."""

_NO_THREADS = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
"""Details of an error with which the anthropic package sends the whole conversation again."""

_OPENAI = ("/v1/chat/", "/v1/completions", "/v1/responses")
"""Paths of OpenAI's API, whatever the headers."""

_KEY = "osmium.request_id"


def is_anthropic(scope: Scope) -> bool:
    """Whether the client uses Anthropic's API."""
    path: str = scope["path"]
    if path.removeprefix("/v1").removeprefix("/v1").startswith("/messages"):
        return True
    return "anthropic-version" in Headers(scope=scope) and not path.startswith(_OPENAI)


def request_id(scope: Scope) -> str:
    """The id of a request, the same in the header and in an error."""
    found: str = scope.setdefault(_KEY, "")
    if not found:
        found = scope[_KEY] = "req_" + secrets.token_hex(12)
    return found


def error_form(
    scope: Scope, error: OsmiumError, status: int | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The body of an error response, and its headers.  `status` is the error's own if None."""
    if not is_anthropic(scope):
        return error_body(error), {}
    name = request_id(scope)
    return anthropic_error(error, name, status), {"request-id": name}


def anthropic_error(
    error: OsmiumError, request_id: str, status: int | None = None
) -> dict[str, Any]:
    """Anthropic's error object."""
    status = error_status(error) if status is None else status
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    text: str = error_body(error)["error"]["message"]
    if isinstance(error, ContextError):
        # clients read both numbers; a prompt needs room for one generated token
        most = min(error.context, error.tokens - 1)
        text = f"prompt is too long: {error.tokens} tokens > {most} maximum"
    found: dict[str, Any] = {"type": kind, "message": text}
    if isinstance(error, RequestError) and error.param == "thread":
        found["details"] = _NO_THREADS
    return {"type": "error", "error": found, "request_id": request_id}
