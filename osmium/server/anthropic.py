"""Anthropic's Messages API: POST /v1/messages and /v1/messages/count_tokens.

A body becomes the request of a chat; the response is written in Anthropic's form.  docs/messages.md
has the fields.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from osmium.engine.engine import Engine
from osmium.errors import RequestError
from osmium.server.answer import answer, work_on_body
from osmium.server.anthropic_errors import request_id
from osmium.server.anthropic_prompt import chat_messages, invalid
from osmium.server.anthropic_schema import (
    ALIASES,
    CountTokensRequest,
    MessagesFields,
    MessagesRequest,
    ignored_fields,
)
from osmium.server.anthropic_tools import chat_tools
from osmium.server.anthropic_types import (
    AnthropicErrorBody,
    MessageEvent,
    MessageResponse,
    TokenCount,
)
from osmium.server.anthropic_writer import PING, MessageWriter
from osmium.server.chat_prompt import ChatPrompt, render_chat
from osmium.server.fields import IgnoredFields
from osmium.server.limits import shown
from osmium.server.prepare import Prepared, prepare_messages
from osmium.server.route import ApiRoute, Operation
from osmium.server.schema import ChatRequest, check_request, decode, sampling_params
from osmium.server.thinking import MIN_BUDGET

__all__ = ["ANTHROPIC_ROUTES"]


async def messages(request: Request) -> Response:
    """The model's message in Anthropic's form, as JSON or as a stream."""
    name = request_id(request.scope)
    response = await answer(request, partial(prepare_message, request_id=name), _reporter(request))
    response.headers["request-id"] = name
    return response


async def count_tokens(request: Request) -> Response:
    """The number of tokens of the prompt that /v1/messages would run."""
    count, ignored = await work_on_body(request, count_prompt)
    headers = {"request-id": request_id(request.scope), **_reporter(request).headers(ignored)}
    return JSONResponse({"input_tokens": count}, headers=headers)


def _reporter(request: Request) -> IgnoredFields:
    """What reports the ignored fields of this API, which has other names than OpenAI's."""
    state = request.app.state
    if not hasattr(state, "anthropic_ignored"):
        state.anthropic_ignored = IgnoredFields(MessagesRequest.__struct_fields__, ALIASES)
    found: IgnoredFields = state.anthropic_ignored
    return found


def prepare_message(engine: Engine, name: str, raw: bytearray, *, request_id: str) -> Prepared:
    """Prepare a body of /v1/messages.  Raises: RequestError."""
    body = decode(raw, MessagesRequest)
    converted = convert(raw, body)

    def writer(prompt: ChatPrompt) -> MessageWriter:
        return MessageWriter(
            name, request_id, prompt, engine.template.tool_format,
            parallel_calls=converted.chat.parallel_tool_calls is not False,
            omits_thinking=converted.omits_thinking,
        )  # fmt: skip

    try:
        check_request(converted.chat)
        prepared = prepare_messages(engine, converted.chat, writer, converted.ignored)
    except RequestError as error:
        raise converted.in_clients_names(error) from None
    prepared.ping = PING
    return prepared


def count_prompt(engine: Engine, name: str, raw: bytearray) -> tuple[int, tuple[str, ...]]:
    """The tokens of the prompt that /v1/messages would run, and the names of ignored fields.

    Raises: RequestError.
    """
    converted = convert(raw, decode(raw, CountTokensRequest))
    try:
        check_request(converted.chat)
        sampling_params(converted.chat, engine.defaults)
        text = render_chat(engine, converted.chat).text
    except RequestError as error:
        raise converted.in_clients_names(error) from None
    return len(engine.tokenizer.encode(text)), converted.ignored


# -- from a body to a chat -------------------------------------------------------------------------


@dataclass
class Converted:
    """The chat that a body stands for."""

    chat: ChatRequest
    omits_thinking: bool
    ignored: tuple[str, ...]
    """Names of fields that have no effect."""
    tool_places: Sequence[int]
    """The index in the body of each of the chat's tools."""
    format_path: str
    """The path of the body's response format."""

    def in_clients_names(self, error: RequestError) -> RequestError:
        """The error of a chat with the body's names of fields."""
        param = error.param
        if param is None:
            return error
        name = re.sub(r"^response_format(\.json_schema)?", self.format_path, param)
        name = re.sub(r"^stop(?=$|\[)", "stop_sequences", name)
        name = re.sub(r"^reasoning_effort$", "output_config.effort", name)
        name = re.sub(r"^continue_final_message$", "messages", name)
        name = re.sub(r"^tool_choice\.function", "tool_choice", name)
        name = re.sub(r"^tools\[(\d+)\](\.function)?", self._tool_path, name)
        name = re.sub(r"^(tools\[\d+\])\.parameters", r"\1.input_schema", name)
        if name != param:
            error.args = (str(error).replace(param, name, 1),)
            error.param = name
        return error

    def _tool_path(self, match: re.Match[str]) -> str:
        index = int(match[1])
        return f"tools[{self.tool_places[index] if index < len(self.tool_places) else index}]"


def convert(raw: bytearray, body: MessagesFields) -> Converted:
    """A body as a chat.  Raises: RequestError with the body's names of fields."""
    tools = chat_tools(body.tools, body.tool_choice)
    found = chat_messages(body.system, body.messages)
    thinking, omits_thinking = _thinking(body.thinking)
    effort, format_path, response_format = _output(body)
    chat = ChatRequest(
        messages=found,
        tools=tools.tools or None,
        tool_choice=tools.choice,
        parallel_tool_calls=tools.parallel,
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop_sequences,
        stream=body.stream,
        thinking=thinking,
        reasoning_effort=effort,
        response_format=response_format,
        continue_final_message=found[-1]["role"] == "assistant" or None,
    )
    ignored = (*ignored_fields(raw, body), *tools.ignored)
    return Converted(chat, omits_thinking, ignored, tools.places, format_path)


def _thinking(value: dict[str, Any] | None) -> tuple[dict[str, Any], bool]:
    """A chat's `thinking`, and whether the response omits its text.  Raises: RequestError.

    Without the field the model does not think, as clients expect the text in the first block.
    """
    if value is None:
        return {"type": "disabled"}, False
    kind, display = value.get("type"), value.get("display")
    if kind not in ("enabled", "adaptive", "disabled"):
        raise invalid("thinking.type", kind, "'enabled', 'adaptive' or 'disabled'")
    if display not in (None, "summarized", "omitted"):
        raise invalid("thinking.display", display, "'summarized' or 'omitted'")
    budget = value.get("budget_tokens")
    if budget is not None and (type(budget) is not int or budget < MIN_BUDGET):
        raise invalid("thinking.budget_tokens", budget, "a number of tokens")
    thinking = {"type": kind} if budget is None else {"type": kind, "budget_tokens": budget}
    return thinking, display == "omitted"


def _output(body: MessagesFields) -> tuple[str | None, str, dict[str, Any] | None]:
    """The effort; the path of the response format; the format as a chat's.  Raises: RequestError"""
    config = body.output_config or {}
    effort = config.get("effort")
    if not isinstance(effort, str | None):
        raise invalid("output_config.effort", effort, "a text such as 'high'")
    path, value = "output_config.format", config.get("format")
    if body.output_format is not None:
        if value is not None:
            raise RequestError(
                "output_config.format and output_format both restrict the response; send one.",
                param="output_format",
                code="invalid_value",
            )
        path, value = "output_format", body.output_format
    if value is None:
        return effort, path, None
    if not isinstance(value, dict) or value.get("type") != "json_schema":
        kind = value.get("type") if isinstance(value, dict) else value
        raise RequestError(
            f"{path}.type is {shown(kind)}; it must be 'json_schema', with a `schema`.",
            param=f"{path}.type",
            code="invalid_value",
        )
    if not isinstance(value.get("schema"), dict):
        raise invalid(f"{path}.schema", value.get("schema"), "a JSON schema, which is an object")
    inner = {"name": "output", "schema": value["schema"], "strict": True}
    return effort, path, {"type": "json_schema", "json_schema": inner}


ANTHROPIC_ROUTES = [
    ApiRoute(
        "/v1/messages",
        messages,
        Operation(MessagesRequest, MessageResponse, events=MessageEvent, error=AnthropicErrorBody),
    ),
    ApiRoute(
        "/v1/messages/count_tokens",
        count_tokens,
        Operation(CountTokensRequest, TokenCount, error=AnthropicErrorBody),
    ),
]
