"""A route of the API, with what /openapi.json states of it beside its path and docstring."""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

__all__ = ["ApiRoute", "Operation"]


@dataclass(frozen=True)
class Operation:
    """The bodies of a route's requests and responses, as types.

    A `body` with a bool field `stream` may also get `events` as server-sent events.
    """

    body: type[msgspec.Struct] | None = None
    """The decoded type of a request's JSON; None without a body."""
    response: Any = None
    """The type of a successful response's JSON; None for any JSON."""
    text: str | None = None
    """The media type of a successful response that is no JSON."""
    events: Any = None
    """The type of the JSON of each event of a stream."""
    unready: Any = None
    """The type of the JSON of status 503, where it is no error object."""
    error: Any = None
    """The type of the JSON of most errors; None is OpenAI's error object."""
    statuses: tuple[int, ...] = ()
    """Error statuses beside those of every route, or of every route with a body."""
    fields: Collection[str] | None = None
    """The fields of `body` that have an effect; None for all of them."""
    rules: Sequence[Mapping[str, Any]] = ()
    """JSON Schemas that a body satisfies beside its type: which fields exclude each other."""
    query: Mapping[str, Any] = field(default_factory=dict)
    """JSON Schemas of the query's parameters, by name; each may be absent."""
    is_public: bool = False
    """Whether the route needs no API key."""


class ApiRoute(Route):
    """A Starlette route with its Operation.  Its method follows from the body: GET, or POST."""

    def __init__(
        self,
        path: str,
        endpoint: Callable[[Request], Awaitable[Response]],
        operation: Operation | None = None,
        *,
        method: str | None = None,
        include_in_schema: bool = True,
    ) -> None:
        self.operation = operation or Operation()
        method = method or ("GET" if self.operation.body is None else "POST")
        super().__init__(path, endpoint, methods=[method], include_in_schema=include_in_schema)
