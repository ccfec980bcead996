"""The requests that wait for the engine: how many may, and the place of each."""

from collections.abc import Callable

from osmium.errors import RequestError

__all__ = ["RequestQueue"]


class RequestQueue:
    """Requests in order of arrival.  Used on the event loop alone."""

    def __init__(self, most: int) -> None:
        """At most `most` requests may wait."""
        self.most = most
        self._waits: dict[int, Callable[[], bool]] = {}
        """Whether a request still waits, by its number."""
        self._next = 0

    def join(self, waits: Callable[[], bool]) -> int:
        """Add a request; returns its number.  Raises: RequestError if too many others wait."""
        self._drop_started()
        if len(self._waits) >= self.most:
            raise RequestError(
                f"{len(self._waits)} requests wait, which is the limit "
                "(--max-queued-requests). Try again later.",
                code="too_many_requests",
                status=429,
            )
        self._next += 1
        self._waits[self._next] = waits
        return self._next

    def leave(self, number: int) -> None:
        """Remove a request that has ended; does nothing if it is not there."""
        self._waits.pop(number, None)

    def place(self, number: int) -> tuple[int, int] | None:
        """(n, of): a request is the n-th of those that wait, from 1; None if it does not wait."""
        self._drop_started()
        if number not in self._waits:
            return None
        return list(self._waits).index(number) + 1, len(self._waits)

    def _drop_started(self) -> None:
        for number in [n for n, waits in self._waits.items() if not waits()]:
            del self._waits[number]
