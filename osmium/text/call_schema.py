"""The parameters of a tool, as a grammar of its calls takes them.

With `strict` a schema is enforced as a whole or refused by name.  Without it, what a grammar cannot
enforce is left out, so that no tool of a client is refused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from osmium.errors import RequestError, shown
from osmium.text.json_schema import RESTRICTING, checked_schema, mapped_schema, relaxed_schema
from osmium.text.lark import Unenforceable
from osmium.text.tool_schema import Tool, ValueType, alternatives, offered_tools, target

__all__ = ["CallableTool", "Parameter", "callable_tool", "resolved"]

T = TypeVar("T")

_ROOT = "#/$defs/_"
"""Where a parameter's schema has the schema of all parameters, to which its $ref refer."""

MAX_REFERENCES = 16
"""References that refer to each other."""

MAX_NUMBER = 9 * 10**18
"""Largest number of a parameter whose schema has no limits: models may repeat digits forever."""


@dataclass(frozen=True, eq=False)
class Parameter:
    """One parameter of a tool."""

    name: str
    schema: Mapping[str, Any]
    """Its $ref refer to the schema itself."""
    kind: ValueType
    """The types by which the parser of responses reads a value that has no JSON."""
    required: bool
    strict: bool
    path: str
    """Where the request has it."""

    def anything(self) -> "Parameter":
        """The parameter with any value of its types."""
        names = sorted(self.kind.names)
        return replace(self, schema={"type": names} if names else {})

    def refused(self, reason: str) -> RequestError:
        """The error of a strict schema that no grammar enforces."""
        summary = " ".join(reason.split())[:300].rstrip(".")
        return RequestError(
            f"{self.path} cannot be enforced in a call of a tool: {summary}. Change the schema, "
            "or omit `strict`.",
            param=self.path,
            code="unsupported_schema",
        )


@dataclass(frozen=True)
class CallableTool:
    """One tool, for the grammar of its calls."""

    name: str
    path: str
    """Where the request has it."""
    parameters: tuple[Parameter, ...] = ()
    """In the order of the schema."""
    additional: Parameter | None = None
    """The value of any other name; None if there are no others."""
    is_free: bool = False
    """Whether the arguments are any text."""
    reader: Tool = field(default_factory=lambda: Tool(""))
    """What the parser of responses knows of it."""

    def each(self, make: Callable[[Parameter], T]) -> Iterator[tuple[Parameter, T]]:
        """Each parameter and what `make` makes of it.

        Where it raises Unenforceable, it gets the parameter with any value of its types instead.
        Raises: RequestError for one that is strict.
        """
        for one in (*self.parameters, *((self.additional,) if self.additional else ())):
            try:
                yield one, make(one)
            except Unenforceable as error:
                if one.strict:
                    raise one.refused(str(error)) from None
                yield one, make(one.anything())


def callable_tool(entry: Mapping[str, Any], path: str, is_free: bool = False) -> CallableTool:
    """A tool of a request in OpenAI's form, which has been checked; with `is_free` any arguments.

    Raises: RequestError for a strict schema that cannot be enforced.
    """
    function = entry["function"]
    name, strict = function["name"], function.get("strict") is True
    reader, path = offered_tools([entry])[name], f"{path}.function"
    if is_free:
        return CallableTool(name, path, is_free=True, reader=reader)
    given = function.get("parameters") or {}
    where = f"{path}.parameters"
    root = checked_schema(given, where) if strict else relaxed_schema(given)
    if not isinstance(root, dict):
        root = {}
    properties, required, other = _strict(root, where) if strict else _relaxed(root)
    properties |= {key: {} for key in required if key not in properties}

    def parameter(key: str, schema: Any) -> Parameter:
        return Parameter(
            key, _bundled(schema, root), reader.value_type(key), key in required, strict,
            f"{where}.properties.{key[:64]}",
        )  # fmt: skip

    parameters = [parameter(key, one) for key, one in properties.items() if one is not False]
    additional = None
    if other is not False and other is not None:
        additional = replace(
            parameter("", other), kind=reader.other, path=f"{where}.additionalProperties"
        )
    return CallableTool(name, path, tuple(parameters), additional, reader=reader)


Shape = tuple[dict[str, Any], Sequence[str], Any]
"""Properties, required names, additionalProperties."""


def _strict(root: dict[str, Any], path: str) -> Shape:
    """Raises: RequestError for keywords that restrict the arguments in another way."""
    schema = root
    for _ in range(MAX_REFERENCES):
        if not isinstance(schema.get("$ref"), str):
            break
        found = target(schema["$ref"], root)
        if not isinstance(found, dict):
            raise RequestError(
                f"{path} has a $ref to {shown(schema['$ref'])}, where it has no schema. Correct "
                "it, or omit `strict`.",
                param=path,
                code="invalid_schema",
            )
        schema = found
    known = {"type", "properties", "required", "additionalProperties"}
    for key, value in schema.items():
        if key in RESTRICTING - known or (key == "type" and value != "object"):
            raise RequestError(
                f"{path} has {key!r} at the top, which a strict tool does not support: parameters "
                "are an object with properties. Remove it, or omit `strict`.",
                param=path,
                code="unsupported_schema",
            )
    properties, required = schema.get("properties", {}), schema.get("required", [])
    for key, value, kind, rule in (
        ("properties", properties, dict, "an object"), ("required", required, list, "a list"),
    ):  # fmt: skip
        if not isinstance(value, kind):
            raise RequestError(
                f"{path}.{key} is of type {type(value).__name__}; it must be {rule}.",
                param=f"{path}.{key}",
                code="invalid_schema",
            )
    return dict(properties), [key for key in required if isinstance(key, str)], _other(schema)


def _relaxed(root: dict[str, Any]) -> Shape:
    """All properties that some part of the schema has; those required that the whole requires."""
    properties: dict[str, Any] = {}
    for part in alternatives(root, root):
        given = part.get("properties")
        if isinstance(given, dict):
            properties = {**{str(key): one for key, one in given.items()}, **properties}
    waiting, required = [root], dict[str, None]()
    for _ in range(MAX_REFERENCES):
        if not waiting:
            break
        part = waiting.pop(0)
        names = part.get("required")
        for name in names if isinstance(names, list) else ():
            if isinstance(name, str):
                required[name] = None
        several = part.get("allOf")
        parts = [*(several if isinstance(several, list) else ())]
        if isinstance(part.get("$ref"), str):
            parts.append(target(part["$ref"], root))
        waiting += [one for one in parts if isinstance(one, dict)]
    return properties, list(required), _other(root)


def _other(schema: Mapping[str, Any]) -> Any:
    """Other names are given only if the schema says so, as models would invent them."""
    return schema.get("additionalProperties", False)


def _bundled(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    """A schema with what its $ref refer to, and with limits of numbers."""
    found = False

    def changed(one: dict[str, Any]) -> dict[str, Any]:
        nonlocal found
        one = _limited(one)
        reference = one.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            found = True
            return {**one, "$ref": _ROOT + reference[1:]}
        return one

    out = mapped_schema(schema if isinstance(schema, dict) else {}, changed)
    if found:
        out["$defs"] = {"_": mapped_schema(root, changed)}
    return out


def _limited(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type") not in ("integer", "number") or "enum" in schema or "const" in schema:
        return schema
    limits = {"minimum": -MAX_NUMBER, "maximum": MAX_NUMBER}
    given = [schema[key] for key in schema if "inimum" in key or "aximum" in key]
    if any(not isinstance(n, int | float) or abs(n) >= MAX_NUMBER for n in given):
        return schema
    if "exclusiveMinimum" in schema:
        del limits["minimum"]
    if "exclusiveMaximum" in schema:
        del limits["maximum"]
    return {**limits, **schema}


def resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that one which is only a $ref, or an allOf of one schema, stands for.

    Raises: Unenforceable for a $ref to nothing.
    """
    for _ in range(MAX_REFERENCES):
        keys = RESTRICTING & schema.keys()
        if keys == {"$ref"}:
            reference = str(schema["$ref"])
            schema = target(reference, root)
            if schema is None:
                raise Unenforceable(f"it has no schema at {reference.removeprefix(_ROOT)[:80]!r}")
        elif keys == {"allOf"} and isinstance(schema["allOf"], list) and len(schema["allOf"]) == 1:
            schema = schema["allOf"][0]
        else:
            break
        if not isinstance(schema, Mapping):
            return {}
    return schema
