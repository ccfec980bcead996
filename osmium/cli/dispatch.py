"""Runs a command and returns its exit code; converts errors to one line on stderr.

0: done.  1: failed (disk, memory, device, a bug).  2: refused (an invalid flag, file or request).
130: Ctrl-C.
"""

import argparse
import contextlib
import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from osmium.cli.catalog import Command
from osmium.cli.parser import Help, Usage, parse
from osmium.errors import (
    CheckpointError,
    ConfigError,
    NoDevice,
    OsmiumError,
    OutOfMemory,
    RequestError,
)

__all__ = ["prepare", "run"]

Action = Callable[[], int]
"""A command with its arguments; returns the exit code."""

REFUSED = (ConfigError, CheckpointError, RequestError, NoDevice)
"""Errors that the user's input causes."""

MIB = 1 << 20


def prepare(argv: Sequence[str]) -> Action:
    """Parse the arguments and import the command's module."""
    unusable = (AttributeError, ValueError, OSError)  # a closed stream, or a replaced one
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(*unusable):
            # An ASCII terminal then shows "?" for other characters; the default raises.
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    with contextlib.suppress(*unusable):
        sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    try:
        command, args = parse(argv)
        _check_address_space()
        return _bound(command, args)
    except Help as error:
        text = str(error)
        return lambda: print(text) or 0
    except BaseException as error:
        code = _report(error)
        return lambda: code


def _bound(command: Command, args: argparse.Namespace) -> Action:
    module, _, function = command.entry_point.partition(":")
    body = getattr(importlib.import_module(f"osmium.cli.{module}"), function)

    def action() -> int:
        body(args)
        return 0

    return action


def run(action: Action, *, owns_stdout: bool) -> int:
    """Run a command and return the exit code.

    With `owns_stdout`, output that stdout could not take is dropped, as Python would otherwise
    print an error at exit.
    """
    handler = _Lines()
    logging.getLogger().addHandler(handler)
    try:
        try:
            code = action()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
        return code
    except BaseException as error:
        return _report(error)
    finally:
        logging.getLogger().removeHandler(handler)
        if owns_stdout:
            _drop_unwritten()


def _report(error: BaseException) -> int:
    """One line on stderr, or a traceback for a bug.  Returns the exit code."""
    if isinstance(error, SystemExit | GeneratorExit):
        raise error
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, BrokenPipeError):
        return 1  # the reader of stdout has exited, like `head`
    line, code = _line(error)
    if line is None:
        _print_error("".join(traceback.format_exception(error)).rstrip())
        line = (
            f"osmium: this is a bug ({type(error).__name__}). Please report it with the text above "
            "and what `osmium doctor` prints."
        )
    _print_error(line)
    return code


def _line(error: BaseException) -> tuple[str | None, int]:
    """The error's line and the exit code; None as the line for a bug."""
    text = " ".join(str(error).split()) if not isinstance(error, OsmiumError) else str(error)
    if isinstance(error, OsmiumError):
        if not isinstance(error, Usage):  # its line already begins with the command
            text = f"osmium: {text}"
        return text, 2 if isinstance(error, REFUSED) else 1
    if _is_out_of_memory(error, text):
        return f"osmium: {_out_of_memory(text)}", 1
    if isinstance(error, OSError):
        reason = error.strerror or text or type(error).__name__
        if error.filename is not None:
            return f"osmium: {error.filename}: {reason}.", 1
        if error.errno in (errno.ENOSPC, errno.EIO, errno.EBADF, errno.EDQUOT):
            return f"osmium: the output cannot be written: {reason}.", 1
        return f"osmium: {reason}.", 1
    return None, 1


def _is_out_of_memory(error: BaseException, text: str) -> bool:
    low = text.lower()
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and "can't start new thread" in low)
        or "cannot allocate memory" in low
        or "failed to map segment" in low  # a shared library, under ulimit -v
    )


def _out_of_memory(text: str) -> str:
    what = f" ({text})" if text else ""
    return (
        f"out of memory{what}. Close other programs, choose a smaller --context or model, or raise "
        "the limits that `ulimit -v` and `ulimit -u` show."
    )


def _check_address_space() -> None:
    """Raises: OutOfMemory if `ulimit -v` is too low for the libraries.

    NumPy's matrix library would end the process, or crash.
    """
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return
    # 141 MB with NumPy, 32 MB per core for its matrix library, 200 for threads and the rest:
    # below 340 MB the demo crashed on two cores (2026-11).
    minimum = (448 + 64 * (os.cpu_count() or 1)) * MIB
    if soft < minimum:
        raise OutOfMemory(
            f"out of memory: `ulimit -v` allows {soft // MIB} MiB of address space; Osmium needs "
            f"{minimum // MIB} MiB and the model's size. Raise it with `ulimit -v unlimited`."
        )


class _Lines(logging.Handler):
    """Warnings and errors as plain lines on stderr."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        name = "osmium" if record.name.split(".")[0] == "osmium" else record.name
        _print_error(f"{name}: {record.levelname.lower()}: {record.getMessage()}")
        if record.exc_info and record.exc_info[1] is not None:
            _print_error("".join(traceback.format_exception(record.exc_info[1])).rstrip())


def _print_error(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed, too
        print(text, file=sys.stderr, flush=True)


def _drop_unwritten() -> None:
    """Redirect stdout and stderr to /dev/null if they cannot be flushed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
