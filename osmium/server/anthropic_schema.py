"""Bodies of Anthropic's Messages API as types, and which of their fields have an effect."""

from typing import Any

import msgspec

from osmium.server.anthropic_types import (
    Messages,
    OutputConfig,
    OutputFormat,
    System,
    Thinking,
    ToolChoice,
    Tools,
)
from osmium.server.field_types import NumTokens, StopTexts, Temperature, TopK, TopP
from osmium.server.fields import unknown_fields

__all__ = ["ALIASES", "CountTokensRequest", "MessagesFields", "MessagesRequest", "ignored_fields"]


class MessagesFields(msgspec.Struct, kw_only=True):
    """Fields of a message's request and of one that counts its tokens."""

    messages: Messages
    model: str | None = None
    system: System | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    """The name of output_config.format in an earlier version."""
    max_tokens: NumTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    stop_sequences: StopTexts | None = None
    stream: bool | None = None
    cache_control: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    betas: list[str] | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None
    service_tier: str | None = None
    speed: str | None = None
    inference_geo: str | None = None
    context_management: dict[str, Any] | None = None
    container: str | dict[str, Any] | None = None
    mcp_servers: list[dict[str, Any]] | None = None
    diagnostics: dict[str, Any] | None = None


class MessagesRequest(MessagesFields, kw_only=True):
    """POST /v1/messages"""

    max_tokens: NumTokens


class CountTokensRequest(MessagesFields, kw_only=True):
    """POST /v1/messages/count_tokens: the fields of a message; those of its response are unused."""


_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "inference_geo": (),
    "context_management": ({}, {"edits": []}),
    "container": (),
    "mcp_servers": ([],),
    "diagnostics": (),
}
"""Fields that are reported as ignored: the values that ask for nothing."""

_OPTIONS = {
    "thinking": ("type", "budget_tokens", "display"),
    "output_config": ("effort", "format"),
    "tool_choice": ("type", "name", "disable_parallel_tool_use"),
}
"""Known keys of objects."""

ALIASES = {
    "stop": "stop_sequences", "max_completion_tokens": "max_tokens",
    "max_tokens_to_sample": "max_tokens", "max_output_tokens": "max_tokens",
    "response_format": "output_config", "guided_json": "output_config",
    "parallel_tool_calls": "tool_choice", "prompt": "messages", "system_prompt": "system",
    "instructions": "system", "effort": "output_config", "user": "metadata",
}  # fmt: skip
"""Other APIs' names."""


def ignored_fields(raw: bytearray, body: MessagesFields) -> tuple[str, ...]:
    """The names of fields that have no effect.  Raises: RequestError for refused ones."""
    found = list(unknown_fields(raw, body.__struct_fields__))
    for name, harmless in _WITHOUT_EFFECT.items():
        value = getattr(body, name)
        if value is not None and value not in harmless:
            found.append(name)
    for name, known in _OPTIONS.items():
        found += [f"{name}.{key}" for key in getattr(body, name) or {} if key not in known]
    return tuple(found)
