"""Bodies of requests with wrong values and damaged bytes."""

import json
import random
from collections.abc import Iterator
from typing import Any

__all__ = [
    "CHAT",
    "CHAT_PROMPT",
    "COMPLETION",
    "MESSAGE",
    "NASTY",
    "RESPONSE",
    "SCHEMA",
    "TOKENIZE",
    "damaged",
    "mutated",
    "varied",
]  # fmt: skip

CHAT: dict[str, Any] = {
    "model": "demo", "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "seed": 3,
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "Hi", "reasoning_content": "greet", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}
        ]},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
        {"role": "user", "content": "And?"},
    ],
    "tools": [{"type": "function", "function": {
        "name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}],
    "tool_choice": "auto", "stream": False, "stream_options": {"include_usage": True},
    "stop": ["\n\n", "END"], "max_tokens": 4, "max_completion_tokens": 3, "n": 1,
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1,
    "logit_bias": {"5": 1.5}, "logprobs": True, "top_logprobs": 2, "user": "u",
    "response_format": {"type": "text"}, "chat_template_kwargs": {"enable_thinking": False},
    "enable_thinking": False, "reasoning_effort": "none", "ignore_eos": False,
}  # fmt: skip

COMPLETION: dict[str, Any] = {
    "model": "demo", "prompt": "The capital of", "max_tokens": 3, "temperature": 0, "logprobs": 2,
    "echo": False, "suffix": None, "best_of": 1, "stop": "x", "stream": False, "seed": 1,
    "logit_bias": {"7": -3}, "n": 1, "prompt_ids": [1, 2, 3],
}  # fmt: skip

RESPONSE: dict[str, Any] = {
    "model": "demo", "instructions": "Be short.", "max_output_tokens": 4, "temperature": 0.5,
    "input": [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "greet"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{\"a\": 1}"},
        {"type": "function_call_output", "call_id": "c1", "output": "4"},
    ],
    "tools": [
        {"type": "function", "name": "f", "strict": True, "parameters": {
            "type": "object", "properties": {"a": {"type": "integer"}}}},
        {"type": "web_search"},
        {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "g"}]},
    ],
    "tool_choice": "auto", "parallel_tool_calls": True, "stream": False, "store": False,
    "reasoning": {"effort": "low", "summary": "auto"}, "top_p": 0.9, "top_logprobs": 1,
    "include": ["reasoning.encrypted_content"], "text": {"format": {"type": "text"}},
    "previous_response_id": None, "metadata": {"a": "b"}, "prompt_cache_key": "k",
}  # fmt: skip

MESSAGE: dict[str, Any] = {
    "model": "demo", "max_tokens": 4, "temperature": 0.5, "top_k": 3, "top_p": 0.9,
    "stop_sequences": ["END"], "stream": False, "metadata": {"user_id": "u"},
    "system": [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "greet", "signature": "x"},
            {"type": "text", "text": "Hi"},
            {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1",
             "content": [{"type": "text", "text": "4"}]},
            {"type": "text", "text": "And?"}]},
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": {
        "type": "object", "properties": {"a": {"type": "integer"}}}}],
    "tool_choice": {"type": "auto"}, "thinking": {"type": "adaptive"},
    "output_config": {"effort": "high"},
}  # fmt: skip

CHAT_PROMPT: dict[str, Any] = {
    name: CHAT[name] for name in ("messages", "tools", "model", "chat_template_kwargs")
}

TOKENIZE: dict[str, Any] = {"prompt": "Hello <|im_end|>", "model": "demo"}

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, -1e-308, 0.5,
    float("nan"), float("inf"), "", " ", "\0", "\ud800", "é🙂", "a" * 5000, "{{ 7 * 7 }}",
    "{% for i in range(10**9) %}x{% endfor %}", "<|im_end|>", "</think>", "user", "image_url",
    [], [[]], {}, {"": None}, [None], [1, "a", {}], {"type": "text"}, {"role": "user"},
    {"type": "image_url", "image_url": {"url": "x"}}, [[1, 2], [3]], [-1], [10**9], ["a", "b"],
    {"function": 3}, {"function": {"name": 5, "arguments": []}}, {"a": {"b": {"c": []}}},
]  # fmt: skip


SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["a", "f"], "additionalProperties": False,
    "properties": {
        "a": {"type": "integer", "minimum": 0}, "b": {"type": ["string", "null"], "maxLength": 9},
        "c": {"enum": ["x", 1, None]}, "d": {"const": "y"}, "e": {"$ref": "#/$defs/g"},
        "f": {"anyOf": [{"type": "string", "pattern": "^a+$"}, {"type": "boolean"}]},
        "h": {"type": "array", "items": {"type": "number"}, "minItems": 1},
    },
    "$defs": {"g": {"type": "object", "properties": {"i": {"format": "date", "type": "string"}}}},
}  # fmt: skip

TEXTS = (
    "", " ", "x", "é🙂", "\0", "\ud800", "\r\n", "<|im_end|>", "<|im_start|>user\n", "</think>",
    "<think>\nhm\n", "<tool_call>\n<function=f>", "{{ 7 * 7 }}", "{% raw %}", "[1, {}]", "null",
    '{"a": 2}', "a" * 300, "\ufdd0\ufdd1\ufdd0",
)  # fmt: skip

FREE = (
    "content", "text", "description", "arguments", "output", "thinking", "reasoning_content",
    "instructions", "prompt", "suffix", "input", "system", "user", "id", "call_id", "tool_call_id",
    "tool_use_id", "signature", "name",
)  # fmt: skip
"""Fields whose texts may be any."""


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in items:
        yield (*path, key)
        if isinstance(one, dict | list):
            yield from paths_of(one, (*path, key))


def mutated(rng: random.Random, body: dict[str, Any]) -> Any:
    """A body with a few wrong values."""
    made: Any = json.loads(json.dumps(body))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if not isinstance(made, dict) or not made:
            return made
        path = rng.choice(list(paths_of(made)))
        parent = made
        for key in path[:-1]:
            parent = parent[key]
        value = json.loads(json.dumps(rng.choice(NASTY)))
        match rng.randrange(6):
            case 0:
                del parent[path[-1]]
            case 1 if isinstance(parent, dict):
                parent[rng.choice(("type", "content", "role", "x", "", "function"))] = value
            case 2 if isinstance(parent, list):
                parent.extend([parent[path[-1]]] * rng.choice((1, 50)))
            case 3:
                parent[path[-1]] = [value] if rng.random() < 0.5 else {"text": value}
            case _:
                parent[path[-1]] = value
    if rng.random() < 0.01:
        return rng.choice(NASTY)
    return made


def varied(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """A body that is mostly valid: other texts and numbers, fewer fields, fewer messages."""
    made: dict[str, Any] = json.loads(json.dumps(body))
    for name in [*made]:
        if name not in ("messages", "prompt", "input") and rng.random() < 0.3:
            del made[name]
    for path in [*paths_of(made)]:
        parent, key = made, path[-1]
        for one in path[:-1]:
            parent = parent[one]
        value = parent[key]
        if isinstance(value, str) and key in FREE and rng.random() < 0.3:
            parent[key] = "".join(rng.choices(TEXTS, k=rng.randint(1, 3)))
        elif isinstance(value, bool):
            parent[key] = value if rng.random() < 0.8 else not value
        elif isinstance(value, int | float) and rng.random() < 0.2:
            parent[key] = rng.choice((0, 1, 2, 0.5))
    for name in ("messages", "input"):
        if isinstance(made.get(name), list) and rng.random() < 0.3:
            made[name] = rng.choices(made[name], k=rng.randint(1, 4))
    return made


def damaged(rng: random.Random, raw: bytes) -> bytes:
    """Bytes changed, removed or doubled."""
    made = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(made) + 1)
        match rng.randrange(5):
            case 0:
                del made[at:]
            case 1:
                made[at:at] = rng.choice((b"\0", b"\xff\xfe", b"[" * 5000, b'"', b"\\u", b"{}"))
            case 2:
                made[at : at + rng.randrange(1, 9)] = b""
            case _ if at < len(made):
                made[at] ^= 1 << rng.randrange(8)
    return bytes(made)
