"""Grammars of llguidance in its form of Lark, put together from rules and terminals."""

import json
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["JSON_OPTIONS", "LarkRules", "Unenforceable", "literal", "regex"]

JSON_OPTIONS: Any = {
    "item_separator": ",",
    "key_separator": ":",
    # Bounded, as small models may otherwise generate spaces without end.
    "whitespace_pattern": r"(\x20|\r?\n[\x20\t]{0,32})?",
    "coerce_one_of": False,
    "lenient": False,
}
"""Options of a JSON Schema's grammar."""

Check = Callable[[str], str]
"""From a grammar to the reason why it cannot be used; empty if it can."""


class Unenforceable(Exception):
    """A schema that no grammar enforces; its text is the reason."""


class LarkRules:
    """The rules and terminals of one grammar; equal ones are written once."""

    def __init__(self, tag_ids: Mapping[str, int | None], check: Check | None = None) -> None:
        """`tag_ids` are tokens of tags; None for a tag that is ordinary text.

        With `check`, each JSON Schema and each terminal is checked by itself.
        """
        self._tag_ids, self._check = tag_ids, check
        self._names: dict[str, str] = {}

    def tag(self, text: str) -> str:
        """A tag: its token, or its text."""
        token = self._tag_ids.get(text)
        return literal(text) if token is None else f"<[{token}]>"

    def rule(self, body: str) -> str:
        """The name of a rule."""
        return self._named("r", body)

    def terminal(self, body: str) -> str:
        """The name of a terminal.  Raises: Unenforceable."""
        return self._named("T", body, checked=True)

    def json(self, schema: Mapping[str, Any]) -> str:
        """The name of a rule of the JSON values that a schema allows.  Raises: Unenforceable."""
        return self._named("r", _json_body(schema), checked=True)

    def check(self, schema: Mapping[str, Any]) -> None:
        """Raises: Unenforceable for a schema that `json` refuses."""
        if self._check is not None:
            LarkRules({}, self._check).json(schema)

    def source(self, start: str) -> str:
        """The whole grammar, of texts that `start` describes."""
        rules = "\n".join(f"{name}: {body}" for body, name in self._names.items())
        return f"start: {start}\n{rules}\n"

    def _only(self, name: str) -> str:
        """The grammar of one rule or terminal, without other JSON Schemas."""
        own = [f"{one}: {body}" for body, one in self._names.items()
               if one == name or one.startswith("T")]  # fmt: skip
        return f"start: {name}\n" + "\n".join(own) + "\n"

    def _named(self, prefix: str, body: str, checked: bool = False) -> str:
        name = self._names.get(body)
        if name is None:
            name = f"{prefix}{len(self._names)}"
            self._names[body] = name
            reason = self._check(self._only(name)) if checked and self._check else ""
            if reason:
                del self._names[body]
                raise Unenforceable(reason)
        return name


def _json_body(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": JSON_OPTIONS})


def literal(text: str) -> str:
    """A text as itself."""
    return json.dumps(text)


def regex(expression: str) -> str:
    """A regular expression between slashes."""
    out, at = [], 0
    while at < len(expression):
        char = expression[at : at + 2] if expression[at] == "\\" else expression[at]
        at += len(char)
        out.append(_ESCAPED.get(char, char))
    return "/" + "".join(out) + "/"


_ESCAPED = {"/": r"\/", "\n": r"\n", "\r": r"\r", "\\\n": r"\n", "\\\r": r"\r"}
