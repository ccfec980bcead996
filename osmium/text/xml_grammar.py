"""The grammar of calls in Qwen's XML: what XmlCall reads back as the schema's values.

A string is raw text without the tags of calls, as these may end it.  Other values are JSON.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from osmium.errors import RequestError
from osmium.text.call_schema import CallableTool, Parameter, resolved
from osmium.text.json_schema import RESTRICTING
from osmium.text.lark import LarkRules, Unenforceable, literal, regex
from osmium.text.raw_text import STRING_KEYS, limits, looks_like_other, one_of
from osmium.text.xml_tags import (
    CALL,
    CALL_END,
    FUNCTION,
    FUNCTION_END,
    PARAMETER,
    PARAMETER_END,
    function_header,
    parameter_header,
)

__all__ = ["VALUE_END", "call_rule"]

VALUE_END = f"\n{PARAMETER_END}>\n"
"""What ends a value, whatever its type."""

_TAGS = r"</parameter|</function>|</?tool_call>|<function=|<parameter[\s\x1c-\x1f]*(name)?="
"""Texts that no string has."""

_NAME = "[A-Za-z_][A-Za-z0-9_.-]{0,63}"
"""A name of a parameter that the schema does not name."""

MAX_ALTERNATIVES = 16
"""Schemas inside each other by anyOf and oneOf."""


def call_rule(tool: CallableTool, rules: LarkRules) -> str:
    """A call of a tool, from <tool_call> to </tool_call>.  Raises: RequestError."""
    _check_name(tool)
    body = [rules.tag(CALL), literal(f"\n{FUNCTION}{tool.name}>\n")]
    if tool.is_free:
        return " ".join([*body, rules.terminal(regex("(?s:.*)")), rules.tag(CALL_END)])
    for one, value in tool.each(lambda one: _value(one, rules)):
        if one is tool.additional:
            if not tool.parameters:
                name = rules.terminal(regex(_NAME))
                before, after = literal(f"{PARAMETER}="), literal(">\n")
                body.append(f"({before} {name} {after} {value})*")
        elif _is_readable(one.name, tool):
            text = literal(f"{PARAMETER}={one.name}>\n") + f" {value}"
            body.append(text if one.required else f"({text})?")
        elif one.required and one.strict:
            raise one.refused("its name cannot be written in the model's format of calls")
    return " ".join([*body, literal(FUNCTION_END + "\n"), rules.tag(CALL_END)])


def _check_name(tool: CallableTool) -> None:
    text = f"{FUNCTION}{tool.name}>\n"
    if function_header(text, 0, True) != (tool.name, len(text) - 1):
        raise RequestError(
            f"{tool.path}.name is {tool.name[:80]!r}, which cannot be written in the "
            "model's format of calls. Use letters, digits, underscores and dashes.",
            param=f"{tool.path}.name",
            code="invalid_value",
        )


def _is_readable(name: str, tool: CallableTool) -> bool:
    text = f"{PARAMETER}={name}>\n"
    return name != "" and parameter_header(text, 0, True, tool.reader) == (name, len(text) - 1)


def _value(one: Parameter, rules: LarkRules) -> str:
    """A value and what ends it.  Raises: Unenforceable."""
    end = literal(VALUE_END)
    if not one.kind.takes_strings:
        return f"{rules.json(one.schema)} {end}"
    parts = _Parts()
    _split(one.schema, one.schema, parts, MAX_ALTERNATIVES)
    options = []
    texts = [text for text in dict.fromkeys(parts.texts) if not re.search(_TAGS, text)]
    if texts:
        options.append(rules.terminal(f"({one_of(texts)}) {end}"))
    other_texts = looks_like_other(one.kind, containers=bool(parts.others))
    for schema in parts.strings:
        limited = limits(schema, one.strict)
        content = [_content(rules), *limited, *([f"~{other_texts}"] if other_texts else ())]
        options.append(rules.terminal(f"({' & '.join(content)}) {end}"))
    if parts.others:
        schema = parts.others[0] if len(parts.others) == 1 else {"anyOf": parts.others}
        definitions = one.schema.get("$defs", {})
        options.append(f"{rules.json({**schema, '$defs': definitions})} {end}")
    if not options:
        raise Unenforceable("no value of it can be written in the model's format of calls")
    return rules.rule(" | ".join(options))


def _content(rules: LarkRules) -> str:
    """The terminal of texts without tags."""
    tagged = regex(f"(?s:.*)({_TAGS})(?s:.*)")
    return rules.terminal(f"{regex('(?s:.*)')} & ~{tagged}")


@dataclass
class _Parts:
    """A schema, parted by how its values are written."""

    strings: list[Mapping[str, Any]] = field(default_factory=list)
    """Schemas of strings; any may hold."""
    texts: list[str] = field(default_factory=list)
    """Strings that are listed."""
    others: list[Mapping[str, Any]] = field(default_factory=list)
    """Schemas of values that are no strings."""


def _split(schema: Any, root: Mapping[str, Any], parts: _Parts, depth: int) -> None:
    """Add a schema to the parts.  Raises: Unenforceable for a combination that has none."""
    if not depth:
        raise Unenforceable(f"it has more than {MAX_ALTERNATIVES} schemas inside each other")
    schema = resolved(schema, root) if isinstance(schema, Mapping) else {}
    keys = RESTRICTING & schema.keys()
    several = next((key for key in ("anyOf", "oneOf") if key in keys), None)
    if several is not None:
        if keys != {several}:
            raise Unenforceable(f"{several} beside {', '.join(sorted(keys - {several}))}")
        before = len(parts.strings) + bool(parts.texts)
        for one in schema[several]:
            _split(one, root, parts, depth - 1)
        if several == "oneOf" and len(parts.strings) + bool(parts.texts) > before + 1:
            raise Unenforceable("oneOf has several schemas of strings")
        return
    if keys & {"allOf", "$ref"}:
        raise Unenforceable(f"{', '.join(sorted(keys))} in one schema")
    types = schema.get("type")
    names = {types} if isinstance(types, str) else set(types or ())
    if "enum" in keys or "const" in keys:
        if keys - {"enum", "const", "type"}:
            raise Unenforceable(f"enum beside {', '.join(sorted(keys - {'enum', 'const'}))}")
        values = [schema["const"]] if "const" in keys else schema["enum"]
        if not names or "string" in names:
            parts.texts += [value for value in values if isinstance(value, str)]
        rest = [value for value in values if not isinstance(value, str)]
        if rest:
            parts.others.append({**({"type": types} if names else {}), "enum": rest})
        return
    if not names or "string" in names:
        parts.strings.append({key: schema[key] for key in STRING_KEYS & keys})
    rest_keys = keys - STRING_KEYS - {"type"}
    others = sorted(names - {"string"}) if names else ["array", "object"] if rest_keys else []
    if others:
        kept = {key: schema[key] for key in schema if key in rest_keys}
        parts.others.append({**kept, "type": others if len(others) > 1 else others[0]})
