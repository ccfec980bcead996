"""Engine statistics, for GET /metrics and --timing: times, tokens and expert counts.

Only the engine's thread writes them; another thread may read one number newer than another.  The
expert counters are in device memory, and a read synchronises the stream.  They are read after a
response's first token and at its end, while no step is in flight.  With `poll_interval_s` they are
also read between two tokens, and one step is then launched without lookahead.
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

LOG = logging.getLogger("osmium.stats")

ITL_EDGES_S = (
    .001, .002, .003, .004, .005, .006, .008, .01, .0125, .015, .02, .025, .03, .04, .05, .075,
    .1, .2, .5, 1.0,
)  # fmt: skip
TTFT_EDGES_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
REQUEST_EDGES_S = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0,
)  # fmt: skip
"""Of whole requests and their parts."""


class Histogram:
    """Counts of values in buckets with upper edges."""

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = tuple(edges)
        self.counts = [0] * (len(edges) + 1)
        """counts[i] is of values in (edges[i - 1], edges[i]]; the last is of larger values."""
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.sum += value


@dataclass(frozen=True)
class IntervalStats:
    """Statistics of one response, or of an interval of serving."""

    queue_s: float
    prefill_s: float
    decode_s: float
    prompt_tokens: int
    """Tokens of prompts."""
    generated_tokens: int
    hit_rate: float
    """Hits per routed pair, of all requests in the interval; the next two are also of all."""
    mb_per_token: float
    """Bytes of fetched experts per generated token, 1e6 bytes."""
    link_utilization: float
    """Fetch rate / measured rate of the link; 0 if the link was not measured."""

    @property
    def tokens_per_s(self) -> float:
        return self.generated_tokens / self.decode_s if self.decode_s else 0.0

    def line(self) -> str:
        """The statistics as one line of text."""
        link = ""
        if self.link_utilization:
            link_ms = 1e3 * self.link_utilization * self.decode_s / max(1, self.generated_tokens)
            link = f", link {self.link_utilization:.2f} (at least {link_ms:.1f} ms per token)"
        return (
            f"{self.tokens_per_s:.1f} tok/s, hit {self.hit_rate:.3f}, {self.mb_per_token:.1f} "
            f"MB/token{link}; queue {1e3 * self.queue_s:.0f} ms, prefill "
            f"{1e3 * self.prefill_s:.0f} ms ({self.prompt_tokens} tokens), decode "
            f"{1e3 * self.decode_s:.0f} ms ({self.generated_tokens} tokens)"
        )


@dataclass(frozen=True)
class _Sample:
    """The counters at one time."""

    at: float
    experts: ExpertCounters
    tokens: tuple[int, int]
    """Prompt and generated tokens."""


class EngineStats:
    """The statistics of one engine."""

    def __init__(self, scheduler: Scheduler, expert_runner: Any, link_gb_s: float = 0.0) -> None:
        self.scheduler, self._expert_runner = scheduler, expert_runner
        self.link_gb_s = link_gb_s
        """Measured rate of the link; 0: not measured."""
        self.expert_bytes: int = expert_runner.cache.layout.nbytes
        """Bytes of one packed expert."""
        self.tokens = {"prompt": 0, "completion": 0}
        self.finished = dict.fromkeys(FinishReason, 0)
        self.itl_s, self.ttft_s = Histogram(ITL_EDGES_S), Histogram(TTFT_EDGES_S)
        self.e2e_s, self.queue_s = Histogram(REQUEST_EDGES_S), Histogram(REQUEST_EDGES_S)
        self.prefill_s, self.decode_s = Histogram(REQUEST_EDGES_S), Histogram(REQUEST_EDGES_S)
        """Of finished requests: from submission to end, and the parts that were reached."""
        self.prefill_tokens_s = 0.0
        """Prompt tokens per second of the newest prefill that ended."""
        self.experts = ExpertCounters(0, 0, 0, 0)
        """The expert counters at their last read."""
        self.fetch_gb_s = 0.0
        """Fetch rate between the last two interval polls."""
        self.vram: tuple[int, int] | None = None
        """(free, total) bytes of VRAM at the last interval poll."""
        self.read_vram: Callable[[], tuple[int, int]] | None = None
        """Returns (free, total) bytes of VRAM; None without a GPU."""
        self.poll_interval_s: float | None = None
        """Seconds between polls while requests run; None polls only at first tokens and ends."""
        self.on_request_stats: Callable[[IntervalStats], None] | None = None
        """Called on the engine's thread after each response; must return at once."""
        self.on_interval_stats: Callable[[IntervalStats], None] | None = None
        """Called on the engine's thread after each interval poll; must return at once."""
        self._last_poll = self._sample()
        self._start_samples: dict[Request, _Sample] = {}
        self._first_tokens: list[Request] = []
        """Requests whose first token was generated since the last poll."""
        self._finished_requests: list[Request] = []
        self._logged_mismatch = False

    # -- events, on the engine's thread ------------------------------------------------------------

    def begin(self, batch: Batch) -> None:
        """Start the times of requests that are new in this step; call it before the step."""
        if not self._start_samples:
            self._last_poll = self._sample()  # the engine was idle since the last poll
        for request, _ in batch.scheduled:
            if request not in self._start_samples and not request.done:
                request.times.started = request.times.started or time.perf_counter()
                self._start_samples[request] = self._sample()

    def add_computed(self, request: Request, count: int) -> None:
        """Add this step's prompt tokens; call it before num_computed_tokens grows by `count`."""
        self.tokens["prompt"] += min(
            count, max(0, request.prompt_tokens - request.num_computed_tokens)
        )

    def token(self, request: Request) -> None:
        """Count a generated token, and its TTFT or ITL."""
        now, times = time.perf_counter(), request.times
        self.tokens["completion"] += 1
        if times.first_token:
            self.itl_s.add(now - times.last_token)
        else:
            times.first_token = now
            self.ttft_s.add(now - times.submitted)
            if not request.computed_tokens and now > times.started:
                self.prefill_tokens_s = request.prompt_tokens / (now - times.started)
            self._first_tokens.append(request)
        times.last_token = now

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Count a finished request, and its times."""
        self.finished[reason] += 1
        times = request.times
        times.ended = time.perf_counter()
        self.e2e_s.add(times.ended - times.submitted)
        if times.started:
            self.queue_s.add(times.started - times.submitted)
        if times.started and times.first_token:
            self.prefill_s.add(times.first_token - times.started)
            self.decode_s.add(times.last_token - times.first_token)
        if request in self._start_samples:
            self._finished_requests.append(request)

    @property
    def due(self) -> bool:
        """Whether an interval poll is due."""
        return (
            self.poll_interval_s is not None
            and time.perf_counter() - self._last_poll.at >= self.poll_interval_s
        )

    def poll(self) -> None:
        """Read the counters if a poll is due; call it while no step is in flight."""
        due = self.due
        if not (self._first_tokens or self._finished_requests or due):
            return
        self.update()
        now = self._sample()
        for request in self._first_tokens:
            if not request.done:
                self._start_samples[request] = now  # statistics start with decoding
        finished, self._first_tokens, self._finished_requests = self._finished_requests, [], []
        for request in finished:
            start = self._start_samples.pop(request)
            if request.times.first_token and self.on_request_stats is not None:
                self._call("on_request_stats", self._request_stats(request, start, now))
        if due:
            before, self._last_poll = self._last_poll, now
            copied = now.experts.experts_copied - before.experts.experts_copied
            self.fetch_gb_s = copied * self.expert_bytes / (now.at - before.at) / 1e9
            if self.read_vram is not None:
                self.vram = self.read_vram()
            if self.on_interval_stats is not None and now.tokens != before.tokens:
                self._call("on_interval_stats", self._interval_stats(before, now))

    def update(self) -> ExpertCounters:
        """Read the expert counters; synchronises.

        A mismatch is logged once, not raised: a step that failed halfway leaves one.
        """
        try:
            self.experts = self._expert_runner.counters()
        except AssertionError as error:
            if not self._logged_mismatch:
                LOG.error("The expert counters do not add up: %s", error)
            self._logged_mismatch = True
        return self.experts

    # -- sums --------------------------------------------------------------------------------------

    def _sample(self) -> _Sample:
        tokens = self.tokens["prompt"], self.tokens["completion"]
        return _Sample(time.perf_counter(), self.experts, tokens)

    def _call(self, name: str, stats: IntervalStats) -> None:
        try:
            getattr(self, name)(stats)
        except Exception as error:  # for example a closed terminal; serving continues
            LOG.warning("Could not report timing: %r", error)
            setattr(self, name, None)

    def _request_stats(self, request: Request, start: _Sample, now: _Sample) -> IntervalStats:
        times = request.times
        started = times.started or times.first_token
        return IntervalStats(
            started - times.submitted, times.first_token - started,
            times.last_token - times.first_token,
            request.prompt_tokens, request.completion_tokens - 1,
            *self._expert_rates(start, now, times.last_token - start.at),
        )  # fmt: skip

    def _interval_stats(self, before: _Sample, now: _Sample) -> IntervalStats:
        seconds = now.at - before.at
        prompt, generated = (a - b for a, b in zip(now.tokens, before.tokens, strict=True))
        rates = self._expert_rates(before, now, seconds)
        return IntervalStats(0.0, 0.0, seconds, prompt, generated, *rates)

    def _expert_rates(
        self, before: _Sample, now: _Sample, seconds: float
    ) -> tuple[float, float, float]:
        """Hit rate, MB fetched per generated token, link utilization."""
        routed = now.experts.routed - before.experts.routed
        hit = now.experts.hit - before.experts.hit
        nbytes = (now.experts.experts_copied - before.experts.experts_copied) * self.expert_bytes
        generated = now.tokens[1] - before.tokens[1]
        link_bytes = self.link_gb_s * 1e9 * seconds
        return (
            hit / routed if routed else 1.0,
            nbytes / max(1, generated) / 1e6,
            nbytes / link_bytes if link_bytes else 0.0,
        )
