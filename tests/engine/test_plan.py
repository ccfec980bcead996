"""The memory plan: consistent sums, and refusals before anything is allocated."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from osmium.config import EngineConfig, ModelConfig
from osmium.engine.host_memory import available_ram
from osmium.engine.plan import (
    CUDA_CONTEXT_BYTES,
    DoesNotFit,
    HardwareInfo,
    MemoryPlan,
    make_plan,
)
from osmium.engine.prefill_plan import (
    CPU_CHUNK,
    PREFILL_CHUNK,
    RESIDENT_PIECE_ROWS,
    RESIDENT_PREFILL_CHUNK,
    default_piece_rows,
)
from osmium.engine.speed_estimate import (
    LAYER_US,
    LINK_EFFICIENCY,
    MISS_LAYER_US,
    OVERLAP_FRACTION,
    VRAM_EFFICIENCY,
)
from osmium.errors import ConfigError
from osmium.experts.cache import cache_bytes
from osmium.experts.streaming import MIN_STAGING_EXPERTS, STAGING_EXPERTS
from osmium.models.state import state_bytes
from osmium.ops.grouped import STAGING_GROUPS
from osmium.quant.expert_layout import ExpertLayout

GIB = 1 << 30

MODEL = ModelConfig(
    model_type="qwen3_5_moe", vocab_size=248320, hidden_size=3072,
    layer_types=("delta_net", "delta_net", "delta_net", "attention") * 12,
    num_heads=32, num_kv_heads=2, head_dim=256, rotary_dim=64,
    rope_frequencies=(1.0,) * 32, rope_factor=1.0,
    key_heads=16, value_heads=64, key_dim=128, value_dim=128,
    num_experts=256, top_k=8, moe_intermediate_size=1024, shared_intermediate_size=1024, eps=1e-6,
    max_context=262144, tie_word_embeddings=False, eos_token_ids=(1,),
)  # fmt: skip
"""The shapes of a model larger than any card."""

LAYOUT = ExpertLayout(4, MODEL.hidden_size, MODEL.moe_intermediate_size)

WEIGHTS = [("embed", 2 * MODEL.vocab_size * MODEL.hidden_size), ("head", GIB), ("layers", 6 * GIB)]

CARD = HardwareInfo(True, 31 * GIB, 32 * GIB, 90 * GIB, 96 * GIB)

LAPTOP = HardwareInfo(False, ram_available=100 * GIB, ram_total=128 * GIB)


def plan(machine: HardwareInfo = CARD, model: ModelConfig = MODEL, **options: Any) -> MemoryPlan:
    return make_plan(model, LAYOUT, WEIGHTS, EngineConfig(**options), machine)


# -- what fits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {}, {"context": 262144}, {"kv_cache_mb": 4096}, {"max_num_seqs": 16},
        {"prefill_chunk": 4096},
        {"expert_slots": 20}, {"vram": 24 * GIB}, {"enable_expert_cache": False}, {"page_size": 16},
    ],
)  # fmt: skip
def test_the_parts_never_sum_to_more_than_the_limit(options: dict[str, Any]) -> None:
    result = plan(**options)
    assert sum(result.vram.values()) <= result.vram_limit
    assert sum(result.ram.values()) <= result.ram_limit
    assert MODEL.top_k <= result.expert_slots <= MODEL.num_experts


def test_expert_slots_take_all_remaining_vram() -> None:
    result = plan()
    assert result.vram["expert slots"] == cache_bytes(
        LAYOUT, MODEL.num_layers, MODEL.num_experts, result.expert_slots
    )
    one_more = MODEL.num_layers * (LAYOUT.nbytes + 4)
    assert sum(result.vram.values()) + one_more > result.vram_limit
    assert 0 < result.expert_slots < MODEL.num_experts


def test_a_smaller_budget_changes_only_slots_and_reserve() -> None:
    small, large = plan(vram=20 * GIB), plan(vram=30 * GIB)
    assert small.expert_slots < large.expert_slots
    changed = {name for name in small.vram if small.vram[name] != large.vram[name]}
    # the reserve, and the rows of a pass with their inputs, are fractions of the budget
    assert changed == {"expert slots", "prefill", "reserve", "workspace"}
    assert small.hit_rate < large.hit_rate


@pytest.mark.parametrize("machine", [CARD, LAPTOP])
@pytest.mark.parametrize("sequences", [1, 4, 16])
def test_the_recurrent_state_has_a_slot_per_sequence(machine: HardwareInfo, sequences: int) -> None:
    result = plan(machine, max_num_seqs=sequences)
    parts = result.vram if machine.gpu else result.ram
    one = state_bytes(MODEL, 0, result.page_size, 1, result.kv_dtype)
    assert parts["recurrent state"] == sequences * one


def test_partly_resident_experts_have_staging_slots() -> None:
    """Four groups of at most .34 % of VRAM each, and at least of a few experts."""
    result = plan()
    staged = result.staging_experts
    assert MIN_STAGING_EXPERTS < staged <= STAGING_EXPERTS
    staging = STAGING_GROUPS * staged * LAYOUT.nbytes
    assert staging <= 0.0136 * result.vram_limit and staging < result.vram["prefill"]
    machine = replace(CARD, vram_free=400 * GIB, vram_total=400 * GIB)
    whole = plan(machine)
    assert whole.resident and whole.staging_experts == 0


def test_staging_slots_leave_slots_for_a_token() -> None:
    options: dict[str, Any] = {"prefill_chunk": 512, "context": 4096}
    tight = [plan(vram=size << 20, **options) for size in range(10_500, 11_500, 50)
             if fits(size << 20, **options)]  # fmt: skip
    assert MIN_STAGING_EXPERTS <= tight[0].staging_experts <= STAGING_EXPERTS
    assert all(one.expert_slots >= MODEL.top_k for one in tight)


def fits(vram: int, **options: Any) -> bool:
    try:
        plan(vram=vram, **options)
    except DoesNotFit:
        return False
    return True


def test_an_explicit_vram_limit_has_a_smaller_reserve() -> None:
    """2 % of free VRAM, which other programs use too; 1 % of --vram."""
    limit = CARD.vram_free + CUDA_CONTEXT_BYTES
    assert plan().vram["reserve"] == limit // 50
    assert plan(vram=limit).vram["reserve"] == limit // 100
    assert plan(vram=12 * GIB).vram["reserve"] == 256 << 20


def test_a_model_that_fits_needs_no_host_experts() -> None:
    few = replace(MODEL, layer_types=MODEL.layer_types[:4])
    result = plan(model=few)
    assert result.expert_slots == few.num_experts
    assert result.hit_rate == 1
    assert "host experts" not in result.ram
    assert plan().ram["host experts"] == MODEL.num_layers * MODEL.num_experts * LAYOUT.nbytes


def test_kv_pages_hold_one_context_or_the_requested_size() -> None:
    result = plan(context=10_000, page_size=64)
    assert (result.num_pages, result.max_pages_per_seq) == (157, 157)
    assert result.vram["KV cache"] == state_bytes(MODEL, 157 + 1, 64, 0, "fp8_e4m3")
    more = plan(context=10_000, page_size=64, kv_cache_mb=2048)
    assert (
        more.vram["KV cache"]
        <= 2 << 30
        < more.vram["KV cache"] + state_bytes(MODEL, 1, 64, 0, "fp8_e4m3")
    )
    assert more.max_pages_per_seq == 157


def test_the_default_context_is_the_models_up_to_32768() -> None:
    assert plan().context == 32768
    assert plan(model=replace(MODEL, max_context=5000)).context == 5000


def test_the_default_number_of_sequences_is_at_most_the_chunk() -> None:
    assert [plan(prefill_chunk=n).max_num_seqs for n in (1, 3, 512)] == [1, 3, 4]
    assert plan(prefill_chunk=8, max_num_seqs=8).max_num_seqs == 8


def test_the_default_chunk_is_a_fraction_of_vram() -> None:
    wide = replace(CARD, vram_free=90 * GIB, vram_total=96 * GIB)
    assert plan(wide).resident and plan(wide).prefill_chunk == RESIDENT_PREFILL_CHUNK
    assert not plan().resident and plan().prefill_chunk == PREFILL_CHUNK
    pieces = plan(wide).piece_rows, plan().piece_rows
    assert pieces == (RESIDENT_PIECE_ROWS, default_piece_rows(MODEL))
    sizes = [
        default_piece_rows(replace(MODEL, hidden_size=n)) for n in (64, 2048, 3072, 4096, 9999)
    ]
    assert sizes == [1024, 1024, 704, 512, 256]
    small = plan(vram=12 * GIB, context=16384)
    assert default_piece_rows(MODEL) < small.prefill_chunk < PREFILL_CHUNK
    assert small.vram["prefill"] < 0.05 * small.vram_limit
    assert plan(LAPTOP).prefill_chunk == plan(LAPTOP).piece_rows == CPU_CHUNK
    assert (
        plan(wide, prefill_chunk=64).prefill_chunk == plan(wide, prefill_chunk=64).piece_rows == 64
    )
    assert plan(wide, context=1000).prefill_chunk == 1000


def test_without_an_expert_cache_every_layer_has_top_k_slots() -> None:
    assert plan(enable_expert_cache=False).expert_slots == MODEL.top_k


def test_a_cpu_needs_no_vram_and_keeps_f32() -> None:
    result = plan(LAPTOP)
    assert (result.device, result.vram, result.kv_dtype) == ("cpu", {}, "f32")
    assert plan().kv_dtype == "fp8_e4m3"


def test_an_e4m3_token_takes_half_of_bf16_plus_scales() -> None:
    sizes = {kind: plan(kv_dtype=kind).vram["KV cache"] for kind in ("fp8_e4m3", "bf16")}
    dim = MODEL.head_dim
    assert sizes["bf16"] * (dim + 2) == sizes["fp8_e4m3"] * 2 * dim
    laptop = {kind: plan(LAPTOP, kv_dtype=kind).ram["KV cache"] for kind in ("fp8_e4m3", "bf16")}
    assert laptop == sizes


def test_a_plan_prints_as_a_table_and_as_json() -> None:
    result = plan()
    text = result.table()
    for name in (*result.vram, *result.ram):
        assert name in text
    assert "estimate" in text
    read = json.loads(json.dumps(result.as_dict()))
    assert read["expert_slots"] == result.expert_slots
    assert read["vram_bytes"] == result.vram
    assert 0 < read["expected_hit_rate"] < 1


def test_the_expected_hit_rate_rises_with_slots() -> None:
    rates = [replace(plan(), expert_slots=slots).hit_rate for slots in range(MODEL.num_experts + 1)]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0, 1)


MEASURED = replace(CARD, link_gb_s=50.0, memory_gb_s=1500.0)


def test_estimates_improve_with_slots_and_include_the_plan() -> None:
    result = plan(MEASURED)
    rows = result.slot_estimates()
    assert [row.gib for row in rows] == [-4, -2, 0, 2, 4, 8]
    (current,) = [row for row in rows if row.gib == 0]
    assert (current.expert_slots, current.hit_rate) == (result.expert_slots, result.hit_rate)
    for less, more in pairwise(rows):
        assert less.expert_slots < more.expert_slots
        assert less.missed_mb_per_token > more.missed_mb_per_token
        assert less.tokens_per_s is not None and more.tokens_per_s is not None
        assert less.tokens_per_s < more.tokens_per_s
    gained = (rows[-1].expert_slots - current.expert_slots) * MODEL.num_layers * (LAYOUT.nbytes + 4)
    assert abs(gained - 8 * GIB) <= MODEL.num_layers * (LAYOUT.nbytes + 4)


def test_the_estimate_is_its_formula() -> None:
    result = plan(MEASURED)
    used = MODEL.num_layers * MODEL.top_k * LAYOUT.nbytes
    weights = sum(size for name, size in WEIGHTS if name != "embed")
    states = 2 * state_bytes(MODEL, 0, 64, 1, "bf16")
    context = 1024 * state_bytes(MODEL, 1, 64, 0, "fp8_e4m3") // 64
    vram = (weights + used + states + context) / (VRAM_EFFICIENCY * 1500e9)
    gpu = vram + MODEL.num_layers * LAYER_US / 1e6
    link = (1 - result.hit_rate) * used / (LINK_EFFICIENCY * 50e9)
    seconds = (
        gpu + MODEL.num_layers * MISS_LAYER_US / 1e6 + link - OVERLAP_FRACTION * min(gpu, link)
    )
    assert result.expected_tokens_per_s == pytest.approx(1 / seconds, rel=1e-6)
    (current,) = [row for row in result.slot_estimates() if row.gib == 0]
    assert current.tokens_per_s == result.expected_tokens_per_s
    assert current.missed_mb_per_token == pytest.approx((1 - result.hit_rate) * used / 1e6)
    longer = result.tokens_per_s_at(32768)
    assert longer is not None and longer < 1 / seconds


def test_prefetch_is_planned_with_bulk_copies_and_missed_experts() -> None:
    hopper = replace(MEASURED, capability=(9, 0))
    assert plan(hopper).prefetch
    fast, slow = plan(hopper).expected_tokens_per_s, plan(MEASURED).expected_tokens_per_s
    assert fast is not None and slow is not None and fast > slow
    few = replace(MODEL, layer_types=MODEL.layer_types[:4])
    for result in (
        plan(replace(MEASURED, capability=(8, 9))),
        plan(hopper, prefetch=False),
        plan(hopper, enable_expert_cache=False),
        plan(hopper, few),
        plan(LAPTOP),
    ):
        assert not result.prefetch


def test_without_measured_rates_nothing_is_estimated() -> None:
    result = plan()
    assert result.expected_tokens_per_s is None
    assert all(row.tokens_per_s is None for row in result.slot_estimates())
    assert "GB/s" not in result.table()
    assert "GB/s" in plan(MEASURED).table()
    assert plan(LAPTOP).slot_estimates() == []
    assert plan(LAPTOP).expected_tokens_per_s is None


def test_the_estimates_end_at_full_residency_and_at_no_slots() -> None:
    few = replace(MODEL, layer_types=MODEL.layer_types[:4])
    assert {row.gib for row in plan(MEASURED, few).slot_estimates()} == {-4, -2, 0}
    tight = plan(MEASURED, expert_slots=8)
    assert [row.gib for row in tight.slot_estimates()] == [0, 2, 4, 8]


def test_fewer_slots_compensate_for_spilled_bytes() -> None:
    result = plan()
    each = MODEL.num_layers * (LAYOUT.nbytes + 4)
    assert result.fewer_slots(1) == result.expert_slots - 1
    assert result.fewer_slots(3 * each) == result.expert_slots - 3
    assert result.fewer_slots(3 * each + 1) == result.expert_slots - 4
    with pytest.raises(ConfigError, match=r"30\.00 GiB"):
        result.fewer_slots(30 * GIB)


def test_a_slightly_too_small_card_is_refused_with_both_sizes() -> None:
    """The smallest sufficient size is planned; one MiB less is refused with both numbers."""
    smallest = next(
        size for size in range(8 * GIB, 31 * GIB, 1 << 20) if _fits(vram=size)
    )  # the reserve is a share of the budget: no formula
    assert plan(vram=smallest).expert_slots == MODEL.top_k
    with pytest.raises(DoesNotFit) as caught:
        plan(vram=smallest - (1 << 20))
    need, left = re.findall(r"(\d+\.\d+) GiB", str(caught.value))[:2]
    assert 0 <= float(need) - float(left) <= 0.01
    assert 0 < caught.value.need - caught.value.limit <= 2 << 20
    for word in ("weights", "KV cache", "recurrent state"):
        assert word in str(caught.value)


def _fits(**options: Any) -> bool:
    try:
        plan(**options)
    except ConfigError:
        return False
    return True


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "options", "named"),
    [
        (CARD, {"vram": 9 * GIB}, ["of VRAM", "of 9.00 GiB", "weights 7.00 GiB"]),
        (CARD, {"vram": 40 * GIB}, ["--vram", "40.00 GiB"]),
        (replace(CARD, vram_free=4 * GIB), {}, ["smallest expert cache", "0.00 GiB are left"]),
        (CARD, {"kv_cache_mb": 26 << 10}, ["smallest expert cache", "KV cache 26.00 GiB"]),
        (CARD, {"kv_cache_mb": 1}, ["--kv-cache-mb 1", "32768"]),
        (CARD, {"context": 262145}, ["--context is 262145", "262144"]),
        (CARD, {"expert_slots": 7}, ["--expert-slots is 7", "8"]),
        (CARD, {"kv_dtype": "f32"}, ["--kv-dtype", "f32"]),
        (CARD, {"ram": 10 * GIB}, ["10.00 GiB", "host memory"]),
        (replace(CARD, ram_available=50 * GIB), {}, ["host memory", "host experts 55.69 GiB"]),
        (CARD, {"prefill_chunk": 4, "max_num_seqs": 5}, ["--max-num-seqs is 5", "4"]),
        (replace(LAPTOP, ram_available=8 * GIB), {}, ["host memory"]),
        (LAPTOP, {"ram": 1 << 20}, ["host memory"]),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_with_its_numbers(
    machine: HardwareInfo, options: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(machine, **options)
    for word in named:
        assert word in str(caught.value)


def test_the_suggested_kv_cache_size_is_the_smallest_sufficient() -> None:
    with pytest.raises(ConfigError, match=r"Raise it to (\d+)") as caught:
        plan(kv_cache_mb=100, context=32768)
    suggested = int(str(caught.value).split("Raise it to ")[1].split(",")[0])
    assert plan(kv_cache_mb=suggested, context=32768).num_pages * 64 >= 32768
    with pytest.raises(ConfigError):
        plan(kv_cache_mb=suggested - 1, context=32768)


def test_the_default_context_is_limited_by_the_kv_cache() -> None:
    result = plan(kv_cache_mb=100)
    assert result.context == result.num_pages * 64 < 32768
    assert plan(kv_cache_mb=4096).context == 32768 < plan(kv_cache_mb=4096).num_pages * 64


def test_some_ram_is_kept_free_by_default() -> None:
    free = 64 * GIB
    big = replace(LAPTOP, ram_available=free, ram_total=128 * GIB)
    small = replace(LAPTOP, ram_available=7 * GIB, ram_total=8 * GIB)
    few = replace(MODEL, layer_types=MODEL.layer_types[:4], num_experts=16)
    weights = [("embed", 1 << 20)]
    options = EngineConfig(context=512, prefill_chunk=16)
    assert make_plan(few, LAYOUT, weights, options, big).ram_limit == free - 128 * GIB // 10
    assert make_plan(few, LAYOUT, weights, options, small).ram_limit == 5 * GIB
    explicit = replace(options, ram=63 * GIB)
    assert make_plan(few, LAYOUT, weights, explicit, big).ram_limit == 63 * GIB


# -- hardware --------------------------------------------------------------------------------------


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


MIB = 1 << 20


def test_without_cgroup_limits_available_ram_is_the_systems(tmp_path: Path) -> None:
    current = tmp_path / "own"
    current.write_text("0::/user\n")
    write(tmp_path / "user", memory__max="max", memory__current=5)
    available, total = available_ram(tmp_path, current)
    assert total == psutil.virtual_memory().total
    assert 0 < available <= total


@pytest.mark.parametrize("where", ["a/b", "a", ""])
def test_a_cgroup_limit_of_any_ancestor_holds(tmp_path: Path, where: str) -> None:
    current = tmp_path / "own"
    current.write_text("0::/a/b\n")
    write(tmp_path / "a/b", memory__max="max", memory__current=MIB)
    write(tmp_path / where, memory__max=100 * MIB, memory__current=30 * MIB)
    assert available_ram(tmp_path, current) == (70 * MIB, 100 * MIB)


def test_cached_files_count_as_available(tmp_path: Path) -> None:
    current = tmp_path / "own"
    current.write_text("0::/\n")
    stat = f"anon 1\nfile {60 * MIB}\ninactive_file {50 * MIB}"
    write(tmp_path, memory__max=100 * MIB, memory__current=90 * MIB, memory__stat=stat)
    assert available_ram(tmp_path, current) == (60 * MIB, 100 * MIB)


def test_cgroup_v1_limits_are_read(tmp_path: Path) -> None:
    current = tmp_path / "own"
    current.write_text("9:name=systemd:/\n4:cpu,memory:/job\n1:cpu:/\n")
    write(
        tmp_path / "memory/job",
        memory__limit_in_bytes=100 * MIB,
        memory__usage_in_bytes=80 * MIB,
        memory__stat=f"inactive_file 1\ntotal_inactive_file {20 * MIB}",
    )
    assert available_ram(tmp_path, current) == (40 * MIB, 100 * MIB)


def test_a_containers_root_limit_holds_without_its_own_path(
    tmp_path: Path,
) -> None:
    current = tmp_path / "own"
    current.write_text("0::/docker/0123\n")
    write(tmp_path, memory__max=100 * MIB, memory__current=MIB)
    assert available_ram(tmp_path, current) == (99 * MIB, 100 * MIB)


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    assert available_ram(tmp_path / "none", tmp_path / "no")[1] == psutil.virtual_memory().total
