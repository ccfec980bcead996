"""Who computes next, and how many of their tokens.

Requests wait in order of arrival until there is a slot, and pages for what they have to say.  A
long prompt is read in chunks, and between two chunks everyone who is decoding gets a token.  Where
pages run out, the request that came last gives its own up and is read again later from its tokens:
nobody's reply changes.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from osmium.engine.kv_cache_manager import KVCacheManager
from osmium.engine.request import Request

__all__ = ["Batch", "Scheduler"]


@dataclass(frozen=True)
class Batch:
    """One step: so many pending tokens of each of these requests."""

    scheduled: list[tuple[Request, int]]


class Scheduler:
    """Waiting and running requests."""

    def __init__(self, seats: KVCacheManager, chunk: int) -> None:
        self.seats, self.chunk = seats, chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """In order of arrival."""
        self._decoded_last = True

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def all_requests(self) -> Iterator[Request]:
        yield from list(self.running)
        yield from list(self.waiting)

    def remove(self, request: Request) -> None:
        """A request is over, or is asked to go."""
        if request in self.running:
            self.running.remove(request)
            self.seats.free(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def schedule(self) -> Batch | None:
        """The next step, or None if there is nothing to do."""
        while self.waiting and self._admit(self.waiting[0]):
            request = self.waiting.popleft()
            if request.skip_prefill:
                request.num_computed_tokens = len(request.tokens) - 1
            self.running.append(request)
        reading = [r for r in self.running if r.num_pending_tokens > 1]
        decoding = [r for r in self.running if r.num_pending_tokens == 1]
        if reading and (self._decoded_last or not decoding):
            self._decoded_last = False
            request = reading[0]
            return self._batch([(request, min(request.num_pending_tokens, self.chunk))])
        self._decoded_last = True
        return self._batch([(r, 1) for r in decoding[: self.chunk]])

    def _admit(self, request: Request) -> bool:
        """Whether a waiting request may run: alone always, since a whole context fits; beside
        others if there are pages for what it and they have to say so far."""
        wanted = sum(self._missing(one) for one in (*self.running, request))
        return (wanted <= self.seats.free_pages or not self.running) and self.seats.allocate_slot(
            request
        )

    def _missing(self, request: Request) -> int:
        """Pages that a request will need for the tokens it has and the next one."""
        return max(0, -(-(len(request.tokens) + 1) // self.seats.page) - len(request.pages))

    def _batch(self, parts: list[tuple[Request, int]]) -> Batch | None:
        """The parts that have pages, after those who came last have made room."""
        kept = []  # in order of arrival, so that who makes room is never among them
        for request, count in parts:
            if request not in self.running:
                continue  # made room for somebody before it in this very list
            while not self.seats.allocate_pages(request, request.num_computed_tokens + count):
                last = self.running[-1]
                self.preempt(last)
                if last is request:
                    break
            else:
                kept.append((request, count))
        if kept or not self.running:
            return Batch(kept) if kept else None
        return self.schedule()

    def preempt(self, request: Request) -> None:
        """Take a running request's seat; it waits again, first in line."""
        self.running.remove(request)
        self.seats.free(request)
        self.waiting.appendleft(request)
