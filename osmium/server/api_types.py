"""Responses of OpenAI's Responses API and of Anthropic's Messages API as types, for /openapi.json.

docs/responses.md and docs/messages.md have the items, blocks and events.
"""

from typing import Any, Literal, NotRequired, TypedDict

__all__ = [
    "AnthropicErrorBody", "DeletedResponse", "InputItemList", "InputTokens", "MessageEvent",
    "MessageResponse", "MessageTokens", "ResponseEvent", "ResponseObject",
]  # fmt: skip

# -- responses -------------------------------------------------------------------------------------


class ItemUsage(TypedDict):
    """Numbers of tokens."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(TypedDict):
    """A response, with the parameters that it was made with."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool
    completed_at: int | None
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    """Items of the types message, reasoning, function_call and custom_tool_call."""
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ItemUsage | None
    user: str | None


class ResponseEvent(TypedDict):
    """An event of a streamed response; its type says which other fields it has."""

    type: str
    sequence_number: int


class DeletedResponse(TypedDict):
    """A response that is kept no longer."""

    id: str
    object: Literal["response"]
    deleted: bool


class InputTokens(TypedDict):
    """The tokens of a prompt."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class InputItemList(TypedDict):
    """Items of a response's prompt."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


# -- messages --------------------------------------------------------------------------------------


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
    content: list[dict[str, Any]]
    """Blocks of the types text, thinking and tool_use."""
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(TypedDict):
    """An event of a streamed message; its type says which other fields it has."""

    type: str


class MessageTokens(TypedDict):
    """The tokens of a prompt."""

    input_tokens: int


class AnthropicErrorDetails(TypedDict):
    """What went wrong."""

    type: str
    message: str


class AnthropicErrorBody(TypedDict):
    """Anthropic's error object."""

    type: Literal["error"]
    error: AnthropicErrorDetails
    request_id: NotRequired[str]
