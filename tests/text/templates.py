"""A template that uses the features of published templates, and conversations to render."""

from collections.abc import Callable
from typing import Any

from osmium.config import EngineConfig
from osmium.weights import open_model

__all__ = ["CONVERSATIONS", "SOURCES", "TOKENS", "by_transformers"]

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATE = """\
{#- A comment that leaves nothing. -#}
{{- bos_token }}
{%- if tools %}
    <tools>
    {%- for tool in tools %}
        {{- '\\n' ~ (tool | tojson) }}
    {%- endfor %}
    {{- '\\n' ~ (tools[0] | tojson(indent=2)) }}
    </tools>
{% endif %}
{%- set seen = namespace(users=0) %}
{% for message in messages %}
    {% if message.role == 'user' %}
        {% set seen.users = seen.users + 1 %}
    {% elif message.role == 'tool' and loop.first %}
        {{- raise_exception('a result without a call') }}
    {% endif %}
    {% if message.content == 'skip me' %}
        {% continue %}
    {% endif %}
    {{- '[' ~ message.role ~ '] ' }}
    {%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
    {%- generation %}{{ message.content | trim }}{% endgeneration %}
    {%- for call in message.tool_calls or [] %}
        {{- ' ' ~ call.function.name }}
        {%- for key, value in call.function.arguments | items %}
            {{- ' ' ~ key ~ '=' ~ (value if value is string else value | tojson) }}
        {%- endfor %}
    {%- endfor %}
    {{- eos_token ~ '\\n' }}
{% endfor %}
users: {{ seen.users }}
{% if add_generation_prompt %}
[assistant]{% if enable_thinking is not defined or enable_thinking %} <think>{% endif %}
{% endif %}
"""

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Finds <what> & 'where' in Zürich",
            "parameters": {
                "type": "object",
                "properties": {"what": {"type": "string"}, "limit": {"type": "integer"}},
                "required": ["what"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {}}},
]


def _call(name: str, arguments: dict[str, Any], key: str) -> dict[str, Any]:
    return {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one": ([{"role": "user", "content": "Hello"}], {}),
    "no_thinking": ([{"role": "user", "content": "Hello"}], {"enable_thinking": False}),
    "whole": (
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
        {"add_generation_prompt": False},
    ),
    "system": (
        [
            {"role": "system", "content": "  Be brief.\n"},
            {"role": "user", "content": "\n  <b>bold</b> & 'quoted' \"text\"  \n"},
            {"role": "assistant", "content": "1 < 2 > 0 && true"},
            {"role": "user", "content": "skip me"},
            {"role": "user", "content": "naïve 日本語 🙂 e\u0301 \u2028 end"},
        ],
        {},
    ),
    "reasoning": (
        [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4", "reasoning_content": "Two and two\nmake four."},
            {"role": "user", "content": "3 + 3?"},
        ],
        {},
    ),
    "tools": (
        [
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "Where is the <café>?"},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "I should look.",
                "tool_calls": [
                    _call("find", {"what": "<café> & bar", "limit": 3, "near": ["a", 1.5]}, "1"),
                    _call("now", {}, "2"),
                ],
            },
            {"role": "tool", "content": '{"at": "Rue <Émile> & Co"}', "tool_call_id": "1"},
            {"role": "tool", "content": "noon", "tool_call_id": "2"},
        ],
        {"tools": TOOLS},
    ),
}
"""Messages as both renderers get them, and the other options."""


def _demo() -> str:
    found = open_model(None, EngineConfig()).file("chat_template.jinja")
    assert found is not None, "the demo model has a template"
    return found.decode()


SOURCES: dict[str, Callable[[], str]] = {"ours": lambda: TEMPLATE, "demo": _demo}


def by_transformers(source: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
    """The same conversation, rendered by transformers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tools = options.pop("tools", None)
    options.setdefault("add_generation_prompt", True)
    rendered, _ = render_jinja_template(
        conversations=[messages], tools=tools, chat_template=source, **options, **TOKENS
    )
    return str(rendered[0])
