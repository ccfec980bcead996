"""Formats of tool calls, one per file: found by what a model's chat template tells the model.

A file here has FORMAT, a ToolFormat.  A new file is a new format; nothing else names it.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from osmium.text.call_schema import CallableTool
from osmium.text.lark import LarkRules
from osmium.text.tool_schema import Tool

__all__ = [
    "CallArguments",
    "CallEnd",
    "CallEvent",
    "CallParser",
    "CallStart",
    "NotACall",
    "Opening",
    "Place",
    "ToolFormat",
    "find_format",
]


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call's name is complete."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of the arguments' JSON."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The arguments' JSON is complete."""

    complete: bool
    """False if the response ended inside the arguments, which were closed for it."""


@dataclass(frozen=True, slots=True)
class NotACall:
    """What followed the opening is text after all."""

    text: str


CallEvent = CallStart | CallArguments | CallEnd | NotACall


class CallParser(Protocol):
    """Parses what follows an opening: one call, or several."""

    done: bool
    """Whether the block has ended; the rest is text."""
    aborted: bool
    """Whether the block has ended as its reasoning did, at a </think>: it was no call."""

    def parse(self, text: str, at: int, final: bool) -> tuple[list[CallEvent], int]:
        """Parse `text` from `at`: the events, and where the uncertain rest starts.

        The rest is passed again, with more text behind it.  `final` says that no text follows.
        """


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tag stands."""

    line_start: bool
    """Whether only white space is before it in its line."""
    in_reasoning: bool
    tools: Mapping[str, Tool]
    """The tools that the request offers, by name."""


@dataclass(frozen=True, slots=True)
class Opening:
    """The beginning of a block of calls."""

    end: int
    """Where the block's own text starts."""
    parser: CallParser


class ToolFormat(Protocol):
    """A way to write calls."""

    name: str

    def matches(self, template: str) -> bool:
        """Whether a chat template tells the model to write calls in this format."""

    def opening(self, text: str, at: int, final: bool, place: Place) -> Opening | bool:
        """The opening at the "<" or other first character at `at`.

        False: there is none.  True: a longer text decides.
        """

    first: str
    """The first characters of openings."""

    tags: tuple[str, str]
    """What begins and what ends a call."""

    value_ends: tuple[str, ...]
    """Texts that end values which may be any text."""

    def call_rule(self, tool: CallableTool, rules: LarkRules) -> str:
        """The grammar of one call, both tags included; `opening` finds it and reads it back.

        Raises: RequestError for a tool that cannot be called in this format.
        """


@cache
def _formats() -> tuple[ToolFormat, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(module.FORMAT for module in modules)


def find_format(*templates: str | None) -> ToolFormat | None:
    """The format that one of a model's templates uses, or None: its calls stay text."""
    for template in templates:
        for one in _formats():
            if template is not None and one.matches(template):
                return one
    return None
