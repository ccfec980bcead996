"""The command line: `osmium --help` lists the commands.

The answer goes to stdout and everything else to stderr.  Exit codes: 0, 1 (failed), 2 (refused),
130 (Ctrl-C).  The console scripts start in this module.  It imports almost nothing, so that Ctrl-C
prints no traceback, even while NumPy is being imported.
"""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

__all__ = ["main", "serve"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.  Returns the exit code.

    With `argv` None the command owns the process: it reads sys.argv, and afterwards Ctrl-C ends the
    process at once.
    """
    owned = argv is None
    previous = _set_interrupt_handler(_exit_now) if owned else None
    try:
        from osmium.cli.dispatch import prepare, run

        action = prepare(sys.argv[1:] if argv is None else argv)
        if previous is not None:
            _set_interrupt_handler(signal.default_int_handler)
        return run(action, owns_stdout=owned)
    except KeyboardInterrupt:  # in the lines above; run() handles its own
        return 130
    finally:
        if previous is not None:
            _set_interrupt_handler(_exit_now)  # Python may still wait for threads


def serve() -> int:
    """`osmium-serve ...` is `osmium serve ...`."""
    sys.argv.insert(1, "serve")
    return main()


def _exit_now(number: int, frame: FrameType | None) -> None:
    """Ctrl-C before a command has started, or after its end: there is nothing to clean up."""
    os._exit(130)


def _set_interrupt_handler(handler: object) -> object:
    """Set SIGINT's handler; returns the previous one.

    None if the handler was not set: SIGINT is ignored (nohup, a background job), or this is not the
    main thread.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return None
    try:
        return signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]
    except ValueError:
        return None
