"""Heat that outlives an engine: saved, read, restored, and what is not believed."""

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
from tests.experts.test_cache import EXPERTS, LAYERS, OPS, RECORD, TOP_K, parts, records, run

CAPACITY = 2 * TOP_K + 1
WHOSE = "ab" * 32


@pytest.fixture
def arena(rng: np.random.Generator) -> Any:
    return records(rng)


@pytest.fixture
def used(arena: Any, rng: np.random.Generator) -> tuple[ExpertCache, ExpertRunner]:
    """A cache after some use."""
    cache, store = parts(wrap_host_experts(RECORD, arena), CAPACITY)
    for _ in range(40):
        for layer in range(LAYERS):
            run(store, rng, arena, int(rng.integers(1, 4)), layer)
    return cache, store


def leaving(cache: ExpertCache, layer: int) -> list[int]:
    """The experts of a layer in the order in which place would let them go."""
    who = cache.slot_to_expert[layer]
    slots = np.flatnonzero(who >= 0)
    who = who[slots]
    fading, next_step = cache.fading, cache.step[0] + 1
    age = (cache.last_used[layer][who] - next_step).astype(np.float32)
    heat = cache.short_count[layer][who] * np.exp2(age * np.float32(1 / fading.half_life))
    long = cache.long_count[layer][who] * np.exp2(age * np.float32(1 / fading.long_half_life))
    grown = 1 - 2 ** (-(next_step + fading.prior_steps) / fading.long_half_life)
    warmth = np.float32(grown) * heat + np.float32(fading.long_scale) * long
    order = np.lexsort((slots, cache.last_used[layer][who], warmth))
    return [int(one) for one in who[order]]


def there_and_back(cache: ExpertCache, path: Path) -> UsageSnapshot:
    save_usage(path, WHOSE, snapshot_usage(OPS, cache))
    found = read_usage(path, WHOSE, LAYERS, EXPERTS)
    assert found is not None
    return found


def test_what_is_saved_is_what_is_read(
    used: tuple[ExpertCache, ExpertRunner], tmp_path: Path
) -> None:
    cache, _ = used
    now, back = snapshot_usage(OPS, cache), there_and_back(cache, tmp_path / "new" / "a.heat")
    for name in ("short_count", "long_count", "steps", "age", "resident"):
        assert np.array_equal(getattr(now, name), getattr(back, name))
    assert np.array_equal(back.resident, resident(OPS, cache))
    never = cache.last_used == 0
    assert (back.age[never] == -1).all() and back.steps == cache.step[0]
    ages, fading = cache.step[0] - cache.last_used, cache.fading
    for found, count, half_life in (
        (back.short_count, cache.short_count, fading.half_life),
        (back.long_count, cache.long_count, fading.long_half_life),
    ):
        assert (found[never] == 0).all()
        assert np.allclose(found, count * np.exp2(-ages / half_life), rtol=1e-6)
    assert [one.name for one in (tmp_path / "new").iterdir()] == ["a.heat"]


@pytest.mark.parametrize("capacity", [TOP_K, CAPACITY, EXPERTS - 1])
def test_the_hottest_are_back_in_their_slots_byte_for_byte(
    used: tuple[ExpertCache, ExpertRunner], arena: Any, tmp_path: Path, capacity: int
) -> None:
    heat = there_and_back(used[0], tmp_path / "a.heat")
    shared = wrap_host_experts(RECORD, arena)
    cache = make_cache(OPS, shared, capacity, TOP_K)
    count = warm_cache(OPS, cache, shared, heat)
    there = resident(OPS, cache)
    assert count == there.sum() > 0
    assert verify(OPS, cache, arena, 1000, 0) == count
    for layer in range(LAYERS):
        order = heat.top_experts(layer, EXPERTS)
        assert set(order[:capacity]) == set(np.flatnonzero(there[layer]))
    assert cache.counters.tolist() == [0] * 7


def test_the_order_is_kept(
    used: tuple[ExpertCache, ExpertRunner], arena: Any, tmp_path: Path
) -> None:
    old = used[0]
    heat = there_and_back(old, tmp_path / "a.heat")
    shared = wrap_host_experts(RECORD, arena)
    cache = make_cache(OPS, shared, CAPACITY, TOP_K)
    warm_cache(OPS, cache, shared, heat)
    both = resident(OPS, old) & resident(OPS, cache)
    assert both.sum() > LAYERS * TOP_K
    for layer in range(LAYERS):
        before, after = (
            [one for one in leaving(of, layer) if both[layer, one]] for of in (old, cache)
        )
        assert before == after
    again = snapshot_usage(OPS, cache)
    assert np.array_equal(again.short_count, heat.short_count)
    assert np.array_equal(again.long_count, heat.long_count) and again.steps == heat.steps


def test_who_was_used_for_long_is_warmer_than_who_was_used_once(arena: Any) -> None:
    """Two counts, both of them kept: one use just now, and many a while ago."""
    shared, warm = wrap_host_experts(RECORD, arena), DECAY
    heat, long_heat = (np.zeros((LAYERS, EXPERTS), np.float32) for _ in range(2))
    heat[:, 0], long_heat[:, 0] = 1, 1
    heat[:, 1], long_heat[:, 1] = 0.5, (0.5 / warm.long_scale) * 1.01
    age = np.where(long_heat > 0, 0, -1).astype(np.int32)
    heats = UsageSnapshot(heat, long_heat, MAX_STEPS, age, long_heat > 0)
    assert heats.top_experts(0, 2).tolist() == [0, 1]
    heats.long_count[:, 1] += 1
    assert heats.top_experts(0, 2).tolist() == [1, 0]
    cache = make_cache(OPS, shared, TOP_K, TOP_K)
    warm_cache(OPS, cache, shared, heats)
    assert leaving(cache, 0) == [0, 1]


def test_an_engine_that_ran_for_long_has_counted_no_more_than_changes_anything(
    used: tuple[ExpertCache, ExpertRunner], arena: Any, tmp_path: Path
) -> None:
    cache, _ = used
    more = 40_000_000 - int(cache.step[0])
    cache.last_used[cache.last_used > 0] += more
    cache.step[0] += more
    heat = there_and_back(cache, tmp_path / "a.heat")
    assert heat.steps == MAX_STEPS and np.float32(1) == np.float32(
        1 - 2 ** (-MAX_STEPS / DECAY.long_half_life)
    )
    shared = wrap_host_experts(RECORD, arena)
    again = make_cache(OPS, shared, CAPACITY, TOP_K)
    warm_cache(OPS, again, shared, heat)
    assert np.array_equal(snapshot_usage(OPS, again).long_count, heat.long_count)


def test_of_equals_the_one_used_last_leaves_last(arena: Any) -> None:
    heat = np.zeros((LAYERS, EXPERTS), np.float32)
    heat[:, :5] = 1
    age = np.full((LAYERS, EXPERTS), -1, np.int32)
    age[:, :5] = [30, 10, 50, 20, 40]
    shared = wrap_host_experts(RECORD, arena)
    cache = make_cache(OPS, shared, 4, TOP_K)
    warm_cache(OPS, cache, shared, UsageSnapshot(heat, heat, 50, age, heat > 0))
    for layer in range(LAYERS):
        assert leaving(cache, layer) == [4, 0, 3, 1]


def test_counters_add_up_and_known_experts_hit_after_a_restore(
    used: tuple[ExpertCache, ExpertRunner], arena: Any, rng: np.random.Generator, tmp_path: Path
) -> None:
    heat = there_and_back(used[0], tmp_path / "a.heat")
    rates = []
    for warm in (False, True):
        shared = wrap_host_experts(RECORD, arena)
        cache, store = parts(shared, CAPACITY)
        if warm:
            warm_cache(OPS, cache, shared, heat)
        ids = np.random.default_rng(1)
        for layer in range(LAYERS):
            run(store, ids, arena, 1, layer)
        counted = store.counters()
        assert counted.routed == counted.hit + counted.missed == LAYERS * TOP_K
        rates.append(counted.hit)
        for _ in range(10):
            for layer in range(LAYERS):
                run(store, rng, arena, 2, layer)
        store.counters()
        assert verify(OPS, cache, arena, 1000, 0) > 0
    assert rates[0] == 0 < rates[1]


def test_a_cache_that_was_used_computes_with_what_was_restored(
    used: tuple[ExpertCache, ExpertRunner], arena: Any, rng: np.random.Generator
) -> None:
    cache, store = used
    heat = snapshot_usage(OPS, cache)
    coldest = replace(
        heat,
        short_count=heat.short_count[:, ::-1].copy(),
        long_count=heat.long_count[:, ::-1].copy(),
    )
    before = resident(OPS, cache)
    warm_cache(OPS, cache, wrap_host_experts(RECORD, arena), coldest)
    assert (resident(OPS, cache) != before).any()
    for layer in range(LAYERS):
        run(store, rng, arena, 8, layer)  # held to the records
    assert store.counters().hit > 0


def test_nothing_is_kept_of_a_cache_that_nobody_used(arena: Any, tmp_path: Path) -> None:
    cache = make_cache(OPS, wrap_host_experts(RECORD, arena), CAPACITY, TOP_K)
    try_save_usage(tmp_path / "a.heat", WHOSE, OPS, cache)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_warning(
    used: tuple[ExpertCache, ExpertRunner], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    try_save_usage(tmp_path / "file" / "a.heat", WHOSE, OPS, used[0])
    assert "a.heat" in caplog.text
    (tmp_path / "b.heat").mkdir()
    (tmp_path / "b.heat" / "x").write_text("")
    try_save_usage(tmp_path / "b.heat", WHOSE, OPS, used[0])
    assert "b.heat" in caplog.text
    assert sorted(one.name for one in tmp_path.iterdir()) == ["b.heat", "file"]


# -- what is not believed --------------------------------------------------------------------------


def is_left_aside(path: Path, caplog: pytest.LogCaptureFixture, **other: Any) -> None:
    asked = {"fingerprint": WHOSE, "layers": LAYERS, "experts": EXPERTS, **other}
    caplog.clear()
    assert read_usage(path, **asked) is None
    (said,) = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert path.name in said.getMessage()


def test_a_file_that_is_not_there_is_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_usage(tmp_path / "a.heat", WHOSE, LAYERS, EXPERTS) is None
    assert not caplog.records


def test_another_models_heat_is_left_aside(
    used: tuple[ExpertCache, ExpertRunner], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.heat"
    there_and_back(used[0], path)
    is_left_aside(path, caplog, fingerprint="cd" * 32)
    is_left_aside(path, caplog, layers=LAYERS + 1)
    is_left_aside(path, caplog, experts=EXPERTS - 1)


def test_a_heat_that_is_no_number_is_left_aside(
    used: tuple[ExpertCache, ExpertRunner], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = snapshot_usage(OPS, used[0])
    for name in ("short_count", "long_count"):
        for wrong in (np.nan, np.inf, -1):
            heat = getattr(good, name).copy()
            heat[1, 2] = wrong
            save_usage(tmp_path / "a.heat", WHOSE, replace(good, **{name: heat}))
            is_left_aside(tmp_path / "a.heat", caplog)
    for steps in (0, -1, MAX_STEPS + 1):
        save_usage(tmp_path / "a.heat", WHOSE, replace(good, steps=steps))
        is_left_aside(tmp_path / "a.heat", caplog)


def test_an_earlier_versions_heat_is_left_aside_and_its_version_said(
    used: tuple[ExpertCache, ExpertRunner], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.heat"
    there_and_back(used[0], path)
    raw = path.read_bytes()
    path.write_bytes(raw[:7] + b"\1" + raw[8:])
    is_left_aside(path, caplog)
    assert "version is 1" in caplog.text


def test_any_damage_is_left_aside(
    used: tuple[ExpertCache, ExpertRunner],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    rng: np.random.Generator,
) -> None:
    path = tmp_path / "a.heat"
    there_and_back(used[0], path)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        is_left_aside(path, caplog)
    for at in rng.integers(0, len(whole), 60).tolist():
        edited = bytearray(whole)
        edited[at] ^= int(rng.integers(1, 256))
        path.write_bytes(edited)
        is_left_aside(path, caplog)
    for length in (10, 3000, 1 << 20):
        path.write_bytes(rng.bytes(length))
        is_left_aside(path, caplog)
    path.unlink()
    path.mkdir()
    is_left_aside(path, caplog)


def heat_like(uses: Any) -> UsageSnapshot:
    """Of so many uses each, f32 [L, E]."""
    uses = np.asarray(uses, np.float32)
    return UsageSnapshot(uses, uses, 100, np.where(uses > 0, 0, -1).astype(np.int32), uses > 0)


NARROW, WIDE = [50, 40, 9, 1, 0, 0, 0, 0], [13, 13, 13, 13, 12, 12, 12, 12]


def test_slots_go_where_uses_are_spread() -> None:
    assert slots_per_layer(heat_like([NARROW, WIDE, WIDE]), 4, 1) == [2, 5, 5]
    assert slots_per_layer(heat_like([WIDE, WIDE]), 4, 2) == [4, 4], "alike"
    assert slots_per_layer(heat_like([NARROW, WIDE]), 7, 2) == [6, 8], (
        "no more than there are experts"
    )
    assert slots_per_layer(heat_like([NARROW, [0] * 8]), 4, 1) is None, "a layer that nobody asked"


def test_every_layer_keeps_room_for_a_token_and_a_half() -> None:
    heat = heat_like([NARROW, WIDE])
    assert slots_per_layer(heat, 6, 3) == [4, 8]
    assert slots_per_layer(heat, 5, 2) == [3, 7]
    for slots, top_k in ((4, 3), (3, 3), (3, 2), (1, 1)):
        assert slots_per_layer(heat, slots, top_k) is None, "there is nothing to share out"


def test_slots_stay_where_too_few_would_move() -> None:
    heat = heat_like(np.array([[0.5], [0.9], [0.99]]) ** np.arange(64))
    each = slots_per_layer(heat, 32, 4)
    assert each is not None and sum(each) == 3 * 32 and len({*each}) > 1
    assert rebalanced_slots(heat, each, 4) is None
    for moved, wanted in ((1, None), (2, None), (3, each), (4, each)):
        now = [each[0] + moved, each[1] - 1, each[2] - moved + 1]
        assert rebalanced_slots(heat, now, 4) == wanted, "three are one of 32"
    assert rebalanced_slots(heat, [6, 6, 6], 4) is None, "there is nothing to share out"


def test_a_start_with_quotas_has_the_hottest_of_each_layer(
    used: tuple[ExpertCache, ExpertRunner], arena: Any, rng: np.random.Generator
) -> None:
    heat, shared = snapshot_usage(OPS, used[0]), wrap_host_experts(RECORD, arena)
    each = [TOP_K, CAPACITY, 2 * CAPACITY - TOP_K]
    cache = make_cache(OPS, shared, CAPACITY, TOP_K, each)
    count = warm_cache(OPS, cache, shared, heat)
    there = resident(OPS, cache)
    assert count == there.sum() and (there.sum(axis=1) <= each).all()
    for layer, own in enumerate(each):
        assert set(heat.top_experts(layer, own)) == set(np.flatnonzero(there[layer]))
    store = ExpertRunner(OPS, shared, cache, 8, TOP_K)
    for _ in range(20):
        for layer in range(LAYERS):
            run(store, rng, arena, int(rng.integers(1, 9)), layer)  # held to the records
    assert verify(OPS, cache, arena, 1000, 0) == resident(OPS, cache).sum() == sum(each)
