"""How fast replies are written and prompts are read, end to end through the engine.

Method.  Decode: sequences with a context of --depth tokens, whose KV and states hold seeded random
values, generate tokens, greedily without --temperature.  Where routers are random, expert ids come
from a trace (--replay-routing).  Warm-up tokens are not timed.  Then the median of the repeats
counts; each continues where the last one ended, so that no token of the trace is used twice.
Prefill: a prompt of random ids, timed from its submission to its first token.
Every routed expert is computed: the counters of the three kernels that route, look up and copy must
add up, and sampled slots must equal host memory byte for byte, or the benchmark fails.

The roofline of a token is max(bytes fetched / link rate, bytes read / VRAM rate).  Both rates are
measured here: fetching experts with nothing else running, and a copy inside VRAM.  link_utilization
compares a row with the same kernel fetching as many experts at once, alone.

Each decode row starts with an empty cache: its first 64 tokens are the cold start.  The warm start
is 64 tokens after the repeats, a new sequence on the cache that they left.
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
    """What to measure."""

    depths: tuple[str, ...] = ("1k",)
    """Tokens of context, as 1k, or a share of what the KV holds, as 90%."""
    tokens: int = 256
    repeats: int = 3
    warm_up: int = 256
    parallel: tuple[int, ...] = (1,)
    """Sequences at once."""
    prompts: tuple[int, ...] = ()
    """Tokens of prefill."""
    temperature: float = 0.0
    """Of decoded tokens; above 0 with top-k 20 and top-p .95, as models of today ask for."""

    @property
    def short_run(self) -> int:
        """Tokens of the cold start, and of the warm one."""
        return min(64, self.warm_up, self.tokens)

    def sampling(self, tokens: int) -> SamplingParams:
        """How so many tokens are drawn."""
        greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        if self.temperature == 0:
            return greedy
        return replace(greedy, temperature=self.temperature, top_k=20, top_p=0.95, seed=1)


OnRow = Callable[[dict[str, Any], int, float | None], None]
"""Called with each row once it is measured, the number of rows left, and the seconds that these
will take: None while a kind of row has not been timed yet."""


def measure(
    engine: Engine,
    settings: BenchConfig,
    memory_gb_s: float = 0.0,
    on_row: OnRow | None = None,
) -> dict[str, Any]:
    """A document for JSON; `memory_gb_s` is the rate of VRAM.

    Raises: ConfigError where the sizes do not fit the engine.
    """
    for name, value, least in (
        ("--tokens", settings.tokens, 2), ("--repeats", settings.repeats, 1),
        ("--warm-up", settings.warm_up, 1), ("--temperature", settings.temperature, 0),
    ):  # fmt: skip
        if not value >= least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}.")
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
    plan, gpu = engine.plan, getattr(getattr(engine.runner.ops, "machine", None), "device", None)
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
    """Every row; `on_row` is told each."""
    prompts = [("prefill", tokens, 1, "") for tokens in settings.prompts]
    decodes = [
        ("decode", 1, count, depth) for count in settings.parallel for depth in settings.depths
    ]
    asked = [*prompts, *decodes]
    rows: list[dict[str, Any]] = []
    cost: dict[str, float] = {}  # seconds of a kind's last row, a token of its prompt for prefill
    for number, (what, tokens, count, depth) in enumerate(asked, 1):
        start = time.perf_counter()
        if what == "prefill":
            rows.append(_prefill(engine, tokens, settings, rates))
        else:
            rows.append(_decode(engine, depth, count, settings, rates))
        cost[what] = (time.perf_counter() - start) / tokens
        if on_row is not None:
            left = asked[number:]
            known = all(kind in cost for kind, *_ in left)
            seconds = sum(cost.get(kind, 0) * size for kind, size, *_ in left)
            on_row(rows[-1], len(left), seconds if known else None)
    return rows


def seed_state(engine: Engine) -> None:
    """Seeded random keys, values and recurrent states, in every page and slot."""
    for array in arrays(engine.runner.state.layers):
        fill_noise(engine.runner.ops, array)


def fill_noise(ops: Ops, array: Any) -> None:
    """Seeded random numbers of a sane size, whatever an array holds: none is infinite."""
    size = math.prod(array.shape)
    some, whole = _noise(np.dtype(array.dtype)), array.reshape(size)
    for start in range(0, size, len(some)):
        part = whole[start : min(start + len(some), size)]
        ops.copy_h2d(part, some[: part.shape[0]])


@functools.cache
def _noise(dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    rng, size = np.random.default_rng(7), 1 << 22
    if dtype == np.uint8:  # as e4m3, and as halves of an f16, none of them NaN
        return rng.integers(0, 256, size, np.uint8) & np.uint8(0xBF)
    if dtype == np.int8:
        return rng.integers(-127, 128, size, np.int8)
    if dtype == np.float16:
        return np.full(size, 0.01, np.float16)
    noise = rng.standard_normal(size, np.float32)
    return bf16_from_f32(noise) if dtype == np.uint16 else noise * np.float32(0.1)


def arrays(value: Any) -> Iterator[Any]:
    """Every array in a tree of dataclasses and tuples."""
    if is_dataclass(value):
        for field in fields(value):
            yield from arrays(getattr(value, field.name))
    elif isinstance(value, tuple):
        for one in value:
            yield from arrays(one)
    elif hasattr(value, "nbytes"):
        yield value


def _prefill(
    engine: Engine, tokens: int, settings: BenchConfig, rates: dict[str, float]
) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    times, before = [], _experts(engine)
    for turn in range(settings.repeats + 1):
        if turn == 1:
            before = _experts(engine)
        ids = [int(one) for one in rng.integers(0, engine.config.vocab_size, tokens)]
        start = time.perf_counter()
        next(iter(engine.generate(ids, SamplingParams(temperature=0, max_tokens=1))))
        times.append(time.perf_counter() - start)
    total = _difference(before, _experts(engine))
    _need(engine, total, settings.repeats * tokens)
    spent = statistics.median(times[1:])
    fetched = (
        total["experts_copied"] * engine.runner.expert_runner.cache.record.nbytes / settings.repeats
    )
    link = rates["link_gb_s"] * 1e9
    return {
        "what": "prefill",
        "tokens": tokens,
        "tokens_per_s": tokens / spent,
        "ttft_ms": spent * 1e3,
        "hit_rate": _hits(total),
        **total,
        "mb_fetched": fetched / 1e6,
        "link_gb_s": fetched / spent / 1e9,
        "link_utilization": fetched / spent / link if link else 0.0,
    }


def _decode(
    engine: Engine, depth: str, count: int, settings: BenchConfig, rates: dict[str, float]
) -> dict[str, Any]:
    few = settings.short_run
    context = _depth(engine, depth, count, settings)
    engine.run_on_engine_thread(lambda: _empty(engine))
    engine.run_on_engine_thread(lambda: seed_state(engine))  # the row before has changed it
    before, at, found = _experts(engine), context, []
    slow = _run_decode(engine, at, count, few, settings)
    cold = _difference(before, _experts(engine))
    if settings.warm_up > few:
        _run_decode(engine, at + few, count, settings.warm_up - few, settings)
    at += settings.warm_up
    for _ in range(settings.repeats):
        before = _experts(engine)
        seconds = _run_decode(engine, at, count, settings.tokens, settings)
        after = _difference(before, _experts(engine))
        found.append((seconds / (settings.tokens - 1), after))
        at += settings.tokens
    before = _experts(engine)
    _run_decode(engine, at, count, few, settings)
    warm = _difference(before, _experts(engine))
    spent = statistics.median(one for one, _ in found)
    total = {name: sum(one[name] for _, one in found) for name in found[0][1]}
    steps = settings.repeats * settings.tokens
    _need(engine, total, steps * count)
    fetched = total["experts_copied"] * engine.runner.expert_runner.cache.record.nbytes / steps
    read = _bytes_read(engine, context, count)
    link, memory = rates["link_gb_s"] * 1e9, rates["memory_gb_s"] * 1e9
    each = max(1, round(total["experts_copied"] / (steps * engine.config.num_layers)))
    alike = 1e9 * engine.run_on_engine_thread(lambda: link_rate(engine, each))
    floor = max(fetched / link if link else 0, read / memory if memory else 0)
    return {
        "what": "decode",
        "depth": context,
        "sequences": count,
        "temperature": settings.temperature,
        "tokens": settings.tokens,
        "tokens_per_s": count / spent,
        "ms_per_token": spent * 1e3,
        "samples_ms": [round(1e3 * one, 3) for one, _ in found],
        "cold_ms_per_token": slow * 1e3 / max(1, few - 1),
        "hit_rate_cold_64": _hits(cold),
        "hit_rate_warm_64": _hits(warm),
        "hit_rate": _hits(total),
        **total,
        "mb_fetched_per_token": fetched / 1e6,
        "mb_prefetched_per_token": total["prefetch_bytes"] / steps / 1e6,
        "prefetch_accuracy": total["prefetch_hits"] / max(1, total["prefetched"]),
        "link_gb_s": fetched / spent / 1e9,
        "fetch_batch": each,
        "link_gb_s_isolated": alike / 1e9,
        "link_utilization": fetched / spent / alike if alike else 0.0,
        "mb_read_per_token": read / 1e6,
        "vram_gb_s": read / spent / 1e9,
        "vram_utilization": read / spent / memory if memory else 0.0,
        "roofline_ms": floor * 1e3,
        "roofline_fraction": floor / spent,
    }


def _empty(engine: Engine) -> None:
    """The cache as after a start."""
    if engine.runner.expert_runner.host_experts is not None:
        reset_cache(engine.runner.ops, engine.runner.expert_runner.cache)


def _depth(engine: Engine, depth: str, count: int, settings: BenchConfig) -> int:
    """Tokens of context to stand at.  Raises: ConfigError."""
    plan = engine.plan
    more = settings.warm_up + settings.repeats * settings.tokens + settings.short_run
    room = min(engine.context, plan.num_pages * plan.page_size // count)
    text = depth.lower()
    try:
        if text.endswith("%"):
            tokens = int(room * float(text[:-1]) / 100)
        else:
            tokens = int(float(text.rstrip("k")) * (1024 if text.endswith("k") else 1))
    except ValueError:
        raise ConfigError(f"--depth is {depth!r}; write 1k, 4096 or 90%.") from None
    most = room - more - count * SPACING
    if text.endswith("%"):
        tokens = max(1, min(tokens, most))
    if not 0 < tokens <= most or count > plan.max_num_seqs:
        raise ConfigError(
            f"{count} sequences of {tokens} tokens, and {more} generated tokens each (--tokens "
            f"{settings.tokens}, --repeats {settings.repeats}), do not fit: there is room for "
            f"{plan.max_num_seqs} sequences of {room} tokens. "
            "Raise --context, --kv-cache-mb or --max-num-seqs, or lower --depth or --tokens."
        )
    return tokens


SPACING = 768
"""Tokens that sequences side by side stand apart: other prompts of a trace, at most four times."""


def _run_decode(engine: Engine, at: int, count: int, tokens: int, settings: BenchConfig) -> float:
    """Seconds from the first token to the last, of `count` sequences side by side."""
    params = settings.sampling(tokens)
    done = threading.Semaphore(0)
    stamps: list[float] = []
    errors: list[Exception] = []

    def on_event(event: Token | Finish) -> None:
        if isinstance(event, Token):
            stamps.append(time.perf_counter())
            return
        if event.error is not None:
            errors.append(event.error)
        done.release()

    for row in range(count):
        prompt = [row + 1] * (at + row * SPACING + 1)
        engine.submit(prompt, params, on_event, skip_prefill=True)
    for _ in range(count):
        done.acquire()
    if errors:
        raise errors[0]
    stamps.sort()
    return stamps[-1] - stamps[count - 1]


def _experts(engine: Engine) -> dict[str, int]:
    found: dict[str, int] = engine.status()["experts"]
    if found["routed"] != found["hit"] + found["missed"]:
        raise AssertionError(f"the expert counters do not add up: {found}")
    return found


def _difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in after}


def _need(engine: Engine, experts: dict[str, int], tokens: int) -> None:
    """Raises: AssertionError where fewer experts were asked for than so many tokens have."""
    asked = tokens * engine.config.num_layers * engine.config.top_k
    if experts["routed"] < asked:
        raise AssertionError(
            f"{tokens} tokens route to {asked} experts; the counters have {experts}"
        )


def _hits(experts: dict[str, int]) -> float:
    return experts["hit"] / max(1, experts["routed"])


def _bytes_read(engine: Engine, depth: int, count: int) -> float:
    """Bytes of VRAM that a step of one token a sequence has to read or write at least."""
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
    experts = config.num_layers * config.top_k * cache.record.nbytes
    return float(plan.vram.get("weights", 0) + count * (kv + recurrent + experts))


def link_rate(engine: Engine, records: int | None = None) -> float:
    """GB/s of fetching so many records at once with nothing else running, as many as a step may
    where none are named; 0 where nothing is ever fetched.

    Experts are fetched into the slots where they are: nothing changes.
    """
    ops, store = engine.runner.ops, engine.runner.expert_runner
    cache, plan = store.cache, store.assignment
    machine = getattr(ops, "machine", None)
    if store.host_experts is None or machine is None:
        return 0.0
    counters = ops.copy_d2h(cache.counters)
    held: npt.NDArray[Any] = ops.copy_d2h(cache.slot_to_expert[0])
    slots = np.arange(min(len(held), plan.expert.shape[0], records or len(held)), dtype=np.int32)
    expert = np.where(held[slots] < 0, slots, held[slots])  # a free slot may hold anything
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
    return float(len(slots) * cache.record.nbytes / statistics.median(times) / 1e6)


def _verify(engine: Engine) -> int:
    """Slots compared with their records in host memory; 0 where there is no arena."""
    store, ops = engine.runner.expert_runner, engine.runner.ops
    if store.host_experts is None:
        return 0
    records: Any = ops.host_view(store.host_experts.records)
    return verify(ops, store.cache, records, SAMPLED_SLOTS, int(time.time()))
