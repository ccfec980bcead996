"""The tools and the tool choice of /v1/responses, in the form of a chat.

Functions are offered as they are, those of a namespace by their own names, and custom tools as
functions with one text.  Tools that the server would have to run are left out and reported.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from osmium.errors import RequestError
from osmium.server.limits import MAX_TOOLS, check_count, shown

__all__ = ["CUSTOM_INPUT", "OfferedTools", "ToolOrigin", "custom_arguments", "offer_tools"]

CUSTOM_INPUT = "input"
"""The parameter of the function that stands for a custom tool."""

_MAX_NAME_CHARS = 64

_Found = tuple[str, Mapping[str, Any], str | None, str]
"""A tool's path, the tool, its namespace, and what its description begins with."""


@dataclass(frozen=True)
class ToolOrigin:
    """The tool of the request that a function of the prompt stands for."""

    name: str
    namespace: str | None = None
    custom: bool = False


@dataclass
class OfferedTools:
    """The tools of a request."""

    functions: list[dict[str, Any]] = field(default_factory=list)
    """In the form of a chat."""
    paths: list[str] = field(default_factory=list)
    """The client's path of each function."""
    origins: dict[str, ToolOrigin] = field(default_factory=dict)
    """By the function's name in the prompt."""
    given: list[dict[str, Any]] = field(default_factory=list)
    """The request's tools that are offered, in the form of responses."""
    ignored: list[str] = field(default_factory=list)
    """The tools that are not, as `tools.web_search`."""
    _prompt_names: dict[tuple[str, str | None], str] = field(default_factory=dict)

    def add(self, function: dict[str, Any], path: str, origin: ToolOrigin | None) -> None:
        """Offer a function; without a name it has no origin, and is refused later."""
        self.functions.append({"type": "function", "function": function})
        self.paths.append(path)
        if origin is not None:
            self.origins[function["name"]] = origin
            self._prompt_names[origin.name, origin.namespace] = function["name"]

    def prompt_name(self, name: str, namespace: str | None) -> str:
        """The name of a tool in the prompt; its own name if it is not offered."""
        return self._prompt_names.get((name, namespace), name)

    def choice(self, given: Any) -> str | dict[str, Any] | None:
        """A tool choice in the form of a chat.  Raises: RequestError."""
        if not isinstance(given, Mapping):
            return None if given is None else str(given)
        kind = given.get("type")
        if kind in ("function", "custom"):
            return self._named(given, "tool_choice")
        if kind == "allowed_tools":
            tools = given.get("tools")
            if not isinstance(tools, list):
                raise _invalid("tool_choice.tools", tools, "a list of tools")
            allowed = [
                self._named(tool, f"tool_choice.tools[{i}]")
                for i, tool in enumerate(tools)
                if not self._is_left_out(tool)
            ]
            inner = {"mode": given.get("mode"), "tools": allowed}
            return {"type": "allowed_tools", "allowed_tools": inner}
        raise RequestError(
            f"tool_choice.type is {shown(kind)}; the server runs no tools itself. Use 'auto', "
            "'none', 'required', or an object of type 'function', 'custom' or 'allowed_tools'.",
            param="tool_choice.type",
            code="unsupported_value",
        )

    def _named(self, tool: Any, path: str) -> dict[str, Any]:
        name = tool.get("name") if isinstance(tool, Mapping) else None
        if not isinstance(name, str) and isinstance(tool, Mapping):
            function = tool.get("function")  # the form of a chat
            name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise _invalid(f"{path}.name", name, "the name of a tool")
        namespace = tool.get("namespace")
        if not isinstance(namespace, str | None):
            raise _invalid(f"{path}.namespace", namespace, "a text")
        return {"type": "function", "function": {"name": self.prompt_name(name, namespace)}}

    def _is_left_out(self, tool: Any) -> bool:
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        return f"tools.{kind}" in self.ignored


def offer_tools(tools: Sequence[Mapping[str, Any]] | None) -> OfferedTools:
    """The tools of a request.  Raises: RequestError for a malformed one, by its path."""
    check_count("tools", len(tools or ()), MAX_TOOLS)
    offered = OfferedTools()
    found: list[_Found] = []
    for i, tool in enumerate(tools or ()):
        path, kind = f"tools[{i}]", tool.get("type")
        if not isinstance(kind, str):
            raise _invalid(f"{path}.type", kind, "a text, such as 'function'")
        if kind == "namespace":
            inner = _namespace(tool, path, offered.ignored)
            found += inner
            offered.given.append({**tool, "tools": [dict(one) for _, one, _, _ in inner]})
        elif kind in ("function", "custom"):
            found.append((path, tool, None, ""))
            plain = {"parameters": None, "strict": None, **_function(tool)}
            offered.given.append({"type": kind, **plain} if kind == "function" else dict(tool))
        else:
            offered.ignored.append(f"tools.{kind[:_MAX_NAME_CHARS]}")
    check_count("tools", len(found), MAX_TOOLS)
    names = Counter(str(_function(tool).get("name")) for _, tool, _, _ in found)
    for path, tool, namespace, prefix in found:
        function, origin = _function(tool), None
        name, custom = function.get("name"), tool.get("type") == "custom"
        own = function.get("description", "")
        if not isinstance(own, str):
            raise _invalid(f"{path}.description", own, "a text")
        if isinstance(name, str):
            origin = ToolOrigin(name, namespace, custom)
            if namespace is not None and names[name] > 1:
                function["name"] = f"{namespace}__{name}"
        if custom:
            function = _custom(function, tool.get("format"), path)
        if prefix:
            function["description"] = f"{prefix}\n\n{own}" if own else prefix
        offered.add(function, path, origin)
    offered.ignored = list(dict.fromkeys(offered.ignored))
    return offered


def _namespace(tool: Mapping[str, Any], path: str, ignored: list[str]) -> list[_Found]:
    """The tools of a namespace; the first one gets its description.  Raises: RequestError."""
    name, inner = tool.get("name"), tool.get("tools")
    if not isinstance(name, str) or not name.strip():
        raise _invalid(f"{path}.name", name, "a text that is not empty")
    if not isinstance(inner, list):
        raise _invalid(f"{path}.tools", inner, "a list of tools")
    description = tool.get("description")
    if not isinstance(description, str | None):
        raise _invalid(f"{path}.description", description, "a text")
    prefix = f"{name}: {description}" if description else ""
    found: list[_Found] = []
    for j, one in enumerate(inner):
        kind = one.get("type") if isinstance(one, Mapping) else None
        if not isinstance(kind, str):
            raise _invalid(f"{path}.tools[{j}]", one, "an object with a type")
        if kind not in ("function", "custom"):
            ignored.append(f"tools.{kind[:_MAX_NAME_CHARS]}")
            continue
        found.append((f"{path}.tools[{j}]", one, name, "" if found else prefix))
    return found


_FUNCTION = ("name", "description", "parameters", "strict")


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a tool's function, flat or in the form of a chat."""
    inner = tool.get("function")
    function = inner if isinstance(inner, Mapping) and "name" not in tool else tool
    return {name: function[name] for name in _FUNCTION if function.get(name) is not None}


def _custom(function: Mapping[str, Any], form: Any, path: str) -> dict[str, Any]:
    """A function with one text for a custom tool.  Its grammar is described, not enforced.

    Raises: RequestError.
    """
    if not isinstance(form, Mapping | None):
        raise _invalid(f"{path}.format", form, "an object with a type")
    texts = [function.get("description", "")]
    if form and form.get("type") == "grammar":
        texts.append(
            f"The text matches this grammar ({form.get('syntax')}):\n{form.get('definition')}"
        )
    text = {"type": "string", "description": "The tool's whole input, as plain text."}
    return {
        "name": function.get("name"),
        "description": "\n\n".join(filter(None, texts)),
        "parameters": {
            "type": "object", "properties": {CUSTOM_INPUT: text}, "required": [CUSTOM_INPUT],
        },
    }  # fmt: skip


def custom_arguments(text: str) -> str:
    """The arguments of the function that stands for a custom tool with this input."""
    return json.dumps({CUSTOM_INPUT: text}, ensure_ascii=False)


def _invalid(path: str, value: object, rule: str) -> RequestError:
    return RequestError(
        f"{path} is {shown(value)}; it must be {rule}.", param=path, code="invalid_value"
    )
