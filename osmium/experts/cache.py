"""The expert cache: slots of each layer, the experts in them, and decayed use counts.

Allocates, resets and inspects the arrays.  Ops.assign_slots decides admission and eviction; see
docs/expert-cache.md.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.errors import ConfigError
from osmium.ops import Array, DecayConfig, ExpertCache, HostExperts, Ops
from osmium.quant.expert_layout import ExpertLayout

__all__ = [
    "DECAY", "cache_bytes", "empty_slots", "make_cache", "reset_cache", "resident",
    "resident_cache", "resize_layers", "verify",
]  # fmt: skip

DECAY = DecayConfig(half_life=8.0, long_half_life=512.0, long_weight=1.0, prior_steps=19)
"""Near the best policy on every trace tried: synthetic routing of several drifts and the test
model's own (tools/simulate_cache; LOG.md, 2026-11-25)."""


def make_cache(
    ops: Ops,
    host_experts: HostExperts,
    capacity: int,
    top_k: int,
    slots_per_layer: Sequence[int] | None = None,
    staging: int = 0,
) -> ExpertCache:
    """An empty cache with `capacity` slots per layer; `slots_per_layer` may divide them unevenly.

    With a slot for every expert the cache is filled from `host_experts` and fully resident.
    `staging`: further slots behind those of all layers, which belong to no layer.
    Raises: ConfigError, OutOfMemory.
    """
    layers, experts, nbytes = host_experts.packed.shape
    if capacity < top_k:
        raise ConfigError(
            f"--expert-slots is {capacity}; it must be at least {top_k}, the experts per token."
        )
    assert capacity <= experts, f"{capacity} slots for {experts} experts"
    if capacity < experts:
        if slots_per_layer is None:
            slots_per_layer = [capacity] * layers
        assert sum(slots_per_layer) == layers * capacity, f"{slots_per_layer} slots"
        assert top_k <= min(slots_per_layer), f"{slots_per_layer} slots"
        slots = ops.empty((layers * capacity + staging, nbytes), np.uint8)
        return _empty_cache(ops, host_experts.layout, slots, slots_per_layer, experts)
    slots = ops.empty((layers, capacity, nbytes), np.uint8)
    for layer in range(layers):
        ops.copy(slots[layer : layer + 1], host_experts.packed[layer : layer + 1])
    return resident_cache(ops, host_experts.layout, slots)


def resident_cache(ops: Ops, layout: ExpertLayout, slots: Array) -> ExpertCache:
    """A cache in which expert e of every layer stays in slot e.

    slots u8 [L, E, nbytes], filled; on the CPU they may be the host experts themselves.
    """
    layers, num_experts, nbytes = slots.shape
    storage = slots.reshape(layers * num_experts, nbytes)
    cache = _empty_cache(ops, layout, storage, [num_experts] * layers, num_experts)
    identity = np.arange(num_experts, dtype=np.int32)
    ops.copy_h2d(cache.expert_to_slot, np.tile(identity, (layers, 1)))
    for slot_to_expert in cache.slot_to_expert:
        ops.copy_h2d(slot_to_expert, identity)
    return cache


def resize_layers(cache: ExpertCache, slots_per_layer: Sequence[int]) -> ExpertCache:
    """The same memory divided into `slots_per_layer` slots, with the same total.

    The slot tables keep their old contents; call reset_cache before the next use.
    """
    assert cache.storage is not None, "only a cache of make_cache can be resized"
    slots, slot_to_expert = cache.storage
    assert sum(slots_per_layer) == slot_to_expert.shape[0], f"{slots_per_layer} slots"
    assert max(slots_per_layer) <= cache.num_experts, f"{slots_per_layer} slots"
    return replace(
        cache,
        slots=_split_by_layer(slots, slots_per_layer),
        slot_to_expert=_split_by_layer(slot_to_expert, slots_per_layer),
    )


def _split_by_layer(storage: Array, slots_per_layer: Sequence[int]) -> tuple[Array, ...]:
    """Views of consecutive rows, one view per layer."""
    ends = np.cumsum(slots_per_layer).tolist()
    return tuple(
        storage[end - count : end] for end, count in zip(ends, slots_per_layer, strict=True)
    )


def _empty_cache(
    ops: Ops, layout: ExpertLayout, slots: Array, slots_per_layer: Sequence[int], num_experts: int
) -> ExpertCache:
    """An empty cache over `slots` of all layers.  Raises: OutOfMemory."""
    layers = len(slots_per_layer)
    slot_to_expert = ops.empty((sum(slots_per_layer),), np.int32)
    cache = ExpertCache(
        layout=layout,
        num_experts=num_experts,
        decay=DECAY,
        slots=_split_by_layer(slots, slots_per_layer),
        expert_to_slot=ops.empty((layers, num_experts), np.int32),
        slot_to_expert=_split_by_layer(slot_to_expert, slots_per_layer),
        short_count=ops.empty((layers, num_experts), np.float32),
        long_count=ops.empty((layers, num_experts), np.float32),
        last_used=ops.empty((layers, num_experts), np.int32),
        step=ops.empty((1,), np.int32),
        counters=ops.empty((7,), np.int64),
        storage=(slots, slot_to_expert),
    )
    reset_cache(ops, cache)
    ops.memset(cache.counters, 0)
    return cache


def reset_cache(ops: Ops, cache: ExpertCache) -> None:
    """Empty every slot and clear the use counts, as in a new cache; the hit counters stay."""
    empty_slots(ops, cache)
    for array in (cache.short_count, cache.long_count, cache.last_used, cache.step):
        ops.memset(array, 0)


def empty_slots(ops: Ops, cache: ExpertCache) -> None:
    """Empty every slot; use counts and hit counters stay."""
    for table in (cache.expert_to_slot, *cache.slot_to_expert):
        ops.memset(table, 0xFF)  # -1


def cache_bytes(layout: ExpertLayout, layers: int, num_experts: int, capacity: int) -> int:
    """Bytes of the arrays of a cache with `capacity` slots per layer."""
    return layers * (capacity * (layout.nbytes + 4) + num_experts * 16) + 60


def resident(ops: Ops, cache: ExpertCache) -> npt.NDArray[np.bool_]:
    """Which experts are in a slot, bool [L, E].

    Asserts that the two tables agree: expert_to_slot[e] is s exactly where slot_to_expert[s] is e.
    """
    expert_to_slot: npt.NDArray[Any] = ops.copy_d2h(cache.expert_to_slot)
    for layer_slots, device_experts in zip(expert_to_slot, cache.slot_to_expert, strict=True):
        layer_experts: npt.NDArray[Any] = ops.copy_d2h(device_experts)
        (experts,) = np.nonzero(layer_slots >= 0)
        assert (layer_experts[layer_slots[experts]] == experts).all(), (
            "expert_to_slot names a slot that holds another expert"
        )
        assert len(experts) == (layer_experts >= 0).sum(), (
            "slot_to_expert names an expert that expert_to_slot lacks"
        )
    return np.asarray(expert_to_slot >= 0)


def verify(
    ops: Ops, cache: ExpertCache, packed_experts: npt.NDArray[Any], samples: int, seed: int
) -> int:
    """Compare up to `samples` slots with their packed experts, byte for byte.

    packed_experts u8 [L, E, nbytes] in host memory: the host experts, or those of the packed file.
    Returns the number of slots compared.
    """
    slot_to_expert: list[npt.NDArray[Any]] = [ops.copy_d2h(x) for x in cache.slot_to_expert]
    occupied = [
        (layer, slot)
        for layer, experts in enumerate(slot_to_expert)
        for slot in np.flatnonzero(experts >= 0).tolist()
    ]
    sampled = np.random.default_rng(seed).permutation(len(occupied))[:samples]
    for layer, slot in (occupied[i] for i in sampled):
        slot_bytes = ops.copy_d2h(cache.slots[layer][slot : slot + 1])[0]
        expert = int(slot_to_expert[layer][slot])
        assert np.array_equal(slot_bytes, packed_experts[layer, expert]), (
            f"slot {slot} of layer {layer} differs from packed expert {expert}"
        )
    return len(sampled)
