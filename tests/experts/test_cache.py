"""Host experts, expert cache and expert runner on NumPy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.errors import CheckpointError, ConfigError
from osmium.experts.cache import (
    cache_bytes,
    make_cache,
    reset_cache,
    resident,
    resident_cache,
    resize_layers,
    verify,
)
from osmium.experts.host_experts import load_host_experts, load_resident_experts, wrap_host_experts
from osmium.experts.prefetch import make_prefetch_state, prefetch_state_bytes
from osmium.experts.runner import ExpertRunner, expert_runner_bytes
from osmium.ops import ExpertCache, HostExperts, LinearWeight, SharedExpert
from osmium.ops.formulas import expert_matrices
from osmium.ops.grouped import GroupedExperts
from osmium.ops.reference import ReferenceOps
from osmium.quant.expert_layout import ExpertLayout
from tests.tolerance import close, distance

LAYERS, EXPERTS, TOP_K = 3, 11, 3
LAYOUT = ExpertLayout(bits=16, hidden=32, inner=16)
OPS = ReferenceOps()


def make_experts(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Packed experts u8 [L, E, nbytes] with bf16 weights near 1, and padding that is not zero."""
    packed = rng.integers(0, 256, (LAYERS, EXPERTS, LAYOUT.nbytes), dtype=np.uint8)
    values = rng.standard_normal((LAYERS, EXPERTS, LAYOUT.down_scale // 2)).astype(np.float32)
    half = (values.view(np.uint32) >> 16).astype(np.uint16)
    packed[:, :, : LAYOUT.down_scale] = half.view(np.uint8)
    return packed


def routed(rng: np.random.Generator, tokens: int) -> npt.NDArray[np.uint16]:
    """Expert ids u16 [T, A] of uneven popularity."""
    weight = 1 / np.arange(1, EXPERTS + 1)
    sampled = [
        rng.choice(EXPERTS, TOP_K, replace=False, p=weight / weight.sum()) for _ in range(tokens)
    ]
    return np.array(sampled, np.uint16)


def route(cache: ExpertCache, ids: npt.NDArray[np.uint16]) -> None:
    """Add to the counters what ops.topk_softmax adds."""
    cache.counters[0] += ids.size


def parts(
    host_experts: HostExperts, capacity: int, rows: int = 8
) -> tuple[ExpertCache, ExpertRunner]:
    cache = make_cache(OPS, host_experts, capacity, TOP_K)
    return cache, ExpertRunner(OPS, host_experts, cache, rows, TOP_K)


def expected(
    host_experts: npt.NDArray[np.uint8],
    x: npt.NDArray[np.float32],
    ids: npt.NDArray[np.uint16],
    weights: npt.NDArray[np.float32],
    layer: int,
) -> npt.NDArray[np.float64]:
    """The experts' weighted sum in float64, computed from the packed bytes."""
    out = np.zeros(x.shape)
    for t in range(len(x)):
        for a in range(ids.shape[1]):
            up, down = expert_matrices(LAYOUT, host_experts[layer, ids[t, a]])
            both = up.astype(np.float64) @ x[t]
            gate, value = both[: LAYOUT.inner], both[LAYOUT.inner :]
            out[t] += weights[t, a] * (down @ (gate / (1 + np.exp(-gate)) * value))
    return out


def run(
    store: ExpertRunner,
    rng: np.random.Generator,
    host_experts: npt.NDArray[np.uint8],
    tokens: int,
    layer: int,
) -> None:
    """Run one layer, and check its output against the packed experts."""
    x = rng.standard_normal((tokens, LAYOUT.hidden)).astype(np.float32)
    ids = routed(rng, tokens)
    weights = rng.uniform(0, 1, ids.shape).astype(np.float32)
    route(store.cache, ids)
    out = mlp(store, x, ids, weights, layer)
    out -= 1  # remove the initial ones
    want = expected(host_experts, x, ids, weights, layer)
    assert close(out, want, "f32"), distance(out, want)


def mlp(
    store: ExpertRunner,
    x: npt.NDArray[np.float32],
    ids: npt.NDArray[np.uint16],
    weights: npt.NDArray[np.float32],
    layer: int,
) -> npt.NDArray[np.float32]:
    """1 + the experts' output for x [T, D], with a shared expert of zeros."""
    tokens, hidden = x.shape
    shared_expert = SharedExpert(
        LinearWeight("bf16", 16, hidden, np.zeros((16, hidden), np.uint16)),
        LinearWeight("bf16", hidden, 8, np.zeros((hidden, 8), np.uint16)),
        gate_column=0,
    )
    out, scores = np.ones_like(x), np.zeros((tokens, 1), np.float32)
    both, inner = np.empty((tokens, 16), np.float32), OPS.empty_input(tokens, 8)
    shared_out, y, norm = np.empty_like(x), np.empty_like(x), np.zeros(hidden, np.float32)
    h = OPS.empty_input(tokens, hidden, 1e-6)
    h.f32[:] = x
    store.forward(
        out, h, ids, weights, layer, shared_expert, scores, inner, both, shared_out, y, norm
    )
    return out


@pytest.mark.parametrize("capacity", [TOP_K, TOP_K + 1, 2 * TOP_K + 1, EXPERTS - 1, EXPERTS])
def test_every_routed_expert_is_computed_with_any_number_of_slots(
    capacity: int, rng: np.random.Generator
) -> None:
    host_experts = make_experts(rng)
    cache, store = parts(wrap_host_experts(LAYOUT, host_experts), capacity)
    for _ in range(6):
        tokens = int(rng.integers(1, 9))
        for layer in range(LAYERS):
            run(store, rng, host_experts, tokens, layer)
    counted = store.counters()
    assert counted.routed == counted.hit + counted.missed > 0
    assert (counted.missed == 0) == (capacity == EXPERTS)
    assert counted.experts_copied <= counted.missed
    assert resident(OPS, cache).sum(axis=1).max() <= capacity
    assert verify(OPS, cache, host_experts, samples=1000, seed=0) == resident(OPS, cache).sum()


def test_a_used_expert_is_a_hit_in_the_next_step(rng: np.random.Generator) -> None:
    host_experts = make_experts(rng)
    _, store = parts(wrap_host_experts(LAYOUT, host_experts), 2 * TOP_K)
    use(store, 1, 4, 1, 9)
    use(store, 1, 9, 4, 2)
    counted = store.counters()
    assert (counted.routed, counted.hit, counted.missed, counted.experts_copied) == (6, 2, 4, 4)


def use(store: ExpertRunner, layer: int, *experts: int) -> None:
    """Run one row routed to these experts."""
    x = np.ones((1, LAYOUT.hidden), np.float32)
    ids, weights = np.array([experts], np.uint16), np.ones((1, TOP_K), np.float32)
    route(store.cache, ids)
    mlp(store, x, ids, weights, layer)


def test_an_often_used_expert_outlives_one_used_once_later(rng: np.random.Generator) -> None:
    _, store = parts(wrap_host_experts(LAYOUT, make_experts(rng)), TOP_K + 1)
    for third in (2, 2, 2, 3, 5):
        use(store, 0, 0, 1, third)
    assert np.flatnonzero(resident(OPS, store.cache)[0]).tolist() == [0, 1, 2, 5]


def test_an_expert_used_often_long_ago_is_evicted_before_a_recent_one(
    rng: np.random.Generator,
) -> None:
    _, store = parts(wrap_host_experts(LAYOUT, make_experts(rng)), TOP_K + 1)
    for third in (2, 2, 2):
        use(store, 0, 0, 1, third)
    for _ in range(100):  # each pass over the last layer advances the step
        use(store, LAYERS - 1, 0, 1, 2)
    for third in (3, 5):
        use(store, 0, 0, 1, third)
    assert np.flatnonzero(resident(OPS, store.cache)[0]).tolist() == [0, 1, 3, 5]


def test_verify_finds_a_wrong_byte_in_a_slot(rng: np.random.Generator) -> None:
    host_experts = make_experts(rng)
    cache, store = parts(wrap_host_experts(LAYOUT, host_experts), TOP_K)
    run(store, rng, host_experts, 1, 0)
    slot = int(np.flatnonzero(cache.slot_to_expert[0] >= 0)[0])
    cache.slots[0][slot, -1] ^= 1
    with pytest.raises(AssertionError, match=f"slot {slot} of layer 0"):
        verify(OPS, cache, host_experts, samples=1000, seed=0)


def test_inconsistent_tables_are_found(rng: np.random.Generator) -> None:
    cache = make_cache(OPS, wrap_host_experts(LAYOUT, make_experts(rng)), EXPERTS, TOP_K)
    cache.expert_to_slot[1, 4] = 5
    with pytest.raises(AssertionError):
        resident(OPS, cache)


def test_inconsistent_counters_are_found(rng: np.random.Generator) -> None:
    host_experts = make_experts(rng)
    _, store = parts(wrap_host_experts(LAYOUT, host_experts), TOP_K)
    run(store, rng, host_experts, 2, 0)
    store.cache.counters[2] -= 1  # as if an expert had been skipped
    with pytest.raises(AssertionError, match="routed"):
        store.counters()


@pytest.mark.parametrize("capacity", [1, TOP_K - 1])
def test_fewer_slots_than_a_token_needs_are_refused(
    capacity: int, rng: np.random.Generator
) -> None:
    host_experts = wrap_host_experts(LAYOUT, make_experts(rng))
    with pytest.raises(ConfigError, match=rf"--expert-slots is {capacity}\b"):
        make_cache(OPS, host_experts, capacity, TOP_K)


def test_host_experts_and_resident_slots_are_loaded_layer_by_layer(
    rng: np.random.Generator,
) -> None:
    source = make_experts(rng)
    seen: list[tuple[str, int, int]] = []

    def begin(layer: int, first: int, out: npt.NDArray[Any]) -> Callable[[], None]:
        def wait() -> None:
            out[...] = source[layer, first : first + len(out)]

        out[...] = 0xAA  # bytes before the wait are undefined
        return wait

    def progress(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))

    host_experts = load_host_experts(OPS, LAYOUT, LAYERS, EXPERTS, begin, progress)
    assert np.array_equal(host_experts.packed, source)
    assert seen == [("experts", n, LAYERS) for n in range(1, LAYERS + 1)]
    slots = load_resident_experts(OPS, LAYOUT, LAYERS, EXPERTS, begin, None)
    assert np.array_equal(slots, source)


def test_a_resident_cache_on_the_cpu_copies_nothing(rng: np.random.Generator) -> None:
    source = make_experts(rng)
    source.flags.writeable = False  # like a mapped file
    cache = resident_cache(OPS, LAYOUT, wrap_host_experts(LAYOUT, source).packed)
    assert all(np.shares_memory(layer, source) for layer in cache.slots)
    store = ExpertRunner(OPS, None, cache, 8, TOP_K)
    for layer in range(LAYERS):
        run(store, rng, source, 5, layer)
    assert store.counters().hit == LAYERS * 5 * TOP_K
    assert resident(OPS, cache).all()


def test_the_bytes_planned_are_the_bytes_allocated(rng: np.random.Generator) -> None:
    host_experts = wrap_host_experts(LAYOUT, make_experts(rng))
    for capacity in (5, 8, EXPERTS):
        cache, store = parts(host_experts, capacity)
        assert cache.storage is not None, "the memory that slots and slot_to_expert are views of"
        arrays = [x for x in vars(cache).values() if isinstance(x, np.ndarray)]
        arrays += cache.storage
        assert cache_bytes(LAYOUT, LAYERS, EXPERTS, capacity) == sum(x.nbytes for x in arrays)
        inner = store.inner.f32.nbytes
        num_slots = inner + sum(x.nbytes for x in vars(store.assignment).values() if x is not None)
        sizes = (8, capacity, EXPERTS, TOP_K, LAYOUT)
        assert expert_runner_bytes(*sizes, gpu=False) == num_slots
        # again, as hi and lo; and the arrays of experts of many tokens
        grouped = GroupedExperts.nbytes(store.max_rows, TOP_K, EXPERTS, LAYOUT.hidden)
        partial_out = 8 * min(store.max_rows, 8) * LAYOUT.hidden
        assert expert_runner_bytes(*sizes, gpu=True) == num_slots + inner + grouped + partial_out
    prefetch = make_prefetch_state(OPS, LAYERS, EXPERTS, TOP_K)
    assert prefetch_state_bytes(LAYERS, EXPERTS, TOP_K) == sum(
        x.nbytes for x in vars(prefetch).values()
    )


def test_resizing_layers_reuses_the_same_memory(rng: np.random.Generator) -> None:
    host_experts = make_experts(rng)
    cache, store = parts(wrap_host_experts(LAYOUT, host_experts), 6)
    for slots_per_layer in ([6, 6, 6], [5, 9, 4], [3, 4, 11], [6, 6, 6]):
        resized = resize_layers(cache, slots_per_layer)
        assert resized.storage is cache.storage and resized.storage is not None
        assert resized.short_count is cache.short_count and resized.capacity == 6
        for storage, layers in zip(
            resized.storage, (resized.slots, resized.slot_to_expert), strict=True
        ):
            assert [len(one) for one in layers] == slots_per_layer
            at = storage.ctypes.data
            for one in layers:
                assert one.ctypes.data == at, "layers are contiguous"
                at += one.nbytes
            assert at == storage.ctypes.data + storage.nbytes
        reset_cache(OPS, resized)
        store.set_cache(resized)
        assert store.layer_rows == [min(2, num_slots // TOP_K) for num_slots in slots_per_layer]
        for _ in range(5):
            for layer in range(LAYERS):
                # checks against the packed experts
                run(store, rng, host_experts, int(rng.integers(1, 9)), layer)
        assert verify(OPS, resized, host_experts, 1000, 0) == resident(OPS, resized).sum() <= 18
    counted = store.counters()
    assert counted.routed == counted.hit + counted.missed
    with pytest.raises(AssertionError, match="slots"):
        store.set_cache(resize_layers(cache, [TOP_K - 1, 8, 8]))


def test_packed_experts_of_the_wrong_size_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(CheckpointError, match=str(LAYOUT.nbytes)):
        wrap_host_experts(LAYOUT, make_experts(rng)[:, :, :-1])


def test_replayed_routing_prefetches_from_the_trace_or_not_at_all(rng: np.random.Generator) -> None:
    host_experts = wrap_host_experts(LAYOUT, make_experts(rng))
    for predicted in (None, rng.integers(0, EXPERTS, (5, LAYERS, TOP_K)).astype(np.uint16)):
        cache, prefetch = (
            make_cache(OPS, host_experts, 5, TOP_K),
            make_prefetch_state(OPS, LAYERS, EXPERTS, TOP_K),
        )
        store = ExpertRunner(OPS, host_experts, cache, 8, TOP_K, prefetch)
        assert store.router_prefetch_buffers(1) is store.prefetch_state(1) is prefetch
        assert (
            store.router_prefetch_buffers(2) is store.prefetch_state(2) is None
        )  # two rows may need more slots than a layer has
        store.replay(np.zeros((5, LAYERS, TOP_K), np.uint16), predicted)
        if predicted is None:
            assert store.router_prefetch_buffers(1) is store.prefetch_state(1) is None
            continue
        found, router_buffers = store.prefetch_state(1), store.router_prefetch_buffers(1)
        assert (
            found is prefetch and router_buffers is not None and router_buffers.ids is prefetch.ids
        )
        assert (
            prefetch.weights == np.float32(1 / TOP_K)
        ).all() and router_buffers.weights is not prefetch.weights
