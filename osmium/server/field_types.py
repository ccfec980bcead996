"""Types of request fields with what /openapi.json states of them.

The limits are those that the checks use.  A check names the field, its value and the rule, so they
are stated as JSON Schema only, and msgspec does not enforce them.
"""

from typing import Annotated, Any

import msgspec

from osmium.engine.request import INTEGER_LIMITS, LOGIT_BIAS_LIMITS, NUMBER_LIMITS
from osmium.server.limits import MAX_MESSAGES, MAX_STOP_CHARS, MAX_STOP_TEXTS, MAX_TOOLS
from osmium.server.structured import OUTPUT_OPTIONS
from osmium.server.thinking import (
    EFFORTS,
    MIN_BUDGET,
    REASONING_KEYS,
    THINKING_KEYS,
    THINKING_TYPES,
)

__all__ = [
    "MAX_CHOICES", "REASONING", "ROLES", "TOKEN_ID", "BestOf", "Budget", "Choices",
    "CompletionTokens", "Count", "Effort", "FrequencyPenalty", "LogitBias", "Messages", "MinP",
    "MinTokens", "NamedTools", "NumTokens", "PresencePenalty", "PromptScores", "Reasoning",
    "RepetitionPenalty", "ResponseFormat", "StopText", "StopTexts", "Structured", "Temperature",
    "Thinking", "TokenId", "ToolMode", "Tools", "TopK", "TopLogprobs", "TopP",
]  # fmt: skip

MAX_CHOICES = 8
"""Most choices of a response (n)."""

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of messages."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message's reasoning."""

TOKEN_ID = "token-id"
"""The format of token ids; openapi.py adds the largest one of the served model."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of a message's parts that have a text."""


def _states(**schema: Any) -> msgspec.Meta:
    return msgspec.Meta(extra_json_schema=schema)


def _limits(name: str) -> msgspec.Meta:
    """The limits of a sampling parameter."""
    least, most = {**NUMBER_LIMITS, **INTEGER_LIMITS}[name]
    return _states(minimum=least, maximum=most)


def _nullable(**schema: Any) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


# -- sampling --------------------------------------------------------------------------------------

Temperature = Annotated[float, _limits("temperature")]
TopP = Annotated[float, _states(exclusiveMinimum=0, maximum=NUMBER_LIMITS["top_p"][1])]
TopK = Annotated[int, _limits("top_k")]
MinP = Annotated[float, _limits("min_p")]
PresencePenalty = Annotated[float, _limits("presence_penalty")]
FrequencyPenalty = Annotated[float, _limits("frequency_penalty")]
RepetitionPenalty = Annotated[float, _limits("repetition_penalty")]
NumTokens = Annotated[int, _states(minimum=1, maximum=INTEGER_LIMITS["max_tokens"][1])]
CompletionTokens = Annotated[int, _limits("max_tokens")]
MinTokens = Annotated[int, _limits("min_tokens")]
TopLogprobs = Annotated[int, _limits("logprobs")]
PromptScores = Annotated[int, _limits("prompt_logprobs")]
TokenId = Annotated[int, _states(minimum=0, format=TOKEN_ID)]
Bias = Annotated[float, _states(minimum=LOGIT_BIAS_LIMITS[0], maximum=LOGIT_BIAS_LIMITS[1])]
LogitBias = Annotated[dict[str, Bias], _states(propertyNames={"pattern": "^[0-9]{1,9}$"})]
StopText = Annotated[str, _states(minLength=1, maxLength=MAX_STOP_CHARS)]
StopTexts = Annotated[list[StopText], _states(maxItems=MAX_STOP_TEXTS)]
Count = Annotated[int, _states(minimum=1, maximum=MAX_CHOICES)]
BestOf = Annotated[int, _states(minimum=1, maximum=MAX_CHOICES)]

# -- messages and tools ----------------------------------------------------------------------------

_TEXT: dict[str, Any] = {"type": "string"}
_PART = {
    "anyOf": [
        _TEXT,
        _object(("text",), type={"enum": [*TEXT_PARTS, None]}, text=_TEXT),
        _object(("type",), type={"const": "refusal"}, refusal=_nullable(**_TEXT)),
    ]
}
_CONTENT = {"anyOf": [_TEXT, {"type": "array", "items": _PART}, {"type": "null"}]}
_CALL = _object(function=_nullable(type="object"))
_CALLS = _nullable(type="array", items=_CALL)
Message = Annotated[
    dict[str, Any],
    msgspec.Meta(
        extra_json_schema=_object(
            ("role",),
            role={"enum": list(ROLES)},
            content=_CONTENT,
            tool_calls=_CALLS,
            **{key: _nullable(**_TEXT) for key in (*REASONING, "refusal")},
        )
    ),
]
Messages = Annotated[list[Message], _states(minItems=1, maxItems=MAX_MESSAGES)]

_FUNCTION = _object(
    ("name",),
    name={"type": "string", "minLength": 1, "pattern": r"\S"},
    description=_nullable(type="string"),
    parameters=_nullable(type="object"),
    strict=_nullable(type="boolean"),
)
Tool = Annotated[
    dict[str, Any],
    msgspec.Meta(
        extra_json_schema=_object(
            ("type", "function"), type={"const": "function"}, function=_FUNCTION
        )
    ),
]
Tools = Annotated[list[Tool], _states(maxItems=MAX_TOOLS)]

_NAME_ONLY = _object(("name",), name=_TEXT)
_NAMED_TOOL = {
    "anyOf": [
        _object(("type", "function"), type={"const": "function"}, function=_NAME_ONLY),
        _object(("type", "name"), type={"const": "function"}, name=_TEXT),
    ]
}
_ALLOWED = {
    "mode": {"enum": ["auto", "required"]},
    "tools": {"type": "array", "items": _NAMED_TOOL, "minItems": 1},
}
_ALLOWED_TYPE = {"const": "allowed_tools"}
_ALLOWED_TOOLS = {
    "anyOf": [
        _object(
            ("type", "allowed_tools"),
            type=_ALLOWED_TYPE,
            allowed_tools=_object(("mode", "tools"), **_ALLOWED),
        ),
        _object(("type", "mode", "tools"), type=_ALLOWED_TYPE, **_ALLOWED),
    ]
}
ToolMode = Annotated[str, _states(enum=["auto", "none", "required"])]
NamedTools = Annotated[dict[str, Any], _states(anyOf=[_NAMED_TOOL, _ALLOWED_TOOLS])]
"""Values of tool_choice: a mode, or an object that names tools."""

# -- reasoning and structure -----------------------------------------------------------------------

_BUDGET = _nullable(type="integer", minimum=MIN_BUDGET)
_SWITCH = _nullable(type="boolean")
Effort = Annotated[str, _states(enum=list(EFFORTS))]
Budget = Annotated[int, _states(minimum=MIN_BUDGET)]
Thinking = Annotated[
    dict[str, Any],
    _states(
        properties={
            **dict.fromkeys(THINKING_KEYS, True),
            "type": {"enum": list(THINKING_TYPES)}, "budget_tokens": _BUDGET,
        },
        required=["type"], additionalProperties=False,
    ),
]  # fmt: skip
Reasoning = Annotated[
    dict[str, Any],
    _states(
        properties={
            **dict.fromkeys(REASONING_KEYS, True),
            "effort": {"enum": [*EFFORTS, None]}, "max_tokens": _BUDGET,
            "enabled": _SWITCH, "exclude": _SWITCH,
        },
        additionalProperties=False,
    ),
]  # fmt: skip

_SCHEMA = {"type": "object"}
_NAMED = _object(("schema",), name=_nullable(**_TEXT), schema=_SCHEMA, strict=_SWITCH)
ResponseFormat = Annotated[
    dict[str, Any],
    _states(
        anyOf=[
            _object(("type",), type={"const": "text"}),
            _object(("type",), type={"const": "json_object"}, schema=_nullable(**_SCHEMA)),
            _object(("type", "json_schema"), type={"const": "json_schema"}, json_schema=_NAMED),
            _object(("type", "schema"), type={"const": "json_schema"}, schema=_SCHEMA),
        ]
    ),
]
Choices = Annotated[list[str], _states(minItems=1)]
Structured = Annotated[
    dict[str, Any],
    _states(
        properties={
            "json": _nullable(anyOf=[_SCHEMA, _TEXT]), "regex": _nullable(**_TEXT),
            "choice": _nullable(type="array", items=_TEXT, minItems=1),
            "grammar": _nullable(**_TEXT), "json_object": _SWITCH,
            **{key: {"enum": [False, None]} for key in OUTPUT_OPTIONS},
        },
        additionalProperties=False,
    ),
]  # fmt: skip
