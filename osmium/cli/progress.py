"""A progress bar on stderr for whatever reports (stage, done, total)."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from osmium.config import Progress as Report

__all__ = ["progress_bar"]


@contextmanager
def progress_bar() -> Iterator[Report]:
    """Shows one bar a stage; on something that is not a terminal, one line a stage."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description:>16}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bars:
        tasks = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield report


class _Lines:
    """Says each stage once, and each tenth of it."""

    def __init__(self) -> None:
        self.said: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        tenth = done * 10 // total if total else 0
        if self.said.get(stage) != tenth:
            self.said[stage] = tenth
            print(f"{stage}: {tenth * 10} %", file=sys.stderr, flush=True)
