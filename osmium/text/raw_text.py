"""Strings of a JSON Schema as raw text, without JSON's quotes and escapes: their grammar.

Formats are those of RFC 3339, RFC 4122 and others, as far as a regular expression checks them.
"""

from collections.abc import Mapping
from typing import Any

from osmium.text.lark import Unenforceable, literal, regex
from osmium.text.tool_schema import ValueType

__all__ = ["STRING_KEYS", "limits", "looks_like_other", "one_of"]

STRING_KEYS = frozenset({"minLength", "maxLength", "pattern", "format"})
"""Keywords that restrict strings."""

MAX_LENGTH = 1 << 13
"""Lengths above this restrict nothing: each character of a counted text is a lexer's state."""

ANY = "(?s:.*)"

_DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_TIME = (
    r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL}){{0,7}}"
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"({_BYTE}\.){{3}}{_BYTE}"
_HEX = r"[0-9a-fA-F]{1,4}"

_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": r"P([0-9]{1,9}W|[0-9]{1,9}D(T[0-9]{1,9}[HMS])?|T[0-9]{1,9}[HMS])",
    "uuid": r"[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
    "ipv4": _IPV4,
    "ipv6": rf"({_HEX}:){{7}}{_HEX}|({_HEX}:){{1,6}}:{_HEX}|::{_HEX}|::",
    "hostname": _HOST,
    "email": rf"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@{_HOST}",
    "uri": r"[A-Za-z][A-Za-z0-9+.-]*:[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+",
}

_SPACE = r"[\s\x1c-\x1f]*"
_NUMBER = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"


def limits(schema: Mapping[str, Any], strict: bool) -> list[str]:
    """Regular expressions that a string of `schema` matches.  Raises: Unenforceable."""
    found = []
    low, high = _length(schema, "minLength"), _length(schema, "maxLength")
    if not strict and high is not None and high > MAX_LENGTH:
        high = None
    if low or high is not None:
        if high is not None and high < (low or 0):
            raise Unenforceable(f"minLength {low} is above maxLength {high}")
        found.append(regex(f"(?s:.{{{low or 0},{'' if high is None else high}}})"))
    if isinstance(schema.get("pattern"), str):
        found.append(regex(_whole(schema["pattern"])))
    if isinstance(schema.get("format"), str):
        if schema["format"] in _FORMATS:
            found.append(regex(_FORMATS[schema["format"]]))
        elif strict:
            raise Unenforceable(f"the format {schema['format']!r} is not supported")
    return found


def _length(schema: Mapping[str, Any], name: str) -> int | None:
    value = schema.get(name)
    if not isinstance(value, int | float | None) or isinstance(value, bool):
        raise Unenforceable(f"{name} is no number")
    return None if value is None else int(value)


def _whole(pattern: str) -> str:
    """An expression that a whole text matches if `pattern` matches a part of it.

    Raises: Unenforceable for anchors that are not at an end of an alternative.
    """
    whole = []
    for part in _alternatives(pattern):
        start, end = part.startswith("^"), _ends_in_anchor(part)
        inner = part[start : len(part) - end]
        if _anchors(inner):
            raise Unenforceable(f"the pattern {pattern[:80]!r} has an anchor inside")
        whole.append(("" if start else ANY) + f"({inner})" + ("" if end else ANY))
    return "|".join(whole)


def _tokens(pattern: str) -> list[tuple[int, str, bool, int]]:
    """Position, character or escape, whether it is in a class, and the depth of groups."""
    found, at, in_class, depth = [], 0, False, 0
    while at < len(pattern):
        char = pattern[at : at + 2] if pattern[at] == "\\" else pattern[at]
        if not in_class:
            depth += (char == "(") - (char == ")")
        found.append((at, char, in_class, depth))
        in_class = char == "[" or (in_class and char != "]")
        at += len(char)
    return found


def _alternatives(pattern: str) -> list[str]:
    cuts = [at for at, char, inside, depth in _tokens(pattern)
            if char == "|" and not inside and not depth]  # fmt: skip
    return [pattern[a:b] for a, b in zip([0, *(c + 1 for c in cuts)], [*cuts, len(pattern)],
                                         strict=True)]  # fmt: skip


def _ends_in_anchor(part: str) -> bool:
    tokens = _tokens(part)
    return bool(tokens) and tokens[-1][1] == "$" and not tokens[-1][2]


def _anchors(part: str) -> bool:
    return any(char in ("^", "$", r"\b", r"\B") and not inside
               for _, char, inside, _ in _tokens(part))  # fmt: skip


def looks_like_other(kind: ValueType, containers: bool) -> str:
    """The texts that ValueWriter does not read as strings, as a regular expression.

    Also texts whose first line is one of them: the lexer takes the longest token, and would not
    part such a line from what ends the value.  `containers`: lists and objects among them.
    """
    names, found = kind.names, []
    if "null" in names:
        found.append("(?i:null|none)")
    if "boolean" in names:
        found.append("(?i:true|false)")
    if names & {"integer", "number"}:
        found.append(_NUMBER)
    if containers and (not names or names & {"array", "object"}):
        found.append(r"[\[{]" + ANY)
    if not found:
        return ""
    return regex(rf"{_SPACE}({'|'.join(found)})({_SPACE}|[ \t\r]*\n{ANY})")


def one_of(texts: list[str]) -> str:
    """Texts as themselves."""
    return " | ".join(map(literal, texts))
