"""Pack a checkpoint in a process that is killed at a chosen system call, or meets a full disk.

`python -m tests.weights.interrupted_packing FOLDER CACHE ACTION`, where ACTION is one of:

kill N   SIGKILL in the middle of the Nth write to disk
full N   no file may grow past 4 KiB from the Nth call of progress on
hold     wait for a line on stdin while packing

Prints the number of writes, or the error's type and text.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

from osmium.config import EngineConfig, Progress
from osmium.errors import OsmiumError
from osmium.weights import open_model

CALLS = ("pwrite", "fsync", "fdatasync", "posix_fallocate", "replace")
"""System calls by which packing writes to disk; Path.replace calls os.replace."""


def kill_at(last: int) -> list[int]:
    """Kill the process in the middle of its `last`-th such call; returns the counter."""
    count = [0]

    def killing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            count[0] += 1
            if count[0] < last:
                return real(*args)
            if name == "pwrite" and len(args[1]) > 1:
                real(args[0], args[1][: len(args[1]) // 2], args[2])
            os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in CALLS:
        setattr(os, name, killing(name, getattr(os, name)))
    return count


def full_from(first: int) -> Progress:
    """From the `first`-th progress report on, writes past 4 KiB fail with EFBIG (full disk)."""
    remaining = [first]

    def report(stage: str, done: int, total: int) -> None:
        remaining[0] -= 1
        if not remaining[0]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    return report


def hold(stage: str, done: int, total: int) -> None:
    """Print that the lock is held, and wait for a line on stdin once."""
    if not done:
        print("holding", flush=True)
        sys.stdin.readline()


def main() -> None:
    folder, cache, action = sys.argv[1:4]
    count, progress = [0], None
    if action == "kill":
        count = kill_at(int(sys.argv[4]))
    elif action == "full":
        progress = full_from(int(sys.argv[4]))
    elif action == "hold":
        progress = hold
    try:
        open_model(folder, EngineConfig(cache_dir=cache), progress)
    except OsmiumError as error:
        print(type(error).__name__, error)
        sys.exit(2)
    print(count[0])


if __name__ == "__main__":
    main()
