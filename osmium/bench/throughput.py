"""Decode and prefill throughput, end to end through the engine.

Decode rows generate tokens at a context of --depth tokens of random state; a row is the median of
its repeats.  A prefill row is timed from the submission of a random prompt to its first token.
Fails unless the counters of router, slot assignment and fetch add up and sampled slots equal host
memory.  Method, roofline and cold start: docs/benchmarks.md.
"""

import functools
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from osmium.bench.environment import environment
from osmium.cuda.stream import Event
from osmium.engine.engine import Engine
from osmium.engine.request import Finish, SamplingParams, Token
from osmium.errors import ConfigError
from osmium.experts.cache import reset_cache, verify
from osmium.ops import Ops
from osmium.quant.floats import bf16_from_f32

__all__ = ["BenchConfig", "OnRow", "arrays", "fill_noise", "link_rate", "measure", "seed_state"]


SAMPLED_SLOTS = 8


@dataclass(frozen=True)
class BenchConfig:
    """The rows to measure, and how."""

    depths: tuple[str, ...] = ("1k",)
    """Tokens of context, as 1k, or a fraction of the KV cache, as 90%."""
    tokens: int = 256
    """Timed tokens of each repeat."""
    repeats: int = 3
    """Repeats of each row; the median is the result."""
    warm_up: int = 256
    """Untimed tokens of a decode row before its repeats."""
    parallel: tuple[int, ...] = (1,)
    """Sequences of a decode row."""
    prompts: tuple[int, ...] = ()
    """Prompt tokens of the prefill rows."""
    temperature: float = 0.0
    """Temperature of decode rows; above 0 with top-k 20 and top-p .95, usual defaults of models."""

    @property
    def short_run(self) -> int:
        """Tokens of the cold start, and of the warm start."""
        return min(64, self.warm_up, self.tokens)

    def sampling(self, tokens: int) -> SamplingParams:
        """Sampling parameters of a request for `tokens` tokens."""
        greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        if self.temperature == 0:
            return greedy
        return replace(greedy, temperature=self.temperature, top_k=20, top_p=0.95, seed=1)


OnRow = Callable[[dict[str, Any], int, float | None], None]
"""Called after each row with the row, the number of rows left, and an estimate of their seconds.

The estimate is None until both kinds of rows that are left have been timed."""


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
    for tokens in settings.prompts:
        if tokens < 1 or tokens + 1 > engine.context:
            raise ConfigError(
                f"--prompt-tokens {tokens} does not fit the context of {engine.context} tokens."
            )
    for count in settings.parallel:
        for depth in settings.depths:
            _depth(engine, depth, count, settings)  # refused before the first row is measured
    rates = {
        "link_gb_s": engine.run_on_engine_thread(lambda: link_rate(engine)),
        "memory_gb_s": memory_gb_s,
    }
    rows = _rows(engine, settings, rates, on_row)
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


def _rows(
    engine: Engine, settings: BenchConfig, rates: dict[str, float], on_row: OnRow | None
) -> list[dict[str, Any]]:
    """Measure every row; `on_row` is called after each."""
    prompts = [("prefill", tokens, 1, "") for tokens in settings.prompts]
    decodes = [
        ("decode", 1, count, depth) for count in settings.parallel for depth in settings.depths
    ]
    all_rows = [*prompts, *decodes]
    rows: list[dict[str, Any]] = []
    cost: dict[
        str, float
    ] = {}  # seconds of the last row of each kind: a decode row, a prompt token
    for number, (what, tokens, count, depth) in enumerate(all_rows, 1):
        start = time.perf_counter()
        if what == "prefill":
            rows.append(_prefill(engine, tokens, settings, rates))
        else:
            rows.append(_decode(engine, depth, count, settings, rates))
        cost[what] = (time.perf_counter() - start) / tokens
        if on_row is not None:
            left = all_rows[number:]
            known = all(kind in cost for kind, *_ in left)
            seconds = sum(cost.get(kind, 0) * size for kind, size, *_ in left)
            on_row(rows[-1], len(left), seconds if known else None)
    return rows


def seed_state(engine: Engine) -> None:
    """Fill every KV page and state slot with seeded random values."""
    for array in arrays(engine.runner.state.layers):
        fill_noise(engine.runner.ops, array)


def fill_noise(ops: Ops, array: Any) -> None:
    """Fill a device array with seeded random values, small and finite in each format of a dtype."""
    size = math.prod(array.shape)
    values, flat = _noise(np.dtype(array.dtype)), array.reshape(size)
    for start in range(0, size, len(values)):
        part = flat[start : min(start + len(values), size)]
        ops.copy_h2d(part, values[: part.shape[0]])


@functools.cache
def _noise(dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    rng, size = np.random.default_rng(7), 1 << 22
    if dtype == np.uint8:  # no NaN as e4m3, nor as halves of an f16
        return rng.integers(0, 256, size, np.uint8) & np.uint8(0xBF)
    if dtype == np.int8:
        return rng.integers(-127, 128, size, np.int8)
    if dtype == np.float16:
        return np.full(size, 0.01, np.float16)
    noise = rng.standard_normal(size, np.float32)
    return bf16_from_f32(noise) if dtype == np.uint16 else noise * np.float32(0.1)


def arrays(value: Any) -> Iterator[Any]:
    """Yield every array in a tree of dataclasses and tuples."""
    if is_dataclass(value):
        for field in fields(value):
            yield from arrays(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from arrays(item)
    elif hasattr(value, "nbytes"):
        yield value


def _prefill(
    engine: Engine, tokens: int, settings: BenchConfig, rates: dict[str, float]
) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    times, before = [], _experts(engine)
    for repeat in range(settings.repeats + 1):  # the first is not timed
        if repeat == 1:
            before = _experts(engine)
        ids = [int(token) for token in rng.integers(0, engine.config.vocab_size, tokens)]
        start = time.perf_counter()
        next(iter(engine.generate(ids, SamplingParams(temperature=0, max_tokens=1))))
        times.append(time.perf_counter() - start)
    total = _difference(before, _experts(engine))
    _check_routed(engine, total, settings.repeats * tokens)
    seconds = statistics.median(times[1:])
    fetched = (
        total["experts_copied"] * engine.runner.expert_runner.cache.layout.nbytes / settings.repeats
    )
    link = rates["link_gb_s"] * 1e9
    return {
        "what": "prefill",
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "ttft_ms": seconds * 1e3,
        "hit_rate": _hit_rate(total),
        **total,
        "mb_fetched": fetched / 1e6,
        "link_gb_s": fetched / seconds / 1e9,
        "link_utilization": fetched / seconds / link if link else 0.0,
    }


def _decode(
    engine: Engine, depth: str, count: int, settings: BenchConfig, rates: dict[str, float]
) -> dict[str, Any]:
    short_run = settings.short_run
    context = _depth(engine, depth, count, settings)
    engine.run_on_engine_thread(lambda: _reset_cache(engine))
    engine.run_on_engine_thread(lambda: seed_state(engine))  # the last row has changed it
    before, position, repeats = _experts(engine), context, []
    cold_s = _run_decode(engine, position, count, short_run, settings)
    cold = _difference(before, _experts(engine))
    if settings.warm_up > short_run:
        rest = settings.warm_up - short_run
        _run_decode(engine, position + short_run, count, rest, settings)
    position += settings.warm_up
    for _ in range(settings.repeats):
        before = _experts(engine)
        seconds = _run_decode(engine, position, count, settings.tokens, settings)
        experts = _difference(before, _experts(engine))
        repeats.append((seconds / (settings.tokens - 1), experts))
        position += settings.tokens
    before = _experts(engine)
    _run_decode(engine, position, count, short_run, settings)
    warm = _difference(before, _experts(engine))
    step_s = statistics.median(seconds for seconds, _ in repeats)
    total = {name: sum(experts[name] for _, experts in repeats) for name in repeats[0][1]}
    steps = settings.repeats * settings.tokens
    _check_routed(engine, total, steps * count)
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
        "hit_rate_cold_64": _hit_rate(cold),
        "hit_rate_warm_64": _hit_rate(warm),
        "hit_rate": _hit_rate(total),
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
        engine.submit(prompt, params, on_event, skip_prefill=True)
    for _ in range(count):
        done.acquire()
    if errors:
        raise errors[0]
    times.sort()
    return times[-1] - times[count - 1]


def _experts(engine: Engine) -> dict[str, int]:
    """The expert counters.  Raises: AssertionError if they do not add up."""
    counters: dict[str, int] = engine.status()["experts"]
    if counters["routed"] != counters["hit"] + counters["missed"]:
        raise AssertionError(f"the expert counters do not add up: {counters}")
    return counters


def _difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in after}


def _check_routed(engine: Engine, experts: dict[str, int], tokens: int) -> None:
    """Raises: AssertionError if the counters have fewer routed experts than `tokens` need."""
    expected = tokens * engine.config.num_layers * engine.config.top_k
    if experts["routed"] < expected:
        raise AssertionError(
            f"{tokens} tokens route to {expected} experts; the counters have {experts}"
        )


def _hit_rate(experts: dict[str, int]) -> float:
    return experts["hit"] / max(1, experts["routed"])


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


def link_rate(engine: Engine, experts: int | None = None) -> float:
    """GB/s of fetching `experts` packed experts at once with nothing else running.

    None takes as many as a step may fetch.  0 if the engine never fetches.
    Each resident expert is fetched into its own slot, so that no slot changes.
    """
    ops, store = engine.runner.ops, engine.runner.expert_runner
    cache, plan = store.cache, store.assignment
    machine = getattr(ops, "runtime", None)
    if store.host_experts is None or machine is None:
        return 0.0
    counters = ops.copy_d2h(cache.counters)
    resident: npt.NDArray[Any] = ops.copy_d2h(cache.slot_to_expert[0])
    count = min(len(resident), plan.expert.shape[0], experts or len(resident))
    slots = np.arange(count, dtype=np.int32)
    expert = np.where(resident[slots] < 0, slots, resident[slots])  # a free slot: any expert
    entries = np.zeros((4, plan.expert.shape[0]), np.int32)
    entries[0, : len(slots)], entries[1, : len(slots)], entries[2:, : len(slots)] = (
        expert, slots, 1,
    )  # fmt: skip
    ops.copy_h2d(plan.count, np.array([len(slots)], np.int32))
    for array, values in zip(
        (plan.expert, plan.slot, plan.fetch_flags, plan.uses), entries, strict=True
    ):
        ops.copy_h2d(array, values)
    times = []
    for _ in range(9):
        start = Event(machine.device).record(machine.stream)
        for _ in range(4):
            ops.fetch_experts(cache, plan, store.host_experts, 0)
        end = Event(machine.device).record(machine.stream)
        times.append((end - start) / 4)
    ops.copy_h2d(cache.counters, counters)
    return float(len(slots) * cache.layout.nbytes / statistics.median(times) / 1e6)


def _verify(engine: Engine) -> int:
    """Compare sampled slots with host memory: how many were compared, 0 without host experts."""
    store, ops = engine.runner.expert_runner, engine.runner.ops
    if store.host_experts is None:
        return 0
    packed_experts: Any = ops.host_view(store.host_experts.packed)
    return verify(ops, store.cache, packed_experts, SAMPLED_SLOTS, int(time.time()))
