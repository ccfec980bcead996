"""Estimated decode speed against speeds measured by `osmium bench` (LOG.md)."""

from typing import Any

import pytest

from osmium.config import EngineConfig
from osmium.engine.plan import HardwareInfo, MemoryPlan
from osmium.engine.speed_estimate import ERROR, LINK_EFFICIENCY, TokenCost, hit_rate
from osmium.planning.alternatives import plan_shapes
from osmium.weights.synthetic import open_synthetic

GIB = 1 << 30

LARGE, SMALL = "qwen3.5-122b-a10b", "qwen3.5-35b-a3b"

H100 = HardwareInfo(
    True, 79 * GIB, 80 * GIB, 120 * GIB, 128 * GIB, 50.5 / LINK_EFFICIENCY, 2980, (9, 0), "H100"
)
"""Measured rates: 50.5 and 51 GB/s by the fetch kernel, VRAM by a copy."""

H200 = HardwareInfo(
    True, 139 * GIB, 141 * GIB, 120 * GIB, 128 * GIB, 51.0 / LINK_EFFICIENCY, 4160, (9, 0), "H200"
)

SMALL_KV: dict[str, Any] = {"vram": 32 * GIB, "kv_cache_mb": 200, "context": 12288}

SLOTS: dict[str, Any] = {"expert_slots": 77}

CARD_12: dict[str, Any] = {"vram": 12 * GIB}

NO_PREFETCH: dict[str, Any] = {"prefetch": False}

WIDE = {200: 15148, 500: 38016, 1000: 76089, 1500: 114220, 2000: 152294, 3400: 235929}
"""Context tokens by MiB of KV cache."""

MEASURED = [
    # model, options, tokens of context, tok/s
    (H100, LARGE, SMALL_KV, 1024, 146.9),
    (H100, LARGE, SLOTS, 1024, 97.8),
    (H100, LARGE, {"enable_expert_cache": False}, 1024, 34.6),
    (H100, SMALL, CARD_12, 1024, 439.3),
    (H100, SMALL, {}, 1024, 694.5),
    (H100, SMALL, {}, 1024, 714.4),
    (H100, LARGE, {**SMALL_KV, **NO_PREFETCH}, 1024, 131.4),
    (H100, LARGE, {**SLOTS, **NO_PREFETCH}, 1024, 89.5),
    (H100, SMALL, {**CARD_12, **NO_PREFETCH}, 1024, 399.3),
    (H100, LARGE + ":12", {"expert_slots": 122}, 1024, 533.6),
    (H100, LARGE + ":12", SLOTS, 1024, 373.5),
    *(
        (H100, LARGE, {"vram": 32 * GIB, "kv_cache_mb": mb}, WIDE[mb] * 9 // 10, speed)
        for mb, speed in {
            200: 143.6, 500: 139.3, 1000: 136.5, 1500: 128.8, 2000: 121.2, 3400: 112.3,
        }.items()
    ),
    (H200, LARGE, SMALL_KV, 1024, 157.0),
    (H200, LARGE, SMALL_KV, 1024, 154.0),
    (H200, LARGE, SLOTS, 1024, 103.8),
    (H200, SMALL, CARD_12, 1024, 469),
    (H200, SMALL, {}, 1024, 782),
    (H200, LARGE, {}, 1024, 409.9),
    *(
        (H200, LARGE, {"vram": 32 * GIB, "kv_cache_mb": mb}, WIDE[mb] * 9 // 10, speed)
        for mb, speed in {200: 150.6, 1000: 143.7, 2000: 130.2, 3400: 116.8}.items()
    ),
]  # fmt: skip


BF16: dict[str, Any] = {"attention_quant": "bf16"}

HELD_OUT = [
    # as above, on an H200, 2026-11-30 (docs/benchmarks.md); the constants are not fitted to these
    (H200, SMALL, BF16, 1024, 567.0),
    (H200, SMALL, {**BF16, "vram": 12 * GIB}, 1024, 332.9),
    (H200, SMALL, {**BF16, "vram": 8 * GIB}, 1024, 229.0),
    (H200, SMALL, {**CARD_12, **NO_PREFETCH}, 1024, 414.6),
    (H200, LARGE, {**BF16, "vram": 32 * GIB}, 1024, 109.9),
    (H200, LARGE, {**BF16, "vram": 24 * GIB}, 1024, 81.4),
    (H200, LARGE, {"vram": 32 * GIB, **NO_PREFETCH}, 1024, 138.0),
    (H200, LARGE, {"vram": 24 * GIB}, 1024, 110.0),
    (H200, LARGE, {"vram": 16 * GIB}, 1024, 74.3),
    (H200, LARGE, {"vram": 12 * GIB}, 1024, 59.1),
]


def plan(hardware: HardwareInfo, model: str, options: dict[str, Any], context: int) -> MemoryPlan:
    most = {"context": WIDE[options["kv_cache_mb"]]} if context > 12288 else {}
    # the rates were measured before prompts had arrays of their own
    most["prefill_chunk"] = 64
    config = EngineConfig(**{"attention_quant": "int4", **most, **options})
    return plan_shapes(open_synthetic(f"synthetic:{model}", config), config, hardware)


@pytest.mark.parametrize(
    ("row", "most"),
    [*((row, 0.075) for row in MEASURED), *((row, ERROR) for row in HELD_OUT)],
    ids=lambda of: of if isinstance(of, float) else "-".join(map(str, (of[0].name, *of[1:4]))),
)
def test_an_estimate_is_close_to_the_measured_speed(row: tuple[Any, ...], most: float) -> None:
    """Tight for rows that the constants are fitted to, within the stated error for others."""
    hardware, model, options, context, measured = row
    speed = plan(hardware, model, options, context).tokens_per_s_at(context)
    assert speed is not None
    assert abs(speed / measured - 1) < most <= ERROR, f"{speed:.1f} of {measured}"


def test_the_parts_of_a_token_sum_to_its_time() -> None:
    made = plan(H100, LARGE, SMALL_KV, 1024)
    time, speed = made.token_time(), made.expected_tokens_per_s
    assert time is not None and speed is not None
    assert time.total_ms == pytest.approx(1e3 / speed)
    assert time.overlap_ms < min(time.link_ms, time.vram_ms + time.overhead_ms)
    resident = plan(H200, SMALL, {}, 1024).token_time()
    assert resident is not None and resident.link_ms == resident.overlap_ms == 0


def test_without_known_rates_nothing_is_estimated() -> None:
    for link, memory in ((0, 0), (50, 0), (0, 900)):
        assert TokenCost(1, 1, 1, 1, link, memory).tokens_per_s(0.5) is None


def test_the_estimated_hit_rate_is_close_to_the_benchmarks() -> None:
    """Measured .870, .770, .914 and .842 (LOG.md, 2026-11-26)."""
    for slots, measured in ((122, 0.870), (77, 0.770), (150, 0.914), (108, 0.842)):
        assert abs(hit_rate(slots / 256) - measured) < 0.005
