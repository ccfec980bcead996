"""Whether a place in streamed Markdown is inside code, where tags are examples."""

__all__ = ["CodeSpans"]

MAX_FENCE_LINE = 80
"""Characters of a line that are looked at for a fence."""


class CodeSpans:
    """Follows text piece by piece: fenced blocks, and backticks of the current line."""

    def __init__(self) -> None:
        self.at_line_start = True
        """Whether the current line has only white space so far."""
        self.last = ""
        """The last character, or nothing."""
        self._line = ""
        """The beginning of the current line."""
        self._backticks = 0
        """Backticks in the current line."""
        self._fence = ""
        """The characters that opened a block of code; a line with as many closes it."""

    @property
    def in_code(self) -> bool:
        return bool(self._fence) or self._backticks % 2 == 1

    @property
    def in_block(self) -> bool:
        return bool(self._fence)

    def add(self, text: str) -> None:
        """Follow `text`."""
        self.last = text[-1:] or self.last
        *ended, rest = text.split("\n")
        for line in ended:
            self._add(line)
            self._end_line()
        if rest:
            self._add(rest)

    def _add(self, text: str) -> None:
        self._line += text[: MAX_FENCE_LINE - len(self._line)]
        self._backticks += text.count("`")
        self.at_line_start = self.at_line_start and not text.strip()

    def _end_line(self) -> None:
        line = self._line.strip()
        self._line, self._backticks, self.at_line_start = "", 0, True
        mark = line[:1]
        if mark not in ("`", "~"):
            return
        info = line.lstrip(mark)
        run = line[: len(line) - len(info)]
        if not self._fence:
            if len(run) >= 3 and mark not in info:
                self._fence = run
        elif run.startswith(self._fence) and not info:
            self._fence = ""
