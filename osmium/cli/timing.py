"""`--timing`: a line on stderr for each response, and every few seconds while serving."""

import contextlib
import queue
import sys
import time

from osmium.engine.engine import Engine
from osmium.engine.stats import IntervalStats

__all__ = ["INTERVAL_S", "ResponseTimes", "enable_timing"]

INTERVAL_S = 5.0
"""Seconds between lines while requests run."""


def enable_timing(engine: Engine) -> None:
    """Print a line per response and per interval, on the engine's thread, until it is closed."""
    engine.stats.on_request_stats = lambda stats: _print("response", stats)
    engine.stats.poll_interval_s = INTERVAL_S
    engine.stats.on_interval_stats = _RateLimited()


class ResponseTimes:
    """Prints a line after each response, on the display's thread, so that it never splits text."""

    def __init__(self, engine: Engine) -> None:
        self._queue: queue.SimpleQueue[IntervalStats] = queue.SimpleQueue()
        engine.stats.on_request_stats = self._queue.put

    def print_next(self) -> None:
        """Print the line of the response that has ended last."""
        with contextlib.suppress(queue.Empty):
            _print("response", self._queue.get(timeout=2))


class _RateLimited:
    """At most one line per INTERVAL_S, though the counters may be read more often."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, stats: IntervalStats) -> None:
        now = time.monotonic()
        if now - self._last >= INTERVAL_S - 1:
            self._last = now
            print(f"osmium: {_interval(stats)}", file=sys.stderr, flush=True)


def _interval(stats: IntervalStats) -> str:
    """Prompt and generated tokens since the last line; shows the progress of a long prompt."""
    seconds = stats.decode_s
    return (
        f"last {seconds:.1f} s: prompts {stats.prompt_tokens:,} tokens "
        f"({stats.prompt_tokens / seconds:.0f} tok/s), generated {stats.generated_tokens:,} tokens "
        f"({stats.tokens_per_s:.1f} tok/s), hit {stats.hit_rate:.3f}, {stats.mb_per_token:.1f} "
        "MB/token"
    )


def _print(what: str, stats: IntervalStats) -> None:
    print(f"osmium: {what}: {stats.line()}", file=sys.stderr, flush=True)
