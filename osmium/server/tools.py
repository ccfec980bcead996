"""The shape of `tools` and `tool_choice`: a malformed one is refused by its path."""

from collections.abc import Mapping, Sequence
from typing import Any

from osmium.errors import RequestError
from osmium.server.limits import MAX_TOOLS, check_count, shown

__all__ = ["check_tools"]


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
