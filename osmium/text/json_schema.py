"""JSON Schemas of structured output: what is refused by name, and what is only an annotation.

A schema that `checked_schema` returns is enforced as a whole: each keyword of it that restricts
values is one that grammars support.  JSON Schema 2020-12, and the older names of its keywords.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from osmium.errors import RequestError

__all__ = ["ascii_classes", "checked_schema"]

_ONE = ("additionalProperties", "items", "additionalItems")
"""Keywords whose value is one schema; `items` may also be a list."""

_MANY = ("anyOf", "oneOf", "allOf", "prefixItems")
"""Keywords whose value is a list of schemas."""

_NAMED = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords whose value is an object of schemas."""

_UNSUPPORTED = frozenset({
    "not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains",
    "propertyNames", "dependentRequired", "dependentSchemas", "dependencies",
    "unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef", "extends",
    "disallow", "divisibleBy",
})  # fmt: skip
"""Keywords that restrict values and that a grammar cannot enforce."""

_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "propertyNames": (True, {}, {"type": "string"}),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
}
"""Values of these keywords that restrict nothing."""

_STANDARD_FORMATS = frozenset({
    "date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname",
    "ipv4", "ipv6", "uri", "uri-reference", "iri", "iri-reference", "uuid", "uri-template",
    "json-pointer", "relative-json-pointer", "regex",
})  # fmt: skip
"""Formats that JSON Schema defines.  Others, such as "password", are annotations."""

_DROPPED = ("x-guidance",)
"""Options of the grammar package, which a client may not set."""


def checked_schema(schema: Any, param: str) -> dict[str, Any]:
    """The schema without annotations that the grammar package would refuse.

    Raises: RequestError for a keyword that cannot be enforced, with its path.
    """
    if schema is True:
        return {}
    if not isinstance(schema, Mapping):
        raise RequestError(
            f"{param} is {_kind(schema)}; it must be a JSON Schema, which is an object.",
            param=param,
            code="invalid_schema",
        )
    return _checked(dict(schema), param, "")


def _checked(schema: dict[str, Any], param: str, path: str) -> dict[str, Any]:
    out = {}
    for key, value in schema.items():
        if key in _DROPPED or value in _WITHOUT_EFFECT.get(key, ()):
            continue
        if key in _UNSUPPORTED:
            raise RequestError(
                f"{param} has {key!r} at {path or 'the top'}, which structured output does not "
                "support. Remove it, or check the value in the client.",
                param=param,
                code="unsupported_schema",
            )
        if key == "$schema" and "json-schema.org/" not in str(value):
            continue  # names no version of JSON Schema
        if key == "format" and isinstance(value, str) and value not in _STANDARD_FORMATS:
            continue
        if key == "pattern" and isinstance(value, str):
            value = ascii_classes(value)
        elif key == "patternProperties" and isinstance(value, dict):
            value = {ascii_classes(name): child for name, child in value.items()}
        out[key] = value
    for key, name, child in _children(out):
        checked = _checked(child, param, f"{path}/{key}" + ("" if name is None else f"/{name}"))
        if name is None:
            out[key] = checked
        elif isinstance(out[key], list):
            out[key] = [*out[key][:name], checked, *out[key][name + 1 :]]
        else:
            out[key] = {**out[key], name: checked}
    return out


def _children(schema: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Keyword, name or index, and schema of each subschema that is an object."""
    for key, value in list(schema.items()):
        if key in _ONE and isinstance(value, dict):
            yield key, None, value
        elif key in (*_MANY, "items") and isinstance(value, list):
            yield from ((key, i, child) for i, child in enumerate(value) if isinstance(child, dict))
        elif key in _NAMED and isinstance(value, dict):
            yield from ((key, n, child) for n, child in value.items() if isinstance(child, dict))


def ascii_classes(regex: str) -> str:
    r"""The expression with \d and \w of ASCII alone, as in ECMA-262, whose regexes schemas use."""
    out, at, in_class = [], 0, False
    while at < len(regex):
        char = regex[at : at + 2] if regex[at] == "\\" else regex[at]
        at += len(char)
        if char in _CLASSES:
            char = _CLASSES[char] if in_class else f"[{_CLASSES[char]}]"
        elif char == "[":
            in_class = True
        elif char == "]":
            in_class = False
        out.append(char)
    return "".join(out)


_CLASSES = {r"\d": "0-9", r"\w": "A-Za-z0-9_"}


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
