"""The command line: `osmium --help` lists the commands.

The answer goes to stdout and everything else to stderr.  Exit codes: 0, 1 (failed), 2 (refused),
130 (Ctrl-C).  This module is where the console scripts begin and imports next to nothing, so that
Ctrl-C is quiet from the start, also while NumPy is being imported.
"""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

__all__ = ["main", "serve"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.  Returns the exit code.

    With `argv` None the process is this command's: its arguments are sys.argv's, and at the end
    Ctrl-C is left to end it at once.
    """
    owned = argv is None
    before = _on_interrupt(_leave) if owned else None
    try:
        from osmium.cli.dispatch import prepare, run

        action = prepare(sys.argv[1:] if argv is None else argv)
        if before is not None:
            _on_interrupt(signal.default_int_handler)
        return run(action, owns_stdout=owned)
    except KeyboardInterrupt:  # in the lines above; run() handles its own
        return 130
    finally:
        if before is not None:
            _on_interrupt(_leave)  # Python still waits for threads


def serve() -> int:
    """`osmium-serve ...` is `osmium serve ...`."""
    sys.argv.insert(1, "serve")
    return main()


def _leave(number: int, frame: FrameType | None) -> None:
    """Ctrl-C before a command has begun, or after its end: nothing is open, nothing is unwound."""
    os._exit(130)


def _on_interrupt(handler: object) -> object:
    """Set SIGINT's handler; the one before, or None where it stays: SIGINT is ignored (nohup, a
    background job), or this is not the main thread."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return None
    try:
        return signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]
    except ValueError:
        return None
