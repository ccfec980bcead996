"""Bodies of /v1/responses as types, for /openapi.json.

The items of inputs have limits that are stated as JSON Schema; responses_input.py checks them.
"""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec

from osmium.server.limits import MAX_MESSAGES, MAX_TOOLS

__all__ = [
    "LEFT_OUT", "ROLES", "TEXT_PARTS",
    "DeletedResponse", "InputItemList", "InputTokens", "Items", "ResponseEvent", "ResponseObject",
    "ResponseTools",
]  # fmt: skip

LEFT_OUT = (
    "web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call",
    "mcp_list_tools", "mcp_call", "mcp_approval_request", "mcp_approval_response",
    "tool_search_call", "tool_search_output",
)  # fmt: skip
"""Items of tools that other servers run; they are left out and reported."""

ROLES = ("system", "developer", "user", "assistant")
TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
"""Types of parts with a text; each is accepted in every place."""

_TEXT: dict[str, Any] = {"type": "string"}
_NAME: dict[str, Any] = {"type": "string", "minLength": 1, "pattern": r"\S"}


def _object(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


def _nullable(**schema: Any) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_PART = {
    "anyOf": [
        _object(("type", "text"), type={"enum": list(TEXT_PARTS)}, text=_TEXT),
        _object(("type", "refusal"), type={"const": "refusal"}, refusal=_TEXT),
    ]
}
_CONTENT = {"anyOf": [_TEXT, {"type": "array", "items": _PART}]}
_ITEMS = [
    _object(
        ("role", "content"), type={"enum": ["message", None]}, content=_CONTENT,
        role={"enum": list(ROLES)},
    ),
    _object(("type",), type={"const": "reasoning"}, content=_nullable(**_CONTENT),
            summary=_nullable(**_CONTENT)),
    _object(("type", "call_id", "name", "arguments"), type={"const": "function_call"},
            call_id=_NAME, name=_NAME, arguments={"type": ["string", "object"]},
            namespace=_nullable(**_TEXT)),
    _object(("type", "call_id", "name", "input"), type={"const": "custom_tool_call"},
            call_id=_NAME, name=_NAME, input=_TEXT, namespace=_nullable(**_TEXT)),
    _object(("type", "call_id", "output"), call_id=_NAME, output=_CONTENT,
            type={"enum": ["function_call_output", "custom_tool_call_output"]}),
    _object(("type", "id"), type={"const": "item_reference"}, id=_NAME),
    _object(("type",), type={"enum": list(LEFT_OUT)}),
]  # fmt: skip
InputItem = Annotated[dict[str, Any], msgspec.Meta(extra_json_schema={"anyOf": _ITEMS})]
Items = Annotated[
    list[InputItem], msgspec.Meta(extra_json_schema={"minItems": 1, "maxItems": MAX_MESSAGES})
]

_FUNCTION = _object(
    ("type", "name"), type={"const": "function"}, name=_NAME, description=_nullable(**_TEXT),
    parameters=_nullable(type="object"), strict=_nullable(type="boolean"),
)  # fmt: skip
_CUSTOM = _object(("type", "name"), type={"const": "custom"}, name=_NAME,
                  description=_nullable(**_TEXT), format=_nullable(type="object"))  # fmt: skip
_OTHER_IN_IT = _object(("type",), type={"type": "string", "not": {"enum": ["function", "custom"]}})
_OF_NAMESPACE = {
    "type": "array", "maxItems": MAX_TOOLS, "items": {"anyOf": [_FUNCTION, _CUSTOM, _OTHER_IN_IT]},
}  # fmt: skip
_NAMESPACE = _object(("type", "name", "tools"), type={"const": "namespace"}, name=_NAME,
                     description=_nullable(**_TEXT), tools=_OF_NAMESPACE)  # fmt: skip
_OTHER = _object(
    ("type",), type={"type": "string", "not": {"enum": ["function", "custom", "namespace"]}}
)
ResponseTool = Annotated[
    dict[str, Any],
    msgspec.Meta(extra_json_schema={"anyOf": [_FUNCTION, _CUSTOM, _NAMESPACE, _OTHER]}),
]
ResponseTools = Annotated[
    list[ResponseTool], msgspec.Meta(extra_json_schema={"maxItems": MAX_TOOLS})
]


class InputTokensDetails(TypedDict):
    """Parts of input_tokens."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    """Parts of output_tokens."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Numbers of tokens."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(TypedDict):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseFailure(TypedDict):
    """Why a response failed."""

    code: Literal["server_error", "invalid_prompt"]
    message: str


class ResponseObject(TypedDict):
    """A response: its output items, and the parameters that it is made with."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool
    completed_at: int | None
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    """Items of type reasoning, message, function_call or custom_tool_call."""
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class ResponseEvent(TypedDict):
    """An event of a streamed response; docs/responses.md has the types and their fields."""

    type: str
    sequence_number: int
    response: NotRequired[ResponseObject]
    item: NotRequired[dict[str, Any]]
    item_id: NotRequired[str]
    output_index: NotRequired[int]
    delta: NotRequired[str]


class InputTokens(TypedDict):
    """The tokens of a prompt."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class DeletedResponse(TypedDict):
    """A response that is kept no longer."""

    id: str
    object: Literal["response"]
    deleted: bool


class InputItemList(TypedDict):
    """A page of the items of a response's prompt."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
