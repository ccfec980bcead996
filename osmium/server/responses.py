"""OpenAI's Responses API: POST /v1/responses, and the responses that are kept.

A body becomes a chat, so prompts, tools, structured output and limits are those of
/v1/chat/completions.  docs/responses.md has the fields, items and events.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from osmium.engine.engine import Engine
from osmium.errors import RequestError
from osmium.server.answer import answer, work_on_body
from osmium.server.chat_prompt import ChatPrompt, render_chat
from osmium.server.limits import shown
from osmium.server.prepare import Prepared, prepare_messages
from osmium.server.responses_input import InputItems, Item, messages_of, new_id
from osmium.server.responses_schema import (
    ReasoningOptions,
    ResponsesRequest,
    TextOptions,
    chat_request,
    ignored_fields,
    includes_encrypted,
    renamed,
    summary_of,
)
from osmium.server.responses_store import KeptResponse, ResponseStore
from osmium.server.responses_tools import OfferedTools, offer_tools
from osmium.server.responses_types import (
    DeletedResponse,
    InputItemList,
    InputTokens,
    ResponseEvent,
    ResponseObject,
)
from osmium.server.responses_writer import ResponsesWriter
from osmium.server.route import ApiRoute, Operation
from osmium.server.schema import ChatRequest, check_request, decode, sampling_params
from osmium.server.thinking import shows_reasoning
from osmium.text.response_parser import ResponseParser

__all__ = ["RESPONSE_ROUTES"]

ORDERS = ("asc", "desc")
"""Values of `order` in the query of input_items."""

MAX_PAGE = 100
"""Most items of one page of GET /v1/responses/{id}/input_items."""


@dataclass
class Converted:
    """A body as a chat."""

    body: ResponsesRequest
    chat: ChatRequest
    tools: OfferedTools
    inputs: tuple[Item, ...]
    """All items of the prompt."""
    context_bytes: int
    """About the bytes of these items."""
    ignored: tuple[str, ...]


def convert(store: ResponseStore, raw: bytearray) -> Converted:
    """Decode and check a body.  Raises: RequestError with the client's names."""
    body = decode(raw, ResponsesRequest)
    ignored = ignored_fields(raw, body)
    tools = offer_tools(body.tools)
    context: Sequence[Item] = ()
    context_bytes = 0
    if body.previous_response_id is not None:
        previous = store.previous(body.previous_response_id)
        context, context_bytes = previous.items, previous.context_bytes
    elif not isinstance(body.input, str) and not body.input:
        found = "missing" if body.input is None else "[]"
        raise RequestError(
            f"input is {found}; send a text or a list of items, or previous_response_id.",
            param="input",
            code="missing_required_parameter" if body.input is None else "invalid_value",
        )
    given = InputItems(() if body.input is None else body.input, context, store.item)
    inputs, context_bytes = (*context, *given.items), context_bytes + _size(given.items)
    try:
        chat = chat_request(body, messages_of(inputs, body.instructions, tools), tools)
        check_request(chat)
    except RequestError as error:
        raise renamed(error, tools) from None
    return Converted(
        body, chat, tools, inputs, context_bytes, (*ignored, *tools.ignored, *given.ignored)
    )


def prepare_response(store: ResponseStore, engine: Engine, name: str, raw: bytearray) -> Prepared:
    """Prepare a body of POST /v1/responses.  Raises: RequestError."""
    made = convert(store, raw)
    body, body_bytes = made.body, len(raw)

    def keep(response: dict[str, Any]) -> None:
        if body.store is not False:
            context_bytes = made.context_bytes + _size(response["output"])
            store.keep(KeptResponse(response, made.inputs, context_bytes, body_bytes))

    def writer(prompt: ChatPrompt) -> ResponsesWriter:
        parser = ResponseParser(engine.template.tool_format, prompt.tools, prompt.thinking)
        return ResponsesWriter(
            response_head(name, body, made.tools, engine.defaults), engine.tokenizer, parser,
            origins=made.tools.origins,
            parallel_calls=body.parallel_tool_calls is not False,
            shows_reasoning=shows_reasoning(made.chat),
            summary=summary_of(body.reasoning) is not None,
            encrypted=includes_encrypted(body),
            keep=keep,
        )  # fmt: skip

    try:
        return prepare_messages(engine, made.chat, writer, made.ignored)
    except RequestError as error:
        raise renamed(error, made.tools) from None


def count_input_tokens(
    store: ResponseStore, engine: Engine, name: str, raw: bytearray
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The body of POST /v1/responses/input_tokens, and ignored fields.  Raises: RequestError."""
    made = convert(store, raw)
    try:
        sampling_params(made.chat, engine.defaults)  # checks them
        prompt = render_chat(engine, made.chat)
    except RequestError as error:
        raise renamed(error, made.tools) from None
    count = len(engine.tokenizer.encode(prompt.text))
    return {"object": "response.input_tokens", "input_tokens": count}, made.ignored


def _size(items: Sequence[Item]) -> int:
    """About the bytes of items."""
    return sum(256 + len(str(item)) for item in items)


def response_head(
    name: str, body: ResponsesRequest, tools: OfferedTools, defaults: dict[str, Any]
) -> dict[str, Any]:
    """A response without its output: an id, and the parameters that it is made with."""
    text, reasoning = body.text or TextOptions(), body.reasoning or ReasoningOptions()
    temperature = defaults.get("temperature", 1.0) if body.temperature is None else body.temperature
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": summary_of(reasoning)},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": temperature,
        "text": {
            "format": text.format or {"type": "text"},
            "verbosity": text.verbosity or "medium",
        },
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": tools.given,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": defaults.get("top_p", 1.0) if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


# -- endpoints -------------------------------------------------------------------------------------


def _store(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.responses
    return store


def _kept(request: Request) -> KeptResponse:
    return _store(request).get(request.path_params["id"])


async def create_response(request: Request) -> Response:
    """The model's response to a text or to items, as JSON or as a stream."""
    try:
        return await answer(request, partial(prepare_response, _store(request)))
    except RequestError as error:
        if error.param == "messages" and error.code != "unsupported_value":
            error.param = "input"  # the engine's name for a prompt is that of chats
        raise


async def input_tokens(request: Request) -> Response:
    """The number of tokens of a response's prompt, without the response."""
    body, ignored = await work_on_body(request, partial(count_input_tokens, _store(request)))
    return JSONResponse(body, headers=request.app.state.ignored.headers(ignored))


async def retrieve_response(request: Request) -> Response:
    """A response that is kept."""
    if request.query_params.get("stream", "false").lower() not in ("false", "0"):
        raise RequestError(
            "stream is true, but a response that is kept has ended. Omit it.",
            param="stream",
            code="unsupported_value",
        )
    return JSONResponse(_kept(request).body)


async def delete_response(request: Request) -> Response:
    """Delete a response that is kept."""
    response_id = request.path_params["id"]
    _store(request).delete(response_id)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


async def cancel_response(request: Request) -> Response:
    """Always refused, as the responses that are kept have ended."""
    status = _kept(request).body["status"]
    raise RequestError(
        f"The response {shown(request.path_params['id'])} has ended with status {status}. A "
        "running one is cancelled by closing its connection.",
        param="response_id",
        code="response_not_cancellable",
    )


async def list_input_items(request: Request) -> Response:
    """The items of a response's prompt, in pages."""
    items = list(_kept(request).inputs)
    query = request.query_params
    order, limit = query.get("order", "desc"), query.get("limit", "20")
    if order not in ORDERS:
        raise _invalid("order", order, "'asc' or 'desc'")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:4]) <= MAX_PAGE):
        raise _invalid("limit", limit, f"an integer from 1 to {MAX_PAGE}")
    if order == "desc":
        items.reverse()
    after = query.get("after")
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise _invalid("after", after, "the id of an item of this response")
        items = items[ids.index(after) + 1 :]
    page = items[: int(limit)]
    return JSONResponse(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > len(page),
        }
    )


async def compact(request: Request) -> Response:
    """Always refused: conversations are not compacted."""
    raise RequestError(
        "POST /v1/responses/compact is not supported. Have the model summarise the conversation "
        "with POST /v1/responses, and go on with the summary.",
        code="unsupported_endpoint",
        status=404,
    )


def _invalid(name: str, value: str, rule: str) -> RequestError:
    return RequestError(
        f"{name} is {shown(value)}; it must be {rule}.", param=name, code="invalid_value"
    )


_PAGE = {
    "order": {"enum": list(ORDERS)},
    "limit": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE},
    "after": {"type": "string"},
}
"""Query parameters of input_items."""

_INPUT = (
    {
        "anyOf": [
            {"required": [name], "properties": {name: {"not": {"type": "null"}}}}
            for name in ("input", "previous_response_id")
        ]
    },
)
"""The rule of a body: it has an input, or continues a response."""

RESPONSE_ROUTES = [
    ApiRoute(
        "/v1/responses",
        create_response,
        Operation(
            ResponsesRequest, ResponseObject, events=ResponseEvent, statuses=(404,), rules=_INPUT
        ),
    ),
    ApiRoute(
        "/v1/responses/input_tokens",
        input_tokens,
        Operation(ResponsesRequest, InputTokens, statuses=(404,), rules=_INPUT),
    ),
    ApiRoute(
        "/v1/responses/{id}", retrieve_response,
        Operation(response=ResponseObject, query={"stream": {"const": False}}),
    ),
    ApiRoute(
        "/v1/responses/{id}", delete_response, Operation(response=DeletedResponse), method="DELETE"
    ),
    ApiRoute(
        "/v1/responses/{id}/input_items", list_input_items,
        Operation(response=InputItemList, query=_PAGE),
    ),
    Route("/v1/responses/{id}/cancel", cancel_response, methods=["POST"],
          include_in_schema=False),
    Route("/v1/responses/compact", compact, methods=["POST"], include_in_schema=False),
]  # fmt: skip
