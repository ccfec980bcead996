"""Anthropic's tools and tool_choice in the form of a chat's."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from osmium.server.anthropic_prompt import invalid
from osmium.server.limits import MAX_TOOLS, check_count

__all__ = ["ChatTools", "chat_tools"]

_OF_THE_SERVER = re.compile(
    r"(?:web_search|web_fetch|bash|text_editor|computer|code_execution|memory|advisor"
    r"|tool_search_tool(?:_\w+)?|mcp_toolset)(?:_\d{8})?|\w+_\d{8}"
)
"""Types of tools that Anthropic runs, or whose description only its models have."""

_KNOWN = (
    "type", "name", "description", "input_schema", "strict", "cache_control", "defer_loading",
    "eager_input_streaming",
)  # fmt: skip
"""Keys of a custom tool; the last two change only how it is transferred."""


@dataclass
class ChatTools:
    """The tools of a chat, and their choice."""

    tools: list[dict[str, Any]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """The index in the request of each tool."""
    ignored: list[str] = field(default_factory=list)
    """Names of tools and keys that have no effect."""
    choice: str | dict[str, Any] | None = None
    parallel: bool | None = None


def chat_tools(
    tools: Sequence[Mapping[str, Any]] | None, choice: Mapping[str, Any] | None
) -> ChatTools:
    """Convert the tools.  Those that only Anthropic has are left out and reported.

    Raises: RequestError that names the path of a wrong value.
    """
    found = ChatTools()
    check_count("tools", len(tools or ()), MAX_TOOLS)
    names: set[str] = set()
    for i, tool in enumerate(tools or ()):
        kind, path = tool.get("type"), f"tools[{i}]"
        if isinstance(kind, str) and kind != "custom" and _OF_THE_SERVER.fullmatch(kind):
            _add(found.ignored, f"tools.{kind}")
            continue
        if kind not in (None, "custom"):
            raise invalid(f"{path}.type", kind, "'custom' or absent")
        function = _function(tool, path)
        if function["name"] in names:
            raise invalid(f"{path}.name", function["name"], "a name that no other tool has")
        names.add(function["name"])
        found.tools.append({"type": "function", "function": function})
        found.places.append(i)
        for key in tool:
            if key not in _KNOWN:
                _add(found.ignored, f"tools.{key}")
    if choice is not None:
        _set_choice(found, choice, names)
    return found


def _function(tool: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A custom tool as a function.  Raises: RequestError."""
    name = tool.get("name")
    if not isinstance(name, str) or not name.strip():
        raise invalid(f"{path}.name", name, "a text that is not empty")
    schema = tool.get("input_schema")
    if not isinstance(schema, Mapping):
        raise invalid(f"{path}.input_schema", schema, "a JSON schema, which is an object")
    function: dict[str, Any] = {"name": name}
    for key, kind, rule in (("description", str, "a text"), ("strict", bool, "true or false")):
        value = tool.get(key)
        if not isinstance(value, kind | None):
            raise invalid(f"{path}.{key}", value, f"{rule}, or absent")
        if value is not None:
            function[key] = value
    return {**function, "parameters": dict(schema)}


def _set_choice(found: ChatTools, choice: Mapping[str, Any], names: set[str]) -> None:
    """Convert tool_choice.  Raises: RequestError."""
    kind, single = choice.get("type"), choice.get("disable_parallel_tool_use")
    if not isinstance(single, bool | None):
        raise invalid("tool_choice.disable_parallel_tool_use", single, "true or false")
    found.parallel = False if single else None
    if kind in ("auto", "none"):
        found.choice = kind
    elif kind == "any":
        if not names:
            raise invalid("tool_choice.type", kind, "'auto' or 'none' where no tool is offered")
        found.choice = "required"
    elif kind == "tool":
        name = choice.get("name")
        if not isinstance(name, str) or name not in names:
            raise invalid("tool_choice.name", name, "the name of one of the custom tools")
        found.choice = {"type": "function", "function": {"name": name}}
    else:
        raise invalid("tool_choice.type", kind, "'auto', 'any', 'tool' or 'none'")


def _add(names: list[str], name: str) -> None:
    if name not in names:
        names.append(name)
