"""Decode and prefill throughput, end to end through the engine.

Decode rows generate tokens at a context of --depth tokens of random state; a row is the median of
its repeats.  Rows of prompts are in prefill.py and beside.py.
Fails unless the counters of router, slot assignment and fetch add up and sampled slots equal host
memory.  Method, roofline and cold start: docs/benchmarks.md.
"""

import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil

from osmium.bench.beside import beside_row, check_beside
from osmium.bench.counters import check_routed, difference, expert_counters, hit_rate
from osmium.bench.environment import environment
from osmium.bench.mma_rate import mma_rates
from osmium.bench.noise import arrays, seed_state
from osmium.bench.prefill import check_prompts, prompt_row
from osmium.bench.rates import copy_rate, link_rate
from osmium.bench.report import notes
from osmium.bench.settings import BenchConfig
from osmium.bench.trace_parts import TraceParts
from osmium.engine.engine import Engine
from osmium.engine.request import Finish, Token
from osmium.errors import ConfigError
from osmium.experts.cache import reset_cache, verify

__all__ = ["BenchConfig", "OnRow", "measure"]


SAMPLED_SLOTS = 8


OnRow = Callable[[dict[str, Any], int, float | None], None]
"""Called after each row with the row, the number of rows left, and an estimate of their seconds.

The estimate is None until all kinds of rows that are left have been timed."""


def measure(
    engine: Engine,
    settings: BenchConfig,
    memory_gb_s: float = 0.0,
    on_row: OnRow | None = None,
) -> dict[str, Any]:
    """Measure all rows: a document for JSON.  `memory_gb_s` is the measured rate of VRAM.

    Raises: ConfigError if sizes do not fit the engine, AssertionError if a check fails.
    """
    for name, value, minimum in (
        ("--tokens", settings.tokens, 2), ("--repeats", settings.repeats, 1),
        ("--warm-up", settings.warm_up, 1), ("--temperature", settings.temperature, 0),
    ):  # fmt: skip
        if not value >= minimum:
            raise ConfigError(f"{name} is {value}; it must be at least {minimum}.")
    check_prompts(engine, settings)
    check_beside(engine, settings)
    for count in settings.parallel:
        for depth in settings.depths:
            _depth(engine, depth, count, settings)  # refused before the first row is measured
    rates = {"memory_gb_s": memory_gb_s}
    rates |= engine.run_on_engine_thread(lambda: _measured_rates(engine, settings))
    parts = TraceParts(engine)
    rows = _rows(engine, settings, rates, parts, on_row)
    checked = engine.run_on_engine_thread(lambda: _verify(engine))
    experts = engine.status()["experts"]
    plan, gpu = engine.plan, getattr(getattr(engine.runner.ops, "runtime", None), "device", None)
    free, total = (0, 0) if gpu is None else engine.run_on_engine_thread(gpu.memory)
    return {
        "model": engine.name,
        **environment(engine.device, gpu),
        "repeats": settings.repeats,
        "rates": rates,
        "rows": rows,
        "notes": notes(rows, parts.tokens, parts.taken),
        "experts": experts,
        "expert_slots": [plan.expert_slots, plan.num_experts],
        "slots_verified": checked,
        "kv_dtype": plan.kv_dtype,
        "vram": plan.vram,
        "vram_in_use": total - free,
        "ram": plan.ram,
        "rss": psutil.Process().memory_info().rss,
        "swap_used": psutil.swap_memory().used,
        "host_memory": engine.host_memory,
    }


def _measured_rates(engine: Engine, settings: BenchConfig) -> dict[str, float]:
    """Rates of the link, by the fetch kernel and by the copy engine, and of mma for prompts."""
    rates = {"link_gb_s": link_rate(engine), "copy_gb_s": copy_rate(engine)}
    if settings.prompts or settings.turns:
        largest = max(arrays(engine.runner.state.layers), key=lambda array: array.nbytes)
        rates |= mma_rates(engine.runner.ops, largest)  # no sequence uses the state now
    return rates


def _rows(
    engine: Engine,
    settings: BenchConfig,
    rates: dict[str, float],
    parts: TraceParts,
    on_row: OnRow | None,
) -> list[dict[str, Any]]:
    """Measure every row; `on_row` is called after each."""
    prompt = partial(prompt_row, engine)
    more = settings, rates, parts
    planned: list[tuple[str, int, Callable[[], dict[str, Any]]]] = [
        *(("prefill", size, partial(prompt, 0, size, *more)) for size in settings.prompts),
        *(("turn", size, partial(prompt, old, size, *more)) for old, size in settings.turns),
        *(
            ("beside", size, partial(beside_row, engine, size, settings, parts))
            for size in settings.beside
        ),
        *(
            ("decode", 1, partial(_decode, engine, depth, count, settings, rates))
            for count in settings.parallel
            for depth in settings.depths
        ),
    ]
    rows: list[dict[str, Any]] = []
    cost: dict[str, float] = {}
    """Seconds of the last row of each kind: a decode row, or a prompt token."""
    for number, (what, size, run) in enumerate(planned, 1):
        start = time.perf_counter()
        if what == "decode":
            parts.reset()
        rows.append(run())
        cost[what] = (time.perf_counter() - start) / size
        if on_row is not None:
            left = planned[number:]
            known = all(kind in cost for kind, *_ in left)
            seconds = sum(cost.get(kind, 0) * size for kind, size, _ in left)
            on_row(rows[-1], len(left), seconds if known else None)
    return rows


def _decode(
    engine: Engine, depth: str, count: int, settings: BenchConfig, rates: dict[str, float]
) -> dict[str, Any]:
    short_run = settings.short_run
    context = _depth(engine, depth, count, settings)
    engine.run_on_engine_thread(lambda: _reset_cache(engine))
    engine.run_on_engine_thread(lambda: seed_state(engine))  # the last row has changed it
    before, position, repeats = expert_counters(engine), context, []
    cold_s = _run_decode(engine, position, count, short_run, settings)
    cold = difference(before, expert_counters(engine))
    if settings.warm_up > short_run:
        rest = settings.warm_up - short_run
        _run_decode(engine, position + short_run, count, rest, settings)
    position += settings.warm_up
    for _ in range(settings.repeats):
        before = expert_counters(engine)
        seconds = _run_decode(engine, position, count, settings.tokens, settings)
        experts = difference(before, expert_counters(engine))
        repeats.append((seconds / (settings.tokens - 1), experts))
        position += settings.tokens
    before = expert_counters(engine)
    _run_decode(engine, position, count, short_run, settings)
    warm = difference(before, expert_counters(engine))
    step_s = statistics.median(seconds for seconds, _ in repeats)
    total = {name: sum(experts[name] for _, experts in repeats) for name in repeats[0][1]}
    steps = settings.repeats * settings.tokens
    check_routed(engine, total, steps * count)
    fetched = total["experts_copied"] * engine.runner.expert_runner.cache.layout.nbytes / steps
    read = _bytes_read(engine, context, count)
    link, memory = rates["link_gb_s"] * 1e9, rates["memory_gb_s"] * 1e9
    fetch_batch = max(1, round(total["experts_copied"] / (steps * engine.config.num_layers)))
    isolated = 1e9 * engine.run_on_engine_thread(lambda: link_rate(engine, fetch_batch))
    roofline_s = max(fetched / link if link else 0, read / memory if memory else 0)
    return {
        "what": "decode",
        "depth": context,
        "sequences": count,
        "temperature": settings.temperature,
        "tokens": settings.tokens,
        "tokens_per_s": count / step_s,
        "ms_per_token": step_s * 1e3,
        "samples_ms": [round(1e3 * seconds, 3) for seconds, _ in repeats],
        "cold_ms_per_token": cold_s * 1e3 / max(1, short_run - 1),
        "hit_rate_cold_64": hit_rate(cold),
        "hit_rate_warm_64": hit_rate(warm),
        "hit_rate": hit_rate(total),
        **total,
        "mb_fetched_per_token": fetched / 1e6,
        "mb_prefetched_per_token": total["prefetch_bytes"] / steps / 1e6,
        "prefetch_accuracy": total["prefetch_hits"] / max(1, total["prefetched"]),
        "link_gb_s": fetched / step_s / 1e9,
        "fetch_batch": fetch_batch,
        "link_gb_s_isolated": isolated / 1e9,
        "link_utilization": fetched / step_s / isolated if isolated else 0.0,
        "mb_read_per_token": read / 1e6,
        "vram_gb_s": read / step_s / 1e9,
        "vram_utilization": read / step_s / memory if memory else 0.0,
        "roofline_ms": roofline_s * 1e3,
        "roofline_fraction": roofline_s / step_s,
    }


def _reset_cache(engine: Engine) -> None:
    """Empty the expert cache, as after a first start."""
    if engine.runner.expert_runner.host_experts is not None:
        reset_cache(engine.runner.ops, engine.runner.expert_runner.cache)


def _depth(engine: Engine, depth: str, count: int, settings: BenchConfig) -> int:
    """Tokens of context of a decode row, from --depth.

    Raises: ConfigError if `depth` is no size, or does not fit with the generated tokens.
    """
    plan = engine.plan
    generated = settings.warm_up + settings.repeats * settings.tokens + settings.short_run
    capacity = min(engine.context, plan.num_pages * plan.page_size // count)
    text = depth.lower()
    try:
        if text.endswith("%"):
            tokens = int(capacity * float(text[:-1]) / 100)
        else:
            tokens = int(float(text.rstrip("k")) * (1024 if text.endswith("k") else 1))
    except ValueError:
        raise ConfigError(f"--depth is {depth!r}; write 1k, 4096 or 90%.") from None
    max_tokens = capacity - generated - count * SPACING
    if text.endswith("%"):
        tokens = max(1, min(tokens, max_tokens))
    if not 0 < tokens <= max_tokens or count > plan.max_num_seqs:
        raise ConfigError(
            f"{count} sequences of {tokens} tokens, and {generated} generated tokens each "
            f"(--tokens {settings.tokens}, --repeats {settings.repeats}), do not fit: there is "
            f"room for {plan.max_num_seqs} sequences of {capacity} tokens. "
            "Raise --context, --kv-cache-mb or --max-num-seqs, or lower --depth or --tokens."
        )
    return tokens


SPACING = 768
"""Tokens between the positions of sequences that decode together.

A quarter of a generated trace's 3,072 tokens: up to four sequences replay different routing."""


def _run_decode(
    engine: Engine, position: int, count: int, tokens: int, settings: BenchConfig
) -> float:
    """Seconds from the last sequence's first token to the last token, of `count` sequences."""
    params = settings.sampling(tokens)
    done = threading.Semaphore(0)
    times: list[float] = []
    errors: list[Exception] = []

    def on_event(event: Token | Finish) -> None:
        if isinstance(event, Token):
            times.append(time.perf_counter())
            return
        if event.error is not None:
            errors.append(event.error)
        done.release()

    for row in range(count):
        prompt = [row + 1] * (position + row * SPACING + 1)
        engine.submit(prompt, params, on_event, computed_tokens=len(prompt) - 1)
    for _ in range(count):
        done.acquire()
    if errors:
        raise errors[0]
    times.sort()
    return times[-1] - times[count - 1]


def _bytes_read(engine: Engine, depth: int, count: int) -> float:
    """The least bytes of VRAM that a decode step of `count` sequences reads or writes."""
    plan, config, cache = engine.plan, engine.config, engine.runner.expert_runner.cache
    state = engine.runner.state
    pages = state.num_pages * state.page_size
    kv = sum(
        array.nbytes / pages * depth
        for layer, mixer in zip(state.layers, config.layer_types, strict=True)
        if mixer == "attention"
        for array in arrays(layer)
    )
    recurrent = sum(
        2 * array.nbytes / state.num_slots
        for layer, mixer in zip(state.layers, config.layer_types, strict=True)
        if mixer != "attention"
        for array in arrays(layer)
    )
    experts = config.num_layers * config.top_k * cache.layout.nbytes
    return float(plan.vram.get("weights", 0) + count * (kv + recurrent + experts))


def _verify(engine: Engine) -> int:
    """Compare sampled slots with host memory: how many were compared, 0 without host experts."""
    store, ops = engine.runner.expert_runner, engine.runner.ops
    if store.host_experts is None:
        return 0
    packed_experts: Any = ops.host_view(store.host_experts.packed)
    return verify(ops, store.cache, packed_experts, SAMPLED_SLOTS, int(time.time()))
