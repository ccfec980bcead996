"""What replies took, and where their experts came from: for GET /metrics and --timing.

Written by the engine's thread alone; whoever reads may find one number newer than another.  The
counters of experts are in device memory, and reading them waits for the stream.  So they are looked
at when a reply has its first token and at its end, when nothing is on its way, and, if somebody
watches, every so often between two tokens: then the next step is launched once without one ahead.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from osmium.engine.request import FinishReason, Request
from osmium.engine.scheduler import Batch, Scheduler
from osmium.experts.runner import ExpertCounters

__all__ = ["EngineStats", "Histogram", "IntervalStats"]

LOG = logging.getLogger("osmium.meter")

TOKEN_S = (
    .001, .002, .003, .004, .005, .006, .008, .01, .0125, .015, .02, .025, .03, .04, .05, .075,
    .1, .2, .5, 1.0,
)  # fmt: skip
FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Histogram:
    """How often a value was at most each of some edges."""

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = tuple(edges)
        self.counts = [0] * (len(edges) + 1)
        """A value's count is kept at the first edge that is not below it, or last of all."""
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.sum += value


@dataclass(frozen=True)
class IntervalStats:
    """One reply, or a while of serving."""

    queue_s: float
    prefill_s: float
    decode_s: float
    prompt_tokens: int
    """Tokens of prompts."""
    generated_tokens: int
    hit_rate: float
    """Of all that ran meanwhile; so are the next two."""
    mb_per_token: float
    """Fetched over the link a token that was said, 1e6 bytes."""
    link_utilization: float
    """Bytes fetched a second over what the link was measured to carry; 0 where it was not."""

    @property
    def tokens_per_s(self) -> float:
        return self.generated_tokens / self.decode_s if self.decode_s else 0.0

    def line(self) -> str:
        """One line for people."""
        link = ""
        if self.link_utilization:
            least = 1e3 * self.link_utilization * self.decode_s / max(1, self.generated_tokens)
            link = f", link {self.link_utilization:.2f} (at least {least:.1f} ms per token)"
        return (
            f"{self.tokens_per_s:.1f} tok/s, hit {self.hit_rate:.3f}, {self.mb_per_token:.1f} "
            f"MB/token{link}; queue {1e3 * self.queue_s:.0f} ms, prefill "
            f"{1e3 * self.prefill_s:.0f} ms ({self.prompt_tokens} tokens), decode "
            f"{1e3 * self.decode_s:.0f} ms ({self.generated_tokens} tokens)"
        )


@dataclass(frozen=True)
class _Mark:
    """Where the counters stood."""

    at: float
    experts: ExpertCounters
    tokens: tuple[int, int]


class EngineStats:
    """The counts of one engine."""

    def __init__(self, scheduler: Scheduler, store: Any, link_gb_s: float = 0.0) -> None:
        self.scheduler, self._store, self.link_gb_s = scheduler, store, link_gb_s
        self.record_bytes: int = store.cache.layout.nbytes
        self.tokens = {"prompt": 0, "completion": 0}
        self.finished = dict.fromkeys(FinishReason, 0)
        self.itl_s, self.ttft_s = Histogram(TOKEN_S), Histogram(FIRST_S)
        self.experts = ExpertCounters(0, 0, 0, 0)
        """As they were when last looked at."""
        self.link_now = 0.0
        """GB/s fetched between the last two looks of `every`."""
        self.vram: tuple[int, int] | None = None
        """Bytes free and in all, at the last look of `every`."""
        self.vram_of: Callable[[], tuple[int, int]] | None = None
        """Asks for it."""
        self.poll_interval_s: float | None = None
        """Seconds between looks while replies run; None looks at their beginnings and ends."""
        self.on_request_stats: Callable[[IntervalStats], None] | None = None
        """Called on the engine's thread after each reply; must return at once."""
        self.on_interval_stats: Callable[[IntervalStats], None] | None = None
        """Called there after each look of `every`, with what happened since the one before."""
        self._looked = self._mark()
        self._marks: dict[Request, _Mark] = {}
        self._begun: list[Request] = []
        """Those that have said their first token since the last look."""
        self._ended: list[Request] = []
        self._told_wrong = False

    # -- what the engine tells, on its thread ------------------------------------------------------

    def begin(self, batch: Batch) -> None:
        """A step of these requests is about to be computed."""
        if not self._marks:
            self._looked = self._mark()  # nothing has happened since
        for request, _ in batch.scheduled:
            if request not in self._marks and not request.done:
                request.times.started = request.times.started or time.perf_counter()
                self._marks[request] = self._mark()

    def add_computed(self, request: Request, count: int) -> None:
        """So many more of a request's tokens are about to count as computed."""
        self.tokens["prompt"] += min(
            count, max(0, request.prompt_tokens - request.num_computed_tokens)
        )

    def token(self, request: Request) -> None:
        """A request has its next token."""
        now, times = time.perf_counter(), request.times
        self.tokens["completion"] += 1
        if times.first_token:
            self.itl_s.add(now - times.last_token)
        else:
            times.first_token = now
            self.ttft_s.add(now - times.submitted)
            self._begun.append(request)
        times.last_token = now

    def finish(self, request: Request, reason: FinishReason) -> None:
        """A request is over."""
        self.finished[reason] += 1
        if request in self._marks:
            self._ended.append(request)

    @property
    def due(self) -> bool:
        """Whether it is time for somebody who watches."""
        return (
            self.poll_interval_s is not None
            and time.perf_counter() - self._looked.at >= self.poll_interval_s
        )

    def poll(self) -> None:
        """Read the counters if anybody wants them; to be called when nothing is on its way."""
        due = self.due
        if not (self._begun or self._ended or due):
            return
        self.update()
        now = self._mark()
        for request in self._begun:
            if not request.done:
                self._marks[request] = now  # what it takes from here on is decoding
        ended, self._begun, self._ended = self._ended, [], []
        for request in ended:
            mark = self._marks.pop(request)
            if request.times.first_token and self.on_request_stats is not None:
                self._tell("on_request_stats", self._reply(request, mark, now))
        if due:
            before, self._looked = self._looked, now
            copied = now.experts.experts_copied - before.experts.experts_copied
            self.link_now = copied * self.record_bytes / (now.at - before.at) / 1e9
            if self.vram_of is not None:
                self.vram = self.vram_of()
            if self.on_interval_stats is not None and now.tokens != before.tokens:
                self._tell("on_interval_stats", self._while(before, now))

    def update(self) -> ExpertCounters:
        """Read the counters.  That they do not add up is logged, once, and is for a benchmark to
        fail of: a step that failed half way leaves them so."""
        try:
            self.experts = self._store.counters()
        except AssertionError as error:
            if not self._told_wrong:
                LOG.error("The expert counters do not add up: %s", error)
            self._told_wrong = True
        return self.experts

    # -- sums --------------------------------------------------------------------------------------

    def _mark(self) -> _Mark:
        tokens = self.tokens["prompt"], self.tokens["completion"]
        return _Mark(time.perf_counter(), self.experts, tokens)

    def _tell(self, name: str, took: IntervalStats) -> None:
        try:
            getattr(self, name)(took)
        except Exception as error:  # a terminal that is gone, say; replies go on
            LOG.warning("Could not report timing: %r", error)
            setattr(self, name, None)

    def _reply(self, request: Request, mark: _Mark, now: _Mark) -> IntervalStats:
        times = request.times
        started = times.started or times.first_token
        return IntervalStats(
            started - times.submitted, times.first_token - started,
            times.last_token - times.first_token,
            request.prompt_tokens, request.completion_tokens - 1,
            *self._experts(mark, now, times.last_token - mark.at),
        )  # fmt: skip

    def _while(self, before: _Mark, now: _Mark) -> IntervalStats:
        seconds = now.at - before.at
        read, said = (a - b for a, b in zip(now.tokens, before.tokens, strict=True))
        return IntervalStats(0.0, 0.0, seconds, read, said, *self._experts(before, now, seconds))

    def _experts(self, before: _Mark, now: _Mark, seconds: float) -> tuple[float, float, float]:
        """Hit rate, MB a token, share of the link."""
        routed = now.experts.routed - before.experts.routed
        hit = now.experts.hit - before.experts.hit
        nbytes = (now.experts.experts_copied - before.experts.experts_copied) * self.record_bytes
        said = now.tokens[1] - before.tokens[1]
        carried = self.link_gb_s * 1e9 * seconds
        return (
            hit / routed if routed else 1.0,
            nbytes / max(1, said) / 1e6,
            nbytes / carried if carried else 0.0,
        )
