"""A response on stdout as it comes: plain text in a pipe, dim thinking and Markdown on a terminal.

Markdown is drawn block by block.  Finished blocks are printed once and never touched again; only
the last lines of the block that still grows are drawn anew, and never more than fit the screen.
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
"""Seconds between two drawings, at least; more where drawing takes long."""

_VISIBLE = {
    code: 0xFFFD for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in "\n\t\r"
} | {ord("\r"): None}
"""Control characters: a model's text must not move the cursor or set the terminal's title."""


class Display(Protocol):
    """Where a response goes."""

    shows_thinking: bool

    def thought(self, text: str) -> None:
        """More of the thinking."""

    def answer(self, text: str) -> None:
        """More of the answer."""

    def tick(self) -> None:
        """Nothing came for a while."""

    def end(self) -> None:
        """The response is over, or given up; more than once is harmless."""


def display_for(*, markdown: bool, thinking: bool) -> Display:
    """The display that suits stdout.  `markdown` and `thinking` say what to do on a terminal."""
    if sys.stdout is None or not sys.stdout.isatty():
        return PlainDisplay(sys.stdout)
    console = Console(highlight=False)
    if console.is_dumb_terminal:
        return PlainDisplay(sys.stdout, terminal=True)
    unicode = console.encoding.lower().startswith("utf")
    return TerminalDisplay(console, markdown=markdown and unicode, thinking=thinking)


class PlainDisplay:
    """The answer and a newline, nothing else; thinking is left out."""

    shows_thinking = False

    def __init__(self, stream: TextIO | None, *, terminal: bool = False) -> None:
        self._stream, self._terminal = stream, terminal
        self._ended = False

    def thought(self, text: str) -> None:
        pass

    def answer(self, text: str) -> None:
        print(text.translate(_VISIBLE) if self._terminal else text, end="", file=self._stream)
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
    """Thinking dim, then the answer."""

    def __init__(self, console: Console, *, markdown: bool, thinking: bool) -> None:
        self._console, self.shows_thinking = console, thinking
        self._markdown = MarkdownStream(console) if markdown else None
        self._thought = self._answered = self._ended = False

    def thought(self, text: str) -> None:
        if self.shows_thinking and text:
            self._thought = True
            self._print(text, "dim")

    def answer(self, text: str) -> None:
        if not text:
            return
        if self._thought and not self._answered:
            self._print("\n\n", "")
        self._answered = True
        text = text.translate(_VISIBLE)
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
        if self._markdown is not None and self._answered:
            self._markdown.end()
        else:
            self._console.print()

    def _print(self, text: str, style: str) -> None:
        piece = Text(text.translate(_VISIBLE), style=style, end="")
        self._console.print(piece, end="", soft_wrap=True)
        self._console.file.flush()


class MarkdownStream:
    """Markdown that grows."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._parser = MarkdownIt().enable("strikethrough").enable("table")
        self._text = ""
        """Blocks that are not finished: the last one, and what follows it."""
        self._printed = 0
        """Lines of the last block that are printed for good."""
        self._any = False
        """Whether a block was finished, so that a blank line comes next."""
        self._live: Live | None = None
        self._drawn_at = 0.0
        self._cost = 0.0
        """Seconds that the last drawing took."""
        self._pending = False

    def push(self, text: str) -> None:
        """More text; drawn if the last drawing is long enough ago."""
        self._text += text
        self._pending = True
        self.refresh()

    def refresh(self) -> None:
        """Draw what came since the last drawing."""
        start = time.monotonic()
        if not self._pending or start - self._drawn_at < max(REFRESH_S, 4 * self._cost):
            return
        self._pending = False
        self._finish_blocks()
        lines = self._lines(self._text)
        most = max(1, self._console.height - 2)
        if len(lines) - self._printed > most:
            self._print(lines[self._printed : len(lines) - most])
            self._printed = len(lines) - most
        self._draw(lines[self._printed :])
        self._drawn_at = time.monotonic()
        self._cost = self._drawn_at - start

    def end(self) -> None:
        """Print what is left."""
        self._stop()
        self._finish_blocks()
        self._print(self._lines(self._text)[self._printed :])
        self._text = ""

    def _finish_blocks(self) -> None:
        """Print every block but the last: no later text changes them."""
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
        self._printed, self._any = 0, True

    def _lines(self, text: str) -> list[list[Segment]]:
        """The screen's lines, with a blank one before them where a block was finished before."""
        found = self._console.render_lines(Markdown(text), pad=False, new_lines=False)
        while found and not _is_text(found[-1]):
            found.pop()
        while found and not _is_text(found[0]):
            found.pop(0)
        return [[Segment("")], *found] if found and self._any else found

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


def _is_text(line: list[Segment]) -> bool:
    """Whether a line shows anything: the padding of a code block has a background."""
    return any(one.text.strip() or (one.style and one.style.bgcolor) for one in line)


class _Lines:
    """Rendered lines as something to print."""

    def __init__(self, lines: list[list[Segment]]) -> None:
        self._rendered = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._rendered:
            yield from line
            yield Segment.line()
