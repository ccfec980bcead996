"""`--timing`: a line on stderr for each response, and every few seconds while serving."""

import contextlib
import queue
import sys
import time

from osmium.engine.engine import Engine
from osmium.engine.stats import IntervalStats

__all__ = ["EVERY_S", "ResponseTimes", "enable_timing"]

EVERY_S = 5.0
"""Seconds between lines while responses run."""


def enable_timing(engine: Engine) -> None:
    """Print on the engine's thread, until the engine is closed."""
    engine.stats.on_request_stats = lambda took: _print("response", took)
    engine.stats.poll_interval_s = EVERY_S
    engine.stats.on_interval_stats = _RateLimited()


class ResponseTimes:
    """The same for one response after the other, printed by the thread that shows the text, so that
    the line never lands inside of it."""

    def __init__(self, engine: Engine) -> None:
        self._took: queue.SimpleQueue[IntervalStats] = queue.SimpleQueue()
        engine.stats.on_request_stats = self._took.put

    def print_next(self) -> None:
        """Print the line of the response that has just ended."""
        with contextlib.suppress(queue.Empty):
            _print("response", self._took.get(timeout=2))


class _RateLimited:
    """At most one line per EVERY_S, though the counters may be read more often."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, took: IntervalStats) -> None:
        now = time.monotonic()
        if now - self._last >= EVERY_S - 1:
            self._last = now
            print(f"osmium: {_interval(took)}", file=sys.stderr, flush=True)


def _interval(took: IntervalStats) -> str:
    """What was read and generated since the last line: a long prompt is seen to go on."""
    seconds = took.decode_s
    return (
        f"last {seconds:.1f} s: prompts {took.prompt_tokens:,} tokens "
        f"({took.prompt_tokens / seconds:.0f} tok/s), generated {took.generated_tokens:,} tokens "
        f"({took.tokens_per_s:.1f} tok/s), hit {took.hit_rate:.3f}, {took.mb_per_token:.1f} "
        "MB/token"
    )


def _print(what: str, took: IntervalStats) -> None:
    print(f"osmium: {what}: {took.line()}", file=sys.stderr, flush=True)
