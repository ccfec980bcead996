"""A parameter's text to JSON, by the type that the tool's schema gives, while the text streams."""

import json
from typing import Any

from osmium.text.json_repair import JsonRepair, is_number, shortened_number
from osmium.text.tool_schema import ValueType

__all__ = ["ValueWriter", "json_value"]

MAX_SCALAR = 300
"""Characters within which a text may turn out to be a number, true, false or null."""

_SCALARS = {"null": ("null", "none"), "boolean": ("true", "false")}
_DIGITS = frozenset("+-0123456789.eE")


class ValueWriter:
    """Writes one value: `push` its text, then `close`.  What they return concatenates to JSON.

    A string is returned as it arrives, as is a list or object where no string is allowed.  Text
    that may be either is kept until that is certain.
    """

    def __init__(self, kind: ValueType) -> None:
        self.kind = kind
        self._state = "open"  # open, whole, string, json
        self._kept: list[str] = []
        self._json = JsonRepair()
        self._rest = ""
        """Text that the JSON parser has not consumed."""

    @property
    def in_string(self) -> bool:
        """Whether a string of a list or object is open for certain."""
        quoted = self._rest.startswith(('"', "'"))
        return self._state == "json" and self._json.in_string and not quoted

    def push(self, text: str) -> str:
        """Add `text`; returns JSON that no later text can change."""
        if self._state == "string":
            return _escaped(text)
        if self._state == "json":
            return self._push_json(text, False)
        self._kept.append(text)
        if self._state == "whole":
            return ""
        text = "".join(self._kept)
        self._state = self._decided(text)
        if self._state in ("open", "whole"):
            self._kept = [text]
            return ""
        self._kept = []
        if self._state == "string":
            return '"' + _escaped(text)
        return self._push_json(text, False)

    def close(self, complete: bool = True) -> str:
        """The rest of the value.  Nothing at all if no text was pushed and it is not complete."""
        if self._state == "string":
            return '"'
        if self._state == "json":
            return self._push_json("", True) + self._json.close()
        text = "".join(self._kept)
        return json_value(text, self.kind) if complete or text.strip() else ""

    def _push_json(self, text: str, final: bool) -> str:
        text = self._rest + text
        out, at = self._json.parse(text, 0, final)
        self._rest = "" if self._json.done else text[at:]
        return out

    def _decided(self, text: str) -> str:
        """The state that a value's beginning leads to."""
        names = self.kind.names
        start = text.lstrip()
        if not start:
            if len(text) <= MAX_SCALAR:
                return "open"
            return "string" if self.kind.takes_strings else "whole"
        if start[0] in ("{", "["):
            if self.kind.takes_strings:
                return "whole" if not names or names & {"object", "array"} else "string"
            return "json" if names & {"object", "array"} else "whole"
        if not self.kind.takes_strings:
            return "whole"
        if not names:
            return "string"
        return "open" if len(text) <= MAX_SCALAR and self._may_be_scalar(start) else "string"

    def _may_be_scalar(self, start: str) -> bool:
        names = self.kind.names
        if names == {"string"}:
            return False
        word = start.strip().lower()
        if any(one.startswith(word) for name in names for one in _SCALARS.get(name, ())):
            return True
        return bool(names & {"integer", "number"}) and _DIGITS.issuperset(word)


def json_value(text: str, kind: ValueType) -> str:
    """The JSON of a parameter's whole text.  Text that has none of the types is a string."""
    names, plain = kind.names, text.strip()
    if text in kind.strings:
        return _string(text)
    if "null" in names and (plain.lower() in _SCALARS["null"] or not (plain or "string" in names)):
        return "null"
    if names & {"integer", "number"}:
        number = _number(plain, "integer" in names, "string" not in names)
        if number is not None:
            return number
    if "boolean" in names and plain.lower() in _SCALARS["boolean"]:
        return plain.lower()
    if not names or names & {"object", "array"}:
        found = _structure(plain, not kind.takes_strings)
        if found is not None:
            return found
    return _string(text)


def _number(text: str, integer: bool, lenient: bool) -> str | None:
    """The number that `text` is, as JSON writes it, or None."""
    if lenient:
        text = text.removeprefix("+")
        if text.startswith("."):
            text = "0" + text
        if text.endswith("."):
            text += "0"
    text = shortened_number(text)
    if not is_number(text):
        return None
    if integer and not text.lstrip("-").isdigit():
        value = float(text)
        if abs(value) < 2**53 and value.is_integer():
            return str(int(value))
    return text


def _structure(text: str, lenient: bool) -> str | None:
    """The list or object that `text` is, as JSON, or None.

    With `lenient`, one that is invalid or inside a JSON string is repaired.
    """
    if lenient and text.startswith('"'):
        inner = _loads(text)
        text = _unicode(inner.strip()) if isinstance(inner, str) else text
    if text[:1] not in ("{", "["):
        return None
    if not lenient and _loads(text) is None:
        return None
    repair = JsonRepair()
    out, _ = repair.parse(text, 0, True)
    return out + repair.close()


def _loads(text: str) -> Any:
    """The value of valid JSON, else None."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _unicode(text: str) -> str:
    """`text` with U+FFFD for each half of a surrogate pair, which is not Unicode."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _refuse(name: str) -> Any:
    raise ValueError(name)  # NaN and Infinity are no JSON


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    return _string(text)[1:-1]
