"""JSON Schemas of structured output: what is refused by name, and what is only an annotation.

A schema that `checked_schema` returns is enforced as a whole: each keyword of it that restricts
values is one that grammars support.  JSON Schema 2020-12, and the older names of its keywords.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from osmium.errors import RequestError, shown
from osmium.text.tool_schema import TYPE_ALIASES, TYPES

__all__ = ["RESTRICTING", "ascii_classes", "checked_schema", "mapped_schema", "relaxed_schema"]

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

_FORMATS = frozenset({
    "date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid",
})  # fmt: skip
"""Formats that grammars enforce."""

_STANDARD_FORMATS = _FORMATS | {
    "idn-email", "idn-hostname", "uri-reference", "iri", "iri-reference", "uri-template",
    "json-pointer", "relative-json-pointer", "regex",
}  # fmt: skip
"""Formats that JSON Schema defines.  Others, such as "password", are annotations."""

_NUMBERS = frozenset({
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength",
    "maxLength", "minItems", "maxItems", "minProperties", "maxProperties",
})  # fmt: skip
"""Keywords whose value is a number."""

RESTRICTING = frozenset(
    {"type", "enum", "const", "required", "pattern", "format", "$ref", "items"}
).union(_NUMBERS, _ONE, _MANY, _NAMED, _UNSUPPORTED) - {"$defs", "definitions"}
"""Keywords that restrict values."""

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
        rule = _rule(key, value)
        if rule is not None:
            raise RequestError(
                f"{param} has {key!r} of {shown(value)} at {path or 'the top'}; it must be {rule}.",
                param=param,
                code="invalid_schema",
            )
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
        elif key in _NUMBERS:
            value = _integer(value)
        out[key] = value
    for key, name, child in _children(out):
        checked = _checked(child, param, f"{path}/{key}" + ("" if name is None else f"/{name}"))
        _replace(out, key, name, checked)
    return out


def _rule(key: str, value: Any) -> str | None:
    """What the value of a keyword must be; None if it is that."""
    if key == "type":
        names = value if isinstance(value, list) else [value]
        fits, rule = all(isinstance(one, str) for one in names), "a type or a list of types"
    elif key in (*_MANY, "enum", "required"):
        fits, rule = isinstance(value, list), "a list"
    elif key in ("properties", "patternProperties"):
        fits, rule = isinstance(value, dict), "an object"
    elif key in ("pattern", "$ref"):
        fits, rule = isinstance(value, str), "a text"
    elif key in _NUMBERS:
        fits, rule = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    else:
        return None
    return None if fits else rule


def mapped_schema(
    schema: Mapping[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """A copy in which the schema and all its subschemas have become what `change` returns."""
    out = change(dict(schema))
    for key, name, child in _children(out):
        _replace(out, key, name, mapped_schema(child, change))
    return out


def relaxed_schema(schema: Any) -> dict[str, Any]:
    """The schema without what is malformed or cannot be enforced; any value for no schema."""
    return mapped_schema(schema, _relaxed) if isinstance(schema, Mapping) else {}


def _relaxed(schema: dict[str, Any]) -> dict[str, Any]:
    out = {}
    for key, value in schema.items():
        if key == "type":
            value = _types(value)
        elif key in _NAMED:
            value = _named(value) if isinstance(value, dict) else None
        elif key in _MANY:
            value = [one for one in value if _is_schema(one)] if isinstance(value, list) else None
        elif key in _ONE:
            kinds = (dict, bool, list) if key == "items" else (dict, bool)
            value = value if isinstance(value, kinds) else None
        elif key in _NUMBERS:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            value = _integer(value) if is_number else None
        elif key in ("enum", "required"):
            value = value if isinstance(value, list) else None
        elif key in ("pattern", "$ref"):
            value = value if isinstance(value, str) else None
        elif key == "format":
            value = value if isinstance(value, str) and value in _FORMATS else None
        if key == "const":
            out[key] = value
        elif key in RESTRICTING or key in ("$defs", "definitions"):
            if key in _UNSUPPORTED or value is None or value == []:
                continue
            out[key] = value
    if "pattern" in out:
        out["pattern"] = ascii_classes(out["pattern"])
    if "oneOf" in out and "anyOf" not in out:
        out["anyOf"] = out.pop("oneOf")
    return out


def _integer(value: Any) -> Any:
    """A number such as 3.0 as an integer, which JSON does not tell from it; others as they are."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _types(value: Any) -> Any:
    """The types of JSON that a `type` names; None without any."""
    given = value if isinstance(value, list) else [value]
    plain = [one.strip().lower() for one in given if isinstance(one, str)]
    known = [*dict.fromkeys(TYPE_ALIASES.get(one, one) for one in plain)]
    known = [one for one in known if one in TYPES]
    return known if len(known) > 1 else next(iter(known), None)


def _named(value: dict[str, Any]) -> dict[str, Any]:
    return {name: one if _is_schema(one) else {} for name, one in value.items()}


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict | bool)


def _replace(schema: dict[str, Any], key: str, name: Any, child: dict[str, Any]) -> None:
    """Replace a subschema in a copy of what has it."""
    if name is None:
        schema[key] = child
    elif isinstance(schema[key], list):
        schema[key] = [*schema[key][:name], child, *schema[key][name + 1 :]]
    else:
        schema[key] = {**schema[key], name: child}


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
