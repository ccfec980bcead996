"""The scheduler: which requests the next step computes, and how many tokens of each.

Requests wait in order of arrival until a state slot and pages for their tokens are free.  A long
prompt is prefilled in chunks; between two chunks every decoding request gets one token.  When pages
run out, the newest request is preempted: its pages are freed and it is prefilled again later.
Preemption does not change a response.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from osmium.engine.kv_cache_manager import KVCacheManager
from osmium.engine.request import Request

__all__ = ["Batch", "Scheduler"]


@dataclass(frozen=True)
class Batch:
    """The requests of one step."""

    scheduled: list[tuple[Request, int]]
    """(request, number of its pending tokens to compute)."""


class Scheduler:
    """Waiting and running requests."""

    def __init__(self, kv_cache: KVCacheManager, max_step_tokens: int) -> None:
        self.kv_cache, self.max_step_tokens = kv_cache, max_step_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """In order of arrival."""
        self.preemptions = 0
        """How often a running request was preempted."""
        self._decoded_last = True

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def all_requests(self) -> Iterator[Request]:
        yield from list(self.running)
        yield from list(self.waiting)

    def remove(self, request: Request) -> None:
        """Remove a request that has finished or is cancelled, and free its pages and slot."""
        if request in self.running:
            self.running.remove(request)
            self.kv_cache.free(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def schedule(self) -> Batch | None:
        """The next step, or None if no request can run."""
        while self.waiting and self._admit(self.waiting[0]):
            request = self.waiting.popleft()
            request.num_computed_tokens = request.computed_tokens
            self.running.append(request)
        prefilling = [r for r in self.running if r.num_pending_tokens > 1]
        decoding = [r for r in self.running if r.num_pending_tokens == 1]
        if prefilling and (self._decoded_last or not decoding):
            self._decoded_last = False
            request = prefilling[0]
            return self._batch([(request, min(request.num_pending_tokens, self.max_step_tokens))])
        self._decoded_last = True
        return self._batch([(r, 1) for r in decoding[: self.max_step_tokens]])

    def _admit(self, request: Request) -> bool:
        """Allocate a state slot to a waiting request if it may run.

        It may always run alone, since a whole context fits.  Beside others it needs free pages for
        the tokens of all of them.
        """
        missing = sum(self._missing_pages(r) for r in (*self.running, request))
        fits = missing <= self.kv_cache.free_pages or not self.running
        return fits and self.kv_cache.allocate_slot(request)

    def _missing_pages(self, request: Request) -> int:
        """Pages that a request lacks for its tokens and the next one."""
        return max(0, -(-(len(request.tokens) + 1) // self.kv_cache.page_size) - len(request.pages))

    def _batch(self, wanted: list[tuple[Request, int]]) -> Batch | None:
        """The wanted requests that get pages; preempts the newest running ones for them."""
        scheduled = []  # in order of arrival, so preemption never takes a scheduled request
        for request, count in wanted:
            if request not in self.running:
                continue  # preempted for an earlier request of this list
            while not self.kv_cache.allocate_pages(request, request.num_computed_tokens + count):
                newest = self.running[-1]
                self.preempt(newest)
                if newest is request:
                    break
            else:
                scheduled.append((request, count))
        if scheduled or not self.running:
            return Batch(scheduled) if scheduled else None
        return self.schedule()

    def preempt(self, request: Request) -> None:
        """Free a running request's pages and slot; it becomes the first waiting request."""
        self.preemptions += 1
        self.running.remove(request)
        self.kv_cache.free(request)
        self.waiting.appendleft(request)
