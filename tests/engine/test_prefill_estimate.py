"""Estimated time of prompts against times measured by `osmium bench` (LOG.md)."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osmium.config import EngineConfig
from osmium.engine.plan import HardwareInfo, MemoryPlan
from osmium.engine.prefill_estimate import (
    PROMPT_MS,
    STREAM_EFFICIENCY,
    PrefillCost,
    missing_fraction,
    reading_speed_text,
    reading_vram_text,
    touched_fraction,
)
from osmium.engine.speed_estimate import LINK_EFFICIENCY
from osmium.planning.alternatives import plan_shapes
from osmium.weights.synthetic import open_synthetic

ROOT = Path(__file__).resolve().parents[2]

GIB = 1 << 30

LARGE, SMALL = "qwen3.5-122b-a10b", "qwen3.5-35b-a3b"

H200 = HardwareInfo(
    True, 139 * GIB, 141 * GIB, 120 * GIB, 128 * GIB, 50.8 / LINK_EFFICIENCY, 4160, (9, 0), "H200"
)
"""Measured rates: 50.8 GB/s by the fetch kernel, VRAM by a copy."""

MEASURED = [
    # with --attention-quant int4, on an H200: docs/experiments/2026-12-01-benchmark-bb52caa.md
    # model, expert slots, tokens per pass, tokens in the KV cache, new tokens, tok/s
    (SMALL, 256, 8192, 0, 64, 2699),
    (SMALL, 256, 8192, 0, 1024, 24963),
    (SMALL, 256, 8192, 0, 4096, 38520),
    (SMALL, 256, 8192, 0, 16384, 34497),
    (SMALL, 256, 8192, 32768, 256, 8797),
    (SMALL, 147, 7168, 0, 1024, 6205),
    (LARGE, 118, 10240, 0, 1024, 1740),
    (LARGE, 118, 10240, 0, 4096, 6864),
    (LARGE, 118, 10240, 0, 20480, 12542),
    (LARGE, 118, 10240, 0, 51200, 10379),
    (LARGE, 118, 10240, 32768, 64, 239),
    (LARGE, 118, 10240, 32768, 256, 509),
    (LARGE, 118, 10240, 32768, 2048, 3425),
    (LARGE, 114, 10240, 102400, 256, 454),
]

ERROR = 0.15
"""Most relative error on these rows, which the constants are fitted to."""


def plan(model: str, hardware: HardwareInfo = H200, **options: Any) -> MemoryPlan:
    config = EngineConfig(**{"attention_quant": "int4", **options})
    return plan_shapes(open_synthetic(f"synthetic:{model}", config), config, hardware)


def cost(model: str, hardware: HardwareInfo = H200, **options: Any) -> PrefillCost:
    found = plan(model, hardware, **options).prefill
    assert found is not None
    return found


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: "-".join(map(str, row[:-1])))
def test_an_estimate_is_close_to_the_measured_speed(row: tuple[Any, ...]) -> None:
    model, slots, chunk, cached, tokens, measured = row
    speed = tokens / cost(model).seconds(tokens, cached, slots, chunk)
    assert abs(speed / measured - 1) < ERROR, f"{speed:,.0f} of {measured:,}"


def test_the_documented_table_has_these_rows() -> None:
    page = (ROOT / "docs" / "memory-plan.md").read_text()
    for model, slots, chunk, cached, tokens, measured in MEASURED:
        speed = tokens / cost(model).seconds(tokens, cached, slots, chunk)
        found = re.search(rf"\| .*{tokens:,} tokens \| {measured:,} \| ([\d,]+) \|", page)
        assert found is not None
        assert int(found.group(1).replace(",", "")) == pytest.approx(speed, rel=0.005)


@pytest.fixture(scope="module")
def routing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Ids [T, L, A] of a generated trace."""
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    sizes = ["--tokens", "2560", "--prompts", "2", "--layers", "3"]
    command = [sys.executable, str(ROOT / "tools" / "make_trace.py"), str(path), *sizes]
    subprocess.run(command, check=True, timeout=60)
    return np.load(path)["ids"]


@pytest.mark.parametrize("tokens", [16, 64, 128, 256, 512, 1024])
def test_touched_and_missing_experts_are_those_of_a_trace(routing: Any, tokens: int) -> None:
    """Slots have the experts with the highest decayed counts, as the cache's policy ranks them."""
    shares: dict[float, list[float]] = {resident: [] for resident in (0, 0.2, 0.45, 0.6, 0.8)}
    for start in (1024, 1536):
        age = start - 1 - np.arange(start)
        value = np.exp2(-age / 8) / 8 + np.exp2(-age / 512) / 128
        for layer in range(routing.shape[1]):
            uses = np.zeros((len(routing), 256))
            np.put_along_axis(uses, routing[:, layer].astype(np.int64), 1, axis=1)
            order = np.argsort(-(value @ uses[:start]))
            touched = uses[start : start + tokens].max(axis=0)
            for resident, found in shares.items():
                found.append(touched[order[round(resident * 256) :]].sum() / 256)
    assert touched_fraction(tokens, 256, 8) == pytest.approx(np.mean(shares[0]), abs=0.03)
    for resident, found in shares.items():
        assert missing_fraction(tokens, resident, 256, 8) == pytest.approx(np.mean(found), abs=0.03)


def test_a_prompt_uses_no_expert_more_than_those_of_its_tokens() -> None:
    for tokens in (1, 2, 8):
        assert 0 < touched_fraction(tokens, 256, 8) < 1.5 * tokens * 8 / 256
    assert touched_fraction(100_000, 256, 8) == pytest.approx(1)
    assert missing_fraction(100_000, 0.4, 256, 8) == pytest.approx(0.6)
    assert missing_fraction(64, 1, 256, 8) == 0


@pytest.mark.parametrize("quant", ["int4", "int8", "bf16"])
def test_operations_are_counted_from_all_matrices(quant: str) -> None:
    """Two passes over each weight of the model's parts, the head excepted."""
    config = EngineConfig(attention_quant=quant)  # type: ignore[arg-type]
    model = open_synthetic(f"synthetic:{SMALL}", config)
    layers = [p for p in model.parts.values() if p.matrix and p.name.startswith("layers.")]
    found = cost(SMALL, attention_quant=quant)
    for is_bf16, ops in ((False, found.int8_ops), (True, found.bf16_ops)):
        parts = [math.prod(p.shape) for p in layers if (p.format == "bf16") == is_bf16]
        assert ops == 4 * sum(parts)
    assert found.pair_ops == 4 * 3 * 2048 * 512


def test_attention_costs_more_with_context_and_with_bf16_pages() -> None:
    fp8, bf16 = cost(SMALL), cost(SMALL, kv_dtype="bf16")
    assert bf16.context_ops == 2 * fp8.context_ops
    assert fp8.seconds(256, 32768, 256, 2048) > fp8.seconds(256, 0, 256, 2048)
    halves = fp8.seconds(1024, 0, 256, 2048) + fp8.seconds(1024, 1024, 256, 2048)
    passes = fp8.seconds(2048, 0, 256, 1024)
    assert passes == pytest.approx(halves - PROMPT_MS / 1e3)


def test_missing_experts_cross_the_link_once_per_pass() -> None:
    slow = replace(H200, link_gb_s=5.0)
    found = cost(LARGE, slow)
    copied = 48 * 150 * found.expert_bytes / (STREAM_EFFICIENCY * 5e9)
    for passes in (1, 3):
        seconds = found.seconds(passes * 4096, 0, 106, 4096)
        assert seconds == pytest.approx(passes * copied + PROMPT_MS / 1e3)
    assert found.seconds(12288, 0, 256, 4096) < 2 < passes * copied


def test_few_tokens_fetch_only_the_experts_that_they_use() -> None:
    found = cost(LARGE)
    times = [found.seconds(n, 0, 116, 8192) for n in (16, 64, 128, 256, 512, 1024, 2048)]
    assert times == sorted(times)
    all_missing = 48 * 140 * found.expert_bytes / (LINK_EFFICIENCY * H200.link_gb_s * 1e9)
    assert times[1] < all_missing / 2 < all_missing < times[-1] + 0.03


def test_more_slots_and_a_faster_link_read_faster() -> None:
    slots = [cost(LARGE).seconds(1024, 0, count, 8192) for count in (60, 106, 180, 256)]
    assert slots == sorted(slots, reverse=True)
    links = [replace(H200, link_gb_s=rate) for rate in (12.6, 25.0, 53.0)]
    times = [cost(LARGE, link).seconds(4096, 0, 106, 8192) for link in links]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "a GPU with 24 GiB"},
        {"link_gb_s": 0.0},
        {"memory_gb_s": 0.0},
        {"gpu": False},
    ],
)
def test_unknown_rates_give_no_estimate(change: dict[str, Any]) -> None:
    found = plan(SMALL, replace(H200, **change))
    assert found.prefill is None
    assert found.as_dict()["prefill_estimates"] == []
    assert reading_speed_text(found) == ""
    assert ("reading takes" in found.table()) == bool(found.vram)


def test_shapes_without_kernels_for_many_tokens_give_no_estimate() -> None:
    assert plan("tiny").prefill is None


def test_bf16_experts_are_computed_at_the_rate_of_bf16() -> None:
    known = cost(SMALL)
    int8 = replace(known, int8_tops=2 * known.f16_tflops)  # without the gain of wgmma
    bf16 = replace(int8, bf16_experts=True)
    slower = bf16.gpu_s(4096, 0) - int8.gpu_s(4096, 0)
    more = replace(int8, pair_ops=2 * int8.pair_ops).gpu_s(4096, 0) - int8.gpu_s(4096, 0)
    assert slower == pytest.approx(more, rel=0.01)


def test_a_plan_shows_the_speed_of_prompts_and_what_reading_takes() -> None:
    found = plan(LARGE, vram=32 * GIB, prefill_chunk=4096)
    taken = found.vram["prefill"]
    read = json.loads(json.dumps(found.as_dict()))
    assert read["prefill_vram_bytes"] == taken
    slots = taken / found.token_cost.slot_bytes
    assert read["prefill_slots_per_layer"] == pytest.approx(slots, abs=0.01)
    rows = {(row["new_tokens"], row["cached_tokens"]): row for row in read["prefill_estimates"]}
    assert rows.keys() >= {(64, 0), (4096, 0), (20480, 0), (64, 8192)}
    for (new, _), row in rows.items():
        assert row["tokens_per_s"] == pytest.approx(new / row["seconds"], rel=0.01)
    table, texts = found.table(), (reading_speed_text(found), reading_vram_text(found))
    assert "reading    4k tokens at about " in table
    for part in (f"{round(rows[4096, 0]['tokens_per_s'], -1):,.0f} tok/s", "20k at",
                 f"64 tokens in {rows[64, 0]['seconds']:.2f} s", f"{taken / GIB:.2f} GiB",
                 f"{slots:.1f} slots per layer", "(estimate)"):  # fmt: skip
        assert part in "; ".join(texts) and part in table


def test_a_short_context_has_prompts_of_its_own_length() -> None:
    found = plan(SMALL, context=1000)
    assert reading_speed_text(found).startswith("1,000 tokens at about ")
    assert [row["new_tokens"] for row in found.as_dict()["prefill_estimates"]] == [64]


def test_resident_experts_lose_no_slot_to_reading() -> None:
    found = plan(SMALL)
    assert found.resident and "slots per layer" not in reading_vram_text(found)
    assert found.as_dict()["prefill_slots_per_layer"] == 0
