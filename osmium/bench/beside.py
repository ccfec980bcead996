"""A prompt beside a decode stream: the speed of both, and the longest gap of the stream.

A stream decodes behind seeded state while a long prompt is read.  In the middle of it a short
prompt is submitted.  Method: docs/benchmarks.md.
"""

import statistics
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from osmium.bench.counters import check_routed, difference, expert_counters, hit_rate
from osmium.bench.noise import seed_state
from osmium.bench.prefill import random_ids
from osmium.bench.settings import BenchConfig
from osmium.bench.timed_request import TimedRequest
from osmium.bench.trace_parts import TraceParts
from osmium.engine.engine import Engine
from osmium.errors import ConfigError

__all__ = ["beside_row", "check_beside", "longest_gap"]

SHORT_TOKENS = 64
"""Tokens of the short prompt."""

STREAM_CONTEXT = 1024
"""Tokens of context of the stream."""


@dataclass(frozen=True)
class _Round:
    """Seconds of one round, rates of the stream in tok/s."""

    long_s: float
    short_s: float
    gap_s: float
    before: float
    during: float
    stream_tokens: int


def check_beside(engine: Engine, settings: BenchConfig) -> None:
    """Raises: ConfigError if a row of --prompt-beside does not fit the engine."""
    plan = engine.plan
    for tokens in settings.beside:
        if plan.max_num_seqs < 3:
            raise ConfigError(
                f"--prompt-beside runs three sequences; there is room for {plan.max_num_seqs}. "
                "Start with --max-num-seqs 3."
            )
        room, least = _stream_tokens(engine, tokens), settings.warm_up + 2 * settings.tokens
        if tokens + SHORT_TOKENS + 1 > engine.context or room < least:
            raise ConfigError(
                f"--prompt-beside {tokens} does not fit a context of {engine.context} tokens and "
                f"{plan.num_pages * plan.page_size} tokens of KV cache, with a stream of {least} "
                f"tokens at {STREAM_CONTEXT}. Raise --context or --kv-cache-mb."
            )


def _stream_tokens(engine: Engine, tokens: int) -> int:
    """Most tokens that the stream may generate beside a prompt of `tokens` tokens."""
    page: int = engine.plan.page_size
    pages: int = engine.plan.num_pages
    prompts = tokens + SHORT_TOKENS + 1, SHORT_TOKENS + 1
    left = pages - sum(-(-one // page) + 1 for one in prompts)
    return min(engine.context, left * page) - STREAM_CONTEXT - 1


def beside_row(
    engine: Engine, tokens: int, settings: BenchConfig, parts: TraceParts
) -> dict[str, Any]:
    """A document of a prompt of `tokens` tokens beside a stream.

    Raises: ConfigError if the stream's context ends before the prompt, AssertionError if the
    counters do not add up.
    """
    rng = np.random.default_rng(2)
    engine.run_on_engine_thread(lambda: seed_state(engine))
    rounds: list[_Round] = []
    fresh, before, delay = 0, expert_counters(engine), 0.0
    for number in range(settings.repeats + 1):  # the first gives the time of half a prompt
        # The short prompt replays the first tokens of the part, the long one those behind them.
        unread = parts.take(0, SHORT_TOKENS + tokens)
        if number == 1:
            before, fresh = expert_counters(engine), 0
            rounds.clear()
        fresh += unread
        rounds.append(_run(engine, tokens, settings, rng, delay))
        delay = rounds[-1].long_s / 2
    total = difference(before, expert_counters(engine))
    prompts = settings.repeats * (tokens + SHORT_TOKENS)
    check_routed(engine, total, prompts + sum(one.stream_tokens for one in rounds))
    seconds = statistics.median(one.long_s for one in rounds)
    return {
        "what": "beside",
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "ttft_ms": seconds * 1e3,
        "samples_ms": [round(1e3 * one.long_s, 3) for one in rounds],
        "stream_context": STREAM_CONTEXT,
        "stream_before": statistics.median(one.before for one in rounds),
        "stream_during": statistics.median(one.during for one in rounds),
        "longest_gap_ms": 1e3 * max(one.gap_s for one in rounds),
        "longest_gaps_ms": [round(1e3 * one.gap_s, 3) for one in rounds],
        "short_tokens": SHORT_TOKENS,
        "short_ms": 1e3 * statistics.median(one.short_s for one in rounds),
        "short_samples_ms": [round(1e3 * one.short_s, 3) for one in rounds],
        "hit_rate": hit_rate(total),
        **total,
        "trace_fresh": fresh / prompts if parts.tokens else None,
    }


def _run(
    engine: Engine, tokens: int, settings: BenchConfig, rng: np.random.Generator, delay: float
) -> _Round:
    """One round; the short prompt is submitted `delay` seconds after the long one."""
    stream = TimedRequest(
        engine, [1] * (STREAM_CONTEXT + 1), _stream_tokens(engine, tokens), STREAM_CONTEXT
    )
    try:
        _wait_for(stream, settings.warm_up + settings.tokens)
        before = stream.times[-settings.tokens :]
        ids = [1] * SHORT_TOKENS + random_ids(rng, engine, tokens)
        long = TimedRequest(engine, ids, 1, SHORT_TOKENS)
        long.wait(delay)
        short = TimedRequest(engine, random_ids(rng, engine, SHORT_TOKENS), 1)
        long.wait()
        short.wait()
        end = long.times[0]
        count = sum(one > end for one in stream.times)
        _wait_for(stream, len(stream.times) + (count == 0))
    finally:
        stream.cancel()
    during = sum(long.start < one <= end for one in stream.times) / long.first_token_s
    return _Round(
        long.first_token_s, short.first_token_s, longest_gap(stream.times, long.start, end),
        (len(before) - 1) / (before[-1] - before[0]), during, len(stream.times),
    )  # fmt: skip


def _wait_for(stream: TimedRequest, tokens: int) -> None:
    """Wait until the stream has generated `tokens` tokens.

    Raises: ConfigError if its context ends before.
    """
    while len(stream.times) < tokens:
        if stream.wait(1e-3) and len(stream.times) < tokens:
            raise ConfigError(
                f"the decode stream beside the prompt ended after {len(stream.times)} tokens, "
                f"before the prompt did. Raise --context or --kv-cache-mb, or lower --warm-up."
            )


def longest_gap(times: list[float], start: float, end: float) -> float:
    """Seconds of the longest gap between two consecutive times that overlaps [start, end].

    A gap that has no end lasts until `end`.
    """
    gaps = [late - early for early, late in pairwise(times) if late > start and early < end]
    if times and times[-1] < end:
        gaps.append(end - times[-1])
    return max(gaps, default=end - start)
