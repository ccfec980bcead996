"""The cache simulator against simple reimplementations and against ops.assign_slots."""

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
    """Routing trace with uneven popularity per layer and with drift."""
    base = rng.normal(0, 1, (layers, experts)) * np.resize(popular, (layers, 1))
    drift = np.zeros((layers, experts))
    ids = np.empty((tokens, layers, top_k), np.uint16)
    for t in range(tokens):
        drift = 0.9 * drift + rng.normal(0, 0.6, drift.shape)
        score = base + drift + rng.normal(0, 0.5, drift.shape)
        ids[t] = np.argsort(-score, axis=1)[:, :top_k]
    return RoutingTrace(ids, np.array([0]), experts)


@pytest.mark.parametrize("policy", [policies.SHIPPED, "decayed 24"])
def test_simulated_hit_rate_equals_assign_slots(rng: np.random.Generator, policy: str) -> None:
    """ "decayed" equals assign_slots with a long-term weight of 0."""
    t = trace(rng, 120, 3, 20, 3)
    slots, layers, experts, skip = 8, 3, 20, 10
    decay = DECAY if policy == policies.SHIPPED else DecayConfig(24.0, 512.0, 0.0, 19)
    cache, plan = empty_cache(layers, experts, slots, 3, decay)
    ops = ReferenceOps()
    for step_number, token in enumerate(t.ids):
        if step_number == skip:
            cache.counters[:] = 0
        for layer in range(layers):
            ops.assign_slots(plan, cache, layer, token[layer : layer + 1])
    wanted = cache.counters[1] / ((120 - skip) * layers * 3)
    assert policies.hit_rate(t, slots, policy, skip) == pytest.approx(wanted, abs=2e-3)


def test_the_rebalanced_policy_equals_rebalancing_of_the_real_cache(
    rng: np.random.Generator,
) -> None:
    """The reference snapshots usage, resizes layers and warms the cache after 1,024 and 2,048
    tokens."""
    layers, experts, slots, top_k = 3, 20, 8, 3
    t = trace(rng, 2300, layers, experts, top_k, (0, 1, 4))
    ops, layout = ReferenceOps(), ExpertLayout(16, 8, 8)
    host_experts = wrap_host_experts(layout, np.zeros((layers, experts, layout.nbytes), np.uint8))
    cache, (_, plan) = (
        make_cache(ops, host_experts, slots, top_k),
        empty_cache(layers, experts, slots, top_k),
    )
    rebalanced = []
    for step_number, token in enumerate(t.ids):
        if step_number in (FIRST_REBALANCE_TOKENS, 2 * FIRST_REBALANCE_TOKENS):
            usage = snapshot_usage(ops, cache)
            each = rebalanced_slots(usage, [len(layer) for layer in cache.slots], top_k)
            if each is not None:
                cache = resize_layers(cache, each)
                warm_cache(ops, cache, host_experts, usage)
                rebalanced.append((step_number, each))
        if step_number == 1000:
            cache.counters[:] = 0
        for layer in range(layers):
            ops.assign_slots(plan, cache, layer, token[layer : layer + 1])
    assert (
        rebalanced and rebalanced[0][0] == FIRST_REBALANCE_TOKENS and len({*rebalanced[0][1]}) > 1
    )
    wanted = cache.counters[1] / (1300 * layers * top_k)
    result = policies.hit_rate(t, slots, "shared", 1000)
    assert result == pytest.approx(wanted, abs=1e-3)
    assert result != policies.hit_rate(t, slots, "mixed", 1000)


def empty_cache(
    layers: int, experts: int, slots: int, top_k: int, decay: DecayConfig = DECAY
) -> tuple[ExpertCache, SlotAssignment]:
    """An empty cache, and a slot assignment for one token."""
    shape = (layers, experts)
    cache = ExpertCache(
        ExpertLayout(16, 8, 8), experts, decay, (),
        np.full(shape, -1, np.int32), tuple(np.full((layers, slots), -1, np.int32)),
        np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape, np.int32),
        np.zeros(1, np.int32), np.zeros(7, np.int64),
    )  # fmt: skip
    return cache, SlotAssignment(*(np.zeros(n, np.int32) for n in (1, *[top_k] * 5, 2)))


@pytest.mark.parametrize("slots", [3, 4, 8, 18, 40])
def test_simulated_prefetch_equals_assign_slots(rng: np.random.Generator, slots: int) -> None:
    """Slot counts where no slot, some slots or many slots are free for prefetch."""
    tokens, layers, experts, top_k, skip = 400, 4, 40, 3, 10
    t = predicted(rng, trace(rng, tokens, layers, experts, top_k), 0.7)
    cache, plan = empty_cache(layers, experts, slots, top_k, DECAY)
    prefetch = PrefetchState(
        np.zeros((1, top_k), np.uint16), np.zeros((1, top_k), np.float32),
        np.zeros((1, experts), np.float32), np.zeros(4, np.int64), np.zeros(ROUTER_BARRIER_SHAPE,
        np.int32),
        np.full(layers, -1, np.int32), np.zeros(layers, np.int32), np.zeros(layers, np.int32),
        np.zeros((layers, FETCH_WARPS), np.int32), np.zeros((layers, FETCH_BLOCKS), np.int32),
    )  # fmt: skip
    for step_number, token in enumerate(t.ids):
        if step_number == skip:
            cache.counters[:] = 0
        for layer in range(layers):
            if layer + 1 < layers:
                assert t.predicted is not None and t.predicted_weights is not None
                prefetch.ids[:] = t.predicted[step_number, layer + 1]
                prefetch.weights[:] = t.predicted_weights[step_number, layer + 1]
            ReferenceOps().assign_slots(plan, cache, layer, token[layer : layer + 1], prefetch)
    hit, num_prefetched, right = cache.counters[[1, 4, 5]]
    assert num_prefetched and right, "some prefetches are made, and some are right"
    result = policies.simulate_prefetch(t, slots, skip)
    each = (tokens - skip) * (layers - 1)
    assert result[0] == pytest.approx(hit / ((tokens - skip) * layers * top_k), abs=2e-3)
    assert result[1] == pytest.approx(num_prefetched / each, abs=2e-3)
    assert result[1] * result[2] == pytest.approx(right / each, abs=2e-3)


def predicted(rng: np.random.Generator, t: RoutingTrace, right: float) -> RoutingTrace:
    """`t` with predictions, a fraction `right` of them true, and random prediction weights."""
    wrong = rng.random(t.ids.shape) >= right
    predictions = np.where(wrong, rng.integers(0, t.experts, t.ids.shape), t.ids).astype(np.uint16)
    weights = rng.random(t.ids.shape, np.float32)
    return RoutingTrace(t.ids, t.starts, t.experts, predictions, weights)


@pytest.mark.parametrize(
    ("rule", "predictions", "weights", "right"),
    [
        ("first", [1, 2, 0], None, 1), ("first", [1, 0, 2], None, 0),
        ("warmest", [1, 2, 0], None, 0), ("warmest", [1, 2, 0], [0.3, 0.7, 0], 0),
        ("shipped", [1, 2, 0], None, 0), ("shipped", [1, 0, 2], [0, 0.45, 0.55], 0),
        ("shipped", [1, 0, 2], [0, 0.2, 0.8], 1),
    ],
)  # fmt: skip
def test_prefetch_rules_choose_different_experts(
    rule: str, predictions: list[int], weights: list[float] | None, right: int
) -> None:
    """At layer 1's last token, expert 1 is resident, 0 scores higher than 2, and 2 is routed.

    The eviction score outweighs small router weights, not large ones.
    """
    routed_ids = [[0, 3, 4], [1, 5, 6], [1, 5, 6], [2, 5, 6]]
    ids = np.array([[one, one] for one in routed_ids], np.uint16)
    predicted = ids.copy()
    predicted[3, 1] = predictions
    each = None
    if weights is not None:
        each = np.full(ids.shape, 1 / 3, np.float32)
        each[3, 1] = weights
    t = RoutingTrace(ids, np.array([0]), 9, predicted, each)
    hits, num_prefetched, result = policies.simulate_prefetch(t, 3, 3, rule)
    assert (num_prefetched, result) == (1, right)
    assert hits == pytest.approx((2 + 1) / 6), "the prefetch evicted one of two resident experts"


def test_recall_is_the_fraction_of_predicted_experts_that_are_routed() -> None:
    ids = np.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]]], np.uint16)
    predictions = np.array([[[0, 1], [3, 9]], [[4, 5], [7, 6]]], np.uint16)
    assert policies.recall(RoutingTrace(ids, np.array([0]), 10, predictions)).tolist() == [1, 0.75]


def test_the_eviction_score_orders_by_short_rate_plus_weighted_long_rate(
    rng: np.random.Generator,
) -> None:
    steps, step_number = 90, 89
    uses = rng.integers(0, 2, (steps, 12)).astype(np.float64)
    ages = step_number - np.arange(steps)[:, None]
    short_count = (uses * 2 ** (-ages / DECAY.half_life)).sum(axis=0)
    long_count = (uses * 2 ** (-ages / DECAY.long_half_life)).sum(axis=0)
    ramp = 1 - 2 ** (-(steps + DECAY.prior_steps) / DECAY.long_half_life)
    short_norm = (2 ** (-np.arange(4000) / DECAY.half_life)).sum()
    long_norm = (2 ** (-np.arange(steps + DECAY.prior_steps) / DECAY.long_half_life)).sum()
    wanted = short_count / short_norm + DECAY.long_weight * long_count / long_norm
    result = ramp * short_count + DECAY.long_scale * long_count
    assert np.allclose(result / wanted, (result / wanted)[0], rtol=1e-12)


def test_lru_equals_a_list_in_order_of_use(rng: np.random.Generator) -> None:
    t = trace(rng, 150, 2, 16, 2)
    hits = 0
    for layer in range(2):
        order: list[int] = []
        for step_number, token in enumerate(t.ids[:, layer]):
            hits += sum(int(e) in order for e in token) if step_number >= 20 else 0
            order = [e for e in order if e not in token] + sorted(int(e) for e in token)
            order = order[-6:]
    result = policies.hit_rate(t, 6, "lru", 20)
    # several experts of one token may tie
    assert result == pytest.approx(hits / (130 * 2 * 2), abs=0.02)


@pytest.mark.parametrize("policy", [p for p in policies.POLICIES if p != "static"])
def test_no_policy_beats_belady_and_only_first_uses_miss_when_all_fit(
    rng: np.random.Generator, policy: str
) -> None:
    t = trace(rng, 200, 3, 16, 2)
    bound = policies.hit_rate(t, 5, "belady", 20)
    assert policies.hit_rate(t, 5, policy, 20) <= bound + 1e-12
    # With a slot for every expert, only the first use of each expert misses.
    first_uses = 0
    for layer in t.ids.swapaxes(0, 1):
        _, first_index = np.unique(layer, return_index=True)
        first_uses += int((first_index // 2 >= 150).sum())
    assert policies.hit_rate(t, 16, policy, 150) == pytest.approx(1 - first_uses / (50 * 3 * 2))


def test_quotas_keep_the_total_number_of_slots(rng: np.random.Generator) -> None:
    t = trace(rng, 200, 5, 32, 2)
    assert policies._quotas(t, 8).sum() == 5 * 8


def test_a_saved_routing_trace_reads_back(rng: np.random.Generator, tmp_path: Path) -> None:
    recorder = RoutingRecorder(2)
    parts = [rng.integers(0, 9, (n, 2, 3)).astype(np.uint16) for n in (4, 1, 5)]
    for i, part in enumerate(parts):
        if i == 2:
            recorder.prompt()
        for layer in range(2):
            recorder.add(layer, part[:, layer])
    recorder.save(tmp_path / "routing.npz")
    result = read_trace(tmp_path / "routing.npz", 9)
    assert np.array_equal(result.ids, np.concatenate(parts))
    assert result.starts.tolist() == [0, 5]
    assert result.predicted is None and recorder.predicted() is None
    assert result.predicted_weights is None and recorder.predicted_weights() is None
    predictions = rng.integers(0, 12, (10, 3)).astype(np.uint16)
    weights = rng.random((10, 3), np.float32)
    for rows in (slice(0, 6), slice(6, 10)):
        recorder.add_predicted(1, predictions[rows], weights[rows])
    recorder.save(tmp_path / "routing.npz")
    result = read_trace(tmp_path / "routing.npz")
    assert (
        result.predicted is not None
        and result.experts == max(result.ids.max(), predictions.max()) + 1
    )
    assert np.array_equal(result.predicted[:, 1], predictions)
    assert np.array_equal(result.predicted[:, 0], result.ids[:, 0])
    assert result.predicted_weights is not None and result.predicted_weights.dtype == np.float32
    assert np.array_equal(result.predicted_weights[:, 1], weights)
    assert (result.predicted_weights[:, 0] == np.float32(1 / 3)).all()


def test_a_file_that_is_no_routing_trace_is_refused(tmp_path: Path) -> None:
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
    for predictions, wanted in (
        (ids[:, :2], r"predicted is uint8 \[2, 2, 1\]"),
        (ids.astype(np.int64), "predicted is int64"),
        (ids + np.uint8(40), "40"),
    ):
        np.savez(path, ids=ids, predicted=predictions)
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
