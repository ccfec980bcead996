"""GET /openapi.json: the API's OpenAPI 3.1 document, made from the routes and their types.

A route's Operation names its types, the docstrings of classes and their fields are descriptions,
and field_types.py has the limits.
"""

import ast
import asyncio
import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from itertools import pairwise
from typing import Any, get_args

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

import osmium
from osmium.server.field_types import TOKEN_ID
from osmium.server.response_types import ErrorResponseBody
from osmium.server.route import ApiRoute, Operation

__all__ = ["OPENAPI_ROUTE", "document"]

Json = dict[str, Any]

ALL_ROUTES = (400, 403, 408, 431, 500, 503)
"""Error statuses of every route: bad HTTP, a host that is not allowed, slow headers, overload."""

WITH_BODY = (413, 415, 429)

REF = "#/components/schemas/{name}"

_JSON = "application/json"


async def openapi(request: Request) -> Response:
    """This document.  Token ids have a maximum once the model is loaded."""
    state = request.app.state
    engine = state.loader.engine
    vocab_size = None if engine is None else engine.config.vocab_size
    if state.openapi is None or state.openapi[0] != vocab_size:
        # Off the event loop, as it takes about 0.1 s (two shared cores, 2026-11).
        made = await asyncio.to_thread(
            document, request.app.routes, has_keys=state.has_keys, vocab_size=vocab_size
        )
        state.openapi = vocab_size, json.dumps(made).encode()
    return Response(state.openapi[1], media_type=_JSON)


OPENAPI_ROUTE = ApiRoute("/openapi.json", openapi)


def document(
    routes: Iterable[BaseRoute], *, has_keys: bool = False, vocab_size: int | None = None
) -> Json:
    """The document of all routes that are in the schema.

    With `has_keys` they need an API key.  `vocab_size` limits token ids.
    """
    listed = [one for one in routes if isinstance(one, ApiRoute) and one.include_in_schema]
    components = _components(listed)
    if vocab_size is not None:
        _limit_token_ids(components, vocab_size - 1)
    paths: Json = {}
    for route in listed:
        item = paths.setdefault(route.path_format, _path_item(route))
        for method in sorted(route.methods or ()):
            item[method.lower()] = _operation(route, method, has_keys)
    made: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "Osmium",
            "version": osmium.__version__,
            "summary": "The HTTP API of a Mixture-of-Experts inference engine",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": components},
    }
    if has_keys:
        made["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
    return made


def _path_item(route: ApiRoute) -> Json:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in route.param_convertors
    ]
    return {"parameters": parameters} if parameters else {}


def _operation(route: ApiRoute, method: str, has_keys: bool) -> Json:
    """The operation of one method."""
    operation = route.operation
    is_head, several = method == "HEAD", len((route.methods or set()) - {"HEAD"}) > 1
    summary, _, text = inspect.cleandoc(route.endpoint.__doc__ or "").partition("\n\n")
    needs_key = has_keys and not operation.is_public
    made: Json = {
        "operationId": f"{method.lower()}_{route.name}" if is_head or several else route.name,
        "summary": " ".join(summary.split()),
    }
    if text:
        made["description"] = text
    if needs_key:
        made["security"] = [{"bearer": []}, {"key": []}]
    if operation.query:
        made["parameters"] = [
            {"name": name, "in": "query", "schema": schema}
            for name, schema in operation.query.items()
        ]
    if operation.body is not None:
        content = {_JSON: {"schema": _ref(operation.body)}}
        made["requestBody"] = {"required": True, "content": content}
    made["responses"] = _responses(route, needs_key, is_head)
    return made


def _responses(route: ApiRoute, needs_key: bool, is_head: bool) -> Json:
    operation = route.operation
    statuses = {*ALL_ROUTES, *operation.statuses}
    statuses |= {401} if needs_key else set()
    statuses |= set(WITH_BODY) if operation.body is not None else set()
    statuses |= {404} if route.param_convertors else set()
    found: Json = {"200": {"description": "Success", "content": _success(operation)}}
    if operation.body is not None:
        found["200"]["headers"] = {
            "x-osmium-ignored": _header("Names of fields of the body that have no effect"),
            "x-osmium-did-you-mean": _header("Known fields that these names may stand for"),
        }
    for status in sorted(statuses):
        kinds = [operation.error, operation.unready if status == 503 else None, ErrorResponseBody]
        refs = [_ref(kind) for kind in kinds if kind is not None]
        content = {_JSON: {"schema": refs[0] if len(refs) == 1 else {"anyOf": refs}}}
        found[str(status)] = {"description": HTTPStatus(status).phrase, "content": content}
        if status in (429, 503):
            found[str(status)]["headers"] = {"Retry-After": _header("Seconds to wait")}
        if status == 401:
            found["401"]["headers"] = {"WWW-Authenticate": _header("Bearer")}
    if is_head:
        for response in found.values():
            del response["content"]
    return found


def _success(operation: Operation) -> Json:
    """The content of status 200."""
    if operation.text is not None:
        return {operation.text: {"schema": {"type": "string"}}}
    schema = {} if operation.response is None else _ref(operation.response)
    content: Json = {_JSON: {"schema": schema}}
    if operation.events is not None:
        error = _ref(operation.error or ErrorResponseBody)
        content["text/event-stream"] = {"schema": _event([_ref(operation.events), error])}
    return content


def _event(values: list[Json]) -> Json:
    """One event of a stream: JSON of one of these schemas, or the end."""
    json_text = {
        "type": "string", "contentMediaType": _JSON, "contentSchema": {"anyOf": values},
    }  # fmt: skip
    texts: list[Json] = [{"const": "[DONE]"}, json_text]
    return {
        "description": "One event",
        "anyOf": [
            {"type": "object", "properties": {"data": text}, "required": ["data"]} for text in texts
        ],
    }


def _header(text: str) -> Json:
    return {"description": text, "schema": {"type": "string"}}


# -- types -----------------------------------------------------------------------------------------


def _ref(kind: Any) -> Json:
    """A reference to a type's schema; to any of them for a union."""
    refs = [{"$ref": REF.format(name=one.__name__)} for one in get_args(kind) or (kind,)]
    return refs[0] if len(refs) == 1 else {"anyOf": refs}


def _components(routes: Iterable[ApiRoute]) -> Json:
    """The schemas of all types of these routes, by name."""
    kinds: dict[Any, None] = {ErrorResponseBody: None}
    for route in routes:
        one = route.operation
        for kind in (one.body, one.response, one.events, one.unready, one.error):
            if kind is not None:
                kinds.update(dict.fromkeys(get_args(kind) or (kind,)))
    _, schemas = msgspec.json.schema_components(kinds, ref_template=REF)
    described = {cls.__name__: cls for kind in kinds for cls in _classes(kind)}
    for name, schema in schemas.items():
        for field, text in _field_texts(described.get(name)).items():
            if field in schema.get("properties", {}):
                schema["properties"][field]["description"] = text
    for route in routes:
        if route.operation.body is not None:
            _add_rules(schemas[route.operation.body.__name__], route.operation)
    return schemas


def _add_rules(schema: Json, operation: Operation) -> None:
    """Add an operation's rules to the schema of its body."""
    if operation.fields is not None:
        properties = schema["properties"]
        schema["properties"] = {
            name: properties[name] for name in properties if name in operation.fields
        }
    if operation.rules:
        schema["allOf"] = list(operation.rules)


def _classes(kind: Any) -> Iterator[type]:
    """The classes that a type consists of, with their fields' classes."""
    waiting, found = [kind], set()
    while waiting:
        one = waiting.pop()
        waiting += get_args(one)
        if isinstance(one, type) and one not in found and hasattr(one, "__annotations__"):
            found.add(one)
            yield one
            waiting += inspect.get_annotations(one, eval_str=True).values()
            waiting += one.__mro__[1:-1]


def _field_texts(cls: type | None) -> dict[str, str]:
    """The strings below a class's fields; none without the source."""
    texts: dict[str, str] = {}
    for one in reversed(cls.__mro__ if cls is not None else ()):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        except (OSError, TypeError, SyntaxError, ValueError):
            continue
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for field, text in pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                texts[field.target.id] = " ".join(text.value.value.split())
    return texts


def _limit_token_ids(schema: Any, largest: int) -> None:
    """Add the largest token id to every schema of that format."""
    if isinstance(schema, dict):
        if schema.get("format") == TOKEN_ID:
            schema["maximum"] = largest
        for value in schema.values():
            _limit_token_ids(value, largest)
    elif isinstance(schema, list):
        for value in schema:
            _limit_token_ids(value, largest)
