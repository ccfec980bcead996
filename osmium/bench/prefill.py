"""Prefill rows and turn rows: the time to the first token of new tokens, and what limits it.

A prefill row has an empty state.  A turn row has seeded values in the state of its first tokens.
Columns and method: docs/benchmarks.md.
"""

import statistics
from typing import Any

import numpy as np

from osmium.bench.counters import check_routed, difference, expert_counters, hit_rate
from osmium.bench.noise import seed_state
from osmium.bench.operations import prompt_multiply_adds
from osmium.bench.settings import BenchConfig
from osmium.bench.timed_request import TimedRequest
from osmium.bench.trace_parts import TraceParts
from osmium.engine.engine import Engine
from osmium.errors import ConfigError

__all__ = ["check_prompts", "prompt_row", "random_ids"]


def check_prompts(engine: Engine, settings: BenchConfig) -> None:
    """Raises: ConfigError if a prefill row or a turn row does not fit the engine."""
    capacity = min(engine.context, engine.plan.num_pages * engine.plan.page_size)
    for tokens in settings.prompts:
        if tokens < 1 or tokens + 1 > capacity:
            raise ConfigError(
                f"--prompt-tokens {tokens} does not fit the context of {capacity} tokens. "
                "Raise --context or --kv-cache-mb."
            )
    for context, tokens in settings.turns:
        if min(context, tokens) < 1 or context + tokens + 1 > capacity:
            raise ConfigError(
                f"--turns {context}+{tokens} does not fit the context of {capacity} tokens. "
                "Raise --context or --kv-cache-mb."
            )


def prompt_row(
    engine: Engine,
    context: int,
    tokens: int,
    settings: BenchConfig,
    rates: dict[str, float],
    parts: TraceParts,
) -> dict[str, Any]:
    """A document of `tokens` new tokens behind `context` seeded ones.

    Raises: AssertionError if the counters do not add up.
    """
    rng = np.random.default_rng(1)
    engine.run_on_engine_thread(lambda: seed_state(engine))  # the last row has changed it
    _warm_up(engine, settings, parts)
    times, fresh, before = [], 0, expert_counters(engine)
    for repeat in range(settings.repeats + 1):  # the first is not timed
        unread = parts.take(context, tokens)
        if repeat == 1:
            before, fresh = expert_counters(engine), 0
        fresh += unread
        ids = [1] * context + random_ids(rng, engine, tokens)
        request = TimedRequest(engine, ids, 1, context)
        request.wait()
        times.append(request.first_token_s)
    total = difference(before, expert_counters(engine))
    check_routed(engine, total, settings.repeats * tokens)
    seconds = statistics.median(times[1:])
    fetched = (
        total["experts_copied"] * engine.runner.expert_runner.cache.layout.nbytes / settings.repeats
    )
    return {
        "what": "turn" if context else "prefill",
        **({"context": context} if context else {}),
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "ttft_ms": seconds * 1e3,
        "samples_ms": [round(1e3 * one, 3) for one in times[1:]],
        "hit_rate": hit_rate(total),
        **total,
        "mb_fetched": fetched / 1e6,
        **_limits(engine, context, tokens, seconds, fetched, rates),
        "trace_fresh": fresh / (settings.repeats * tokens) if parts.tokens else None,
    }


def _warm_up(engine: Engine, settings: BenchConfig, parts: TraceParts) -> None:
    """Decode tokens, so that the cache holds the experts of some response."""
    tokens = min(settings.warm_up, engine.context - 2)
    parts.take(1, tokens)
    TimedRequest(engine, [1, 1], tokens, 1).wait()


def random_ids(rng: np.random.Generator, engine: Engine, tokens: int) -> list[int]:
    """Random token ids of the engine's vocabulary."""
    ids: list[int] = rng.integers(0, engine.config.vocab_size, tokens).tolist()
    return ids


def _limits(
    engine: Engine,
    context: int,
    tokens: int,
    seconds: float,
    fetched: float,
    rates: dict[str, float],
) -> dict[str, Any]:
    """Rates of link and tensor cores, and the least time by the larger of both."""
    link = 1e9 * max(rates["link_gb_s"], rates["copy_gb_s"])
    passes = -(-tokens // engine.plan.prefill_chunk)
    unresident = passes * _unresident_bytes(engine)
    operations = 2 * prompt_multiply_adds(engine.config, context, tokens)
    int8_operations, mma = 2 * operations, 1e12 * rates["mma_s8_tops"]
    link_s = min(unresident, fetched) / link if link else 0.0
    mma_s = int8_operations / mma if mma else 0.0
    return {
        "passes": passes,
        "mb_unresident": unresident / 1e6,
        "link_gb_s": fetched / seconds / 1e9,
        "link_utilization": fetched / seconds / link if link else 0.0,
        "tflops": operations / seconds / 1e12,
        "mma_utilization": int8_operations / seconds / mma if mma else 0.0,
        "floor_ms": 1e3 * max(link_s, mma_s),
        "floor_of": "link" if link_s > mma_s else "mma",
        "floor_fraction": max(link_s, mma_s) / seconds,
    }


def _unresident_bytes(engine: Engine) -> int:
    """Bytes of the packed experts of all layers that have no slot."""
    runner, experts = engine.runner.expert_runner, engine.config.num_experts
    if runner.host_experts is None:
        return 0
    missing = sum(experts - layer.shape[0] for layer in runner.cache.slots)
    return int(missing * runner.cache.layout.nbytes)
