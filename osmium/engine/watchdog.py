"""The watchdog: stops the engine before the machine runs out of host memory.

Page-locked memory does not swap, so only available memory counts.  Below the minimum the engine
accepts no more requests, and running ones end with an error.  The process can then exit in order
instead of being killed.
"""

import threading
from collections.abc import Callable

__all__ = ["Watchdog", "default_min_free_ram"]

GIB = 1 << 30


def default_min_free_ram(total: int) -> int:
    """Half a percent of the host's memory, and at least 512 MiB, bytes."""
    return max(512 << 20, total // 200)


class Watchdog:
    """Polls host memory on its own thread."""

    def __init__(
        self,
        stop: Callable[[str], None],
        min_free: int,
        available: Callable[[], int],
        period: float = 1.0,
    ) -> None:
        """Polls `available` each `period` seconds.

        Below `min_free` bytes it calls `stop` once, with the reason, and ends.
        """
        self._stop, self._min_free, self._available, self._period = (
            stop,
            min_free,
            available,
            period,
        )
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="osmium-watchdog", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._closed.wait(self._period):
            try:
                left = self._available()
            except OSError:  # without file descriptors /proc cannot be read; the next poll may
                continue
            if left < self._min_free:
                self._stop(
                    f"Available host memory is {left / GIB:.2f} GiB, the limit is "
                    f"{self._min_free / GIB:.2f} GiB (--min-free-ram). Close other programs, or "
                    "use a smaller model or context."
                )
                return

    def close(self) -> None:
        """Stop polling; callable from any thread."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
