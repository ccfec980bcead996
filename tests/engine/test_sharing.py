"""Slots shared out among layers while nobody asks: when, and that no reply is another for it."""

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osmium import loader
from osmium.engine import engine as crank
from osmium.engine import slot_rebalancer
from osmium.engine.engine import Engine
from osmium.engine.request import SamplingParams
from osmium.engine.runner import ModelRunner
from osmium.errors import CudaError, EngineStopped
from osmium.experts.cache import resident, verify
from osmium.experts.usage import slots_per_layer, snapshot_usage
from osmium.weights import PackedModel
from tests.engine.conftest import CASE
from tests.engine.fake_gpu import FakeGpu
from tests.engine.fakes import PATIENCE_S, Bench

SLOTS = 8

TOKENS = 20 + 12
"""Of a prompt, and of what is said to it."""


@pytest.fixture
def start(packed: PackedModel, tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Starts engines whose heat is kept."""
    made: list[Engine] = []

    def load(device: str = "cpu", **more: Any) -> Engine:
        where: dict[str, Any] = {"cache_dir": str(tmp_path), "vram": 2 << 30, "ram": 1 << 30}
        shape = {"expert_slots": SLOTS, "context": 64, "prefill_chunk": 16, "page_size": 16}
        made.append(loader.load(packed.path, device, **{**where, **shape, **more}))
        return made[-1]

    yield load
    for engine in made:
        engine.close()


def talk(engine: Engine, seed: int = 1) -> list[int]:
    ids = np.random.default_rng(seed).integers(0, CASE.vocab, 20).tolist()
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=12)
    return [token.id for token in engine.generate(ids, params)]


def own(runner: ModelRunner) -> list[int]:
    """How many slots each layer has."""
    return [layer.shape[0] for layer in runner.expert_runner.cache.slots]


# -- what is done ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", [False, True], ids=["", "prepared"])
def test_a_reply_is_the_same_before_and_after(start: Callable[..., Engine], prepared: bool) -> None:
    left, shared = start(), start()
    for engine in (left, shared):
        if prepared:
            engine.run_on_engine_thread(engine.runner.capture_graphs)
        assert talk(engine) == talk(engine)
    assert shared.run_on_engine_thread(shared.runner.rebalance_slots) == SLOTS * len(CASE.kinds), (
        "every slot is filled"
    )
    assert own(left.runner) == [SLOTS] * len(CASE.kinds) != own(shared.runner)
    for seed in (1, 2, 3):
        assert talk(left, seed) == talk(shared, seed)
    counts = [engine.status()["experts"] for engine in (left, shared)]
    assert counts[0]["routed"] == counts[1]["routed"]
    assert counts[0]["hit"] != counts[1]["hit"], "other experts were there"


def test_slots_hold_the_hottest_and_all_else_goes_on(
    start: Callable[..., Engine], packed: PackedModel
) -> None:
    engine = start()
    ops, store = engine.runner.ops, engine.runner.expert_runner
    talk(engine)
    before, counted = (
        engine.run_on_engine_thread(lambda: snapshot_usage(ops, store.cache)),
        store.counters(),
    )
    arrays = {
        name: getattr(store.cache, name)
        for name in ("expert_to_slot", "short_count", "last_used", "step")
    }
    memory = store.cache.storage
    engine.run_on_engine_thread(engine.runner.rebalance_slots)

    each = slots_per_layer(before, SLOTS, engine.config.top_k)
    assert each is not None and own(engine.runner) == each and sum(each) == SLOTS * len(CASE.kinds)
    there = resident(ops, store.cache)
    assert verify(ops, store.cache, packed.all_records(), 10**6, 0) == there.sum() == sum(each)
    for layer, slots in enumerate(each):
        assert set(np.flatnonzero(there[layer])) == set(before.top_experts(layer, slots))
    after = snapshot_usage(ops, store.cache)
    assert np.allclose(after.short_count, before.short_count, rtol=1e-6)
    assert np.allclose(after.long_count, before.long_count, rtol=1e-6)
    assert after.steps == before.steps and store.counters() == counted
    assert store.cache.storage is memory, "nothing was allocated"
    assert all(getattr(store.cache, name) is array for name, array in arrays.items())

    talk(engine, 2)
    assert store.counters().routed == counted.routed * 2
    assert verify(ops, store.cache, packed.all_records(), 10**6, 0) > 0


def test_where_nothing_would_move_nothing_is_done(start: Callable[..., Engine]) -> None:
    engine = start()
    store = engine.runner.expert_runner
    assert engine.run_on_engine_thread(engine.runner.rebalance_slots) == 0, (
        "nobody has asked anything"
    )
    talk(engine)
    assert engine.run_on_engine_thread(engine.runner.rebalance_slots) > 0
    cache, who = store.cache, [one.copy() for one in store.cache.slot_to_expert]
    assert engine.run_on_engine_thread(engine.runner.rebalance_slots) == 0
    assert store.cache is cache
    assert all(np.array_equal(a, b) for a, b in zip(who, cache.slot_to_expert, strict=True))
    all_there = start(expert_slots=16)
    talk(all_there)
    assert all_there.run_on_engine_thread(all_there.runner.rebalance_slots) == 0


def test_on_a_gpu_steps_are_recorded_again_and_nothing_is_allocated(
    start: Callable[..., Engine], packed: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold = start()
    talk(cold)
    heat = snapshot_usage(cold.runner.ops, cold.runner.expert_runner.cache)
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch)
    prepared: list[list[int]] = []

    def prepare(runner: ModelRunner) -> None:
        prepared.append(own(runner))
        runner._graphs_captured = True
        runner._graphs[("decode", 1)] = lambda: None
        for name in ("short_count", "step", "counters"):
            runner.ops.memset(getattr(runner.expert_runner.cache, name), 0)

    monkeypatch.setattr(ModelRunner, "capture_graphs", prepare)  # the kernels would do nothing
    engine = start("gpu", cache_dir=str(packed.path.parent))
    runner, store = engine.runner, engine.runner.expert_runner
    ops, cache = runner.ops, store.cache

    def use() -> None:
        """As if it had answered."""
        ops.copy_h2d(cache.short_count, heat.short_count)
        ops.copy_h2d(cache.long_count, heat.long_count)
        ops.copy_h2d(
            cache.last_used, np.where(heat.age >= 0, heat.steps - heat.age, 0).astype(np.int32)
        )
        ops.copy_h2d(cache.step, np.array([heat.steps], np.int32))
        ops.copy_h2d(cache.counters, np.array([9, 4, 5, 5, 2, 1, 7], np.int64))

    engine.run_on_engine_thread(use)
    old, asked, held = runner._graphs[("decode", 1)], gpu.asked, dict(gpu.held)
    runner._graphs[("logits", 1)] = old
    assert engine.run_on_engine_thread(runner.rebalance_slots) == SLOTS * len(CASE.kinds)
    assert prepared == [[SLOTS] * len(CASE.kinds), own(runner)] and prepared[0] != prepared[1]
    assert list(runner._graphs) == [("decode", 1)] and runner._graphs[("decode", 1)] is not old
    assert gpu.asked == asked and gpu.held.keys() == held.keys()
    assert engine.status()["experts"]["routed"] == 9
    count = engine.run_on_engine_thread(
        lambda: verify(ops, store.cache, packed.all_records(), 10**6, 0)
    )
    assert count == SLOTS * len(CASE.kinds)


def test_a_second_start_has_the_slots_that_were_shared_out(start: Callable[..., Engine]) -> None:
    first = start()
    talk(first)
    first.run_on_engine_thread(first.runner.rebalance_slots)
    each, there = own(first.runner), resident(first.runner.ops, first.runner.expert_runner.cache)
    first.close()
    second = start()
    assert own(second.runner) == each
    assert np.array_equal(resident(second.runner.ops, second.runner.expert_runner.cache), there)


# -- when ------------------------------------------------------------------------------------------


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens after which slots were shared out; there is always a moment for it, after 50."""
    monkeypatch.setattr(crank, "IDLE_SECONDS", 0.01)
    monkeypatch.setattr(slot_rebalancer, "FIRST_REBALANCE_TOKENS", 50)
    seen: list[int] = []
    share = ModelRunner.rebalance_slots

    def counted(runner: ModelRunner) -> int:
        seen.append(int(runner.expert_runner.counters().routed))
        return share(runner)

    monkeypatch.setattr(ModelRunner, "rebalance_slots", counted)
    return seen


def idle(engine: Engine) -> None:
    """Wait until nobody has asked for a while."""
    there, hook = threading.Event(), engine.on_idle
    assert hook is not None

    def told() -> None:
        hook()
        there.set()

    engine.on_idle = told
    engine.run_on_engine_thread(lambda: None)
    assert there.wait(PATIENCE_S), "the engine is never idle"
    engine.on_idle = hook


def test_slots_are_shared_out_after_so_many_tokens_and_then_twice_as_many(
    start: Callable[..., Engine], shares: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "osmium.rebalancer")
    engine = start()
    layers, top_k = len(CASE.kinds), engine.config.top_k
    seen: list[int] = []
    for number in range(1, 10):
        talk(engine, number)
        idle(engine)
        idle(engine)  # once is enough
        if len(shares) > len(seen):
            seen.append(number)
    # A reply's last token is never computed.
    assert shares == [(TOKENS - 1) * number * layers * top_k for number in seen]
    assert seen == [2, 4, 8], "64 tokens of at least 50, then 128 and 256"
    (said, *_) = [one.getMessage() for one in caplog.records]
    assert "expert slots between layers" in said and f"{SLOTS * layers} experts" in said


def test_who_asks_again_after_a_while_is_told_the_same(
    start: Callable[..., Engine], shares: list[int]
) -> None:
    engine = start()
    said = [talk(engine, seed) for seed in (1, 2)]
    idle(engine)
    assert len(shares) == 1 and own(engine.runner) != [SLOTS] * len(CASE.kinds)
    assert [talk(engine, seed) for seed in (1, 2)] == said


def test_while_routing_is_recorded_slots_stay(
    start: Callable[..., Engine], shares: list[int]
) -> None:
    engine = start()
    engine.record_routing()
    for seed in range(3):
        talk(engine, seed)
    idle(engine)
    assert not shares and own(engine.runner) == [SLOTS] * len(CASE.kinds)


@pytest.mark.parametrize(
    "more", [{"enable_expert_cache": False}, {"expert_slots": None}, {"expert_slots": 16}]
)
def test_where_no_heat_is_kept_slots_stay(
    start: Callable[..., Engine], more: dict[str, Any]
) -> None:
    assert start(**more).on_idle is None


def test_of_made_up_models_and_of_benchmarks_slots_stay(
    packed: PackedModel, tmp_path: Path
) -> None:
    where: dict[str, Any] = {"cache_dir": str(tmp_path), "context": 64, "expert_slots": 4}
    made_up = loader.load("synthetic:tiny", "cpu", **where)
    made = loader.Loader(packed.path, "cpu", **where)
    measured, demo = made.engine(), loader.load(None, "cpu", **where)
    for engine in (made_up, measured, demo):
        assert engine.on_idle is None
        engine.close()
    made.close()


# -- the moment for it -----------------------------------------------------------------------------


def test_an_engine_is_idle_once_until_somebody_asks_again(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crank, "IDLE_SECONDS", 0.01)
    made, calls = bench(), threading.Semaphore(0)
    made.engine.on_idle = calls.release
    for _ in range(3):
        made.ask([1, 2, 3]).wait()
        assert calls.acquire(timeout=PATIENCE_S)
        assert not calls.acquire(timeout=0.1), "it waits"


def test_an_engine_is_not_idle_while_somebody_asks_again_soon(bench: Callable[..., Bench]) -> None:
    made, calls = bench(), threading.Semaphore(0)
    made.engine.on_idle = calls.release
    for _ in range(5):
        made.ask([1, 2, 3]).wait()
    made.engine.close()
    assert not calls.acquire(blocking=False)


def test_an_error_of_the_device_ends_the_engine(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crank, "IDLE_SECONDS", 0.01)
    made, stopped = bench(), threading.Event()

    def fail() -> None:
        raise CudaError("gone", call="cuMemcpyAsync", name="x", code=700, context_lost=True)

    made.engine.on_idle, made.engine.on_stopped = fail, stopped.set
    made.ask([1, 2, 3]).wait()
    assert stopped.wait(PATIENCE_S)
    with pytest.raises(EngineStopped, match="gone"):
        made.engine.generate([1, 2, 3])
    assert made.engine.failure is not None
