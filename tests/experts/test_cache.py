"""The arena, the hot cache and the store, on NumPy."""

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
from osmium.ops.reference import ReferenceOps
from osmium.quant.expert_layout import ExpertLayout
from tests.tolerance import close, distance

LAYERS, EXPERTS, TOP_K = 3, 11, 3
RECORD = ExpertLayout(bits=16, hidden=32, inner=16)
OPS = ReferenceOps()


def records(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Experts with values near 1 in bf16, and padding that is not zero."""
    made = rng.integers(0, 256, (LAYERS, EXPERTS, RECORD.nbytes), dtype=np.uint8)
    values = rng.standard_normal((LAYERS, EXPERTS, RECORD.down_scale // 2)).astype(np.float32)
    half = (values.view(np.uint32) >> 16).astype(np.uint16)
    made[:, :, : RECORD.down_scale] = half.view(np.uint8)
    return made


def routed(rng: np.random.Generator, tokens: int) -> npt.NDArray[np.uint16]:
    """ids [T, A] whose popularity is uneven."""
    weight = 1 / np.arange(1, EXPERTS + 1)
    chosen = [
        rng.choice(EXPERTS, TOP_K, replace=False, p=weight / weight.sum()) for _ in range(tokens)
    ]
    return np.array(chosen, np.uint16)


def route(cache: ExpertCache, ids: npt.NDArray[np.uint16]) -> None:
    """What ops.topk_softmax adds to the counters."""
    cache.counters[0] += ids.size


def parts(arena: HostExperts, capacity: int, rows: int = 8) -> tuple[ExpertCache, ExpertRunner]:
    cache = make_cache(OPS, arena, capacity, TOP_K)
    return cache, ExpertRunner(OPS, arena, cache, rows, TOP_K)


def expected(
    arena: npt.NDArray[np.uint8],
    x: npt.NDArray[np.float32],
    ids: npt.NDArray[np.uint16],
    weights: npt.NDArray[np.float32],
    layer: int,
) -> npt.NDArray[np.float64]:
    """The experts' weighted sum in float64, straight from the records."""
    out = np.zeros(x.shape)
    for t in range(len(x)):
        for a in range(ids.shape[1]):
            up, down = expert_matrices(RECORD, arena[layer, ids[t, a]])
            both = up.astype(np.float64) @ x[t]
            gate, value = both[: RECORD.inner], both[RECORD.inner :]
            out[t] += weights[t, a] * (down @ (gate / (1 + np.exp(-gate)) * value))
    return out


def run(
    store: ExpertRunner,
    rng: np.random.Generator,
    arena: npt.NDArray[np.uint8],
    tokens: int,
    layer: int,
) -> None:
    """One call of the store, checked against the records."""
    x = rng.standard_normal((tokens, RECORD.hidden)).astype(np.float32)
    ids = routed(rng, tokens)
    weights = rng.uniform(0, 1, ids.shape).astype(np.float32)
    route(store.cache, ids)
    out = mlp(store, x, ids, weights, layer)
    out -= 1  # what was there
    want = expected(arena, x, ids, weights, layer)
    assert close(out, want, "f32"), distance(out, want)


def mlp(
    store: ExpertRunner,
    x: npt.NDArray[np.float32],
    ids: npt.NDArray[np.uint16],
    weights: npt.NDArray[np.float32],
    layer: int,
) -> npt.NDArray[np.float32]:
    """1 + what the store makes of x, with a shared expert that says nothing."""
    tokens, hidden = x.shape
    nothing = SharedExpert(
        LinearWeight("bf16", 16, hidden, np.zeros((16, hidden), np.uint16)),
        LinearWeight("bf16", hidden, 8, np.zeros((hidden, 8), np.uint16)),
        column=0,
    )
    out, scores = np.ones_like(x), np.zeros((tokens, 1), np.float32)
    both, inner = np.empty((tokens, 16), np.float32), OPS.empty_input(tokens, 8)
    said, y, norm = np.empty_like(x), np.empty_like(x), np.zeros(hidden, np.float32)
    h = OPS.empty_input(tokens, hidden, 1e-6)
    h.f32[:] = x
    store.forward(out, h, ids, weights, layer, nothing, scores, inner, both, said, y, norm)
    return out


@pytest.mark.parametrize("capacity", [TOP_K, TOP_K + 1, 2 * TOP_K + 1, EXPERTS - 1, EXPERTS])
def test_every_routed_expert_is_computed_whatever_the_slots(
    capacity: int, rng: np.random.Generator
) -> None:
    arena = records(rng)
    cache, store = parts(wrap_host_experts(RECORD, arena), capacity)
    for _ in range(6):
        tokens = int(rng.integers(1, 9))
        for layer in range(LAYERS):
            run(store, rng, arena, tokens, layer)
    counted = store.counters()
    assert counted.routed == counted.hit + counted.missed > 0
    assert (counted.missed == 0) == (capacity == EXPERTS)
    assert counted.experts_copied <= counted.missed
    assert resident(OPS, cache).sum(axis=1).max() <= capacity
    assert verify(OPS, cache, arena, samples=1000, seed=0) == resident(OPS, cache).sum()


def test_a_used_expert_is_a_hit_the_next_time(rng: np.random.Generator) -> None:
    arena = records(rng)
    _, store = parts(wrap_host_experts(RECORD, arena), 2 * TOP_K)
    use(store, 1, 4, 1, 9)
    use(store, 1, 9, 4, 2)
    counted = store.counters()
    assert (counted.routed, counted.hit, counted.missed, counted.experts_copied) == (6, 2, 4, 4)


def use(store: ExpertRunner, layer: int, *experts: int) -> None:
    """One row that asks for these experts."""
    x = np.ones((1, RECORD.hidden), np.float32)
    ids, weights = np.array([experts], np.uint16), np.ones((1, TOP_K), np.float32)
    route(store.cache, ids)
    mlp(store, x, ids, weights, layer)


def test_an_expert_used_often_outlives_one_used_once_since(rng: np.random.Generator) -> None:
    _, store = parts(wrap_host_experts(RECORD, records(rng)), TOP_K + 1)
    for third in (2, 2, 2, 3, 5):
        use(store, 0, 0, 1, third)
    assert np.flatnonzero(resident(OPS, store.cache)[0]).tolist() == [0, 1, 2, 5]


def test_an_expert_used_often_long_ago_leaves_before_one_used_once(
    rng: np.random.Generator,
) -> None:
    _, store = parts(wrap_host_experts(RECORD, records(rng)), TOP_K + 1)
    for third in (2, 2, 2):
        use(store, 0, 0, 1, third)
    for _ in range(100):  # time passes at the last layer
        use(store, LAYERS - 1, 0, 1, 2)
    for third in (3, 5):
        use(store, 0, 0, 1, third)
    assert np.flatnonzero(resident(OPS, store.cache)[0]).tolist() == [0, 1, 3, 5]


def test_a_wrong_byte_in_a_slot_is_found(rng: np.random.Generator) -> None:
    arena = records(rng)
    cache, store = parts(wrap_host_experts(RECORD, arena), TOP_K)
    run(store, rng, arena, 1, 0)
    slot = int(np.flatnonzero(cache.slot_to_expert[0] >= 0)[0])
    cache.slots[0][slot, -1] ^= 1
    with pytest.raises(AssertionError, match=f"slot {slot} of layer 0"):
        verify(OPS, cache, arena, samples=1000, seed=0)


def test_tables_that_disagree_are_found(rng: np.random.Generator) -> None:
    cache = make_cache(OPS, wrap_host_experts(RECORD, records(rng)), EXPERTS, TOP_K)
    cache.expert_to_slot[1, 4] = 5
    with pytest.raises(AssertionError):
        resident(OPS, cache)


def test_counters_that_do_not_add_up_are_found(rng: np.random.Generator) -> None:
    arena = records(rng)
    _, store = parts(wrap_host_experts(RECORD, arena), TOP_K)
    run(store, rng, arena, 2, 0)
    store.cache.counters[2] -= 1  # as if an expert had been skipped
    with pytest.raises(AssertionError, match="routed"):
        store.counters()


@pytest.mark.parametrize("capacity", [1, TOP_K - 1])
def test_fewer_slots_than_a_token_needs_are_refused(
    capacity: int, rng: np.random.Generator
) -> None:
    arena = wrap_host_experts(RECORD, records(rng))
    with pytest.raises(ConfigError, match=rf"--expert-slots is {capacity}\b"):
        make_cache(OPS, arena, capacity, TOP_K)


def test_an_arena_and_resident_slots_are_read_layer_by_layer(rng: np.random.Generator) -> None:
    source = records(rng)
    seen: list[tuple[str, int, int]] = []

    def begin(layer: int, first: int, out: npt.NDArray[Any]) -> Callable[[], None]:
        def wait() -> None:
            out[...] = source[layer, first : first + len(out)]

        out[...] = 0xAA  # what is there before it has been waited for
        return wait

    def progress(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))

    arena = load_host_experts(OPS, RECORD, LAYERS, EXPERTS, begin, progress)
    assert np.array_equal(arena.records, source)
    assert seen == [("experts", n, LAYERS) for n in range(1, LAYERS + 1)]
    slots = load_resident_experts(OPS, RECORD, LAYERS, EXPERTS, begin, None)
    assert np.array_equal(slots, source)


def test_a_resident_cache_on_the_cpu_copies_nothing(rng: np.random.Generator) -> None:
    source = records(rng)
    source.flags.writeable = False  # as a mapped file is
    cache = resident_cache(OPS, RECORD, wrap_host_experts(RECORD, source).records)
    assert all(np.shares_memory(layer, source) for layer in cache.slots)
    store = ExpertRunner(OPS, None, cache, 8, TOP_K)
    for layer in range(LAYERS):
        run(store, rng, source, 5, layer)
    assert store.counters().hit == LAYERS * 5 * TOP_K
    assert resident(OPS, cache).all()


def test_the_bytes_planned_are_the_bytes_allocated(rng: np.random.Generator) -> None:
    arena = wrap_host_experts(RECORD, records(rng))
    for capacity in (5, 8, EXPERTS):
        cache, store = parts(arena, capacity)
        assert cache.storage is not None, "of which slots and expert_in are parts"
        arrays = [x for x in vars(cache).values() if isinstance(x, np.ndarray)]
        arrays += cache.storage
        assert cache_bytes(RECORD, LAYERS, EXPERTS, capacity) == sum(x.nbytes for x in arrays)
        inner = store.inner.f32.nbytes
        own = inner + sum(x.nbytes for x in vars(store.assignment).values())
        sizes = (8, capacity, EXPERTS, TOP_K, RECORD.inner)
        assert expert_runner_bytes(*sizes, gpu=False) == own
        assert expert_runner_bytes(*sizes, gpu=True) == own + inner  # once more, as hi and lo
    guess = make_prefetch_state(OPS, LAYERS, EXPERTS, TOP_K)
    assert prefetch_state_bytes(LAYERS, EXPERTS, TOP_K) == sum(
        x.nbytes for x in vars(guess).values()
    )


def test_a_cache_cut_anew_has_the_same_memory(rng: np.random.Generator) -> None:
    arena = records(rng)
    cache, store = parts(wrap_host_experts(RECORD, arena), 6)
    for each in ([6, 6, 6], [5, 9, 4], [3, 4, 11], [6, 6, 6]):
        again = resize_layers(cache, each)
        assert again.storage is cache.storage and again.storage is not None
        assert again.short_count is cache.short_count and again.capacity == 6
        for whole, layers in zip(again.storage, (again.slots, again.slot_to_expert), strict=True):
            assert [len(one) for one in layers] == each
            at = whole.ctypes.data
            for one in layers:
                assert one.ctypes.data == at, "one after another"
                at += one.nbytes
            assert at == whole.ctypes.data + whole.nbytes
        reset_cache(OPS, again)
        store.set_cache(again)
        assert store.layer_rows == [min(2, own // TOP_K) for own in each]
        for _ in range(5):
            for layer in range(LAYERS):
                run(store, rng, arena, int(rng.integers(1, 9)), layer)  # held to the records
        assert verify(OPS, again, arena, 1000, 0) == resident(OPS, again).sum() <= 18
    counted = store.counters()
    assert counted.routed == counted.hit + counted.missed
    with pytest.raises(AssertionError, match="slots"):
        store.set_cache(resize_layers(cache, [TOP_K - 1, 8, 8]))


def test_records_of_the_wrong_size_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(CheckpointError, match=str(RECORD.nbytes)):
        wrap_host_experts(RECORD, records(rng)[:, :, :-1])


def test_what_is_replayed_is_guessed_from_a_trace_or_not_at_all(rng: np.random.Generator) -> None:
    arena = wrap_host_experts(RECORD, records(rng))
    for predicted in (None, rng.integers(0, EXPERTS, (5, LAYERS, TOP_K)).astype(np.uint16)):
        cache, guess = (
            make_cache(OPS, arena, 5, TOP_K),
            make_prefetch_state(OPS, LAYERS, EXPERTS, TOP_K),
        )
        store = ExpertRunner(OPS, arena, cache, 8, TOP_K, guess)
        assert store.router_prefetch_buffers(1) is store.prefetch_state(1) is guess
        assert (
            store.router_prefetch_buffers(2) is store.prefetch_state(2) is None
        )  # two rows may need more slots than a layer has
        store.replay(np.zeros((5, LAYERS, TOP_K), np.uint16), predicted)
        if predicted is None:
            assert store.router_prefetch_buffers(1) is store.prefetch_state(1) is None
            continue
        found, asked = store.prefetch_state(1), store.router_prefetch_buffers(1)
        assert found is guess and asked is not None and asked.ids is guess.ids
        assert (guess.weights == np.float32(1 / TOP_K)).all() and asked.weights is not guess.weights
