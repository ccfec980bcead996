"""The HTTP server: routes, streams, and the cancellation of requests on a disconnect.

`create_app(loader)` returns a Starlette app.  The `BackgroundLoader` loads the model on a thread
while the socket is already open; /health reports the progress.
"""

import asyncio
import errno
import json
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from osmium.config import Progress
from osmium.engine.engine import Engine
from osmium.engine.request import Event, Finish
from osmium.errors import ConfigError, EngineStopped, OsmiumError, RequestError
from osmium.server.access import (
    AccessMiddleware,
    is_address,
    open_to,
    parse_hosts,
    parse_keys,
    parse_origins,
)
from osmium.server.body import BodyReader, ErrorResponse
from osmium.server.connections import HttpConfig
from osmium.server.limits import DEFAULT_LIMITS, Limits
from osmium.server.metrics import CONTENT_TYPE, exposition
from osmium.server.openai import ResponseBuilder, error_body, error_status, model_body
from osmium.server.prepare import Prepare, Prepared, prepare_chat, prepare_completion
from osmium.server.shutdown import Server, Shutdown, exit_now

__all__ = ["BackgroundLoader", "create_app", "serve"]

log = logging.getLogger("osmium.server")

ACCEPTS = 64
"""Most connections that one turn of the event loop accepts."""

DRAIN_S = 5.0
"""Seconds in which the rest of a refused body is dropped."""

PING_INTERVAL_S = 10
"""Seconds without an event before a stream sends a comment; clients time out on silent streams."""


class BackgroundLoader:
    """Loads an engine on its own thread and holds it, or the error that stopped the loading."""

    def __init__(self, load: Callable[[Progress], Engine]) -> None:
        self._load = load
        self.engine: Engine | None = None
        self.failure: BaseException | None = None
        self.progress: tuple[str, int, int] = ("starting", 0, 0)
        self.created = int(time.time())
        self.on_done: Callable[[], None] | None = None
        """Called on the loading thread after the model is loaded or has failed to load."""
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the loading thread; a second call does nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="osmium-load", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            engine = self._load(self._report)
            if engine.tokenizer is not None:
                engine.tokenizer.max_token_bytes  # noqa: B018 - slow once, so before any request
            self.engine = engine
        except BaseException as error:  # /health reports it; serve() raises it again
            self.failure = error
        if self.on_done is not None:
            self.on_done()

    def _report(self, stage: str, done: int, total: int) -> None:
        self.progress = (stage, done, total)

    def ready(self) -> Engine:
        """The engine.  Raises: EngineStopped while it loads, or after loading failed."""
        if self.failure is not None:
            raise EngineStopped(f"The model could not be loaded: {self.failure}")
        if self.engine is None:
            stage, done, total = self.progress
            percent = f", {100 * done // total} %" if total else ""
            raise EngineStopped(f"The model is still loading ({stage}{percent}); try again soon.")
        return self.engine

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()


def create_app(
    loader: BackgroundLoader,
    *,
    api_key: str | Sequence[str] | None = None,
    cors_origin: str | Sequence[str] = (),
    allowed_host: str | Sequence[str] = (),
    served_model_name: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    shutdown: Shutdown | None = None,
) -> Starlette:
    """The app.  With an `api_key`, or several, all routes but /health need one of them.

    `cors_origin` and `allowed_host` are allowed besides local ones.  Raises: ConfigError.
    """
    shutdown, bodies = shutdown or Shutdown(), BodyReader(limits)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        loader.start()
        yield
        bodies.close()
        await shutdown.close(loader.close)

    access = Middleware(
        AccessMiddleware,
        allowed_hosts=parse_hosts(_listed(allowed_host)),
        cors_origins=parse_origins(_listed(cors_origin)),
        api_keys=parse_keys(_listed(api_key)),
    )
    app = Starlette(
        routes=[
            Route("/", root, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{name:path}", model, methods=["GET"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/embeddings", embeddings, methods=["POST"]),
        ],
        middleware=[access],
        exception_handlers={
            OsmiumError: on_error, HTTPException: on_http_error, ClientDisconnect: on_disconnect,
            Exception: on_internal_error,
        },
        lifespan=lifespan,
    )  # fmt: skip
    app.state.loader, app.state.served_model_name = loader, served_model_name
    app.state.bodies, app.state.shutdown = bodies, shutdown
    return app


def _listed(values: str | Sequence[str] | None) -> list[str]:
    return [values] if isinstance(values, str) else list(values or ())


# -- errors ----------------------------------------------------------------------------------------


async def on_error(request: Request, error: Exception) -> Response:
    """Osmium's errors as OpenAI's error object."""
    assert isinstance(error, OsmiumError), "registered for OsmiumError"
    status = error_status(error)
    headers = {"Retry-After": "5"} if status in (429, 503) else None
    if status == 408:
        headers = {"Connection": "close"}
    return _error_response(request, error, status, headers)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Unknown routes and methods as OpenAI's error object."""
    assert isinstance(error, HTTPException), "registered for HTTPException"
    text = f"{request.method} {request.url.path}: {error.detail}."
    return _error_response(request, RequestError(text), error.status_code, error.headers)


def _error_response(
    request: Request, error: OsmiumError, status: int, headers: Mapping[str, str] | None
) -> Response:
    drain_s = 0.2 if status == 408 or request.app.state.shutdown.begun else DRAIN_S
    return ErrorResponse(error_body(error), status, headers, drain_s)


async def on_disconnect(request: Request, error: Exception) -> Response:
    """The client disconnected while it sent the request; no client receives this response."""
    return Response(status_code=499)


async def on_internal_error(request: Request, error: Exception) -> Response:
    """Any other exception: a bug.  Logs the traceback and answers 500."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse(error_body(OsmiumError(f"Internal error: {type(error).__name__}.")), 500)


# -- status ----------------------------------------------------------------------------------------


async def root(request: Request) -> Response:
    """The server's name and the path of its API."""
    return JSONResponse({"name": "osmium", "api": "/v1"})


async def health(request: Request) -> Response:
    """200 if requests can be served, else 503: while loading, with the progress."""
    loader: BackgroundLoader = request.app.state.loader
    if loader.failure is not None:
        return JSONResponse({"status": "failed", "error": str(loader.failure)}, 503)
    if loader.engine is None:
        stage, done, total = loader.progress
        body = {"status": "loading", "stage": stage, "done": done, "total": total}
        return JSONResponse(body, 503)
    stopped = loader.engine.stopped
    if stopped is not None:
        return JSONResponse({"status": "failed", "error": str(stopped)}, 503)
    return JSONResponse({"status": "ok", "model": _name(request, loader.engine)})


async def metrics(request: Request) -> Response:
    """Metrics in the Prometheus text format."""
    loader: BackgroundLoader = request.app.state.loader
    return Response(exposition(loader.engine), media_type=CONTENT_TYPE)


def _name(request: Request, engine: Engine) -> str:
    return str(request.app.state.served_model_name or engine.name)


def _served_model(request: Request) -> dict[str, Any]:
    """The model's entry.  Raises: EngineStopped."""
    loader: BackgroundLoader = request.app.state.loader
    engine = loader.ready()
    return model_body(_name(request, engine), engine.context, loader.created)


async def models(request: Request) -> Response:
    """The list of models: one entry."""
    return JSONResponse({"object": "list", "data": [_served_model(request)]})


async def model(request: Request) -> Response:
    """The model's entry.  Raises: RequestError for another name."""
    served = _served_model(request)
    name = request.path_params["name"]
    if name != served["id"]:
        raise RequestError(
            f"There is no model {name!r}; {served['id']!r} is served.",
            param="model",
            code="model_not_found",
            status=404,
        )
    return JSONResponse(served)


async def embeddings(request: Request) -> Response:
    """Always 404, as Osmium has no embeddings."""
    raise RequestError("Embeddings are not served.", code="unsupported_endpoint", status=404)


# -- responses -------------------------------------------------------------------------------------


async def _handle(request: Request, prepare: Prepare) -> Response:
    """Read a request's body, prepare it on a worker thread, and answer it."""
    state = request.app.state
    engine = state.loader.ready()
    name = _name(request, engine)

    async def prepared() -> Prepared:
        async with state.bodies.read(request) as (body, workers):
            return cast(Prepared, await workers.run(lambda: prepare(engine, name, body)))

    return await _answer(request, engine, await state.shutdown.unless_begun(prepared()))


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions"""
    return await _handle(request, prepare_chat)


async def completions(request: Request) -> Response:
    """POST /v1/completions"""
    try:
        return await _handle(request, prepare_completion)
    except RequestError as error:
        if error.param == "messages":  # the engine's name for a prompt
            error.param = "prompt"
        raise


async def _answer(request: Request, engine: Engine, prepared: Prepared) -> Response:
    """Submit the request, and answer with JSON or a stream.  A disconnect cancels the request."""
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Event | None] = asyncio.Queue()

    def on_event(event: Event) -> None:  # on the engine's thread
        try:
            loop.call_soon_threadsafe(events.put_nowait, event)
        except RuntimeError:
            pass  # the server has stopped, and its event loop is closed

    shutdown: Shutdown = request.app.state.shutdown
    shutdown.watch(events)
    response = prepared.response
    mask = prepared.token_mask() if prepared.token_mask is not None else None
    handle = engine.submit(prepared.ids, prepared.params, on_event, token_mask=mask)
    if prepared.stream:
        return EventSourceResponse(
            _stream(engine, handle, events, response, prepared.usage, shutdown),
            sep="\n",
            background=BackgroundTask(engine.cancel, handle),  # for a stream that never started
            ping=PING_INTERVAL_S,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            headers={"Cache-Control": "no-cache"},
        )
    watch = asyncio.create_task(_watch(request, events))
    try:
        while response.finish is None:
            event = await events.get()
            if event is None:
                return Response(status_code=499)
            response.push(event)
    finally:
        watch.cancel()
        engine.cancel(handle)
    if response.finish.error is not None:
        raise response.finish.error
    return JSONResponse(response.body())


async def _watch(request: Request, events: "asyncio.Queue[Event | None]") -> None:
    """Queue None after the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    events.put_nowait(None)


async def _stream(
    engine: Engine,
    handle: Any,
    events: "asyncio.Queue[Event | None]",
    response: ResponseBuilder,
    usage: bool,
    shutdown: Shutdown,
) -> AsyncIterator[dict[str, str]]:
    """Yield one response as server-sent events.  Its end, for any reason, cancels the request."""
    try:
        if response.chat:
            yield _data(response.first())
        while True:
            event = await events.get()
            assert event is not None, "_watch runs for responses without a stream"
            for chunk in response.push(event):
                yield _data(chunk)
            if isinstance(event, Finish):
                break
        if event.error is not None:
            yield _data(error_body(event.error))
            if not shutdown.begun:
                return  # without [DONE], a client knows that the engine failed
        elif usage:
            yield _data(response.usage_chunk())
        yield {"data": "[DONE]"}
    finally:
        engine.cancel(handle)


def _data(value: dict[str, Any]) -> dict[str, str]:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return {"data": text.translate(_LINE_ENDS)}


_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}
"""Unicode line ends, escaped: JSON allows them, but some clients split the stream's lines there."""


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
) -> None:
    """Serve until Ctrl-C.  The port is bound before the model is loaded.

    Raises: ConfigError if the port is in use, and the error that stopped the loading or the engine.
    """
    hosts = [*_listed(allowed_host), *([] if is_address(address) else [address])]
    shutdown = Shutdown()
    app = create_app(
        loader, api_key=api_key, cors_origin=cors_origin, allowed_host=hosts,
        served_model_name=served_model_name, limits=limits, shutdown=shutdown,
    )  # fmt: skip
    listening = _listen(address, port)
    warning = open_to(listening.getsockname()[0], hosts, _listed(cors_origin), bool(api_key))
    if warning is not None:
        log.warning(warning)
    config = HttpConfig(
        app, limits, log_level="warning", access_log=False, timeout_graceful_shutdown=1,
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
            url_host = f"[{address}]" if ":" in address else address
            print(
                f"{served_model_name or loader.engine.name} is served on "
                f"http://{url_host}:{listening.getsockname()[1]}/v1",
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
