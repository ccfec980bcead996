"""The HTTP server: its routes, its errors, and its start.

`create_app(loader)` returns a Starlette app.  The `BackgroundLoader` loads the model on a thread
while the socket is already open; /health reports the progress.
"""

import errno
import logging
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from osmium.errors import ConfigError, OsmiumError, RequestError
from osmium.server.access import (
    AccessMiddleware,
    is_address,
    open_to,
    parse_hosts,
    parse_keys,
    parse_origins,
)
from osmium.server.answer import ANSWER_ROUTES
from osmium.server.anthropic import ANTHROPIC_ROUTES
from osmium.server.anthropic_errors import error_form
from osmium.server.body import BodyReader, ErrorResponse
from osmium.server.connections import HttpConfig
from osmium.server.fields import IgnoredFields
from osmium.server.limits import DEFAULT_LIMITS, Limits, shown
from osmium.server.loading import BackgroundLoader
from osmium.server.openai import error_status
from osmium.server.request_log import RequestLog, hide_values
from osmium.server.request_queue import RequestQueue
from osmium.server.responses import RESPONSE_ROUTES
from osmium.server.responses_store import ResponseStore
from osmium.server.route import ApiRoute
from osmium.server.shutdown import Server, Shutdown, exit_now
from osmium.server.status import STATUS_ROUTES, UNSUPPORTED_ROUTES, allowed_methods, unknown_route
from osmium.server.tokens import TOKEN_ROUTES

__all__ = ["BackgroundLoader", "create_app", "serve"]

log = logging.getLogger("osmium.server")

ACCEPTS = 64
"""Most connections that one turn of the event loop accepts."""

DRAIN_S = 5.0
"""Seconds in which the rest of a refused body is dropped."""


def create_app(
    loader: BackgroundLoader,
    *,
    api_key: str | Sequence[str] | None = None,
    cors_origin: str | Sequence[str] = (),
    allowed_host: str | Sequence[str] = (),
    served_model_name: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    shutdown: Shutdown | None = None,
    log_requests: int = 0,
) -> Starlette:
    """The app.  With an `api_key`, or several, all routes but /health need one of them.

    `cors_origin` and `allowed_host` are allowed besides local ones.  With `log_requests` 1 each
    request is a line on stderr, with 2 its body another one.  Raises: ConfigError.
    """
    shutdown, bodies = shutdown or Shutdown(), BodyReader(limits)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        loader.start()
        yield
        bodies.close()
        await shutdown.close(loader.close)

    keys = parse_keys(_listed(api_key))
    access = Middleware(
        AccessMiddleware,
        allowed_hosts=parse_hosts(_listed(allowed_host)),
        cors_origins=parse_origins(_listed(cors_origin)),
        api_keys=keys,
    )
    request_log = [Middleware(RequestLog, level=log_requests, write=_print)] if log_requests else []
    hide_values(log_requests < 2)
    app = Starlette(
        routes=[
            *STATUS_ROUTES,
            *ANSWER_ROUTES,
            *RESPONSE_ROUTES,
            *ANTHROPIC_ROUTES,
            *TOKEN_ROUTES,
            *UNSUPPORTED_ROUTES,
        ],
        middleware=[*request_log, access],
        exception_handlers={
            OsmiumError: on_error, HTTPException: on_http_error, ClientDisconnect: on_disconnect,
            Exception: on_internal_error,
        },
        lifespan=lifespan,
    )  # fmt: skip
    app.state.loader, app.state.served_model_name = loader, served_model_name
    app.state.bodies, app.state.shutdown = bodies, shutdown
    app.state.queue = RequestQueue(limits.max_queued_requests)
    app.state.responses = ResponseStore()
    app.state.has_keys, app.state.openapi = bool(keys), None
    routes = [route for route in app.routes if isinstance(route, ApiRoute)]
    operations = [route.operation for route in routes if route.operation.error is None]
    kinds = [one.body for one in operations if one.body is not None]
    app.state.ignored = IgnoredFields(name for kind in kinds for name in kind.__struct_fields__)
    return app


def _print(line: str) -> None:
    """A line on stderr, which may be closed."""
    with suppress(OSError, ValueError):
        print(f"osmium: {line}", file=sys.stderr, flush=True)


def _listed(values: str | Sequence[str] | None) -> list[str]:
    return [values] if isinstance(values, str) else list(values or ())


# -- errors ----------------------------------------------------------------------------------------


async def on_error(request: Request, error: Exception) -> Response:
    """Osmium's errors as the error object of the client's API."""
    assert isinstance(error, OsmiumError), "registered for OsmiumError"
    status = error_status(error)
    headers = {"Retry-After": "5"} if status in (429, 503) else None
    if status == 408:
        headers = {"Connection": "close"}
    return _error_response(request, error, status, headers)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Unknown routes and methods as the error object of the client's API."""
    assert isinstance(error, HTTPException), "registered for HTTPException"
    text = f"{request.method} {shown(request.url.path)}: {error.detail}."
    if error.status_code == 404:
        return _error_response(request, unknown_route(request), 404, error.headers)
    if error.status_code == 405:
        allowed = allowed_methods(request)
        text = f"{request.method} {shown(request.url.path)} is not allowed; use {allowed}."
        return _error_response(request, RequestError(text), 405, {"Allow": allowed})
    return _error_response(request, RequestError(text), error.status_code, error.headers)


def _error_response(
    request: Request, error: OsmiumError, status: int, headers: Mapping[str, str] | None
) -> Response:
    drain_s = 0.2 if status == 408 or request.app.state.shutdown.begun else DRAIN_S
    body, form_headers = error_form(request.scope, error, status)
    return ErrorResponse(body, status, {**(headers or {}), **form_headers}, drain_s)


async def on_disconnect(request: Request, error: Exception) -> Response:
    """The client disconnected while it sent the request; no client receives this response."""
    return Response(status_code=499)


async def on_internal_error(request: Request, error: Exception) -> Response:
    """Any other exception: a bug.  Logs the traceback and answers 500."""
    endpoint = getattr(request.scope.get("endpoint"), "__name__", "the route")
    log.error("%s of %s failed", request.method, endpoint, exc_info=error)
    problem = OsmiumError(f"Internal error: {type(error).__name__}.")
    body, headers = error_form(request.scope, problem)
    return JSONResponse(body, 500, headers)


# -- start -----------------------------------------------------------------------------------------


def serve(
    loader: BackgroundLoader,
    *,
    address: str = "127.0.0.1",
    port: int = 8012,
    api_key: str | Sequence[str] | None = None,
    cors_origin: str | Sequence[str] = (),
    allowed_host: str | Sequence[str] = (),
    served_model_name: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    tls: ssl.SSLContext | None = None,
    log_requests: int = 0,
) -> None:
    """Serve until Ctrl-C, with `tls` by HTTPS.  The port is bound before the model is loaded.

    Raises: ConfigError if the port is in use, and the error that stopped the loading or the engine.
    """
    hosts = [*_listed(allowed_host), *([] if is_address(address) else [address])]
    shutdown = Shutdown()
    app = create_app(
        loader, api_key=api_key, cors_origin=cors_origin, allowed_host=hosts,
        served_model_name=served_model_name, limits=limits, shutdown=shutdown,
        log_requests=log_requests,
    )  # fmt: skip
    listening = _listen(address, port)
    warning = open_to(listening.getsockname()[0], hosts, _listed(cors_origin), bool(api_key))
    if warning is not None:
        log.warning(warning)
    config = HttpConfig(
        app, limits, tls, log_level="warning", access_log=False, timeout_graceful_shutdown=1,
        lifespan="on", backlog=ACCEPTS,
    )  # fmt: skip
    server = Server(config, shutdown)

    def stop() -> None:
        server.should_exit = True

    def on_done() -> None:
        if loader.failure is not None:
            server.should_exit = True
        elif loader.engine is not None:
            loader.engine.on_stopped = stop
            if loader.engine.stopped is not None:
                stop()
            scheme = "http" if tls is None else "https"
            url_host = f"[{address}]" if ":" in address else address
            print(
                f"{served_model_name or loader.engine.name} is served on "
                f"{scheme}://{url_host}:{listening.getsockname()[1]}/v1",
                file=sys.stderr,
                flush=True,
            )

    loader.on_done = on_done
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        if shutdown.engine_runs or app.state.bodies.busy:
            exit_now(signal.SIGINT)  # Python's own exit may crash in threads that still compute
        raise
    finally:
        listening.close()
    if loader.failure is not None:
        raise loader.failure
    if loader.engine is not None and loader.engine.failure is not None:
        raise loader.engine.failure


def _listen(address: str, port: int) -> socket.socket:
    """A listening socket.  Raises: ConfigError if the port is in use or not allowed."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port is {port}; it must be from 0 to 65535.")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((address, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {port} on {address} is in use; stop the process that uses it, or choose "
                "another with --port."
            ) from None
        raise ConfigError(f"Cannot listen on {address}:{port}: {error}") from None
    return listening
