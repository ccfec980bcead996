"""What a client or a package did, as a row of a table and of a report."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["NotRun", "Result", "as_json", "header", "lines"]

STEPS = ("text", "tools", "structured")
"""Columns of the table: a text turn, a tool round, structured output."""

OUTPUT_CHARS = 3000
"""Characters of a failed step's output, from its end."""


class NotRun(Exception):
    """A client cannot be run here; the text says why."""


@dataclass
class Result:
    """The result of one client."""

    name: str
    version: str = ""
    passed: dict[str, bool] = field(default_factory=dict)
    """By step: whether it did what it should."""
    seconds: float = 0.0
    not_run: str = ""
    """Why it was not run; empty if it was."""
    output: dict[str, str] = field(default_factory=dict)
    """By failed step: the end of its output."""

    @property
    def failed(self) -> bool:
        return not all(self.passed.values())

    def add(self, step: str, passed: bool, output: str) -> None:
        """Add a step; its output is kept if it failed."""
        self.passed[step] = passed
        if not passed:
            self.output[step] = output[-OUTPUT_CHARS:]


def header() -> str:
    return f"{'client':24}{'version':10}" + "".join(f"{s:>11}" for s in STEPS) + f"{'seconds':>9}"


def lines(result: Result) -> Iterable[str]:
    """The lines of a result: its row, and below it the output of failed steps."""
    if result.not_run:
        yield f"{result.name:24}not run: {result.not_run}"
        return
    shown = {True: "ok", False: "FAILED", None: "-"}
    cells = "".join(f"{shown[result.passed.get(step)]:>11}" for step in STEPS)
    yield f"{result.name:24}{result.version:10}{cells}{result.seconds:9.1f}"
    for step, output in result.output.items():
        yield f"  {step}:"
        yield from (f"    {line}" for line in output.splitlines())


def as_json(result: Result) -> dict[str, Any]:
    """The result as a row of a report, without what is empty."""
    return {key: value for key, value in asdict(result).items() if value}
