"""The watchdog: stops the engine before the machine runs out of host memory.

Page-locked memory does not swap, so that swap is no help: what counts is what is available.  Below
the floor the engine takes no more requests, those running end with an error that says so, and the
process can leave in order instead of being killed.
"""

import threading
from collections.abc import Callable

__all__ = ["Watchdog", "default_floor"]

GIB = 1 << 30


def default_floor(total: int) -> int:
    """Half a percent of the host's memory, and at least 512 MiB, bytes."""
    return max(512 << 20, total // 200)


class Watchdog:
    """Looks at host memory from a thread of its own."""

    def __init__(
        self,
        stop: Callable[[str], None],
        floor: int,
        available: Callable[[], int],
        period: float = 1.0,
    ) -> None:
        """`stop` is told why, once, when `available` gives fewer bytes than `floor`; looked at each
        `period` seconds."""
        self._stop, self._floor, self._available, self._period = stop, floor, available, period
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="osmium-watchdog", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._closed.wait(self._period):
            left = self._available()
            if left < self._floor:
                self._stop(
                    f"Available host memory is {left / GIB:.2f} GiB, the limit is "
                    f"{self._floor / GIB:.2f} GiB (--min-free-ram). Close other programs, or use a "
                    "smaller model or context."
                )
                return

    def close(self) -> None:
        """Look no more; from any thread."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
