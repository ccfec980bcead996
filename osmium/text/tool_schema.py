"""The tools of a request: names, and the types of their parameters by JSON schema."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "STRING", "TYPES", "TYPE_ALIASES", "UNTYPED", "Tool", "ValueType", "alternatives",
    "offered_tools", "target",
]  # fmt: skip

MAX_PARTS = 64
"""Schemas of one value, by anyOf, oneOf, allOf and $ref, that are followed."""

TYPE_ALIASES = {
    "str": "string", "text": "string", "varchar": "string", "char": "string", "date": "string",
    "int": "integer", "long": "integer", "short": "integer", "uint": "integer",
    "float": "number", "double": "number", "decimal": "number",
    "bool": "boolean", "dict": "object", "map": "object", "list": "array", "tuple": "array",
    "none": "null",
}  # fmt: skip
TYPES = frozenset({"string", "integer", "number", "boolean", "array", "object", "null"})


@dataclass(frozen=True, slots=True)
class ValueType:
    """What a parameter's value may be."""

    names: frozenset[str] = frozenset()
    """JSON types; empty if the schema names none."""
    strings: frozenset[str] = frozenset()
    """The strings of an enum."""

    @property
    def takes_strings(self) -> bool:
        return not self.names or "string" in self.names


UNTYPED = ValueType()
STRING = ValueType(frozenset({"string"}))


@dataclass(frozen=True, slots=True)
class Tool:
    """One function that a request offers."""

    name: str
    types: Mapping[str, ValueType] = field(default_factory=dict)
    """By parameter; empty if the schema names none."""

    other: ValueType = UNTYPED
    """Of a parameter that the schema does not name."""

    def value_type(self, parameter: str) -> ValueType:
        return self.types.get(parameter, self.other)


def offered_tools(tools: Sequence[Any] | None) -> dict[str, Tool]:
    """The functions of a request's `tools`, by name.

    An entry is OpenAI's `{"function": {...}}`, the function itself, or Anthropic's with an
    `input_schema`.  What is no function with a name is left out.
    """
    found = {}
    for entry in tools or ():
        function = entry.get("function", entry) if isinstance(entry, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(function, Mapping) and isinstance(name, str) and name:
            schema = function.get("parameters", function.get("input_schema"))
            others = schema.get("additionalProperties") if isinstance(schema, Mapping) else None
            found[name] = Tool(name, _parameters(schema), _value_type(others, schema))
    return found


def _parameters(schema: Any) -> dict[str, ValueType]:
    """The types of an object schema's properties."""
    found: dict[str, ValueType] = {}
    for part in alternatives(schema, schema):
        properties = part.get("properties")
        if isinstance(properties, Mapping):
            found |= {str(key): _value_type(one, schema) for key, one in properties.items()}
    return found


def _value_type(schema: Any, root: Any) -> ValueType:
    names: set[str] = set()
    strings: set[str] = set()
    for part in alternatives(schema, root):
        given = part.get("type")
        for name in given if isinstance(given, list) else [given]:
            if isinstance(name, str):
                lower = name.strip().lower()
                names |= {TYPE_ALIASES.get(lower, lower)} & TYPES
        values = part.get("enum")
        values = list(values) if isinstance(values, list) else []
        values += [part["const"]] if "const" in part else []
        strings |= {value for value in values if isinstance(value, str)}
        if given is None or given == "enum":
            names |= {_type_of(value) for value in values}
        if part.get("nullable") is True:
            names.add("null")
    return ValueType(frozenset(names), frozenset(strings))


def alternatives(schema: Any, root: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and those that it combines or refers to, each once, in order."""
    waiting, seen = [schema], set[int]()
    while waiting and len(seen) < MAX_PARTS:
        one = waiting.pop(0)
        if not isinstance(one, Mapping) or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        for key in ("anyOf", "oneOf", "allOf"):
            several = one.get(key)
            waiting += several[:MAX_PARTS] if isinstance(several, list) else []
        if isinstance(one.get("$ref"), str):
            waiting.append(target(one["$ref"], root))


def target(reference: str, root: Any) -> Any:
    """What `#/$defs/NAME` refers to, or None."""
    if not reference.startswith("#/"):
        return None
    found = root
    for key in reference[2:].split("/"):
        if not isinstance(found, Mapping):
            return None
        found = found.get(key.replace("~1", "/").replace("~0", "~"))
    return found


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    for kind, name in ((float, "number"), (str, "string"), (list, "array"), (Mapping, "object")):
        if isinstance(value, kind):
            return name
    return "null"
