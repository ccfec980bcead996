"""Calls as Hermes and Qwen3 write them: JSON between tags.

<tool_call>
{"name": NAME, "arguments": {KEY: VALUE}}
</tool_call>
"""

import json
from collections.abc import Callable
from typing import Any

from osmium.text.call_schema import CallableTool, Parameter
from osmium.text.json_repair import JsonRepair
from osmium.text.lark import LarkRules, literal, regex
from osmium.text.tags import skip_space, tag_at
from osmium.text.tool_formats import (
    CallArguments,
    CallEnd,
    CallEvent,
    CallStart,
    NotACall,
    Opening,
    Place,
)

__all__ = ["FORMAT", "Hermes", "HermesCalls", "json_opening"]

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_THINK_END = "</think>"
_FENCES = ("```json", "```")
_ARGUMENTS = ("arguments", "parameters")


class Hermes:
    """The format."""

    name = "hermes"
    first = "<"
    tags = (_CALL, _CALL_END)
    value_ends: tuple[str, ...] = ()

    def matches(self, template: str) -> bool:
        # Templates have the quotes escaped or not.
        plain = template.replace("\\", "")
        return _CALL in plain and '"arguments"' in plain and "<function=" not in plain

    def opening(self, text: str, at: int, final: bool, place: Place) -> Opening | bool:
        """<tool_call> and a JSON object, or a list of them."""
        tag = tag_at(text, at, (_CALL,), final)
        while tag:
            at = skip_space(text, at + len(tag))
            if at == len(text) and not final:
                return True
            tag = tag_at(text, at, (_CALL,), final)  # a repeated one
            if tag == "":
                return json_opening(text, at, final, place)
        return tag is None

    def call_rule(self, tool: CallableTool, rules: LarkRules) -> str:
        """See ToolFormat."""
        begin = f'\n{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "arguments": '
        body = [rules.tag(_CALL), literal(begin)]
        if tool.is_free:
            return " ".join([*body, rules.terminal(regex("(?s:.*)")), rules.tag(_CALL_END)])
        return " ".join([*body, _arguments(tool, rules), literal("}\n"), rules.tag(_CALL_END)])


FORMAT = Hermes()


def _arguments(tool: CallableTool, rules: LarkRules) -> str:
    """The rule of a tool's arguments, an object.  Raises: RequestError."""
    definitions: dict[str, Any] = {}

    def schema(one: Parameter) -> dict[str, Any]:
        rules.check(one.schema)
        definitions.update(one.schema.get("$defs", {}))
        return {key: value for key, value in one.schema.items() if key != "$defs"}

    found = dict(tool.each(schema))
    return rules.json({
        "type": "object",
        "properties": {one.name: found[one] for one in tool.parameters},
        "required": [one.name for one in tool.parameters if one.required],
        "additionalProperties": found[tool.additional] if tool.additional else False,
        "$defs": definitions,
    })  # fmt: skip


def json_opening(text: str, at: int, final: bool, place: Place) -> Opening | bool:
    """The opening behind <tool_call> and white space, at a JSON object; see ToolFormat.opening."""
    fence = tag_at(text, at, _FENCES, final)
    if fence is None:
        return True
    if fence:
        if text.startswith(_FENCES[0][: len(text) - at], at) and len(text) - at < len(_FENCES[0]):
            return not final
        at = skip_space(text, at + len(fence))
    start = at
    while text.startswith(("[", "{"), at) and at - start < 4:
        bracket = text[at]
        at = skip_space(text, at + 1)
        if bracket == "{" and text.startswith(('"', "'"), at):
            return Opening(start, HermesCalls(place))
    return at == len(text) and not final


class HermesCalls:
    """The calls of one block, from the "{" or "[" behind <tool_call>."""

    def __init__(self, place: Place) -> None:
        self.done = self.aborted = False
        self._stops = (_CALL_END, _THINK_END) if place.in_reasoning else (_CALL_END,)
        self._events: list[CallEvent] = []
        self._text: list[str] | None = []
        """The block's text, until it has a name of a tool."""
        self._begin()

    def _begin(self) -> None:
        """Expect an object."""
        self._step: Callable[[str, int, bool], int | None] = self._between
        self._name = ""
        self._key = ""
        self._value = JsonRepair(self._stops)
        self._pieces: list[str] = []
        """JSON of a key, or of a value that cannot be returned as it arrives."""
        self._kept: str | None = None
        """Arguments that came before the name, or that are no object."""
        self._streamed = False
        """Whether arguments have been returned."""

    def parse(self, text: str, at: int, final: bool) -> tuple[list[CallEvent], int]:
        """See CallParser."""
        start = at
        while not (self.done or self.aborted):
            after = self._step(text, at, final)
            if after is None:
                break
            at = after
        if final and not (self.done or self.aborted):
            if self._step != self._between:
                self._end_call(complete=False)
            self.done = True
            at = len(text)
        if self._text is not None:
            self._text.append(text[start:at])
            if self.done:
                self._events = [NotACall("".join(self._text))]
        events, self._events = self._events, []
        return events, at

    def _between(self, text: str, at: int, final: bool) -> int | None:
        """Before an object, or after one: another one, or the end of the block."""
        after = skip_space(text, at)
        if after == len(text):
            return None
        char = text[after]
        if char == "{":
            self._begin()
            self._step = self._open_key
            return after + 1
        if char in "[],}`":  # of a list of calls, a second bracket, a fence
            return after + 1
        tag = tag_at(text, after, (_CALL_END,), final)
        if tag is None:
            return None
        self.done = True
        return after + len(tag) if tag else at

    # -- inside an object --------------------------------------------------------------------------

    def _open_key(self, text: str, at: int, final: bool) -> int | None:
        """Before a key, or the object's end."""
        after = skip_space(text, at)
        if after == len(text):
            return None
        char = text[after]
        if char == "}":
            self._end_call(complete=True)
            return after + 1
        if char in "\"'":
            self._value, self._step = JsonRepair(self._stops), self._read_key
            return after
        return self._tag(text, after, final) if char == "<" else after + 1

    def _tag(self, text: str, at: int, final: bool) -> int | None:
        """At a "<" outside of strings, which may be the block's end before the object's."""
        tag = tag_at(text, at, self._stops, final)
        if tag is None:
            return None
        if tag == _THINK_END:
            self.aborted = True
        elif tag:
            self._end_call(complete=True)
        return at if tag else at + 1

    def _read_key(self, text: str, at: int, final: bool) -> int | None:
        out, after = self._value.parse(text, at, final)
        self._pieces.append(out)
        if not self._value.done:
            return after if after > at else None
        self._key, self._pieces = str(json.loads("".join(self._pieces))), []
        self._step = self._colon
        return after

    def _colon(self, text: str, at: int, final: bool) -> int | None:
        after = skip_space(text, at)
        if after == len(text):
            return None
        char = text[after]
        if char == ":":
            return after + 1
        if char == "<":
            return self._tag(text, after, final)
        if self._key == "function" and char == "{":  # the call is one level deeper
            self._step = self._open_key
            return after + 1
        self._value, self._step = JsonRepair(self._stops), self._read_value
        if self._key in _ARGUMENTS and self._name and char == "{" and not self._has_arguments:
            self._step, self._streamed = self._read_arguments, True
        return after

    @property
    def _has_arguments(self) -> bool:
        return self._streamed or self._kept is not None

    def _read_arguments(self, text: str, at: int, final: bool) -> int | None:
        out, after = self._value.parse(text, at, final)
        self._emit(out)
        if self._value.done:
            self._step = self._open_key
            return after
        return after if after > at else None

    def _read_value(self, text: str, at: int, final: bool) -> int | None:
        out, after = self._value.parse(text, at, final)
        self._pieces.append(out)
        if not self._value.done:
            return after if after > at else None
        self._end_value()
        self._step = self._open_key
        return after

    def _end_value(self) -> None:
        found, self._pieces = "".join(self._pieces) + self._value.close(), []
        if self._key in _ARGUMENTS and not self._has_arguments:
            self._kept = found
        elif self._key == "name" and not self._name:
            name = _loads(found)
            if isinstance(name, str) and name.strip():
                self._name, self._text = name.strip(), None
                self._events.append(CallStart(self._name))

    def _end_call(self, complete: bool) -> None:
        if self._step == self._read_arguments:
            self._emit(self._value.close())
        elif self._step == self._read_value and self._key in _ARGUMENTS:
            self._end_value()
        if self._name:
            if not self._streamed:
                self._emit(_object(self._kept))
            self._events.append(CallEnd(complete))
        self._step = self._between

    def _emit(self, text: str) -> None:
        if text:
            self._events.append(CallArguments(text))


def _object(arguments: str | None) -> str:
    """Arguments as a JSON object: one inside a string is taken out, others get a key."""
    value = _loads(arguments) if arguments else None
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("{"):
            repair = JsonRepair()
            out, _ = repair.parse(text, 0, True)
            return out + repair.close()
        value = text or None
    if isinstance(value, dict):
        return arguments or "{}"
    return json.dumps({"arguments": value}, ensure_ascii=False) if value not in (None, []) else "{}"


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
