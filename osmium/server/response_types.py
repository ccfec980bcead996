"""Responses as types, for /openapi.json; the writers of responses make them as plain dicts.

tests/server/test_openapi.py compares real responses with these types.
"""

from typing import Any, Literal, NotRequired, TypedDict

__all__ = [
    "ChatChunk", "ChatResponse", "CompletionChunk", "CompletionResponse", "DetokenizeResponse",
    "ErrorResponseBody", "Health", "Loading", "ModelEntry", "ModelList", "Props", "Root",
    "TokenizeResponse",
    "Version",
]  # fmt: skip

FinishReason = Literal["stop", "length", "tool_calls"]


class ErrorDetails(TypedDict):
    """What went wrong: the thing, the value found, the rule, the remedy."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    """The path of the field that is wrong."""
    code: str | None
    """The machine-readable reason."""


class ErrorResponseBody(TypedDict):
    """OpenAI's error object."""

    error: ErrorDetails


# -- chats and completions -------------------------------------------------------------------------


class PromptTokensDetails(TypedDict):
    """Parts of prompt_tokens."""

    cached_tokens: int


class Usage(TypedDict):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    """Tokens of all choices."""
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Timings(TypedDict):
    """llama-server's timings of the prefill and of decoding."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class PromptProgress(TypedDict):
    """llama-server's progress of the prefill, in tokens."""

    total: int
    cache: int
    processed: int
    time_ms: int


class TokenLogprob(TypedDict):
    """A token's log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TokenLogprob):
    """A token of the answer, and its likeliest alternatives."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    """Log-probabilities of the answer's tokens."""

    content: list[ContentLogprob]


class PromptLogprob(TypedDict):
    """A token at a position of the prompt; entries are by token id."""

    logprob: float
    rank: int
    """1: the likeliest token."""
    decoded_token: str


class CalledFunction(TypedDict):
    """The name and the arguments of a call."""

    name: str
    arguments: str
    """JSON."""


class ToolCall(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ResponseMessage(TypedDict):
    """The model's message."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: NotRequired[list[ToolCall]]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    """The same as reasoning_content."""


class ChatChoice(TypedDict):
    """One choice of a chat."""

    index: int
    message: ResponseMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatResponse(TypedDict):
    """The response to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings
    prompt_logprobs: NotRequired[list[dict[str, PromptLogprob] | None]]
    """vLLM's, one entry per token of the prompt; the first is null."""


class FunctionDelta(TypedDict):
    """A part of a call's function: its name with the first part, then pieces of its arguments."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """A part of a call; the first part has its id."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class MessageDelta(TypedDict):
    """What a chunk adds to the message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]


class ChunkChoice(TypedDict):
    """A part of one choice of a chat."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(TypedDict):
    """An event of a streamed chat; the last event is [DONE]."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage]
    timings: NotRequired[Timings]
    prompt_progress: NotRequired[PromptProgress]


class CompletionLogprobs(TypedDict):
    """Log-probabilities of a completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One choice of a completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    prompt_logprobs: NotRequired[list[dict[str, PromptLogprob] | None]]
    """vLLM's, one entry per token of the prompt; the first is null."""


class CompletionResponse(TypedDict):
    """The response to a prompt."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    timings: Timings


class CompletionChunkChoice(TypedDict):
    """A part of one choice of a completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionChunk(TypedDict):
    """An event of a streamed completion; the last event is [DONE]."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: NotRequired[Usage]
    timings: NotRequired[Timings]
    prompt_progress: NotRequired[PromptProgress]


# -- other endpoints -------------------------------------------------------------------------------


class TokenizeResponse(TypedDict):
    """Token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(TypedDict):
    """The text of token ids."""

    prompt: str


class ModelEntry(TypedDict):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    """Most tokens of prompt and response."""
    context_length: int
    """The same as max_model_len."""
    type: NotRequired[Literal["model"]]
    """This and the next fields are for requests with the header anthropic-version."""
    display_name: NotRequired[str]
    created_at: NotRequired[str]
    lifecycle: NotRequired[str]
    max_input_tokens: NotRequired[int]
    max_tokens: NotRequired[int]


class ModelList(TypedDict):
    """All models: one."""

    object: Literal["list"]
    data: list[ModelEntry]
    has_more: NotRequired[bool]
    first_id: NotRequired[str]
    last_id: NotRequired[str]


class Root(TypedDict):
    """The server's name and the path of its API."""

    name: str
    api: str
    version: str


class Version(TypedDict):
    """The version of Osmium."""

    version: str


class Health(TypedDict):
    """The server answers requests."""

    status: Literal["ok"]
    model: str


class Loading(TypedDict):
    """The model is loading, or it failed to load, or the engine stopped."""

    status: Literal["loading", "failed"]
    stage: NotRequired[str]
    done: NotRequired[int]
    total: NotRequired[int]
    error: NotRequired[str]


class Props(TypedDict):
    """llama-server's properties of the served model."""

    model_alias: str
    n_ctx: int
    """Most tokens of prompt and response."""
    total_slots: int
    """Most sequences at once."""
    default_generation_settings: dict[str, Any]
    """n_ctx, and the model's sampling parameters."""
    chat_template: str | None
    modalities: dict[str, bool]
    build_info: str
