"""Small endpoints: what is served, whether it runs, and what does not exist."""

import difflib
import re
from typing import Any

from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import osmium
from osmium.engine.engine import Engine
from osmium.errors import RequestError
from osmium.server.anthropic_errors import is_anthropic
from osmium.server.anthropic_writer import anthropic_model
from osmium.server.limits import shown
from osmium.server.loading import BackgroundLoader
from osmium.server.metrics import CONTENT_TYPE, exposition
from osmium.server.openai import model_body
from osmium.server.openapi import OPENAPI_ROUTE
from osmium.server.response_types import (
    Health,
    Loading,
    ModelEntry,
    ModelList,
    Props,
    Root,
    Version,
)
from osmium.server.route import ApiRoute, Operation

__all__ = ["STATUS_ROUTES", "UNSUPPORTED_ROUTES", "allowed_methods", "served_name", "unknown_route"]


async def root(request: Request) -> Response:
    """The server's name and the path of its API."""
    return JSONResponse({"name": "osmium", "api": "/v1", "version": osmium.__version__})


async def version(request: Request) -> Response:
    """The version of Osmium."""
    return JSONResponse({"version": osmium.__version__})


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
    return JSONResponse({"status": "ok", "model": served_name(request, loader.engine)})


async def metrics(request: Request) -> Response:
    """Metrics in the Prometheus text format."""
    loader: BackgroundLoader = request.app.state.loader
    name = request.app.state.served_model_name
    return Response(exposition(loader.engine, name), media_type=CONTENT_TYPE)


async def props(request: Request) -> Response:
    """The served model's context, sequences, sampling parameters and chat template.

    The names are those of llama-server's /props.
    """
    loader: BackgroundLoader = request.app.state.loader
    engine = loader.ready()
    settings = {"n_ctx": engine.context, "params": engine.defaults}
    return JSONResponse(
        {
            "model_alias": served_name(request, engine),
            "n_ctx": engine.context,
            "total_slots": engine.max_num_seqs,
            "default_generation_settings": settings,
            "chat_template": getattr(engine.template, "source", None),
            "modalities": {"vision": False, "audio": False},
            "build_info": f"osmium {osmium.__version__}",
        }
    )


def served_name(request: Request, engine: Engine) -> str:
    """The id of the served model, in every response."""
    return str(request.app.state.served_model_name or engine.name)


def _served_model(request: Request) -> dict[str, Any]:
    """The model's entry; Anthropic's clients get their fields, too.  Raises: EngineStopped."""
    loader: BackgroundLoader = request.app.state.loader
    engine = loader.ready()
    name, context = served_name(request, engine), engine.context
    entry = model_body(name, context, loader.created)
    if is_anthropic(request.scope):
        entry |= anthropic_model(name, context, loader.created)
    return entry


async def models(request: Request) -> Response:
    """The list of models: one entry."""
    entry = _served_model(request)
    body: dict[str, Any] = {"object": "list", "data": [entry]}
    if is_anthropic(request.scope):
        body |= {"has_more": False, "first_id": entry["id"], "last_id": entry["id"]}
    return JSONResponse(body)


async def model(request: Request) -> Response:
    """The served model's entry, under any name, as requests may name any model."""
    return JSONResponse(_served_model(request))


async def unsupported(request: Request) -> Response:
    """Always 404: an endpoint of an API that a text model, or this server, does not have."""
    instead = "/v1/messages" if is_anthropic(request.scope) else "/v1/chat/completions"
    raise RequestError(
        f"{request.method} {shown(request.url.path)} is not supported: the server has one model, "
        f"which takes and returns text alone. Use POST {instead}.",
        code="unsupported_endpoint",
        status=404,
    )


class _AnyText(Convertor[str]):
    """A part of a path with any characters, line ends too."""

    regex = r"[\s\S]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("any", _AnyText())

STATUS_ROUTES = [
    ApiRoute("/", root, Operation(response=Root)),
    ApiRoute("/health", health, Operation(response=Health, unready=Loading, is_public=True)),
    ApiRoute("/version", version, Operation(response=Version)),
    ApiRoute("/metrics", metrics, Operation(text=CONTENT_TYPE)),
    ApiRoute("/props", props, Operation(response=Props)),
    ApiRoute("/v1/models", models, Operation(response=ModelList)),
    ApiRoute("/v1/models/{id:any}", model, Operation(response=ModelEntry)),
    ApiRoute("/v1/models/", models, include_in_schema=False),
    OPENAPI_ROUTE,
]

_UNSUPPORTED = (
    "/v1/embeddings", "/v1/images/{rest:path}", "/v1/audio/{rest:path}", "/v1/moderations",
    "/v1/rerank", "/v1/score", "/v1/videos", "/v1/realtime", "/v1/files", "/v1/batches",
    "/v1/assistants", "/v1/threads", "/v1/fine_tuning/{rest:path}", "/embeddings", "/embedding",
    "/v1/messages/batches", "/v1/messages/batches/{rest:path}",
)  # fmt: skip

_ANY_METHOD = ("GET", "POST", "PUT", "PATCH", "DELETE")

UNSUPPORTED_ROUTES = [
    Route(path, unsupported, methods=_ANY_METHOD, include_in_schema=False) for path in _UNSUPPORTED
]


def allowed_methods(request: Request) -> str:
    """The methods of a path, which may have several routes, for the header `Allow`."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    found = [route for route in routes if route.path_regex.match(request.url.path)]
    methods = {m for route in found if route.path == found[0].path for m in route.methods or ()}
    return ", ".join(sorted(methods))


def unknown_route(request: Request) -> RequestError:
    """The error of a path without a route: it names those that exist."""
    listed = [
        (method, route.path)
        for route in request.app.routes
        if isinstance(route, Route) and route not in UNSUPPORTED_ROUTES
        for method in sorted((route.methods or set()) - {"HEAD"})
        if not route.path.endswith("/") or route.path == "/"
    ]
    paths = [path for _, path in listed]
    path = request.url.path.rstrip("/")[:200]
    tail = path.removeprefix("/v1").removeprefix("/v1")
    near = [name for name in (f"/v1{tail}", tail) if name in paths]
    near = near or difflib.get_close_matches(path, paths, 1, 0.75)
    hint = f" Did you mean {near[0]}? A client's base URL ends in /v1, once." if near else ""
    if near and near[0].startswith("/v1/messages"):
        hint = f" Did you mean {near[0]}? The base URL of Anthropic's clients has no /v1."
    names = ", ".join(f"{method} {re.sub(r':[a-z]+(?=})', '', path)}" for method, path in listed)
    return RequestError(
        f"{request.method} {shown(request.url.path)} does not exist.{hint} Routes: {names}.",
        code="unknown_route",
        status=404,
    )
