"""The body of POST /v1/responses, and its fields in the form of a chat.

Errors of the chat are renamed, so that they name the client's fields.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from osmium.errors import RequestError
from osmium.server.field_types import (
    Budget,
    Effort,
    FrequencyPenalty,
    LogitBias,
    MinP,
    MinTokens,
    NumTokens,
    PresencePenalty,
    RepetitionPenalty,
    StopText,
    StopTexts,
    Temperature,
    TopK,
    TopLogprobs,
    TopP,
)
from osmium.server.fields import REFUSED, unknown_fields
from osmium.server.limits import shown
from osmium.server.responses_tools import OfferedTools
from osmium.server.responses_types import Items, ResponseTools
from osmium.server.schema import ChatRequest, StreamOptions

__all__ = [
    "ReasoningOptions", "ResponsesRequest", "TextOptions", "chat_request", "ignored_fields",
    "includes_encrypted", "renamed", "summary_of",
]  # fmt: skip


VERBOSITIES = ("low", "medium", "high")
SUMMARIES = ("auto", "concise", "detailed")
TRUNCATIONS = ("disabled", "auto")

Verbosity = Annotated[str, msgspec.Meta(extra_json_schema={"enum": list(VERBOSITIES)})]
Summary = Annotated[str, msgspec.Meta(extra_json_schema={"enum": [*SUMMARIES, "none"]})]
Truncation = Annotated[str, msgspec.Meta(extra_json_schema={"enum": list(TRUNCATIONS)})]


class TextOptions(msgspec.Struct):
    """`text`: the form of the answer."""

    format: dict[str, Any] | None = None
    """{"type": "text" | "json_object" | "json_schema", "name", "schema", "strict"}"""
    verbosity: Verbosity | None = None


class ReasoningOptions(msgspec.Struct):
    """`reasoning`: whether the model thinks, how much, and what the response has of it."""

    effort: Effort | None = None
    summary: Summary | None = None
    generate_summary: Summary | None = None
    """The former name of `summary`."""
    context: str | None = None
    mode: str | None = None
    enabled: bool | None = None
    exclude: bool | None = None
    max_tokens: Budget | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """POST /v1/responses"""

    model: str | None = None
    input: str | Items | None = None
    """May be absent where previous_response_id is not."""
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: list[str] | None = None
    tools: ResponseTools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    """A limit of calls that the server runs itself; there are none."""
    max_output_tokens: NumTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_logprobs: TopLogprobs | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Truncation | None = None
    service_tier: str | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: PresencePenalty | None = None
    frequency_penalty: FrequencyPenalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    seed: int | None = None
    stop: StopText | StopTexts | None = None
    min_tokens: MinTokens | None = None
    logit_bias: LogitBias | None = None
    ignore_eos: bool | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


_SAMPLING = (
    "model", "stream", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "seed", "stop", "min_tokens", "logit_bias",
    "ignore_eos", "enable_thinking", "chat_template_kwargs", "parallel_tool_calls",
)  # fmt: skip
"""Fields that a chat has, too."""

_FORMAT = "use text.format"

RESPONSES_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    **REFUSED,
    "background": ((False,), "omit it; a response is made while its client waits"),
    "conversation": ((), "use previous_response_id, or send the whole conversation"),
    "prompt": ((), "write its text in instructions and input"),
    "messages": ((), "use input"),
    "n": ((1,), "send the request again"),
    "max_tokens": ((), "use max_output_tokens"),
    "max_completion_tokens": ((), "use max_output_tokens"),
    "reasoning_effort": ((), "use reasoning.effort"),
    "logprobs": ((False,), "use include: ['message.output_text.logprobs'] and top_logprobs"),
    "functions": (([],), "use tools"),
    "function_call": (("none", "auto"), "use tool_choice"),
    "response_format": (({"type": "text"},), _FORMAT),
    "structured_outputs": ((), _FORMAT),
    "guided_json": ((), _FORMAT), "guided_regex": ((), _FORMAT), "guided_choice": ((), _FORMAT),
    "guided_grammar": ((), _FORMAT), "json_schema": ((), _FORMAT), "grammar": ((), _FORMAT),
}  # fmt: skip
"""Fields that would change the answer: the values that ask for nothing, and what to do instead."""

_INCLUDED = ("reasoning.encrypted_content", "message.output_text.logprobs")
_NOTHING_TO_INCLUDE = (
    "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "message.input_image.image_url", "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)  # fmt: skip
"""Values of `include` about items that no response has."""

_NESTED: dict[str, tuple[str, ...]] = {
    "text": TextOptions.__struct_fields__,
    "reasoning": ReasoningOptions.__struct_fields__,
    "stream_options": StreamOptions.__struct_fields__,
}


def ignored_fields(raw: bytearray, body: ResponsesRequest) -> list[str]:
    """The names of fields without effect.  Raises: RequestError for refused ones."""
    known = ResponsesRequest.__struct_fields__
    ignored = list(unknown_fields(raw, known, refused=RESPONSES_REFUSED, nested=_NESTED))
    text, reasoning = body.text or TextOptions(), body.reasoning or ReasoningOptions()
    _check_one_of("truncation", body.truncation, TRUNCATIONS)
    _check_one_of("text.verbosity", text.verbosity, VERBOSITIES)
    _check_one_of("reasoning.summary", summary_of(reasoning), SUMMARIES)
    for name, value, harmless in (
        ("truncation", body.truncation, ("disabled",)),
        ("service_tier", body.service_tier, ("auto", "default")),
        ("text.verbosity", text.verbosity, ("medium",)),
        ("reasoning.context", reasoning.context, ("auto",)),
        ("reasoning.mode", reasoning.mode, ("standard",)),
    ):
        if value is not None and value not in harmless:
            ignored.append(name)
    ignored += [
        f"include.{value}"
        for value in dict.fromkeys(body.include or ())
        if value not in (*_INCLUDED, *_NOTHING_TO_INCLUDE)
    ]
    return ignored


def includes_encrypted(body: ResponsesRequest) -> bool:
    """Whether the reasoning is wanted as encrypted_content, too."""
    return _INCLUDED[0] in (body.include or ())


def summary_of(reasoning: ReasoningOptions | None) -> str | None:
    """The kind of summary that is asked for; None for none."""
    if reasoning is None:
        return None
    value = reasoning.summary or reasoning.generate_summary
    return None if value == "none" else value


def _check_one_of(name: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        listed = ", ".join(map(repr, allowed))
        raise RequestError(
            f"{name} is {shown(value)}; it must be one of {listed}.",
            param=name,
            code="invalid_value",
        )


def chat_fields(body: ResponsesRequest, tools: OfferedTools) -> dict[str, Any]:
    """The fields of a ChatRequest but for its messages.  Raises: RequestError."""
    fields: dict[str, Any] = {name: getattr(body, name) for name in _SAMPLING}
    fields["max_completion_tokens"] = body.max_output_tokens
    if body.top_logprobs or _INCLUDED[1] in (body.include or ()):
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    if tools.functions:
        fields["tools"] = tools.functions
    if tools.functions or body.tool_choice not in (None, "auto", "none"):
        fields["tool_choice"] = tools.choice(body.tool_choice)
    reasoning = body.reasoning or ReasoningOptions()
    names = ("effort", "enabled", "exclude", "max_tokens")
    fields["reasoning"] = {
        name: value for name in names if (value := getattr(reasoning, name)) is not None
    }
    if body.text is not None and body.text.format is not None:
        fields["response_format"] = _response_format(body.text.format)
    return fields


def _response_format(given: Mapping[str, Any]) -> dict[str, Any]:
    """A chat's response_format.  Raises: RequestError."""
    kind = given.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise RequestError(
            f"text.format.type is {shown(kind)}; it must be 'text', 'json_object' or "
            "'json_schema'.",
            param="text.format.type",
            code="unsupported_value",
        )
    if kind != "json_schema" or "json_schema" in given:  # that of a chat
        return dict(given)
    return {"type": kind, "json_schema": {k: v for k, v in given.items() if k != "type"}}


_RENAMED = (
    ("response_format.json_schema", "text.format"), ("response_format", "text.format"),
    ("max_completion_tokens", "max_output_tokens"), ("max_tokens", "max_output_tokens"),
    ("tool_choice.allowed_tools", "tool_choice"), ("tool_choice.function", "tool_choice"),
)  # fmt: skip


def renamed(error: RequestError, tools: OfferedTools) -> RequestError:
    """The error of a chat with the client's names."""
    param, text = error.param or "", str(error)
    found = re.match(r"tools\[(\d+)\](\.function)?", param)
    if found and int(found[1]) < len(tools.paths):
        old, new = found[0], tools.paths[int(found[1])]
    elif param.startswith("messages"):
        old, new = param, "input"
    else:
        old, new = next((pair for pair in _RENAMED if param.startswith(pair[0])), ("", ""))
    if not old:
        return error
    text = text.replace(old, new, 1)
    return RequestError(text, param=param.replace(old, new, 1), code=error.code,
                        status=error.status)  # fmt: skip


def chat_request(
    body: ResponsesRequest, messages: list[dict[str, Any]], tools: OfferedTools
) -> ChatRequest:
    """The chat that a request asks for.  Raises: RequestError."""
    return ChatRequest(messages=messages, **chat_fields(body, tools))
