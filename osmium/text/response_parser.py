"""A response split while it streams: reasoning, answer, and calls of tools.

The parser starts in the state in which the prompt ends.  It works on text, so borders of tokens do
not matter: any split of a response gives the same result.  docs/tool-calls.md has the rules.
"""

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from osmium.text.code_spans import CodeSpans
from osmium.text.tags import tag_at
from osmium.text.tool_formats import (
    CallArguments,
    CallEnd,
    CallEvent,
    CallParser,
    CallStart,
    NotACall,
    Place,
    ToolFormat,
)
from osmium.text.tool_schema import offered_tools

__all__ = [
    "ContentDelta",
    "Delta",
    "ReasoningDelta",
    "ResponseParser",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
]

_THINK, _THINK_END = "<think>", "</think>"
_STRAY = ("</tool_call>", "</function>")
_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """The next piece of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins."""

    index: int
    """0 for the first call of the response."""
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """The next piece of a call's arguments; all pieces concatenate to a JSON object."""

    index: int
    fragment: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """A call ends."""

    index: int
    complete: bool
    """False if the response ended before the call's closing tags.

    Then values may be cut off or missing, and a client should not run the call if the response
    ended at a limit of tokens."""


Delta = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments | ToolCallEnd


def _new_id() -> str:
    return "call_" + secrets.token_hex(12)


class ResponseParser:
    """Splits the text of one response: `push` each piece of text, then `finish`.

    Both return deltas that no later text can change.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None,
        tools: Sequence[Any] | None,
        starts_in_reasoning: bool,
        *,
        any_tool: bool = False,
        new_id: Callable[[], str] = _new_id,
    ) -> None:
        """`tools` are the request's, as OpenAI or Anthropic write them; without any, or without a
        format, the tags of calls are text.  With `any_tool`, calls count without offered tools.
        `new_id` makes the ids of calls."""
        self._tools = offered_tools(tools)
        self._format = tool_format if self._tools or any_tool else None
        self._new_id = new_id
        first = set("<" + (self._format.first if self._format else ""))
        self._first = re.compile("[" + re.escape("".join(sorted(first))) + "]")
        self._text, self._at = "", 0
        """Text that is not parsed yet: from `_at`."""
        self._out: list[Delta] = []
        self._calls = 0
        self._segment(starts_in_reasoning, trim=starts_in_reasoning)
        self._call: CallParser | None = None
        self._call_text: list[str] = []
        """The text of the current block of calls, while it may turn out to be none."""
        self._call_events: list[CallEvent] = []
        """The events of a block inside the reasoning."""
        self._pending: list[tuple[str, list[CallEvent]]] = []
        """Blocks of calls inside the reasoning, with their text.

        They count unless the answer has calls, too: then the model only considered them."""

    def _segment(self, reasoning: bool, trim: bool, after_call: bool = False) -> None:
        """Start a part of the response: reasoning, or an answer."""
        self.in_reasoning = reasoning
        self._trim = trim
        """Whether the part's leading newlines are the template's."""
        self._after_call = after_call
        self._gap = ""
        """White space for text behind a call, if text was before it."""
        self._empty = True
        """Whether the part has only white space so far."""
        self._space: list[str] = []
        """White space at the end, which is left out before a tag."""
        self._code = CodeSpans()

    @property
    def num_calls(self) -> int:
        """Calls that have started.  With one or more, the finish reason of an ended response is
        "tool_calls"."""
        return self._calls

    @property
    def unparsed(self) -> int:
        """Characters of text that are not parsed yet, since a longer text decides what they are."""
        return len(self._text) - self._at

    def push(self, text: str) -> list[Delta]:
        """Add `text`; returns what is certain."""
        self._text = self._text[self._at :] + text
        self._at = 0
        self._parse(final=False)
        return self._taken()

    def finish(self) -> list[Delta]:
        """The rest, at the end of the response.  Arguments that are cut off become valid JSON."""
        self._text, self._at = self._text[self._at :], 0
        self._parse(final=True)
        space = "".join(self._space)
        if self._empty:
            space = space.lstrip("\n") if self._trim else space
        if space and not (self._empty and self._after_call):
            self._emit(space)
        for _, events in self._pending:
            self._deliver(events)
        self._pending = []
        return self._taken()

    def _taken(self) -> list[Delta]:
        """The deltas so far; pieces of one text that follow each other are one delta."""
        out: list[Delta] = []
        for _, group in groupby(self._out, _text_key):
            several = list(group)
            match several[0]:
                case ReasoningDelta():
                    out.append(ReasoningDelta("".join(map(_text_of, several))))
                case ContentDelta():
                    out.append(ContentDelta("".join(map(_text_of, several))))
                case ToolCallArguments(index):
                    out.append(ToolCallArguments(index, "".join(map(_text_of, several))))
                case _:
                    out += several
        self._out = []
        return out

    def _parse(self, final: bool) -> None:
        going = True
        while going:
            going = self._parse_call(final) if self._call else self._parse_text(final)

    # -- text --------------------------------------------------------------------------------------

    def _parse_text(self, final: bool) -> bool:
        """Parse up to a block of calls; whether one was found."""
        text = self._text
        while self._at < len(text):
            found = self._first.search(text, self._at)
            end = found.start() if found else len(text)
            if end > self._at:
                self._add(text[self._at : end])
                self._at = end
            if not found:
                break
            if not (self.in_reasoning or self._format or self._empty):
                self._add(text[end:])  # no tag counts here
                self._at = len(text)
                break
            after = self._tag(text, end, final)
            if after is None:
                return False
            if self._call:
                return True
            if after == end:
                self._add(text[end])
                after += 1
            self._at = after
        return False

    def _tag(self, text: str, at: int, final: bool) -> int | None:
        """Act on a tag; the position after it, `at` if it is text, None if unknown yet."""
        tags: tuple[str, ...] = (_THINK_END,) if self.in_reasoning or self._empty else ()
        if self._empty:
            tags += (_THINK, *(_STRAY if self._after_call else ()))
        tag = tag_at(text, at, tags, final) if tags else ""
        if tag is None:
            return None
        if tag == _THINK_END and self.in_reasoning:
            return self._end_reasoning(text, at, final)
        if tag == _THINK and not self.in_reasoning:
            self._segment(True, trim=True)
        elif tag == _THINK_END:
            self._trim = True
        if tag:  # a repeated tag is left out
            return at + len(tag)
        if self._format is None or self._code.in_code:
            return at
        place = Place(self._code.at_line_start, self.in_reasoning, self._tools)
        opening = self._format.opening(text, at, final, place)
        if isinstance(opening, bool):
            return None if opening else at
        self._call = opening.parser
        self._call_text = [text[at : opening.end]]
        self._at = opening.end
        return opening.end

    def _end_reasoning(self, text: str, at: int, final: bool) -> int | None:
        """At </think>.  One in quotes or backticks is text."""
        after = at + len(_THINK_END)
        before = self._code.last
        if before in ("`", '"', "'"):
            if after == len(text) and not final:
                return None
            if text.startswith(before, after):
                return at
        space = "".join(self._space).rstrip("\n")
        if space and not self._empty:
            self._emit(space)
        self._segment(False, trim=True)
        return after

    def _add(self, text: str) -> None:
        """Text of the current part."""
        self._code.add(text)
        body = text.rstrip(_SPACE) if self._format else text
        if self._format is None and (self.in_reasoning or self._empty):
            body = text.rstrip("\n")
        if not body:
            self._space.append(text)
            return
        space = "".join(self._space)
        whole = space + body
        if self._empty and self._trim:
            whole = self._gap + whole.lstrip("\n")
        self._empty, self._space = False, [text[len(body) :]] if len(body) < len(text) else []
        self._emit(whole)

    def _emit(self, text: str) -> None:
        if text:
            self._out.append(ReasoningDelta(text) if self.in_reasoning else ContentDelta(text))

    # -- calls -------------------------------------------------------------------------------------

    def _parse_call(self, final: bool) -> bool:
        """Parse inside a block of calls; whether it has ended."""
        assert self._call is not None, "called inside a block"
        events, after = self._call.parse(self._text, self._at, final)
        if self.in_reasoning:
            self._call_text.append(self._text[self._at : after])
            self._call_events += events
        else:
            if any(isinstance(event, CallStart) for event in events):
                self._drop_pending()
            self._deliver(events)
        self._at = after
        if not (self._call.done or self._call.aborted):
            return False
        if self.in_reasoning:
            self._end_pending(self._call.aborted)
        else:
            self._call = None
            if not any(isinstance(event, NotACall) for event in events):
                self._after_block()
        return True

    def _end_pending(self, aborted: bool) -> None:
        """Keep a block inside the reasoning, until the response shows what it is."""
        text, events = "".join(self._call_text), self._call_events
        self._call, self._call_text, self._call_events = None, [], []
        names = [event.name for event in events if isinstance(event, CallStart)]
        if aborted or not names or not all(name in self._tools for name in names):
            self._add(text)
            return
        self._pending.append((text, events))
        self._after_block()

    def _after_block(self) -> None:
        """The part of the response goes on behind calls."""
        gap = self._gap if self._empty else "".join(self._space) or "\n"
        self._segment(self.in_reasoning, trim=True, after_call=True)
        self._gap = gap

    def _drop_pending(self) -> None:
        """The answer has calls: those in the reasoning were only considered, and are its text."""
        for text, _ in self._pending:
            self._out.append(ReasoningDelta("\n" + text))
        self._pending = []

    def _deliver(self, events: list[CallEvent]) -> None:
        for event in events:
            index = self._calls - 1
            match event:
                case CallStart(name):
                    self._out.append(ToolCallStart(self._calls, self._new_id(), name))
                    self._calls += 1
                case CallArguments(text):
                    self._out.append(ToolCallArguments(index, text))
                case CallEnd(complete):
                    self._out.append(ToolCallEnd(index, complete))
                case NotACall(text):
                    self._add("".join(self._call_text) + text)


def _text_of(delta: Delta) -> str:
    if isinstance(delta, ReasoningDelta | ContentDelta):
        return delta.text
    return delta.fragment if isinstance(delta, ToolCallArguments) else ""


def _text_key(delta: Delta) -> tuple[type, int]:
    return type(delta), delta.index if isinstance(delta, ToolCallArguments) else 0
