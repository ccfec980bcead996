"""Progress on stderr of stages over a second: bars on a terminal, else a line per tenth."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from osmium.config import Progress as Report

__all__ = ["DELAY_S", "amount", "byte_amount", "is_plain", "progress_bar", "stopped_stage"]

DELAY_S = 1.0
"""Seconds before a stage is shown; a shorter stage has no line."""

_UNITS = {
    "packing": "bytes", "download": "bytes", "downloading": "bytes", "uploading": "bytes",
    "headers": "files", "weights": "parts", "experts": "layers", "prompt": "tokens",
    "scoring": "tokens", "thinking": "tokens",
}  # fmt: skip
"""The unit of a stage, by the first word of its name."""

_last_stage: list[tuple[str, int, int]] = []
"""The last report of the open progress_bar, for the message after Ctrl-C."""


def amount(stage: str, done: int, total: int) -> str:
    """ "1.2 of 63.0 GB", "1,024 of 6,000 tokens", "12 of 48 layers"."""
    unit = _UNITS.get(stage.split()[0] if stage else "", "")
    if unit == "bytes":
        return byte_amount(done, total)
    return f"{done:,}" + (f" of {total:,}" if total else "") + (f" {unit}" if unit else "")


def byte_amount(done: int, total: int = 0) -> str:
    """ "63.0 GB", "1.2 of 63.0 GB"."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    name, size = next(((n, s) for n, s in units if max(done, total) >= s), units[-1])
    return f"{done / size:.1f}" + (f" of {total / size:.1f}" if total else "") + f" {name}"


def stopped_stage() -> tuple[str, int, int] | None:
    """The last (stage, done, total) of a progress_bar that Ctrl-C has ended."""
    return _last_stage[-1] if _last_stage else None


def is_plain(console: Console) -> bool:
    """Whether written lines cannot change: no terminal, or one without cursor movement."""
    return not console.is_terminal or console.is_dumb_terminal


@contextmanager
def progress_bar() -> Iterator[Report]:
    """Yields a thread-safe function (stage, done, total) that shows one bar per stage."""
    console = Console(stderr=True)
    _last_stage.clear()
    shown: contextlib.AbstractContextManager[Report] = (
        _Lines() if is_plain(console) else _Bars(console)
    )
    with shown as show:

        def report(stage: str, done: int, total: int) -> None:
            _last_stage[:] = [(stage, done, total)]
            show(stage, done, total)

        yield report


class _Amount(ProgressColumn):
    """The amount done, in the stage's unit."""

    def render(self, task: Task) -> Text:
        total = int(task.total or 0)
        text = amount(task.description, int(task.completed), total)
        return Text(text if total or task.completed else "")


class _Bars:
    """Bars, drawn from DELAY_S after the first report on and erased at the end."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description:>12}"), BarColumn(), _Amount(), TimeRemainingColumn(),
            console=console, transient=True,
        )  # fmt: skip
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        self._timer = _later(self._draw)
        self._drawn = self._closed = False

    def __enter__(self) -> Report:
        return self._report

    def _report(self, stage: str, done: int, total: int) -> None:
        with self._lock:
            if not self._tasks:
                _start(self._timer)
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total or None)
            self._bars.update(self._tasks[stage], completed=done, total=total or None)

    def _draw(self) -> None:
        with self._lock:
            if not self._closed:
                self._bars.start()
                self._drawn = True

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            self._closed = True
            if self._drawn:
                self._bars.stop()


class _Lines:
    """A line for each tenth of a stage, from DELAY_S after its start on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stage = ""
        self._started = 0.0
        self._now = (0, 0)
        self._printed: tuple[str, int] | None = None
        """Stage and tenth of the last line."""
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Report:
        return self._report

    def _report(self, stage: str, done: int, total: int) -> None:
        with self._lock:
            if stage != self._stage:
                self._stage, self._started = stage, time.monotonic()
                self._wait(stage)
            self._now = (done, total)
            if time.monotonic() - self._started >= DELAY_S:
                self._print()

    def _wait(self, stage: str) -> None:
        """Print the stage after DELAY_S, even without another report until then."""
        if self._timer is not None:
            self._timer.cancel()

        def due() -> None:
            with self._lock:
                if self._stage == stage:
                    self._print()

        self._timer = _later(due)
        _start(self._timer)

    def _print(self) -> None:
        done, total = self._now
        tenth = done * 10 // total if total else 0
        if self._printed == (self._stage, tenth):
            return
        self._printed = (self._stage, tenth)
        if total:
            text = f"{self._stage}: {tenth * 10} % ({amount(self._stage, done, total)})"
        else:
            text = self._stage
        with contextlib.suppress(OSError, ValueError):  # a closed stderr must not stop the work
            print(text, file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            self._stage = ""


def _later(action: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(DELAY_S, action)
    timer.daemon = True
    return timer


def _start(timer: threading.Timer) -> None:
    """Start a timer.  If no thread can be started, later reports show the progress, or none."""
    with contextlib.suppress(RuntimeError):
        timer.start()
