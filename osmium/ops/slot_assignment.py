"""Slot assignment and eviction in NumPy: the specification of kernels/assign_slots.py."""

import numpy as np
import numpy.typing as npt

from osmium.ops.types import (
    PREFETCH_DISCARD,
    PREFETCH_SCORE_BIAS,
    PREFETCH_STOP,
    Array,
    ExpertCache,
    PrefetchState,
    SlotAssignment,
)

__all__ = ["assign_slots"]

F32 = npt.NDArray[np.float32]


def assign_slots(
    plan: SlotAssignment, cache: ExpertCache, layer: int, ids: Array, prefetch: PrefetchState | None
) -> None:
    """See ops.Ops.assign_slots."""
    step = int(cache.step[0]) + 1
    expert_to_slot, slot_to_expert = cache.expert_to_slot[layer], cache.slot_to_expert[layer]
    experts, uses = np.unique(ids, return_counts=True)
    num_slots = len(slot_to_expert)
    assert len(experts) <= num_slots, f"{len(experts)} experts, {num_slots} slots"
    is_miss = expert_to_slot[experts] < 0
    cache.counters[1] += int(uses[~is_miss].sum())
    prefetched = -1 if prefetch is None else int(prefetch.expert[layer])
    is_prefetch_hit = prefetched in experts[is_miss]
    if is_prefetch_hit:  # its entry of the plan is the first
        order = np.argsort(experts != prefetched, kind="stable")
        experts, uses, is_miss = experts[order], uses[order], is_miss[order]
    misses = experts[is_miss]
    short_count, long_count, scores = _decayed_counts(cache, layer, step)
    if len(misses):
        free = np.flatnonzero(slot_to_expert < 0)
        evictable = np.flatnonzero((slot_to_expert >= 0) & ~np.isin(slot_to_expert, experts))
        held = slot_to_expert[evictable]
        order = np.lexsort((evictable, cache.last_used[layer][held], scores[held]))
        victims = evictable[order]
        assigned = np.concatenate([free, victims])[: len(misses)]
        evicted = slot_to_expert[assigned]
        expert_to_slot[evicted[evicted >= 0]] = -1
        expert_to_slot[misses] = assigned
        slot_to_expert[assigned] = misses
    cache.short_count[layer][experts] = short_count[experts] + uses.astype(np.float32)
    cache.long_count[layer][experts] = long_count[experts] + uses.astype(np.float32)
    cache.last_used[layer][experts] = step
    plan.count[0] = len(experts)
    plan.fetch_progress[:] = 0
    plan.expert[: len(experts)] = experts
    plan.expert[len(experts) :] = -1
    plan.slot[: len(experts)] = expert_to_slot[experts]
    flags = np.where(is_prefetch_hit & (experts == prefetched), 2, is_miss)
    plan.fetch_flags[: len(experts)] = flags
    plan.uses[: len(experts)] = uses
    slots = expert_to_slot[ids.reshape(-1)]
    is_missed_pair = np.isin(ids.reshape(-1), misses)
    plan.pair_slots.reshape(-1)[: ids.size] = np.where(is_missed_pair, ~slots, slots)
    if prefetch is not None:
        prefetch.start_signal[layer] = 16 * step + 15
        if prefetched >= 0:
            prefetch.state[layer] += (
                PREFETCH_STOP if is_prefetch_hit else PREFETCH_STOP + PREFETCH_DISCARD
            )
            prefetch.expert[layer] = -1
            cache.counters[5] += is_prefetch_hit
        if layer + 1 < len(cache.slot_to_expert):
            _pick_prefetch(cache, layer + 1, prefetch, ids.size, step)
    if layer + 1 == len(cache.slot_to_expert):
        cache.step[0] = step


def _pick_prefetch(
    cache: ExpertCache, layer: int, prefetch: PrefetchState, pairs: int, step: int
) -> None:
    """Pick the expert to prefetch for `layer`, and reserve a slot for it.

    Candidates are the predicted experts without a slot.  The one with the largest weight^2 *
    (eviction score + PREFETCH_SCORE_BIAS) wins, ties to the lower id.  It gets the lowest free
    slot, or that of the lowest eviction score among experts that are not predicted.
    """
    expert_to_slot, slot_to_expert = cache.expert_to_slot[layer], cache.slot_to_expert[layer]
    predicted, weights = (np.ravel(array)[:pairs] for array in (prefetch.ids, prefetch.weights))
    is_absent = expert_to_slot[predicted] < 0
    candidates, weights = predicted[is_absent], weights[is_absent]
    _, _, scores = _decayed_counts(cache, layer, step)
    prefetch.state[layer] = prefetch.segments_done[layer] = 0
    prefetch.start_signal[layer] = 16 * step
    free = np.flatnonzero(slot_to_expert < 0)
    evictable = np.flatnonzero((slot_to_expert >= 0) & ~np.isin(slot_to_expert, predicted))
    if not len(candidates) or not len(free) + len(evictable):
        prefetch.expert[layer] = -1
        return
    slot = free[0] if len(free) else evictable[np.argmin(scores[slot_to_expert[evictable]])]
    if slot_to_expert[slot] >= 0:
        expert_to_slot[slot_to_expert[slot]] = slot_to_expert[slot] = -1
    prefetch.slot[layer] = sum(map(len, cache.slot_to_expert[:layer])) + slot
    value = weights * weights * (scores[candidates] + np.float32(PREFETCH_SCORE_BIAS))
    prefetch.expert[layer] = candidates[value == value.max()].min()
    cache.counters[4] += 1


def _decayed_counts(cache: ExpertCache, layer: int, step: int) -> tuple[F32, F32, F32]:
    """f32 [E] each: short and long counts decayed to now, and eviction scores."""
    decay, age = cache.decay, (cache.last_used[layer] - step).astype(np.float32)
    rate, long_rate = np.float32(1 / decay.half_life), np.float32(1 / decay.long_half_life)
    short_count = cache.short_count[layer] * np.exp2(age * rate)
    long_count = cache.long_count[layer] * np.exp2(age * long_rate)
    short_scale = 1 - np.exp2(np.float32(-(step + decay.prior_steps)) * long_rate)
    scores = short_scale * short_count + np.float32(decay.long_scale) * long_count
    return short_count, long_count, np.asarray(scores, np.float32)
