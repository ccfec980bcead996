"""Streams a response to stdout: plain text in a pipe, dim reasoning and Markdown on a terminal.

Markdown is drawn block by block.  A finished block is printed once.  Only the last lines of the
unfinished block are redrawn, at most a screen of them.
"""

import contextlib
import sys
import time
from typing import Protocol, TextIO

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

__all__ = ["Display", "MarkdownStream", "PlainDisplay", "TerminalDisplay", "display_for"]

REFRESH_S = 0.06
"""Least seconds between two drawings; more if drawing is slow."""

_REPLACE_CONTROL = {
    code: 0xFFFD for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in "\n\t\r"
} | {ord("\r"): None}
"""Replaces control characters, so that a model's text cannot move the cursor or set the title."""


class Display(Protocol):
    """Output of one response."""

    shows_thinking: bool

    def reasoning(self, text: str) -> None:
        """Append to the reasoning."""

    def answer(self, text: str) -> None:
        """Append to the answer."""

    def tick(self) -> None:
        """Called while there is no new text."""

    def end(self) -> None:
        """End the response, complete or not; a second call does nothing."""


def display_for(*, markdown: bool, thinking: bool) -> Display:
    """The display for stdout.  `markdown` and `thinking` apply to a terminal."""
    if sys.stdout is None or not sys.stdout.isatty():
        return PlainDisplay(sys.stdout)
    console = Console(highlight=False)
    if console.is_dumb_terminal:
        return PlainDisplay(sys.stdout, terminal=True)
    unicode = console.encoding.lower().startswith("utf")
    return TerminalDisplay(console, markdown=markdown and unicode, thinking=thinking)


class PlainDisplay:
    """Prints the answer and a newline, without the reasoning."""

    shows_thinking = False

    def __init__(self, stream: TextIO | None, *, terminal: bool = False) -> None:
        self._stream, self._terminal = stream, terminal
        self._ended = False

    def reasoning(self, text: str) -> None:
        pass

    def answer(self, text: str) -> None:
        print(
            text.translate(_REPLACE_CONTROL) if self._terminal else text, end="", file=self._stream
        )
        self._flush()

    def tick(self) -> None:
        pass

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            print(file=self._stream)
            self._flush()

    def _flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()


class TerminalDisplay:
    """Prints the reasoning dim, then the answer."""

    def __init__(self, console: Console, *, markdown: bool, thinking: bool) -> None:
        self._console, self.shows_thinking = console, thinking
        self._markdown = MarkdownStream(console) if markdown else None
        self._has_reasoning = self._has_answer = self._ended = False

    def reasoning(self, text: str) -> None:
        if self.shows_thinking and text:
            self._has_reasoning = True
            self._print(text, "dim")

    def answer(self, text: str) -> None:
        if not text:
            return
        if self._has_reasoning and not self._has_answer:
            self._print("\n\n", "")
        self._has_answer = True
        text = text.translate(_REPLACE_CONTROL)
        if self._markdown is not None:
            self._markdown.push(text)
        else:
            self._print(text, "")

    def tick(self) -> None:
        if self._markdown is not None:
            self._markdown.refresh()

    def end(self) -> None:
        if self._ended:
            return
        self._ended = True
        if self._markdown is not None and self._has_answer:
            self._markdown.end()
        else:
            self._console.print()

    def _print(self, text: str, style: str) -> None:
        piece = Text(text.translate(_REPLACE_CONTROL), style=style, end="")
        self._console.print(piece, end="", soft_wrap=True)
        self._console.file.flush()


class MarkdownStream:
    """Renders Markdown while it streams."""

    def __init__(self, console: Console) -> None:
        self._console = console
        # As HTML, rich would leave out the tags: those of vector<int>, or of a tool call.
        options = {"html": False}
        self._parser = MarkdownIt("commonmark", options).enable("strikethrough").enable("table")
        self._text = ""
        """The unfinished block, and the text after it."""
        self._printed = 0
        """Lines of the unfinished block that are printed and not redrawn."""
        self._has_blocks = False
        """Whether a block is finished, so that a blank line precedes the next one."""
        self._live: Live | None = None
        self._drawn_at = 0.0
        self._cost = 0.0
        """Seconds that the last drawing took."""
        self._pending = False

    def push(self, text: str) -> None:
        """Append text; draw it if the last drawing is long enough ago."""
        self._text += text
        self._pending = True
        self.refresh()

    def refresh(self) -> None:
        """Draw the text since the last drawing."""
        start = time.monotonic()
        if not self._pending or start - self._drawn_at < max(REFRESH_S, 4 * self._cost):
            return
        self._pending = False
        self._finish_blocks()
        lines = self._lines(self._text)
        max_lines = max(1, self._console.height - 2)
        if len(lines) - self._printed > max_lines:
            self._print(lines[self._printed : len(lines) - max_lines])
            self._printed = len(lines) - max_lines
        self._draw(lines[self._printed :])
        self._drawn_at = time.monotonic()
        self._cost = self._drawn_at - start

    def end(self) -> None:
        """Print the rest."""
        self._stop()
        self._finish_blocks()
        self._print(self._lines(self._text)[self._printed :])
        self._text = ""

    def _finish_blocks(self) -> None:
        """Print every block but the last, as no later text changes them."""
        starts = [
            token.map[0]
            for token in self._parser.parse(self._text)
            if token.level == 0 and token.map is not None and token.nesting >= 0
        ]
        if len(starts) < 2:
            return
        lines = self._text.splitlines(keepends=True)
        finished, self._text = "".join(lines[: starts[-1]]), "".join(lines[starts[-1] :])
        self._draw([])
        self._print(self._lines(finished)[self._printed :])
        self._printed, self._has_blocks = 0, True

    def _lines(self, text: str) -> list[list[Segment]]:
        """The rendered lines, after a blank line if a block is finished."""
        markdown = Markdown("")
        markdown.markup, markdown.parsed = text, self._parser.parse(text)
        lines = self._console.render_lines(markdown, pad=False, new_lines=False)
        while lines and not _is_visible(lines[-1]):
            lines.pop()
        while lines and not _is_visible(lines[0]):
            lines.pop(0)
        return [[Segment("")], *lines] if lines and self._has_blocks else lines

    def _print(self, lines: list[list[Segment]]) -> None:
        if lines:
            self._console.print(_Lines(lines), end="")

    def _draw(self, lines: list[list[Segment]]) -> None:
        if self._live is None:
            if not lines:
                return
            self._live = Live(
                console=self._console, auto_refresh=False, transient=True, redirect_stdout=False,
                redirect_stderr=False,
            )  # fmt: skip
            self._live.start()
        self._live.update(_Lines(lines), refresh=True)

    def _stop(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            with contextlib.suppress(BrokenPipeError):
                live.stop()


def _is_visible(line: list[Segment]) -> bool:
    """Whether a line has text or a background, as the padding of a code block has."""
    return any(part.text.strip() or (part.style and part.style.bgcolor) for part in line)


class _Lines:
    """Rendered lines that rich can print."""

    def __init__(self, lines: list[list[Segment]]) -> None:
        self._rendered = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._rendered:
            yield from line
            yield Segment.line()
