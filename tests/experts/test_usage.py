"""Expert usage across engine restarts: saved, read, restored, and damaged files ignored."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osmium.experts.cache import DECAY, make_cache, resident, verify
from osmium.experts.host_experts import wrap_host_experts
from osmium.experts.runner import ExpertRunner
from osmium.experts.usage import (
    MAX_STEPS,
    UsageSnapshot,
    read_usage,
    rebalanced_slots,
    save_usage,
    slots_per_layer,
    snapshot_usage,
    try_save_usage,
    warm_cache,
)
from osmium.ops import ExpertCache
from tests.experts.test_cache import EXPERTS, LAYERS, LAYOUT, OPS, TOP_K, make_experts, parts, run

CAPACITY = 2 * TOP_K + 1
FINGERPRINT = "ab" * 32


@pytest.fixture
def experts(rng: np.random.Generator) -> Any:
    return make_experts(rng)


@pytest.fixture
def used_cache(experts: Any, rng: np.random.Generator) -> tuple[ExpertCache, ExpertRunner]:
    """A cache and its runner after 40 steps."""
    cache, store = parts(wrap_host_experts(LAYOUT, experts), CAPACITY)
    for _ in range(40):
        for layer in range(LAYERS):
            run(store, rng, experts, int(rng.integers(1, 4)), layer)
    return cache, store


def eviction_order(cache: ExpertCache, layer: int) -> list[int]:
    """Resident experts of a layer in the order in which assign_slots evicts them."""
    ids = cache.slot_to_expert[layer]
    slots = np.flatnonzero(ids >= 0)
    ids = ids[slots]
    decay, next_step = cache.decay, cache.step[0] + 1
    age = (cache.last_used[layer][ids] - next_step).astype(np.float32)
    usage = cache.short_count[layer][ids] * np.exp2(age * np.float32(1 / decay.half_life))
    long = cache.long_count[layer][ids] * np.exp2(age * np.float32(1 / decay.long_half_life))
    ramp = 1 - 2 ** (-(next_step + decay.prior_steps) / decay.long_half_life)
    scores = np.float32(ramp) * usage + np.float32(decay.long_scale) * long
    order = np.lexsort((slots, cache.last_used[layer][ids], scores))
    return [int(one) for one in ids[order]]


def save_and_read(cache: ExpertCache, path: Path) -> UsageSnapshot:
    save_usage(path, FINGERPRINT, snapshot_usage(OPS, cache))
    found = read_usage(path, FINGERPRINT, LAYERS, EXPERTS)
    assert found is not None
    return found


def test_a_saved_snapshot_reads_back_equal(
    used_cache: tuple[ExpertCache, ExpertRunner], tmp_path: Path
) -> None:
    cache, _ = used_cache
    saved, restored = snapshot_usage(OPS, cache), save_and_read(cache, tmp_path / "new" / "a.usage")
    for name in ("short_count", "long_count", "steps", "age", "resident"):
        assert np.array_equal(getattr(saved, name), getattr(restored, name))
    assert np.array_equal(restored.resident, resident(OPS, cache))
    never = cache.last_used == 0
    assert (restored.age[never] == -1).all() and restored.steps == cache.step[0]
    ages, decay = cache.step[0] - cache.last_used, cache.decay
    for found, count, half_life in (
        (restored.short_count, cache.short_count, decay.half_life),
        (restored.long_count, cache.long_count, decay.long_half_life),
    ):
        assert (found[never] == 0).all()
        assert np.allclose(found, count * np.exp2(-ages / half_life), rtol=1e-6)
    assert [one.name for one in (tmp_path / "new").iterdir()] == ["a.usage"]


@pytest.mark.parametrize("capacity", [TOP_K, CAPACITY, EXPERTS - 1])
def test_the_most_used_experts_are_restored_byte_for_byte(
    used_cache: tuple[ExpertCache, ExpertRunner], experts: Any, tmp_path: Path, capacity: int
) -> None:
    usage = save_and_read(used_cache[0], tmp_path / "a.usage")
    host_experts = wrap_host_experts(LAYOUT, experts)
    cache = make_cache(OPS, host_experts, capacity, TOP_K)
    count = warm_cache(OPS, cache, host_experts, usage)
    is_resident = resident(OPS, cache)
    assert count == is_resident.sum() > 0
    assert verify(OPS, cache, experts, 1000, 0) == count
    for layer in range(LAYERS):
        order = usage.top_experts(layer, EXPERTS)
        assert set(order[:capacity]) == set(np.flatnonzero(is_resident[layer]))
    assert cache.counters.tolist() == [0] * 7


def test_restoring_keeps_the_eviction_order(
    used_cache: tuple[ExpertCache, ExpertRunner], experts: Any, tmp_path: Path
) -> None:
    old = used_cache[0]
    usage = save_and_read(old, tmp_path / "a.usage")
    host_experts = wrap_host_experts(LAYOUT, experts)
    cache = make_cache(OPS, host_experts, CAPACITY, TOP_K)
    warm_cache(OPS, cache, host_experts, usage)
    in_both = resident(OPS, old) & resident(OPS, cache)
    assert in_both.sum() > LAYERS * TOP_K
    for layer in range(LAYERS):
        before, after = (
            [one for one in eviction_order(of, layer) if in_both[layer, one]] for of in (old, cache)
        )
        assert before == after
    restored = snapshot_usage(OPS, cache)
    assert np.array_equal(restored.short_count, usage.short_count)
    assert np.array_equal(restored.long_count, usage.long_count) and restored.steps == usage.steps


def test_long_term_use_outranks_a_single_recent_use(experts: Any) -> None:
    """Expert 0 has one recent use, expert 1 many older ones; both counts are restored."""
    host_experts, decay = wrap_host_experts(LAYOUT, experts), DECAY
    short_count, long_count = (np.zeros((LAYERS, EXPERTS), np.float32) for _ in range(2))
    short_count[:, 0], long_count[:, 0] = 1, 1
    short_count[:, 1], long_count[:, 1] = 0.5, (0.5 / decay.long_scale) * 1.01
    age = np.where(long_count > 0, 0, -1).astype(np.int32)
    usage = UsageSnapshot(short_count, long_count, MAX_STEPS, age, long_count > 0)
    assert usage.top_experts(0, 2).tolist() == [0, 1]
    usage.long_count[:, 1] += 1
    assert usage.top_experts(0, 2).tolist() == [1, 0]
    cache = make_cache(OPS, host_experts, TOP_K, TOP_K)
    warm_cache(OPS, cache, host_experts, usage)
    assert eviction_order(cache, 0) == [0, 1]


def test_the_step_count_saturates_where_it_no_longer_changes_scores(
    used_cache: tuple[ExpertCache, ExpertRunner], experts: Any, tmp_path: Path
) -> None:
    cache, _ = used_cache
    more = 40_000_000 - int(cache.step[0])
    cache.last_used[cache.last_used > 0] += more
    cache.step[0] += more
    usage = save_and_read(cache, tmp_path / "a.usage")
    assert usage.steps == MAX_STEPS and np.float32(1) == np.float32(
        1 - 2 ** (-MAX_STEPS / DECAY.long_half_life)
    )
    host_experts = wrap_host_experts(LAYOUT, experts)
    restored = make_cache(OPS, host_experts, CAPACITY, TOP_K)
    warm_cache(OPS, restored, host_experts, usage)
    assert np.array_equal(snapshot_usage(OPS, restored).long_count, usage.long_count)


def test_ties_evict_the_least_recently_used_first(experts: Any) -> None:
    counts = np.zeros((LAYERS, EXPERTS), np.float32)
    counts[:, :5] = 1
    age = np.full((LAYERS, EXPERTS), -1, np.int32)
    age[:, :5] = [30, 10, 50, 20, 40]
    host_experts = wrap_host_experts(LAYOUT, experts)
    cache = make_cache(OPS, host_experts, 4, TOP_K)
    warm_cache(OPS, cache, host_experts, UsageSnapshot(counts, counts, 50, age, counts > 0))
    for layer in range(LAYERS):
        assert eviction_order(cache, layer) == [4, 0, 3, 1]


def test_restored_experts_hit_and_counters_stay_consistent(
    used_cache: tuple[ExpertCache, ExpertRunner],
    experts: Any,
    rng: np.random.Generator,
    tmp_path: Path,
) -> None:
    usage = save_and_read(used_cache[0], tmp_path / "a.usage")
    rates = []
    for warm in (False, True):
        host_experts = wrap_host_experts(LAYOUT, experts)
        cache, store = parts(host_experts, CAPACITY)
        if warm:
            warm_cache(OPS, cache, host_experts, usage)
        ids = np.random.default_rng(1)
        for layer in range(LAYERS):
            run(store, ids, experts, 1, layer)
        counted = store.counters()
        assert counted.routed == counted.hit + counted.missed == LAYERS * TOP_K
        rates.append(counted.hit)
        for _ in range(10):
            for layer in range(LAYERS):
                run(store, rng, experts, 2, layer)
        store.counters()
        assert verify(OPS, cache, experts, 1000, 0) > 0
    assert rates[0] == 0 < rates[1]


def test_restoring_into_a_used_cache_computes_with_the_restored_experts(
    used_cache: tuple[ExpertCache, ExpertRunner], experts: Any, rng: np.random.Generator
) -> None:
    cache, store = used_cache
    usage = snapshot_usage(OPS, cache)
    reversed_usage = replace(
        usage,
        short_count=usage.short_count[:, ::-1].copy(),
        long_count=usage.long_count[:, ::-1].copy(),
    )
    before = resident(OPS, cache)
    warm_cache(OPS, cache, wrap_host_experts(LAYOUT, experts), reversed_usage)
    assert (resident(OPS, cache) != before).any()
    for layer in range(LAYERS):
        run(store, rng, experts, 8, layer)  # checks against the packed experts
    assert store.counters().hit > 0


def test_an_unused_cache_saves_no_file(experts: Any, tmp_path: Path) -> None:
    cache = make_cache(OPS, wrap_host_experts(LAYOUT, experts), CAPACITY, TOP_K)
    try_save_usage(tmp_path / "a.usage", FINGERPRINT, OPS, cache)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_a_warning(
    used_cache: tuple[ExpertCache, ExpertRunner], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    try_save_usage(tmp_path / "file" / "a.usage", FINGERPRINT, OPS, used_cache[0])
    assert "a.usage" in caplog.text
    (tmp_path / "b.usage").mkdir()
    (tmp_path / "b.usage" / "x").write_text("")
    try_save_usage(tmp_path / "b.usage", FINGERPRINT, OPS, used_cache[0])
    assert "b.usage" in caplog.text
    assert sorted(one.name for one in tmp_path.iterdir()) == ["b.usage", "file"]


# -- ignored files ---------------------------------------------------------------------------------


def assert_ignored(path: Path, caplog: pytest.LogCaptureFixture, **other: Any) -> None:
    expected = {"fingerprint": FINGERPRINT, "layers": LAYERS, "experts": EXPERTS, **other}
    caplog.clear()
    assert read_usage(path, **expected) is None
    (warning,) = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert path.name in warning.getMessage()


def test_a_missing_file_is_ignored_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_usage(tmp_path / "a.usage", FINGERPRINT, LAYERS, EXPERTS) is None
    assert not caplog.records


def test_usage_of_another_model_is_ignored(
    used_cache: tuple[ExpertCache, ExpertRunner], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.usage"
    save_and_read(used_cache[0], path)
    assert_ignored(path, caplog, fingerprint="cd" * 32)
    assert_ignored(path, caplog, layers=LAYERS + 1)
    assert_ignored(path, caplog, experts=EXPERTS - 1)


def test_usage_with_invalid_counts_is_ignored(
    used_cache: tuple[ExpertCache, ExpertRunner], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = snapshot_usage(OPS, used_cache[0])
    for name in ("short_count", "long_count"):
        for wrong in (np.nan, np.inf, -1):
            usage = getattr(good, name).copy()
            usage[1, 2] = wrong
            save_usage(tmp_path / "a.usage", FINGERPRINT, replace(good, **{name: usage}))
            assert_ignored(tmp_path / "a.usage", caplog)
    for steps in (0, -1, MAX_STEPS + 1):
        save_usage(tmp_path / "a.usage", FINGERPRINT, replace(good, steps=steps))
        assert_ignored(tmp_path / "a.usage", caplog)


def test_usage_of_an_earlier_format_version_is_ignored_with_a_warning(
    used_cache: tuple[ExpertCache, ExpertRunner], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.usage"
    save_and_read(used_cache[0], path)
    raw = path.read_bytes()
    path.write_bytes(raw[:7] + b"\1" + raw[8:])
    assert_ignored(path, caplog)
    assert "version is 1" in caplog.text


def test_damaged_usage_files_are_ignored(
    used_cache: tuple[ExpertCache, ExpertRunner],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    rng: np.random.Generator,
) -> None:
    path = tmp_path / "a.usage"
    save_and_read(used_cache[0], path)
    original = path.read_bytes()
    for length in (0, 1, 100, len(original) // 2, len(original) - 1):
        path.write_bytes(original[:length])
        assert_ignored(path, caplog)
    for at in rng.integers(0, len(original), 60).tolist():
        edited = bytearray(original)
        edited[at] ^= int(rng.integers(1, 256))
        path.write_bytes(edited)
        assert_ignored(path, caplog)
    for length in (10, 3000, 1 << 20):
        path.write_bytes(rng.bytes(length))
        assert_ignored(path, caplog)
    path.unlink()
    path.mkdir()
    assert_ignored(path, caplog)


def usage_of(uses: Any) -> UsageSnapshot:
    """A snapshot with these uses f32 [L, E], in both the short and the long count."""
    uses = np.asarray(uses, np.float32)
    return UsageSnapshot(uses, uses, 100, np.where(uses > 0, 0, -1).astype(np.int32), uses > 0)


NARROW, WIDE = [50, 40, 9, 1, 0, 0, 0, 0], [13, 13, 13, 13, 12, 12, 12, 12]


def test_layers_with_spread_use_get_more_slots() -> None:
    assert slots_per_layer(usage_of([NARROW, WIDE, WIDE]), 4, 1) == [2, 5, 5]
    assert slots_per_layer(usage_of([WIDE, WIDE]), 4, 2) == [4, 4], "equal use, equal slots"
    assert slots_per_layer(usage_of([NARROW, WIDE]), 7, 2) == [6, 8], "at most one slot per expert"
    assert slots_per_layer(usage_of([NARROW, [0] * 8]), 4, 1) is None, "a layer without use"


def test_every_layer_keeps_slots_for_one_and_a_half_tokens() -> None:
    usage = usage_of([NARROW, WIDE])
    assert slots_per_layer(usage, 6, 3) == [4, 8]
    assert slots_per_layer(usage, 5, 2) == [3, 7]
    for slots, top_k in ((4, 3), (3, 3), (3, 2), (1, 1)):
        assert slots_per_layer(usage, slots, top_k) is None, "no slot can move"


def test_slots_stay_when_too_few_would_move() -> None:
    usage = usage_of(np.array([[0.5], [0.9], [0.99]]) ** np.arange(64))
    layer_slots = slots_per_layer(usage, 32, 4)
    assert layer_slots is not None and sum(layer_slots) == 3 * 32 and len({*layer_slots}) > 1
    assert rebalanced_slots(usage, layer_slots, 4) is None
    for moved, wanted in ((1, None), (2, None), (3, layer_slots), (4, layer_slots)):
        saved = [layer_slots[0] + moved, layer_slots[1] - 1, layer_slots[2] - moved + 1]
        assert rebalanced_slots(usage, saved, 4) == wanted, "at least 3 of 96 slots must move"
    assert rebalanced_slots(usage, [6, 6, 6], 4) is None, "no slot can move"


def test_a_cache_with_uneven_layers_is_warmed_with_the_most_used_of_each(
    used_cache: tuple[ExpertCache, ExpertRunner], experts: Any, rng: np.random.Generator
) -> None:
    usage, host_experts = snapshot_usage(OPS, used_cache[0]), wrap_host_experts(LAYOUT, experts)
    layer_slots = [TOP_K, CAPACITY, 2 * CAPACITY - TOP_K]
    cache = make_cache(OPS, host_experts, CAPACITY, TOP_K, layer_slots)
    count = warm_cache(OPS, cache, host_experts, usage)
    is_resident = resident(OPS, cache)
    assert count == is_resident.sum() and (is_resident.sum(axis=1) <= layer_slots).all()
    for layer, num_slots in enumerate(layer_slots):
        assert set(usage.top_experts(layer, num_slots)) == set(np.flatnonzero(is_resident[layer]))
    store = ExpertRunner(OPS, host_experts, cache, 8, TOP_K)
    for _ in range(20):
        for layer in range(LAYERS):
            # checks against the packed experts
            run(store, rng, experts, int(rng.integers(1, 9)), layer)
    assert verify(OPS, cache, experts, 1000, 0) == resident(OPS, cache).sum() == sum(layer_slots)
