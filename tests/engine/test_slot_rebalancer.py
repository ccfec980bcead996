"""Rebalancing of slots between layers while the engine is idle: when, and without changing
responses."""

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osmium import loader
from osmium.engine import loop as crank
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
from tests.engine.fakes import PATIENCE_S, EngineHarness

SLOTS = 8

TOKENS = 20 + 12
"""Prompt tokens and generated tokens of one request."""


@pytest.fixture
def start(packed: PackedModel, tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Start engines that save usage."""
    harness: list[Engine] = []

    def load(device: str = "cpu", **more: Any) -> Engine:
        settings: dict[str, Any] = {"cache_dir": str(tmp_path), "vram": 2 << 30, "ram": 1 << 30}
        shape = {"expert_slots": SLOTS, "context": 64, "prefill_chunk": 16, "page_size": 16}
        harness.append(loader.load(packed.path, device, **{**settings, **shape, **more}))
        return harness[-1]

    yield load
    for engine in harness:
        engine.close()


def generate(engine: Engine, seed: int = 1) -> list[int]:
    ids = np.random.default_rng(seed).integers(0, CASE.vocab, 20).tolist()
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=12)
    return [token.id for token in engine.generate(ids, params)]


def layer_slots(runner: ModelRunner) -> list[int]:
    """Slots per layer."""
    return [layer.shape[0] for layer in runner.expert_runner.cache.slots]


# -- effects ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", [False, True], ids=["", "prepared"])
def test_rebalancing_changes_no_response(start: Callable[..., Engine], prepared: bool) -> None:
    unchanged, rebalanced = start(), start()
    for engine in (unchanged, rebalanced):
        if prepared:
            engine.run_on_engine_thread(engine.runner.capture_graphs)
        assert generate(engine) == generate(engine)
    assert rebalanced.run_on_engine_thread(rebalanced.runner.rebalance_slots) == SLOTS * len(
        CASE.kinds
    ), "every slot is filled"
    assert (
        layer_slots(unchanged.runner) == [SLOTS] * len(CASE.kinds) != layer_slots(rebalanced.runner)
    )
    for seed in (1, 2, 3):
        assert generate(unchanged, seed) == generate(rebalanced, seed)
    counts = [engine.status()["experts"] for engine in (unchanged, rebalanced)]
    assert counts[0]["routed"] == counts[1]["routed"]
    assert counts[0]["hit"] != counts[1]["hit"], "other experts are resident"


def test_after_rebalancing_slots_hold_the_most_used_and_state_is_kept(
    start: Callable[..., Engine], packed: PackedModel
) -> None:
    engine = start()
    ops, store = engine.runner.ops, engine.runner.expert_runner
    generate(engine)
    before, counting_rebalance = (
        engine.run_on_engine_thread(lambda: snapshot_usage(ops, store.cache)),
        store.counters(),
    )
    arrays = {
        name: getattr(store.cache, name)
        for name in ("expert_to_slot", "short_count", "last_used", "step")
    }
    memory = store.cache.storage
    engine.run_on_engine_thread(engine.runner.rebalance_slots)

    slots_each = slots_per_layer(before, SLOTS, engine.config.top_k)
    assert (
        slots_each is not None
        and layer_slots(engine.runner) == slots_each
        and sum(slots_each) == SLOTS * len(CASE.kinds)
    )
    is_resident = resident(ops, store.cache)
    assert (
        verify(ops, store.cache, packed.all_packed_experts(), 10**6, 0)
        == is_resident.sum()
        == sum(slots_each)
    )
    for layer, slots in enumerate(slots_each):
        assert set(np.flatnonzero(is_resident[layer])) == set(before.top_experts(layer, slots))
    after = snapshot_usage(ops, store.cache)
    assert np.allclose(after.short_count, before.short_count, rtol=1e-6)
    assert np.allclose(after.long_count, before.long_count, rtol=1e-6)
    assert after.steps == before.steps and store.counters() == counting_rebalance
    assert store.cache.storage is memory, "no memory was allocated"
    assert all(getattr(store.cache, name) is array for name, array in arrays.items())

    generate(engine, 2)
    assert store.counters().routed == counting_rebalance.routed * 2
    assert verify(ops, store.cache, packed.all_packed_experts(), 10**6, 0) > 0


def test_rebalancing_without_a_better_split_does_nothing(start: Callable[..., Engine]) -> None:
    engine = start()
    store = engine.runner.expert_runner
    assert engine.run_on_engine_thread(engine.runner.rebalance_slots) == 0, (
        "no expert has been used"
    )
    generate(engine)
    assert engine.run_on_engine_thread(engine.runner.rebalance_slots) > 0
    cache, before = store.cache, [one.copy() for one in store.cache.slot_to_expert]
    assert engine.run_on_engine_thread(engine.runner.rebalance_slots) == 0
    assert store.cache is cache
    assert all(np.array_equal(a, b) for a, b in zip(before, cache.slot_to_expert, strict=True))
    all_resident = start(expert_slots=16)
    generate(all_resident)
    assert all_resident.run_on_engine_thread(all_resident.runner.rebalance_slots) == 0


def test_on_a_gpu_graphs_are_captured_again_without_allocations(
    start: Callable[..., Engine], packed: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = start()
    generate(source)
    usage = snapshot_usage(source.runner.ops, source.runner.expert_runner.cache)
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch)
    prepared: list[list[int]] = []

    def prepare(runner: ModelRunner) -> None:
        prepared.append(layer_slots(runner))
        runner._graphs_captured = True
        runner._graphs[("reply", 1)] = lambda: None
        for name in ("short_count", "step", "counters"):
            runner.ops.memset(getattr(runner.expert_runner.cache, name), 0)

    monkeypatch.setattr(ModelRunner, "capture_graphs", prepare)  # kernels do nothing here
    engine = start("gpu", cache_dir=str(packed.path.parent))
    runner, store = engine.runner, engine.runner.expert_runner
    ops, cache = runner.ops, store.cache

    def use() -> None:
        """Set the counters as if a response had been generated."""
        ops.copy_h2d(cache.short_count, usage.short_count)
        ops.copy_h2d(cache.long_count, usage.long_count)
        ops.copy_h2d(
            cache.last_used, np.where(usage.age >= 0, usage.steps - usage.age, 0).astype(np.int32)
        )
        ops.copy_h2d(cache.step, np.array([usage.steps], np.int32))
        ops.copy_h2d(cache.counters, np.array([9, 4, 5, 5, 2, 1, 7], np.int64))

    engine.run_on_engine_thread(use)
    old, asked, held_before = runner._graphs[("reply", 1)], gpu.num_allocations, dict(gpu.held)
    runner._graphs[("logits", 1)] = old
    assert engine.run_on_engine_thread(runner.rebalance_slots) == SLOTS * len(CASE.kinds)
    assert (
        prepared == [[SLOTS] * len(CASE.kinds), layer_slots(runner)] and prepared[0] != prepared[1]
    )
    assert list(runner._graphs) == [("reply", 1)] and runner._graphs[("reply", 1)] is not old
    assert gpu.num_allocations == asked and gpu.held.keys() == held_before.keys()
    assert engine.status()["experts"]["routed"] == 9
    count = engine.run_on_engine_thread(
        lambda: verify(ops, store.cache, packed.all_packed_experts(), 10**6, 0)
    )
    assert count == SLOTS * len(CASE.kinds)


def test_a_second_start_restores_the_rebalanced_slots(start: Callable[..., Engine]) -> None:
    first = start()
    generate(first)
    first.run_on_engine_thread(first.runner.rebalance_slots)
    slots_each, is_resident = (
        layer_slots(first.runner),
        resident(first.runner.ops, first.runner.expert_runner.cache),
    )
    first.close()
    second = start()
    assert layer_slots(second.runner) == slots_each
    assert np.array_equal(
        resident(second.runner.ops, second.runner.expert_runner.cache), is_resident
    )


# -- timing ----------------------------------------------------------------------------------------


@pytest.fixture
def rebalanced_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Routed experts at each rebalance; the engine is idle at once, and the first needs 50
    tokens."""
    monkeypatch.setattr(crank, "IDLE_SECONDS", 0.01)
    monkeypatch.setattr(slot_rebalancer, "FIRST_REBALANCE_TOKENS", 50)
    rebalanced_after: list[int] = []
    rebalance = ModelRunner.rebalance_slots

    def counting_rebalance(runner: ModelRunner) -> int:
        rebalanced_after.append(int(runner.expert_runner.counters().routed))
        return rebalance(runner)

    monkeypatch.setattr(ModelRunner, "rebalance_slots", counting_rebalance)
    return rebalanced_after


def idle(engine: Engine) -> None:
    """Wait until the engine is idle."""
    is_resident, hook = threading.Event(), engine.on_idle
    assert hook is not None

    def idle_hook() -> None:
        hook()
        is_resident.set()

    engine.on_idle = idle_hook
    engine.run_on_engine_thread(lambda: None)
    assert is_resident.wait(PATIENCE_S), "the engine is never idle"
    engine.on_idle = hook


def test_slots_are_rebalanced_after_a_token_count_that_doubles(
    start: Callable[..., Engine], rebalanced_at: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "osmium.rebalancer")
    engine = start()
    layers, top_k = len(CASE.kinds), engine.config.top_k
    rebalanced_after: list[int] = []
    for number in range(1, 10):
        generate(engine, number)
        idle(engine)
        idle(engine)  # a second idle period must not rebalance again
        if len(rebalanced_at) > len(rebalanced_after):
            rebalanced_after.append(number)
    # A response's last token is never computed.
    assert rebalanced_at == [(TOKENS - 1) * number * layers * top_k for number in rebalanced_after]
    assert rebalanced_after == [2, 4, 8], "64 tokens of at least 50, then 128 and 256"
    (message, *_) = [one.getMessage() for one in caplog.records]
    assert "expert slots between layers" in message and f"{SLOTS * layers} experts" in message


def test_a_request_repeated_after_rebalancing_gets_the_same_response(
    start: Callable[..., Engine], rebalanced_at: list[int]
) -> None:
    engine = start()
    responses = [generate(engine, seed) for seed in (1, 2)]
    idle(engine)
    assert len(rebalanced_at) == 1 and layer_slots(engine.runner) != [SLOTS] * len(CASE.kinds)
    assert [generate(engine, seed) for seed in (1, 2)] == responses


def test_recording_routing_prevents_rebalancing(
    start: Callable[..., Engine], rebalanced_at: list[int]
) -> None:
    engine = start()
    engine.record_routing()
    for seed in range(3):
        generate(engine, seed)
    idle(engine)
    assert not rebalanced_at and layer_slots(engine.runner) == [SLOTS] * len(CASE.kinds)


@pytest.mark.parametrize(
    "more", [{"enable_expert_cache": False}, {"expert_slots": None}, {"expert_slots": 16}]
)
def test_without_saved_usage_slots_are_not_rebalanced(
    start: Callable[..., Engine], more: dict[str, Any]
) -> None:
    assert start(**more).on_idle is None


def test_synthetic_models_and_benchmarks_are_not_rebalanced(
    packed: PackedModel, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"cache_dir": str(tmp_path), "context": 64, "expert_slots": 4}
    synthetic = loader.load("synthetic:tiny", "cpu", **settings)
    harness = loader.Loader(packed.path, "cpu", **settings)
    measured, demo = harness.engine(), loader.load(None, "cpu", **settings)
    for engine in (synthetic, measured, demo):
        assert engine.on_idle is None
        engine.close()
    harness.close()


# -- the idle callback -----------------------------------------------------------------------------


def test_on_idle_runs_once_until_the_next_request(
    harness_of: Callable[..., EngineHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crank, "IDLE_SECONDS", 0.01)
    harness, calls = harness_of(), threading.Semaphore(0)
    harness.engine.on_idle = calls.release
    for _ in range(3):
        harness.submit([1, 2, 3]).wait()
        assert calls.acquire(timeout=PATIENCE_S)
        assert not calls.acquire(timeout=0.1), "one call per idle period"


def test_on_idle_does_not_run_between_close_requests(
    harness_of: Callable[..., EngineHarness],
) -> None:
    harness, calls = harness_of(), threading.Semaphore(0)
    harness.engine.on_idle = calls.release
    for _ in range(5):
        harness.submit([1, 2, 3]).wait()
    harness.engine.close()
    assert not calls.acquire(blocking=False)


def test_a_device_error_in_on_idle_stops_the_engine(
    harness_of: Callable[..., EngineHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crank, "IDLE_SECONDS", 0.01)
    harness, stopped = harness_of(), threading.Event()

    def fail() -> None:
        raise CudaError("gone", call="cuMemcpyAsync", name="x", code=700, context_lost=True)

    harness.engine.on_idle, harness.engine.on_stopped = fail, stopped.set
    harness.submit([1, 2, 3]).wait()
    assert stopped.wait(PATIENCE_S)
    with pytest.raises(EngineStopped, match="gone"):
        harness.engine.generate([1, 2, 3])
    assert harness.engine.failure is not None
