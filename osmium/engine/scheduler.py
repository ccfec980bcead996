"""The scheduler: which requests the next step computes, and how many tokens of each.

Requests wait in order of arrival until a state slot and pages for their tokens are free.  A long
prompt is prefilled in several passes.  The prompt with the fewest tokens left is first, but a
longer one that waits is not overtaken without end.  When pages run out, the newest request is
preempted: its pages are freed and it is prefilled again later.  Preemption does not change a
response.
"""

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from osmium.engine.kv_cache_manager import KVCacheManager
from osmium.engine.request import Request

__all__ = ["CUT_TOKENS", "Batch", "Scheduler", "pass_tokens"]

CUT_TOKENS = 64
"""Prompts are cut at multiples of this: where they are cut does not change a bit."""

MAX_OVERTAKEN = 4
"""Passes of shorter prompts before the oldest prompt has its own."""


@dataclass(frozen=True)
class Batch:
    """The requests of one step."""

    scheduled: list[tuple[Request, int]]
    """(request, number of its pending tokens to compute)."""


def pass_tokens(computed: int, pending: int, most: int) -> int:
    """Tokens of a prompt's next pass.  Passes are about equal; they end at multiples of CUT_TOKENS.

    computed: tokens before these    pending: tokens left    most: of a pass
    """
    if pending <= most:
        return pending
    if most < CUT_TOKENS:
        return most
    passes = -(-pending // most)
    end = computed + -(-pending // passes)
    count = -(-end // CUT_TOKENS) * CUT_TOKENS - computed
    if count > most:
        count = (computed + most) // CUT_TOKENS * CUT_TOKENS - computed
    return count if count > 0 else most


class Scheduler:
    """Waiting and running requests."""

    def __init__(
        self, kv_cache: KVCacheManager, max_pass_tokens: int, max_decode_rows: int
    ) -> None:
        """A decode step has at most `max_decode_rows` requests, a prefill pass one request."""
        self.kv_cache, self.max_pass_tokens = kv_cache, max_pass_tokens
        self.max_decode_rows = max_decode_rows
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """In order of arrival."""
        self.preemptions = 0
        """How often a running request was preempted."""
        self._overtaken = 0
        """Passes that the oldest prompt has waited for."""

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
        """The next prefill pass, else the next decode step; None if no request can run."""
        while True:
            self._admit_waiting()
            prefilling = [r for r in self.running if r.needs_prefill]
            batch = self._schedule_prefill(prefilling) if prefilling else self.schedule_decode()
            if batch is not None or not self.running:
                return batch

    def _schedule_prefill(self, prefilling: list[Request]) -> Batch | None:
        oldest = prefilling[0]
        request = min(prefilling, key=lambda r: r.num_pending_tokens)
        self._overtaken += 1
        if request is oldest or self._overtaken > MAX_OVERTAKEN:
            request, self._overtaken = oldest, 0
        most = self.max_pass_tokens
        count = pass_tokens(request.num_computed_tokens, request.num_pending_tokens, most)
        return self._batch([(request, count)])

    def schedule_decode(self) -> Batch | None:
        """The next decode step, or None if no request decodes."""
        decoding = [r for r in self.running if not r.needs_prefill]
        return self._batch([(r, 1) for r in decoding[: self.max_decode_rows]]) if decoding else None

    def schedule_short(self, max_tokens: int, others: Collection[Request]) -> Batch | None:
        """A pass of the shortest prompt of at most `max_tokens`, but none of `others`; else None.

        It never preempts a request.
        """
        self._admit_waiting()
        short = [
            r for r in self.running
            if r.needs_prefill and r.num_pending_tokens <= max_tokens and r not in others
        ]  # fmt: skip
        for request in sorted(short, key=lambda r: r.num_pending_tokens):
            tokens = request.num_computed_tokens + request.num_pending_tokens
            if self.kv_cache.allocate_pages(request, tokens):
                return Batch([(request, request.num_pending_tokens)])
        return None

    def _admit_waiting(self) -> None:
        while self.waiting and self._admit(self.waiting[0]):
            request = self.waiting.popleft()
            request.num_computed_tokens = request.tokens_read = request.computed_tokens
            self.running.append(request)

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
        """The wanted requests that get pages; preempts the newest running ones for them.

        None if all of them are preempted.
        """
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
        return Batch(scheduled) if scheduled else None

    def preempt(self, request: Request) -> None:
        """Free a running request's pages and slot; it becomes the first waiting request."""
        self.preemptions += 1
        self.running.remove(request)
        self.kv_cache.free(request)
        self.waiting.appendleft(request)
