"""The hot cache: slots of each layer, which experts are in them, and how much each is used.

Makes the arrays and looks into them; who enters and who leaves is decided by `ops.assign_slots`.
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
    "DECAY", "cache_bytes", "make_cache", "reset_cache", "resident", "resident_cache",
    "resize_layers", "verify",
]  # fmt: skip

DECAY = DecayConfig(half_life=8.0, long_half_life=512.0, long_weight=1.0, prior_steps=19)
"""In the middle of those that are nowhere far from the best policy, on made routing of other drifts
and the lab model's own (tools/simulate_cache; LOG.md, 2026-11-25)."""


def make_cache(
    ops: Ops,
    host_experts: HostExperts,
    capacity: int,
    top_k: int,
    each: Sequence[int] | None = None,
) -> ExpertCache:
    """A cache of `capacity` slots a layer, or of `each` layer's own, as many in all: empty, or
    wholly resident and filled from the arena where there is a slot for every expert.

    Raises: ConfigError, OutOfMemory.
    """
    layers, experts, nbytes = host_experts.packed.shape
    if capacity < top_k:
        raise ConfigError(
            f"--expert-slots is {capacity}; it must be at least {top_k}, the experts per token."
        )
    assert capacity <= experts, f"{capacity} slots for {experts} experts"
    if capacity < experts:
        each = [capacity] * layers if each is None else each
        assert sum(each) == layers * capacity and top_k <= min(each), f"{each} slots"
        slots = ops.empty((layers * capacity, nbytes), np.uint8)
        return _cache(ops, host_experts.layout, slots, each, experts)
    slots = ops.empty((layers, capacity, nbytes), np.uint8)
    for layer in range(layers):
        ops.copy(slots[layer : layer + 1], host_experts.packed[layer : layer + 1])
    return resident_cache(ops, host_experts.layout, slots)


def resident_cache(ops: Ops, layout: ExpertLayout, slots: Array) -> ExpertCache:
    """A cache in which expert e of every layer is in slot e for good.

    slots u8 [L, E, nbytes], filled; on the CPU they may be the arena's records themselves.
    """
    layers, num_experts, nbytes = slots.shape
    whole = slots.reshape(layers * num_experts, nbytes)
    cache = _cache(ops, layout, whole, [num_experts] * layers, num_experts)
    everyone = np.arange(num_experts, dtype=np.int32)
    ops.copy_h2d(cache.expert_to_slot, np.tile(everyone, (layers, 1)))
    for layer in cache.slot_to_expert:
        ops.copy_h2d(layer, everyone)
    return cache


def resize_layers(cache: ExpertCache, each: Sequence[int]) -> ExpertCache:
    """The same memory, with `each` layer's number of slots, as many in all.  Who is in which is to
    be said anew: tables keep what they held."""
    assert cache.storage is not None, "a cache that is not made here is cut once for all"
    slots, expert_in = cache.storage
    assert sum(each) == slots.shape[0] and max(each) <= cache.num_experts, f"{each} slots"
    return replace(cache, slots=_parts(slots, each), slot_to_expert=_parts(expert_in, each))


def _parts(whole: Array, each: Sequence[int]) -> tuple[Array, ...]:
    """So many rows for each layer."""
    ends = np.cumsum(each).tolist()
    return tuple(whole[end - count : end] for end, count in zip(ends, each, strict=True))


def _cache(
    ops: Ops, layout: ExpertLayout, slots: Array, each: Sequence[int], num_experts: int
) -> ExpertCache:
    """An empty cache over all layers' `slots`.  Raises: OutOfMemory."""
    layers, expert_in = len(each), ops.empty((slots.shape[0],), np.int32)
    made = ExpertCache(
        layout=layout,
        num_experts=num_experts,
        decay=DECAY,
        slots=_parts(slots, each),
        expert_to_slot=ops.empty((layers, num_experts), np.int32),
        slot_to_expert=_parts(expert_in, each),
        short_count=ops.empty((layers, num_experts), np.float32),
        long_count=ops.empty((layers, num_experts), np.float32),
        last_used=ops.empty((layers, num_experts), np.int32),
        step=ops.empty((1,), np.int32),
        counters=ops.empty((7,), np.int64),
        storage=(slots, expert_in),
    )
    reset_cache(ops, made)
    ops.memset(made.counters, 0)
    return made


def reset_cache(ops: Ops, cache: ExpertCache) -> None:
    """Empty every slot and clear the use counts, as after a start."""
    for table in (cache.expert_to_slot, *cache.slot_to_expert):
        ops.memset(table, 0xFF)  # -1
    for zero in (cache.short_count, cache.long_count, cache.last_used, cache.step):
        ops.memset(zero, 0)


def cache_bytes(layout: ExpertLayout, layers: int, num_experts: int, capacity: int) -> int:
    """Bytes of the cache's arrays."""
    return layers * (capacity * (layout.nbytes + 4) + num_experts * 16) + 60


def resident(ops: Ops, cache: ExpertCache) -> npt.NDArray[np.bool_]:
    """Which experts are in a slot, bool [L, E].

    Asserts that the two tables say the same: expert e is in slot s if and only if s holds e.
    """
    slot_of: npt.NDArray[Any] = ops.copy_d2h(cache.expert_to_slot)
    for there, in_slots in zip(slot_of, cache.slot_to_expert, strict=True):
        expert_in: npt.NDArray[Any] = ops.copy_d2h(in_slots)
        (experts,) = np.nonzero(there >= 0)
        assert (expert_in[there[experts]] == experts).all(), "an expert left its slot"
        assert len(experts) == (expert_in >= 0).sum(), (
            "a slot holds an expert that is said to be out"
        )
    return np.asarray(slot_of >= 0)


def verify(ops: Ops, cache: ExpertCache, records: npt.NDArray[Any], samples: int, seed: int) -> int:
    """Compare up to `samples` slots with their records, byte for byte; how many were compared.

    records u8 [L, E, nbytes] in the host's memory: the arena's, or the packed file's.
    """
    expert_in: list[npt.NDArray[Any]] = [ops.copy_d2h(layer) for layer in cache.slot_to_expert]
    held = [
        (at, slot) for at, who in enumerate(expert_in) for slot in np.flatnonzero(who >= 0).tolist()
    ]
    chosen = np.random.default_rng(seed).permutation(len(held))[:samples]
    for layer, slot in (held[one] for one in chosen):
        mine = ops.copy_d2h(cache.slots[layer][slot : slot + 1])[0]
        expert = int(expert_in[layer][slot])
        assert np.array_equal(mine, records[layer, expert]), (
            f"slot {slot} of layer {layer} differs from the record of expert {expert}"
        )
    return len(chosen)
