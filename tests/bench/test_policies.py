"""The cache simulator against plain restatements, and against the operation that it stands for."""

from pathlib import Path

import numpy as np
import pytest

from osmium.bench import policies
from osmium.errors import ConfigError
from osmium.experts.cache import DECAY, make_cache, resize_layers
from osmium.experts.host_experts import wrap_host_experts
from osmium.experts.routing import RoutingRecorder, RoutingTrace, read_trace
from osmium.experts.usage import (
    FIRST_REBALANCE_TOKENS,
    rebalanced_slots,
    snapshot_usage,
    warm_cache,
)
from osmium.ops import DecayConfig, ExpertCache, PrefetchState, SlotAssignment
from osmium.ops.reference import ReferenceOps
from osmium.ops.types import FETCH_BLOCKS, FETCH_WARPS, ROUTER_BARRIER_SHAPE
from osmium.quant.expert_layout import ExpertLayout


def trace(
    rng: np.random.Generator,
    tokens: int,
    layers: int,
    experts: int,
    top_k: int,
    popular: tuple[float, ...] = (1,),
) -> RoutingTrace:
    """Routing with experts that are popular, in some layers more than in others, and with drift."""
    base = rng.normal(0, 1, (layers, experts)) * np.resize(popular, (layers, 1))
    drift = np.zeros((layers, experts))
    ids = np.empty((tokens, layers, top_k), np.uint16)
    for t in range(tokens):
        drift = 0.9 * drift + rng.normal(0, 0.6, drift.shape)
        score = base + drift + rng.normal(0, 0.5, drift.shape)
        ids[t] = np.argsort(-score, axis=1)[:, :top_k]
    return RoutingTrace(ids, np.array([0]), experts)


@pytest.mark.parametrize("policy", [policies.SHIPPED, "decayed 24"])
def test_a_policy_hits_what_place_hits(rng: np.random.Generator, policy: str) -> None:
    """Token by token, layer by layer: the simulator is the operation.  Decayed is what place does
    where the long heat weighs nothing."""
    t = trace(rng, 120, 3, 20, 3)
    slots, layers, experts, skip = 8, 3, 20, 10
    fading = DECAY if policy == policies.SHIPPED else DecayConfig(24.0, 512.0, 0.0, 19)
    cache, plan = cold(layers, experts, slots, 3, fading)
    ops = ReferenceOps()
    for now, token in enumerate(t.ids):
        if now == skip:
            cache.counters[:] = 0
        for layer in range(layers):
            ops.assign_slots(plan, cache, layer, token[layer : layer + 1])
    wanted = cache.counters[1] / ((120 - skip) * layers * 3)
    assert policies.hit_rate(t, slots, policy, skip) == pytest.approx(wanted, abs=2e-3)


def test_slots_are_shared_out_as_by_the_cache_itself(rng: np.random.Generator) -> None:
    """Its own heat, cut and filled anew after 1,024 tokens and after 2,048."""
    layers, experts, slots, top_k = 3, 20, 8, 3
    t = trace(rng, 2300, layers, experts, top_k, (0, 1, 4))
    ops, record = ReferenceOps(), ExpertLayout(16, 8, 8)
    arena = wrap_host_experts(record, np.zeros((layers, experts, record.nbytes), np.uint8))
    cache, (_, plan) = make_cache(ops, arena, slots, top_k), cold(layers, experts, slots, top_k)
    shared = []
    for now, token in enumerate(t.ids):
        if now in (FIRST_REBALANCE_TOKENS, 2 * FIRST_REBALANCE_TOKENS):
            heat = snapshot_usage(ops, cache)
            each = rebalanced_slots(heat, [len(layer) for layer in cache.slots], top_k)
            if each is not None:
                cache = resize_layers(cache, each)
                warm_cache(ops, cache, arena, heat)
                shared.append((now, each))
        if now == 1000:
            cache.counters[:] = 0
        for layer in range(layers):
            ops.assign_slots(plan, cache, layer, token[layer : layer + 1])
    assert shared and shared[0][0] == FIRST_REBALANCE_TOKENS and len({*shared[0][1]}) > 1
    wanted = cache.counters[1] / (1300 * layers * top_k)
    found = policies.hit_rate(t, slots, "shared", 1000)
    assert found == pytest.approx(wanted, abs=1e-3)
    assert found != policies.hit_rate(t, slots, "mixed", 1000)


def cold(
    layers: int, experts: int, slots: int, top_k: int, fading: DecayConfig = DECAY
) -> tuple[ExpertCache, SlotAssignment]:
    """A cache with nobody in it, and a plan for a token."""
    shape = (layers, experts)
    cache = ExpertCache(
        ExpertLayout(16, 8, 8), experts, fading, (),
        np.full(shape, -1, np.int32), tuple(np.full((layers, slots), -1, np.int32)),
        np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape, np.int32),
        np.zeros(1, np.int32), np.zeros(7, np.int64),
    )  # fmt: skip
    return cache, SlotAssignment(*(np.zeros(n, np.int32) for n in (1, *[top_k] * 5, 2)))


@pytest.mark.parametrize("slots", [3, 4, 8, 18, 40])
def test_a_guess_is_what_place_guesses(rng: np.random.Generator, slots: int) -> None:
    """With so few slots that none can be given away, some, and so many that some stay free."""
    tokens, layers, experts, top_k, skip = 400, 4, 40, 3, 10
    t = predicted(rng, trace(rng, tokens, layers, experts, top_k), 0.7)
    cache, plan = cold(layers, experts, slots, top_k, DECAY)
    guess = PrefetchState(
        np.zeros((1, top_k), np.uint16), np.zeros((1, top_k), np.float32),
        np.zeros((1, experts), np.float32), np.zeros(4, np.int64), np.zeros(ROUTER_BARRIER_SHAPE,
        np.int32),
        np.full(layers, -1, np.int32), np.zeros(layers, np.int32), np.zeros(layers, np.int32),
        np.zeros((layers, FETCH_WARPS), np.int32), np.zeros((layers, FETCH_BLOCKS), np.int32),
    )  # fmt: skip
    for now, token in enumerate(t.ids):
        if now == skip:
            cache.counters[:] = 0
        for layer in range(layers):
            if layer + 1 < layers:
                assert t.predicted is not None and t.predicted_weights is not None
                guess.ids[:] = t.predicted[now, layer + 1]
                guess.weights[:] = t.predicted_weights[now, layer + 1]
            ReferenceOps().assign_slots(plan, cache, layer, token[layer : layer + 1], guess)
    hit, made, right = cache.counters[[1, 4, 5]]
    assert made and right, "it says something"
    found = policies.simulate_prefetch(t, slots, skip)
    each = (tokens - skip) * (layers - 1)
    assert found[0] == pytest.approx(hit / ((tokens - skip) * layers * top_k), abs=2e-3)
    assert found[1] == pytest.approx(made / each, abs=2e-3)
    assert found[1] * found[2] == pytest.approx(right / each, abs=2e-3)


def predicted(rng: np.random.Generator, t: RoutingTrace, right: float) -> RoutingTrace:
    """A trace that says so much of itself beforehand, with weights that say nothing."""
    wrong = rng.random(t.ids.shape) >= right
    said = np.where(wrong, rng.integers(0, t.experts, t.ids.shape), t.ids).astype(np.uint16)
    weights = rng.random(t.ids.shape, np.float32)
    return RoutingTrace(t.ids, t.starts, t.experts, said, weights)


@pytest.mark.parametrize(
    ("rule", "said", "weights", "right"),
    [
        ("first", [1, 2, 0], None, 1), ("first", [1, 0, 2], None, 0),
        ("warmest", [1, 2, 0], None, 0), ("warmest", [1, 2, 0], [0.3, 0.7, 0], 0),
        ("shipped", [1, 2, 0], None, 0), ("shipped", [1, 0, 2], [0, 0.45, 0.55], 0),
        ("shipped", [1, 0, 2], [0, 0.2, 0.8], 1),
    ],
)  # fmt: skip
def test_the_rules_differ_in_whom_they_guess(
    rule: str, said: list[int], weights: list[float] | None, right: int
) -> None:
    """Of layer 1, at the last token: 1 is there, 0 is warmer than 2, and 2 is asked for.  Warmth
    outweighs a little of the router's weight, not most of it."""
    asked = [[0, 3, 4], [1, 5, 6], [1, 5, 6], [2, 5, 6]]
    ids = np.array([[one, one] for one in asked], np.uint16)
    predicted = ids.copy()
    predicted[3, 1] = said
    each = None
    if weights is not None:
        each = np.full(ids.shape, 1 / 3, np.float32)
        each[3, 1] = weights
    t = RoutingTrace(ids, np.array([0]), 9, predicted, each)
    hits, made, found = policies.simulate_prefetch(t, 3, 3, rule)
    assert (made, found) == (1, right)
    assert hits == pytest.approx((2 + 1) / 6), "one of two that were there has left for it"


def test_recall_is_the_share_of_the_predicted_that_were_asked_for() -> None:
    ids = np.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]]], np.uint16)
    said = np.array([[[0, 1], [3, 9]], [[4, 5], [7, 6]]], np.uint16)
    assert policies.recall(RoutingTrace(ids, np.array([0]), 10, said)).tolist() == [1, 0.75]


def test_warmth_orders_by_uses_a_step_of_late_and_over_long(rng: np.random.Generator) -> None:
    steps, now = 90, 89
    uses = rng.integers(0, 2, (steps, 12)).astype(np.float64)
    ages = now - np.arange(steps)[:, None]
    heat = (uses * 2 ** (-ages / DECAY.half_life)).sum(axis=0)
    long_heat = (uses * 2 ** (-ages / DECAY.long_half_life)).sum(axis=0)
    grown = 1 - 2 ** (-(steps + DECAY.prior_steps) / DECAY.long_half_life)
    weights = (2 ** (-np.arange(4000) / DECAY.half_life)).sum()
    long_weights = (2 ** (-np.arange(steps + DECAY.prior_steps) / DECAY.long_half_life)).sum()
    wanted = heat / weights + DECAY.long_weight * long_heat / long_weights
    found = grown * heat + DECAY.long_scale * long_heat
    assert np.allclose(found / wanted, (found / wanted)[0], rtol=1e-12)


def test_lru_equals_a_list_in_order_of_use(rng: np.random.Generator) -> None:
    t = trace(rng, 150, 2, 16, 2)
    hits = 0
    for layer in range(2):
        order: list[int] = []
        for now, token in enumerate(t.ids[:, layer]):
            hits += sum(int(e) in order for e in token) if now >= 20 else 0
            order = [e for e in order if e not in token] + sorted(int(e) for e in token)
            order = order[-6:]
    found = policies.hit_rate(t, 6, "lru", 20)
    assert found == pytest.approx(hits / (130 * 2 * 2), abs=0.02)  # ties inside a token differ


@pytest.mark.parametrize("policy", [p for p in policies.POLICIES if p != "static"])
def test_nobody_beats_belady_and_everybody_hits_when_all_is_resident(
    rng: np.random.Generator, policy: str
) -> None:
    t = trace(rng, 200, 3, 16, 2)
    bound = policies.hit_rate(t, 5, "belady", 20)
    assert policies.hit_rate(t, 5, policy, 20) <= bound + 1e-12
    # With room for all, what misses is the first use of each expert, and nothing else.
    first = 0
    for layer in t.ids.swapaxes(0, 1):
        _, where = np.unique(layer, return_index=True)
        first += int((where // 2 >= 150).sum())
    assert policies.hit_rate(t, 16, policy, 150) == pytest.approx(1 - first / (50 * 3 * 2))


def test_quotas_share_out_the_same_number_of_slots(rng: np.random.Generator) -> None:
    t = trace(rng, 200, 5, 32, 2)
    assert policies._quotas(t, 8).sum() == 5 * 8


def test_a_recording_reads_back(rng: np.random.Generator, tmp_path: Path) -> None:
    recorder = RoutingRecorder(2)
    parts = [rng.integers(0, 9, (n, 2, 3)).astype(np.uint16) for n in (4, 1, 5)]
    for i, part in enumerate(parts):
        if i == 2:
            recorder.prompt()
        for layer in range(2):
            recorder.add(layer, part[:, layer])
    recorder.save(tmp_path / "routing.npz")
    found = read_trace(tmp_path / "routing.npz", 9)
    assert np.array_equal(found.ids, np.concatenate(parts))
    assert found.starts.tolist() == [0, 5]
    assert found.predicted is None and recorder.predicted() is None
    assert found.predicted_weights is None and recorder.predicted_weights() is None
    said = rng.integers(0, 12, (10, 3)).astype(np.uint16)
    weights = rng.random((10, 3), np.float32)
    for rows in (slice(0, 6), slice(6, 10)):
        recorder.add_predicted(1, said[rows], weights[rows])
    recorder.save(tmp_path / "routing.npz")
    found = read_trace(tmp_path / "routing.npz")
    assert found.predicted is not None and found.experts == max(found.ids.max(), said.max()) + 1
    assert np.array_equal(found.predicted[:, 1], said)
    assert np.array_equal(found.predicted[:, 0], found.ids[:, 0])
    assert found.predicted_weights is not None and found.predicted_weights.dtype == np.float32
    assert np.array_equal(found.predicted_weights[:, 1], weights)
    assert (found.predicted_weights[:, 0] == np.float32(1 / 3)).all()


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(b"PK nothing")
    with pytest.raises(ConfigError, match=r"bad\.npz"):
        read_trace(path)
    np.savez(path, ids=np.zeros((2, 3), np.uint8))
    with pytest.raises(ConfigError, match=r"bad\.npz"):
        read_trace(path)
    np.savez(path, ids=np.full((2, 3, 1), 40, np.uint8))
    with pytest.raises(ConfigError, match="40"):
        read_trace(path, 40)
    ids = np.zeros((2, 3, 1), np.uint8)
    for said, wanted in (
        (ids[:, :2], r"predicted is uint8 \[2, 2, 1\]"),
        (ids.astype(np.int64), "predicted is int64"),
        (ids + np.uint8(40), "40"),
    ):
        np.savez(path, ids=ids, predicted=said)
        with pytest.raises(ConfigError, match=wanted):
            read_trace(path, 40)
    even = np.ones(ids.shape, np.float16)
    for weights, wanted in (
        (even[:, :2], r"predicted_weights is float16 \[2, 2, 1\]"),
        (ids, "predicted_weights is uint8"),
        (even * np.nan, "not finite"),
        (even * np.inf, "not finite"),
        (-even, "below 0"),
    ):
        np.savez(path, ids=ids, predicted=ids, predicted_weights=weights)
        with pytest.raises(ConfigError, match=wanted):
            read_trace(path)
    np.savez(path, ids=ids, predicted_weights=even)
    with pytest.raises(ConfigError, match="without predicted"):
        read_trace(path)
    with pytest.raises(ConfigError):
        RoutingRecorder(1).save(tmp_path / "no" / "where.npz")
