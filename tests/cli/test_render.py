"""Responses on a terminal: growing Markdown, dim reasoning, no cursor control from the model."""

import io
import re

import pytest
from rich.console import Console

from osmium.cli import render
from osmium.cli.render import MarkdownStream, PlainDisplay, TerminalDisplay

DOCUMENT = (
    "# Title\n\nA paragraph with **bold** and `code` that is long enough to be wrapped over more "
    "than one line.\n\n"
    + "".join(f"{i}. item {i} of *many*\n" for i in range(1, 13))
    + "\n```python\n"
    + "".join(f"def f{i}(x): return x + {i}\n" for i in range(12))
    + "```\n\n| a | b |\n|---|---|\n| 1 | x |\n| 2 | y |\n\n- one\n- two\n  - three\n\n"
    + "> quote\n\nEnd."
)


class Screen:
    """A terminal of a few lines, with its scrolled-off lines and its visible lines.

    Accepts only the escape sequences that rendering uses.
    """

    def __init__(self, columns: int, lines: int) -> None:
        self.columns, self.height = columns, lines
        self.scrolled: list[str] = []
        self.shown: list[list[str]] = [[]]
        self.row = self.column = 0
        self.erased_scrolled = False

    def feed(self, data: str) -> None:
        for sequence, char in re.findall(r"\x1b\[([\d;?]*[A-Za-z])|(.|\n)", data, re.S):
            if sequence:
                self._control(sequence)
            elif char == "\n":
                self._line_feed()
            elif char == "\r":
                self.column = 0
            else:
                assert char.isprintable(), f"{char!r} reached the terminal"
                if self.column == self.columns:
                    self._line_feed()
                line = self.shown[self.row]
                line += [" "] * (self.column + 1 - len(line))
                line[self.column] = char
                self.column += 1

    def _control(self, sequence: str) -> None:
        count, kind = sequence[:-1], sequence[-1]
        if kind == "A":
            wanted = self.row - int(count or 1)
            assert wanted >= 0, "a scrolled-off line is drawn again"
            self.row = wanted
        elif sequence == "2K":
            self.shown[self.row] = []
        else:
            assert kind == "m" or sequence in ("?25l", "?25h"), f"unknown sequence {sequence!r}"

    def _line_feed(self) -> None:
        self.column = 0
        self.row += 1
        if self.row == len(self.shown):
            self.shown.append([])
        if self.row == self.height:
            self.scrolled.append("".join(self.shown.pop(0)).rstrip())
            self.row -= 1

    def text(self) -> list[str]:
        shown = ["".join(line).rstrip() for line in self.shown]
        return [*self.scrolled, *shown]


def console(columns: int = 60, lines: int = 12) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    made = Console(
        file=out, force_terminal=True, width=columns, height=lines, color_system="standard",
        highlight=False, legacy_windows=False, _environ={"TERM": "xterm"},
    )  # fmt: skip
    return made, out


@pytest.mark.parametrize(("size", "lines"), [(5, 6), (40, 6), (40, 200)])
def test_streamed_markdown_longer_than_the_screen_ends_as_if_printed_at_once(
    size: int, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "REFRESH_S", 0.0)
    shown = []
    for step in (size, len(DOCUMENT)):
        made, out = console(60, lines)
        stream = MarkdownStream(made)
        for start in range(0, len(DOCUMENT), step):
            stream._cost = 0.0  # draw after each piece
            stream.push(DOCUMENT[start : start + step])
        stream.end()
        screen = Screen(60, lines)
        screen.feed(out.getvalue())
        # A list's first lines may scroll off before its numbers have two digits.
        shown.append([line.strip() for line in screen.text() if line])
    assert shown[0] == shown[1]
    assert shown[0].count("12 item 12 of many") == 1


def test_a_growing_block_is_drawn_before_it_ends() -> None:
    made, out = console()
    stream = MarkdownStream(made)
    stream.push("The answer is **42")
    assert "The answer is **42" in out.getvalue()
    stream.push("**.")
    stream.end()
    screen = Screen(60, 12)
    screen.feed(out.getvalue())
    assert [line for line in screen.text() if line] == ["The answer is 42."]


def test_reasoning_is_dim_and_before_the_answer() -> None:
    made, out = console()
    display = TerminalDisplay(made, markdown=False, thinking=True)
    display.reasoning("let me see")
    display.answer("Paris.")
    display.end()
    assert re.search(r"\x1b\[2mlet me see\x1b\[0m\s+Paris\.\n", out.getvalue())


def test_hidden_reasoning_prints_nothing() -> None:
    made, out = console()
    display = TerminalDisplay(made, markdown=False, thinking=False)
    display.reasoning("let me see")
    display.answer("Paris.")
    display.end()
    assert out.getvalue() == "Paris.\n"


@pytest.mark.parametrize("markdown", [True, False])
def test_a_models_control_characters_do_not_reach_the_terminal(markdown: bool) -> None:
    made, out = console()
    display = TerminalDisplay(made, markdown=markdown, thinking=True)
    display.reasoning("\x1b]0;title\x07")
    display.answer("a\x1b[2Jb\x9bc\rd")
    display.end()
    assert "\x1b[2J" not in out.getvalue() and "\x07" not in out.getvalue()
    assert "\x1b]" not in out.getvalue() and "\x9b" not in out.getvalue()


@pytest.mark.parametrize(
    "text",
    ["a vector<int> and <b>bold</b>", "<tool_call>\n<function=f>\n</tool_call>", "<!-- x -->"],
)
def test_tags_in_an_answer_are_text(text: str) -> None:
    made, file = console()
    stream = MarkdownStream(made)
    stream.push(text)
    stream.end()
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", file.getvalue())
    assert all(word in shown for word in text.split())


def test_a_pipe_gets_the_unformatted_answer_without_reasoning() -> None:
    out = io.StringIO()
    display = PlainDisplay(out)
    display.reasoning("let me see")
    display.answer("a **b**\x1b\n")
    display.end()
    display.end()
    assert out.getvalue() == "a **b**\x1b\n\n"
