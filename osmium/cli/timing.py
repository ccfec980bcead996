"""`--timing`: one line on stderr for each reply, and every few seconds while somebody is served."""

import sys
import time

from osmium.engine.engine import Engine
from osmium.engine.meter import Took

__all__ = ["EVERY_S", "tell_timing"]

EVERY_S = 5.0
"""Seconds between lines while replies run."""


def tell_timing(engine: Engine, while_serving: bool = False) -> None:
    """From now on, until the engine is closed."""
    engine.meter.on_request_stats = lambda took: _print("reply", took)
    if while_serving:
        engine.meter.poll_interval_s = EVERY_S
        engine.meter.on_interval_stats = _Paced()


class _Paced:
    """Says no more than one line in EVERY_S, though others may look more often."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, took: Took) -> None:
        now = time.monotonic()
        if now - self._last >= EVERY_S - 1:
            self._last = now
            _print(f"last {took.decode_s:.1f} s", took)


def _print(what: str, took: Took) -> None:
    print(f"osmium: {what}: {took.line()}", file=sys.stderr, flush=True)
