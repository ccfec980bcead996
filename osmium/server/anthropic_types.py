"""Types of Anthropic's Messages API with what /openapi.json states of them.

Requests' fields state the limits that the checks use; the writer makes responses as plain dicts.
"""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec

from osmium.server.limits import MAX_MESSAGES, MAX_TOOLS
from osmium.server.thinking import MIN_BUDGET

__all__ = [
    "AnthropicError", "AnthropicErrorBody", "ContentBlock", "MessageEvent", "MessageResponse",
    "Messages", "OutputConfig", "OutputFormat", "System", "Thinking", "TokenCount", "ToolChoice",
    "Tools",
]  # fmt: skip

Json = dict[str, Any]


def _states(**schema: Any) -> msgspec.Meta:
    return msgspec.Meta(extra_json_schema=schema)


def _object(required: tuple[str, ...] = (), **properties: Any) -> Json:
    return {"type": "object", "properties": properties, "required": list(required)}


def _block(kind: str, required: tuple[str, ...] = (), **properties: Any) -> Json:
    return _object(("type", *required), type={"const": kind}, **properties)


def _blocks(*kinds: Json) -> Json:
    """A text, or a list of blocks."""
    return {"anyOf": [_TEXT, {"type": "array", "items": {"anyOf": list(kinds)}}]}


# -- requests --------------------------------------------------------------------------------------

_TEXT: Json = {"type": "string"}
_NAME = {"type": "string", "minLength": 1, "pattern": r"\S"}
_SWITCH = {"type": ["boolean", "null"]}

_TEXT_BLOCK = _block("text", ("text",), text=_TEXT)
_DOCUMENT = _block(
    "document",
    ("source",),
    source={
        "anyOf": [
            _block("text", ("data",), data=_TEXT),
            _block("content", ("content",), content=_blocks(_TEXT_BLOCK)),
        ]
    },
)
_RESULT_CONTENT = {"anyOf": [*_blocks(_TEXT_BLOCK, _DOCUMENT)["anyOf"], {"type": "null"}]}
_RESULT = _block(
    "tool_result",
    ("tool_use_id",),
    tool_use_id=_TEXT,
    content=_RESULT_CONTENT,
    is_error=_SWITCH,
)
_USE = _block("tool_use", ("id", "name", "input"), id=_NAME, name=_NAME, input={"type": "object"})
_THINKING = _block(
    "thinking", ("thinking",), thinking=_TEXT, signature={"type": ["string", "null"]}
)
_REDACTED = _block("redacted_thinking")


def _message(role: str, *kinds: Json) -> Json:
    return _object(("role", "content"), role={"const": role}, content=_blocks(*kinds))


Message = Annotated[
    Json,
    _states(
        anyOf=[
            _message("user", _TEXT_BLOCK, _DOCUMENT, _RESULT),
            _message("assistant", _TEXT_BLOCK, _DOCUMENT, _THINKING, _REDACTED, _USE),
            _message("system", _TEXT_BLOCK, _DOCUMENT),
        ]
    ),
]
Messages = Annotated[list[Message], _states(minItems=1, maxItems=MAX_MESSAGES)]
SystemBlock = Annotated[Json, _states(**_TEXT_BLOCK)]
System = str | list[SystemBlock]

Tool = Annotated[
    Json,
    _states(
        anyOf=[
            _object(
                ("name", "input_schema"),
                type={"enum": ["custom", None]},
                name=_NAME,
                description={"type": ["string", "null"]},
                input_schema={"type": "object"},
                strict=_SWITCH,
            ),
            _object(("type",), type={"type": "string", "pattern": r"^[a-z_]+_\d{8}$"}),
        ]
    ),
]
Tools = Annotated[list[Tool], _states(maxItems=MAX_TOOLS)]
ToolChoice = Annotated[
    Json,
    _states(
        **_object(
            ("type",),
            type={"enum": ["auto", "any", "tool", "none"]},
            disable_parallel_tool_use=_SWITCH,
        )
    ),
]
Thinking = Annotated[
    Json,
    _states(
        **_object(
            ("type",),
            type={"enum": ["enabled", "adaptive", "disabled"]},
            budget_tokens={"type": ["integer", "null"], "minimum": MIN_BUDGET},
            display={"enum": ["summarized", "omitted", None]},
        )
    ),
]
_FORMAT = _block("json_schema", ("schema",), schema={"type": "object"})
OutputFormat = Annotated[Json, _states(**_FORMAT)]
OutputConfig = Annotated[Json, _states(**_object(format={"anyOf": [_FORMAT, {"type": "null"}]}))]


# -- responses -------------------------------------------------------------------------------------


class AnthropicError(TypedDict):
    """What went wrong: the path of the field, the value found, the rule, the remedy."""

    type: Literal[
        "invalid_request_error", "authentication_error", "billing_error", "permission_error",
        "not_found_error", "request_too_large", "rate_limit_error", "timeout_error", "api_error",
        "overloaded_error",
    ]  # fmt: skip
    message: str


class AnthropicErrorBody(TypedDict):
    """Anthropic's error object."""

    type: Literal["error"]
    error: AnthropicError
    request_id: str
    """The same as in the header request-id."""


class ContentBlock(TypedDict):
    """A block of a message: thinking, text, or the call of a tool."""

    type: Literal["thinking", "text", "tool_use"]
    text: NotRequired[str]
    thinking: NotRequired[str]
    signature: NotRequired[str]
    """Opaque; clients return it with the block."""
    id: NotRequired[str]
    name: NotRequired[str]
    input: NotRequired[dict[str, Any]]


class MessageUsage(TypedDict):
    """Numbers of tokens."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageResponse(TypedDict):
    """The model's message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    """The text of stop_sequences that ended the message."""
    usage: MessageUsage


class MessageEvent(TypedDict):
    """An event of a stream, by its type."""

    type: Literal[
        "message_start", "ping", "content_block_start", "content_block_delta",
        "content_block_stop", "message_delta", "message_stop", "error",
    ]  # fmt: skip
    message: NotRequired[MessageResponse]
    index: NotRequired[int]
    """The index of the content block."""
    content_block: NotRequired[ContentBlock]
    delta: NotRequired[dict[str, Any]]
    usage: NotRequired[MessageUsage]
    error: NotRequired[AnthropicError]
    request_id: NotRequired[str]


class TokenCount(TypedDict):
    """The number of a prompt's tokens."""

    input_tokens: int
