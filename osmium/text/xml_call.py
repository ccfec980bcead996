"""One call in Qwen's XML: its parameters become JSON as they arrive.

A value may contain any of the tags, so a tag ends it only if the tags that follow fit.
"""

import json
from collections.abc import Callable

from osmium.text.json_repair import JsonRepair
from osmium.text.tags import skip_space, tag_at
from osmium.text.tool_formats import CallArguments, CallEnd, CallEvent, CallStart, Place
from osmium.text.tool_schema import Tool
from osmium.text.value_writer import ValueWriter
from osmium.text.xml_tags import (
    CALL,
    CALL_END,
    CLOSERS,
    FUNCTION_END,
    OPENERS,
    PARAMETER,
    PARAMETER_END,
    THINK_END,
    body_start,
    closer_end,
    function_header,
    opens_call,
    parameter_header,
    skip_openers,
)

__all__ = ["XmlCall"]

MAX_INNER = 4
"""Calls inside the value of another."""


class XmlCall:
    """One call, from the end of <function=NAME>."""

    def __init__(self, tool: Tool, place: Place, nesting: int = 0) -> None:
        self.done = self.aborted = False
        self.tool = tool
        self._place = place
        self._nesting = nesting
        self._step: Callable[[str, int, bool], int | None] = self._start
        self._events: list[CallEvent] = []
        self._given: set[str] = set()
        self._written = False
        """Whether the arguments have a key."""
        self._json: JsonRepair | None = None
        """Reads arguments that are a JSON object instead of parameters."""
        # Of the value that is being read:
        self._writer: ValueWriter | None = None
        """None for a value without a name, or a second one of the same name: it is left out."""
        self._prefix = ""
        """The key, until the value's first character is written."""
        self._line_start = True
        self._bare = False
        """Whether no newline follows the opening tag; then the closing tag needs none before it."""
        self._newline = "\n"
        """The newline that is left out before the closing tag, as the opening tag's."""
        self._strays = 0
        """Tags <parameter=...> inside the value that have not been closed."""
        self._inner: XmlCall | None = None
        """A call inside the value, until it is certain whether it is part of it."""
        self._inner_known = True
        self._inner_text: list[str] = []
        self._inner_events: list[CallEvent] = []

    def parse(self, text: str, at: int, final: bool) -> tuple[list[CallEvent], int]:
        """See CallParser."""
        while not (self.done or self.aborted):
            after = self._step(text, at, final)
            if after is None:
                break
            at = after
        if final and not (self.done or self.aborted):
            at = self._cut_off(text, at)
        events, self._events = self._events, []
        return events, at

    def _cut_off(self, text: str, at: int) -> int:
        """The response has ended inside the call."""
        if self._step == self._value:
            self._push(text[at:].removesuffix(self._newline))
        self._finish(complete=self._step == self._end)
        return len(text)

    # -- around the parameters ---------------------------------------------------------------------

    def _start(self, text: str, at: int, final: bool) -> int | None:
        self._events.append(CallStart(self.tool.name))
        at = skip_space(text, at)
        self._step = self._body
        if text.startswith("{", at):
            self._json, self._step = JsonRepair((CALL_END, FUNCTION_END)), self._object
        return at

    def _object(self, text: str, at: int, final: bool) -> int | None:
        assert self._json is not None, "the step of a JSON object"
        out, after = self._json.parse(text, at, final)
        self._emit(out)
        if self._json.done:
            self._step = self._body
            return after
        return after if after > at else None

    def _body(self, text: str, at: int, final: bool) -> int | None:
        """Between parameters."""
        after = skip_space(text, at)
        if after > at:
            return after
        tags = (PARAMETER, PARAMETER_END, FUNCTION_END, CALL_END, THINK_END, *OPENERS)
        tag = tag_at(text, at, tags, final)
        if tag is None or at == len(text):
            return None
        if tag == PARAMETER:
            return self._open_value(text, at, final)
        if tag == FUNCTION_END:
            self._step = self._end
            return at + len(tag)
        if tag == CALL_END or tag in OPENERS or (tag == THINK_END and self._place.in_reasoning):
            self._finish(complete=True)
            return at + len(tag) if tag == CALL_END else at
        # A repeated </parameter>, or text, which is left out.
        found = text.find("<", at + 1)
        return found if found >= 0 else len(text)

    def _end(self, text: str, at: int, final: bool) -> int | None:
        """After </function>: </tool_call> belongs to the call, as does a second </function>."""
        after = skip_space(text, at)
        tag = tag_at(text, after, (CALL_END, FUNCTION_END), final)
        if tag == FUNCTION_END:
            return after + len(tag)
        if tag is not None:
            self._finish(complete=True)
        return None if tag is None else after + len(tag) if tag else at

    def _finish(self, complete: bool) -> None:
        """End the arguments."""
        if self._step == self._start:
            self._events.append(CallStart(self.tool.name))
        if self._step == self._inner_call:
            self._push("".join(self._inner_text))
        if self._step in (self._value, self._inner_call, self._first):
            self._close_value(complete)
        if self._json is not None:
            self._emit(self._json.close())
        else:
            self._emit("}" if self._written else "{}")
        self._events.append(CallEnd(complete))
        self.done = True

    def _emit(self, text: str) -> None:
        if text:
            self._events.append(CallArguments(text))

    # -- values ------------------------------------------------------------------------------------

    def _open_value(self, text: str, at: int, final: bool) -> int | None:
        header = parameter_header(text, at, final, self.tool)
        if header is None:
            return None
        key, after = header
        self._writer, self._prefix = None, ""
        if key and key not in self._given and self._json is None:
            self._given.add(key)
            self._writer = ValueWriter(self.tool.value_type(key))
            name = json.dumps(key, ensure_ascii=False)
            self._prefix = f"{', ' if self._written else '{'}{name}: "
        self._strays, self._line_start, self._bare = 0, True, False
        self._step = self._first
        return after

    def _first(self, text: str, at: int, final: bool) -> int | None:
        """The newline after the opening tag."""
        newline = tag_at(text, at, ("\r\n", "\n"), final)
        if newline is None:
            return None
        self._bare, self._newline = not newline, newline or "\n"
        self._step = self._value
        return at + len(newline)

    def _value(self, text: str, at: int, final: bool) -> int | None:
        found = text.find("<", at)
        end = found if found >= 0 else len(text)
        start = end  # of what is kept: the last newline may be the closing tag's
        if text.endswith(self._newline, at, end):
            start -= len(self._newline)
        elif found < 0 and text.endswith(self._newline[0], at, end):
            start -= 1
        self._push(text[at:start])
        if found < 0:
            return start if start > at else None
        line_start = self._line_start or start < end
        if final and _is_cut(text[found:], line_start):
            self._finish(complete=False)
            return len(text)
        closes = self._closes(text, found, final, line_start)
        if self.aborted:
            return found
        if closes is None:
            return start if start > at else None
        if closes < 0:
            inner = self._inner_opening(text, found, final) if line_start else False
            if inner is None:
                return start if start > at else None
            if inner:
                self._inner_text = [text[start:inner]]
                return inner
            self._push(text[start : found + 1])
            return found + 1
        self._close_value(complete=True)
        self._step = self._body
        return closes

    def _push(self, text: str) -> None:
        """Add to the value."""
        if text:
            _, newline, line = text.rpartition("\n")
            self._line_start = bool(newline or self._line_start) and not line.strip()
            self._write(self._writer.push(text) if self._writer else "")

    def _close_value(self, complete: bool) -> None:
        self._write(self._writer.close(complete) if self._writer else "")

    def _write(self, fragment: str) -> None:
        if fragment:
            self._emit(self._prefix + fragment)
            self._written, self._prefix = True, ""

    def _closes(self, text: str, at: int, final: bool, line_start: bool) -> int | None:
        """Where the text goes on if the tag at `at` ends the value; -1 if not, None if unknown.

        A tag on a line of its own counts as written by the rules, which others than the last have
        to be followed by.
        """
        tags = (PARAMETER, PARAMETER_END, FUNCTION_END, CALL_END, THINK_END, *OPENERS)
        tag = tag_at(text, at, tags, final)
        strong = line_start or self._bare
        if tag is None:
            return None
        if tag == PARAMETER_END:
            return self._parameter_end(text, at, final, strong)
        if tag == THINK_END:
            self.aborted = self._place.in_reasoning and line_start
            return -1
        if tag == PARAMETER:
            return self._next_parameter(text, at, final, strong)
        if tag in OPENERS:
            plain = self._writer is not None and not self._writer.kind.takes_strings
            return at if plain and strong else -1
        if tag:
            last, after = self._follower(text, at + len(tag), final)
            if tag == FUNCTION_END and last == CALL_END:
                if self._bare or (line_start and "\n" in text[at:after]):
                    return at  # both on lines of their own
                last, _ = self._follower(text, after + len(CALL_END), final)
            if last is None:
                return None
            if last == "end" or (last in OPENERS and strong):
                return at
        return -1

    def _parameter_end(self, text: str, at: int, final: bool, strong: bool) -> int | None:
        """_closes, at </parameter>."""
        end = closer_end(text, at, final)
        if end is None:
            return None
        if end < 0:
            return -1
        follower, after = self._follower(text, end, final)
        if follower is None:
            return None
        if follower == "end":
            return end
        if (
            self._writer is not None
            and self._writer.in_string
            and not (strong or "\n" in text[end:after])
        ):
            return -1  # JSON's strings have no line ends, so it mentions the tags
        known: bool | None = False
        if follower == PARAMETER:
            known = self._is_known(text, after, final)
            if known is None:
                return None
        if self._strays and strong and follower in ("", PARAMETER, PARAMETER_END) and not known:
            self._strays -= 1
            return -1
        if follower in ("", PARAMETER_END):
            return -1
        if not self._bare and "\n" not in text[end:after]:
            strong = False  # not on a line of its own
        if strong or known or follower == CALL:
            return end
        if follower == FUNCTION_END or follower == CALL_END:
            last, _ = self._follower(text, after + len(follower), final)
            if last is None:
                return None
            return end if last in ("end", CALL_END, *OPENERS) else -1
        return -1

    def _next_parameter(self, text: str, at: int, final: bool, strong: bool) -> int | None:
        """_closes, at <parameter without </parameter> before it."""
        known = self._is_known(text, at, final)
        if known is None:
            return None
        plain = self._writer is not None and not self._writer.kind.takes_strings
        if strong and (known or plain):
            return at
        self._strays += strong and not self._bare
        return -1

    def _is_known(self, text: str, at: int, final: bool) -> bool | None:
        """Whether <parameter=KEY> names a parameter that is due: the tool has it, or any."""
        header = parameter_header(text, at, final, self.tool)
        if header is None:
            return None
        key = header[0]
        return (
            bool(key) and key not in self._given and (not self.tool.types or key in self.tool.types)
        )

    def _follower(self, text: str, at: int, final: bool) -> tuple[str | None, int]:
        """The tag after white space, "end" if there is no more text, "" for other text; its place.

        None if a longer text decides.
        """
        after = skip_space(text, at)
        if after == len(text):
            return ("end" if final else None), after
        tags: tuple[str, ...] = (PARAMETER, PARAMETER_END, FUNCTION_END, CALL_END, *OPENERS)
        if self._place.in_reasoning:
            tags += (THINK_END,)
        tag = tag_at(text, after, tags, final)
        if final and not tag and any(one.startswith(text[after:]) for one in tags):
            tag = "end"  # the beginning of a tag
        if tag in OPENERS:
            opens = opens_call(text, after, final)
            tag = None if opens is None else tag if opens else ""
        return ("end" if tag == THINK_END else tag), after

    # -- calls inside of values --------------------------------------------------------------------

    def _inner_opening(self, text: str, at: int, final: bool) -> int | None:
        """Start to read a call inside the value; returns its place, 0 for none, None if unknown."""
        if self._nesting == MAX_INNER:
            return 0
        start, _ = skip_openers(text, at, final)
        header = function_header(text, start, final) if start is not None else True
        if not isinstance(header, tuple):
            return None if header else 0
        name, end = header
        follows = body_start(text, end, final)
        if not follows:
            return None if follows is None else 0
        tool = self._place.tools.get(name)
        self._inner_known = self._inner_known and tool is not None
        self._inner = XmlCall(tool or Tool(name), self._place, self._nesting + 1)
        self._step = self._inner_call
        return end

    def _inner_call(self, text: str, at: int, final: bool) -> int | None:
        """A call inside the value: the next one if the response ends after it, else a text.

        A model that begins anew forgets the tags of the call before; a file that has a call as an
        example goes on after it.
        """
        assert self._inner is not None, "the step of an inner call"
        events, after = self._inner.parse(text, at, final)
        if self._inner.aborted:
            self.aborted = True
        self._inner_text.append(text[at:after])
        self._inner_events += events
        if not self._inner.done:
            return after if after > at else None
        follower, place = self._follower(text, after, final)
        if follower is None:
            return after if after > at else None
        if follower in OPENERS:
            found = self._inner_opening(text, place, final)
            if found is None:
                return after if after > at else None
            if found:
                self._inner_text.append(text[after:found])
                return found
        ended = self._inner_events[-1]
        real = isinstance(ended, CallEnd) and ended.complete and self._inner_known
        calls, inner_text = self._inner_events, "".join(self._inner_text)
        self._inner, self._inner_known = None, True
        self._inner_text, self._inner_events = [], []
        self._step = self._value
        if real and follower == "end":
            self._finish(complete=True)
            self._events += calls
        else:
            self._push(inner_text)
        return after


def _is_cut(text: str, line_start: bool) -> bool:
    """Whether the end of a response is the beginning of a closing tag."""
    return len(text) > (not line_start) and any(tag.startswith(text) for tag in CLOSERS)
