"""The HTTP server: routes, streams, and what happens when a client goes away.

`create_app(host)` makes a Starlette app of a `BackgroundLoader`, which loads its model on a thread
while the socket is already open; /health reports the progress.
"""

import asyncio
import errno
import hmac
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from osmium.config import Progress
from osmium.engine.engine import Engine
from osmium.engine.request import Event, Finish, SamplingParams
from osmium.errors import ConfigError, EngineStopped, OsmiumError, RequestError
from osmium.server.metrics import CONTENT_TYPE, exposition
from osmium.server.openai import ResponseBuilder, error_body, error_status, model_body
from osmium.server.schema import (
    ChatRequest,
    CompletionRequest,
    one_prompt,
    parse,
    sampling_params,
    template_options,
)
from osmium.text.reasoning import starts_in_thought

__all__ = ["BackgroundLoader", "create_app", "serve"]

log = logging.getLogger("osmium.server")

BODY_LIMIT = 64 << 20
"""Bytes of a request's body."""

PING = 10
"""Seconds of silence in a stream before a comment: clients give up on silence."""


class BackgroundLoader:
    """A model that is being loaded, is there, or could not be."""

    def __init__(self, load: Callable[[Progress], Engine]) -> None:
        self._load = load
        self.engine: Engine | None = None
        self.failure: BaseException | None = None
        self.progress: tuple[str, int, int] = ("starting", 0, 0)
        self.created = int(time.time())
        self.on_done: Callable[[], None] | None = None
        """Called on the loading thread once the model is there or has failed."""
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to load; more than once is harmless."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="osmium-load", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            self.engine = self._load(self._report)
        except BaseException as error:  # told to whoever asks; serve() raises it again
            self.failure = error
        if self.on_done is not None:
            self.on_done()

    def _report(self, stage: str, done: int, total: int) -> None:
        self.progress = (stage, done, total)

    def ready(self) -> Engine:
        """The engine.  Raises: EngineStopped while it is not there."""
        if self.failure is not None:
            raise EngineStopped(f"The model could not be loaded: {self.failure}")
        if self.engine is None:
            stage, done, total = self.progress
            share = f", {100 * done // total} %" if total else ""
            raise EngineStopped(f"The model is still loading ({stage}{share}); try again soon.")
        return self.engine

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()


def create_app(
    host: BackgroundLoader,
    *,
    api_key: str | None = None,
    cors_origin: str = "*",
    served_model_name: str | None = None,
) -> Starlette:
    """The app.  With an `api_key`, everything but /health wants `Authorization: Bearer KEY`."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        host.start()
        yield
        await run_in_threadpool(host.close)

    cors = Middleware(
        CORSMiddleware, allow_origins=[cors_origin], allow_methods=["*"], allow_headers=["*"]
    )
    app = Starlette(
        routes=[
            Route("/", root, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{name:path}", one_model, methods=["GET"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/embeddings", embeddings, methods=["POST"]),
        ],
        middleware=[cors, *([Middleware(ApiKeyMiddleware, key=api_key)] if api_key else [])],
        exception_handlers={
            OsmiumError: on_error, HTTPException: on_http_error, ClientDisconnect: on_gone,
            Exception: on_bug,
        },
        lifespan=lifespan,
    )  # fmt: skip
    app.state.host, app.state.served_model_name = host, served_model_name
    return app


class ApiKeyMiddleware:
    """Turns away who has no key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.key):
                error = RequestError("The API key is missing or wrong.", code="invalid_api_key")
                response = JSONResponse(error_body(error), 401, {"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


# -- errors ----------------------------------------------------------------------------------------


async def on_error(request: Request, error: Exception) -> Response:
    """What Osmium refuses, in OpenAI's form."""
    assert isinstance(error, OsmiumError), "registered for these alone"
    headers = {"Retry-After": "5"} if isinstance(error, EngineStopped) else None
    return JSONResponse(error_body(error), error_status(error), headers)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Unknown routes and methods."""
    assert isinstance(error, HTTPException), "registered for these alone"
    text = f"{request.method} {request.url.path}: {error.detail}."
    return JSONResponse(error_body(RequestError(text)), error.status_code, error.headers)


async def on_gone(request: Request, error: Exception) -> Response:
    """The client left while it was still sending: nobody reads this."""
    return Response(status_code=499)


async def on_bug(request: Request, error: Exception) -> Response:
    """The last door: what nobody foresaw."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse(error_body(OsmiumError(f"Internal error: {type(error).__name__}.")), 500)


# -- looking ---------------------------------------------------------------------------------------


async def root(request: Request) -> Response:
    """Somebody is here."""
    return JSONResponse({"name": "osmium", "api": "/v1"})


async def health(request: Request) -> Response:
    """200 once requests can be served; 503 with how far loading is before that."""
    host: BackgroundLoader = request.app.state.host
    if host.failure is not None:
        return JSONResponse({"status": "failed", "error": str(host.failure)}, 503)
    if host.engine is None:
        stage, done, total = host.progress
        told = {"status": "loading", "stage": stage, "done": done, "total": total}
        return JSONResponse(told, 503)
    stopped = host.engine.stopped
    if stopped is not None:
        return JSONResponse({"status": "failed", "error": str(stopped)}, 503)
    return JSONResponse({"status": "ok", "model": _name(request, host.engine)})


async def metrics(request: Request) -> Response:
    """Counts for Prometheus."""
    host: BackgroundLoader = request.app.state.host
    return Response(exposition(host.engine), media_type=CONTENT_TYPE)


def _name(request: Request, engine: Engine) -> str:
    return str(request.app.state.served_model_name or engine.name)


def _described(request: Request) -> dict[str, Any]:
    host: BackgroundLoader = request.app.state.host
    engine = host.ready()
    return model_body(_name(request, engine), engine.context, host.created)


async def models(request: Request) -> Response:
    """The one model."""
    return JSONResponse({"object": "list", "data": [_described(request)]})


async def one_model(request: Request) -> Response:
    """The same by its name."""
    found = _described(request)
    wanted = request.path_params["name"]
    if wanted != found["id"]:
        raise RequestError(
            f"There is no model {wanted!r}; {found['id']!r} is served.",
            param="model",
            code="model_not_found",
            status=404,
        )
    return JSONResponse(found)


async def embeddings(request: Request) -> Response:
    """Not what this server does."""
    raise RequestError("Embeddings are not served.", code="unsupported_endpoint", status=404)


# -- replies ---------------------------------------------------------------------------------------


async def _body(request: Request) -> bytes:
    """The request's body, up to a limit.  Raises: RequestError."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > BODY_LIMIT:
            raise RequestError(
                f"The body is larger than {BODY_LIMIT} bytes.", code="body_too_large", status=413
            )
        parts.append(part)
    return b"".join(parts)


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions"""
    asked = parse(await _body(request), ChatRequest)
    engine = request.app.state.host.ready()
    if engine.tokenizer is None or engine.template is None:
        raise RequestError(f"{engine.name} has no chat template; use /v1/completions.",
                           param="messages", code="no_chat_template")  # fmt: skip
    params = sampling_params(asked, engine.defaults)

    def prepare() -> tuple[list[int], bool]:
        tools = None if asked.tool_choice == "none" else asked.tools
        prompt = engine.template.render(asked.messages, tools, **template_options(asked))
        return engine.tokenizer.encode(prompt), starts_in_thought(prompt)

    ids, thinking = await run_in_threadpool(prepare)
    reply = ResponseBuilder(_name(request, engine), engine.tokenizer, chat=True, thinking=thinking)
    return await _answer(request, engine, asked, ids, params, reply)


async def completions(request: Request) -> Response:
    """POST /v1/completions"""
    asked = parse(await _body(request), CompletionRequest)
    engine = request.app.state.host.ready()
    params = sampling_params(asked, engine.defaults)
    prompt = one_prompt(asked)
    if isinstance(prompt, list):
        ids = prompt
    elif engine.tokenizer is None:
        raise RequestError(f"{engine.name} has no tokenizer; send token ids.", param="prompt")
    else:
        ids = await run_in_threadpool(engine.tokenizer.encode, prompt)
    reply = ResponseBuilder(_name(request, engine), engine.tokenizer, chat=False)
    try:
        return await _answer(request, engine, asked, ids, params, reply)
    except RequestError as error:
        if error.param == "messages":  # the engine's word for a prompt
            error.param = "prompt"
        raise


async def _answer(
    request: Request,
    engine: Engine,
    asked: ChatRequest | CompletionRequest,
    ids: list[int],
    params: SamplingParams,
    reply: ResponseBuilder,
) -> Response:
    """Submit, and answer whole or in a stream; who goes away is cancelled."""
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Event | None] = asyncio.Queue()

    def on_event(event: Event) -> None:  # on the engine's thread
        try:
            loop.call_soon_threadsafe(events.put_nowait, event)
        except RuntimeError:
            pass  # the loop is closed: nobody is there to read it

    running = engine.submit(ids, params, on_event)
    if asked.stream:
        usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return EventSourceResponse(
            _stream(engine, running, events, reply, usage),
            sep="\n",
            background=BackgroundTask(engine.cancel, running),  # the stream may never have begun
            ping=PING,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            headers={"Cache-Control": "no-cache"},
        )
    watch = asyncio.create_task(_watch(request, events))
    try:
        while reply.finish is None:
            event = await events.get()
            if event is None:
                return Response(status_code=499)
            reply.push(event)
    finally:
        watch.cancel()
        engine.cancel(running)
    if reply.finish.error is not None:
        raise reply.finish.error
    return JSONResponse(reply.body())


async def _watch(request: Request, events: "asyncio.Queue[Event | None]") -> None:
    """Puts None among the events once the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    events.put_nowait(None)


async def _stream(
    engine: Engine,
    running: Any,
    events: "asyncio.Queue[Event | None]",
    reply: ResponseBuilder,
    usage: bool,
) -> AsyncIterator[dict[str, str]]:
    """Server-sent events of one reply.  Leaving it, in whatever way, cancels the request."""
    try:
        if reply.chat:
            yield _data(reply.first())
        while True:
            event = await events.get()
            assert event is not None, "nobody watches a stream but the response itself"
            for chunk in reply.push(event):
                yield _data(chunk)
            if isinstance(event, Finish):
                if event.error is not None:
                    yield _data(error_body(event.error))
                    return
                break
        if usage:
            yield _data(reply.usage_chunk())
        yield {"data": "[DONE]"}
    finally:
        engine.cancel(running)


def _data(value: dict[str, Any]) -> dict[str, str]:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return {"data": text.translate(_LINES)}


_LINES = {ord(one): f"\\u{ord(one):04x}" for one in "\x85\u2028\u2029"}
"""Unicode's own line ends, which JSON lets stand and some clients break a stream's lines at."""


# -- running ---------------------------------------------------------------------------------------


def serve(
    host: BackgroundLoader,
    *,
    address: str = "127.0.0.1",
    port: int = 8012,
    api_key: str | None = None,
    cors_origin: str = "*",
    served_model_name: str | None = None,
) -> None:
    """Serve until Ctrl-C.  The port is taken before the model is loaded.

    Raises: ConfigError where the port is in use, and whatever loading the model raised.
    """
    listening = _listen(address, port)
    app = create_app(
        host, api_key=api_key, cors_origin=cors_origin, served_model_name=served_model_name
    )
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, lifespan="on"
    )
    server = uvicorn.Server(config)

    def leave() -> None:
        server.should_exit = True

    def loaded() -> None:
        if host.failure is not None:
            server.should_exit = True
        elif host.engine is not None:
            host.engine.on_stopped = leave
            if host.engine.stopped is not None:
                leave()
            where = f"[{address}]" if ":" in address else address
            print(
                f"{served_model_name or host.engine.name} is served on "
                f"http://{where}:{listening.getsockname()[1]}/v1",
                file=sys.stderr,
                flush=True,
            )

    host.on_done = loaded
    try:
        server.run(sockets=[listening])
    finally:
        listening.close()
    if host.failure is not None:
        raise host.failure
    if host.engine is not None and host.engine.failure is not None:
        raise host.engine.failure


def _listen(address: str, port: int) -> socket.socket:
    """A listening socket.  Raises: ConfigError."""
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
                f"Port {port} on {address} is in use; stop what uses it, or choose another "
                "with --port."
            ) from None
        raise ConfigError(f"Cannot listen on {address}:{port}: {error}") from None
    return listening
