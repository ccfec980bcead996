"""The shape of `tools` and `tool_choice`: a malformed one is refused by its path."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from osmium.errors import RequestError
from osmium.server.limits import MAX_TOOLS, check_count, shown

__all__ = ["ToolChoice", "check_tools", "tool_choice"]


@dataclass(frozen=True)
class ToolChoice:
    """Which tools a response calls."""

    none: bool = False
    """It calls none."""
    required: bool = False
    """It is calls alone."""
    one: bool = False
    """It is one call."""
    names: frozenset[str] | None = None
    """The tools that it may call; None for all."""


_MODES = {
    None: ToolChoice(), "auto": ToolChoice(), "none": ToolChoice(none=True),
    "required": ToolChoice(required=True),
}  # fmt: skip


def tool_choice(choice: Any, tools: Sequence[Mapping[str, Any]] | None) -> ToolChoice:
    """A tool_choice: a mode, a function, or allowed tools.  `tools` have been checked.

    Raises: RequestError with the path of what is wrong.
    """
    if isinstance(choice, Mapping):
        found = _object_choice(choice, {tool["function"]["name"] for tool in tools or ()})
    elif choice is None or (isinstance(choice, str) and choice in _MODES):
        found = _MODES[choice]
    else:
        raise _invalid("tool_choice", choice, "'auto', 'none', 'required' or an object.")
    if found.required and not tools:
        raise RequestError(
            f"tool_choice is {shown(choice)}, but there are no tools to call. Send tools, or omit "
            "it.",
            param="tool_choice",
            code="invalid_value",
        )
    return found


def _object_choice(choice: Mapping[str, Any], offered: set[str]) -> ToolChoice:
    """Raises: RequestError."""
    kind = choice.get("type")
    if kind == "function":
        name = _named(choice, "tool_choice", offered)
        return ToolChoice(required=True, one=True, names=frozenset([name]))
    if kind != "allowed_tools":
        raise _invalid("tool_choice.type", kind, "'function' or 'allowed_tools'.")
    path, given = "tool_choice", cast(Any, choice)
    if "allowed_tools" in choice or not ("mode" in choice or "tools" in choice):
        path, given = "tool_choice.allowed_tools", choice.get("allowed_tools")
    if not isinstance(given, Mapping):
        raise _invalid(path, given, "an object with mode and tools.")
    mode, listed = given.get("mode"), given.get("tools")
    if mode not in ("auto", "required"):
        raise _invalid(f"{path}.mode", mode, "'auto' or 'required'.")
    if not isinstance(listed, list) or not listed:
        raise _invalid(f"{path}.tools", listed, "a list of one or more tools.")
    names = set()
    for i, one in enumerate(listed):
        at = f"{path}.tools[{i}]"
        if not isinstance(one, Mapping) or one.get("type") != "function":
            raise _invalid(at, one, "an object of type 'function' with a name.")
        names.add(_named(one, at, offered))
    return ToolChoice(required=mode == "required", names=frozenset(names))


def _named(value: Mapping[str, Any], path: str, offered: set[str]) -> str:
    """The name in {"function": {"name"}}, or in the flat {"name"}.  Raises: RequestError."""
    if "function" in value or "name" not in value:
        path, function = f"{path}.function", value.get("function")
        if not isinstance(function, Mapping):
            raise _invalid(path, function, "an object with the name of a tool.")
        value = function
    name = value.get("name")
    if not isinstance(name, str) or name not in offered:
        names = ", ".join(sorted(offered))[:200] or "there are none"
        raise _invalid(f"{path}.name", name, f"the name of one of the tools: {names}.")
    return name


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> None:
    """Raises: RequestError for a tool that is not {"type": "function", "function": {"name": ...}},
    a name that occurs twice, or too many tools."""
    check_count("tools", len(tools or ()), MAX_TOOLS)
    names: set[str] = set()
    for i, tool in enumerate(tools or ()):
        path = f"tools[{i}]"
        if tool.get("type") != "function":
            hint = " Omit it." if "type" in tool else ""
            raise _invalid(f"{path}.type", tool.get("type"), f"'function'.{hint}")
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise _invalid(f"{path}.function", function, "an object with a name.")
        name = function.get("name")
        if not isinstance(name, str) or not name.strip():
            raise _invalid(f"{path}.function.name", name, "a text that is not empty.")
        if name in names:
            raise _invalid(f"{path}.function.name", name, "a name that no other tool has.")
        names.add(name)
        for key, kind, rule in (
            ("description", str, "a text"),
            ("parameters", Mapping, "a JSON schema, which is an object"),
            ("strict", bool, "true or false"),
        ):
            value = function.get(key)
            if value is not None and not isinstance(value, kind):
                raise _invalid(f"{path}.function.{key}", value, f"{rule}, or absent.")


def _invalid(path: str, value: object, rule: str) -> RequestError:
    return RequestError(
        f"{path} is {shown(value)}; it must be {rule}", param=path, code="invalid_value"
    )
