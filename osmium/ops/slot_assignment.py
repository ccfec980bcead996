"""Which slot every expert has, in NumPy: what kernels/assign_slots.py does, and its specification."""

import numpy as np
import numpy.typing as npt

from osmium.ops.types import (
    DROP,
    PREFETCH_SCORE_BIAS,
    STOP,
    Array,
    ExpertCache,
    PrefetchState,
    SlotAssignment,
)

__all__ = ["assign_slots"]

F32 = npt.NDArray[np.float32]


def assign_slots(
    plan: SlotAssignment, cache: ExpertCache, layer: int, ids: Array, guess: PrefetchState | None
) -> None:
    """See ops.Ops.assign_slots."""
    now = int(cache.step[0]) + 1
    slot_of, expert_in = cache.expert_to_slot[layer], cache.slot_to_expert[layer]
    experts, uses = np.unique(ids, return_counts=True)
    assert len(experts) <= len(expert_in), f"{len(experts)} experts, {len(expert_in)} slots"
    absent = slot_of[experts] < 0
    cache.counters[1] += int(uses[~absent].sum())
    guessed = -1 if guess is None else int(guess.expert[layer])
    right = guessed in experts[absent]
    if right:  # it comes first
        order = np.argsort(experts != guessed, kind="stable")
        experts, uses, absent = experts[order], uses[order], absent[order]
    missing = experts[absent]
    short, long, warmth = _heats(cache, layer, now)
    if len(missing):
        free = np.flatnonzero(expert_in < 0)
        held = np.flatnonzero((expert_in >= 0) & ~np.isin(expert_in, experts))
        who = expert_in[held]
        victims = held[np.lexsort((held, cache.last_used[layer][who], warmth[who]))]
        taken = np.concatenate([free, victims])[: len(missing)]
        gone = expert_in[taken]
        slot_of[gone[gone >= 0]] = -1
        slot_of[missing] = taken
        expert_in[taken] = missing
    cache.short_count[layer][experts] = short[experts] + uses.astype(np.float32)
    cache.long_count[layer][experts] = long[experts] + uses.astype(np.float32)
    cache.last_used[layer][experts] = now
    plan.count[0] = len(experts)
    plan.fetch_progress[:] = 0
    plan.expert[: len(experts)] = experts
    plan.expert[len(experts) :] = -1
    plan.slot[: len(experts)] = slot_of[experts]
    plan.fetch_flags[: len(experts)] = np.where(right & (experts == guessed), 2, absent)
    plan.uses[: len(experts)] = uses
    slots = slot_of[ids.reshape(-1)]
    new = np.isin(ids.reshape(-1), missing)
    plan.pair_slots.reshape(-1)[: ids.size] = np.where(new, ~slots, slots)
    if guess is not None:
        guess.start_signal[layer] = 16 * now + 15
        if guessed >= 0:
            guess.state[layer] += STOP if right else STOP + DROP
            guess.expert[layer] = -1
            cache.counters[5] += right
        if layer + 1 < len(cache.slot_to_expert):
            _guess(cache, layer + 1, guess, ids.size, now)
    if layer + 1 == len(cache.slot_to_expert):
        cache.step[0] = now


def _guess(cache: ExpertCache, layer: int, guess: PrefetchState, pairs: int, now: int) -> None:
    """Whom to fetch before `layer` is placed, and where to."""
    slot_of, expert_in = cache.expert_to_slot[layer], cache.slot_to_expert[layer]
    named, weights = (np.ravel(array)[:pairs] for array in (guess.ids, guess.weights))
    likely, weights = named[slot_of[named] < 0], weights[slot_of[named] < 0]
    _, _, warmth = _heats(cache, layer, now)
    guess.state[layer], guess.segments_done[layer], guess.start_signal[layer] = 0, 0, 16 * now
    free = np.flatnonzero(expert_in < 0)
    held = np.flatnonzero((expert_in >= 0) & ~np.isin(expert_in, named))
    if not len(likely) or not len(free) + len(held):
        guess.expert[layer] = -1
        return
    slot = free[0] if len(free) else held[np.argmin(warmth[expert_in[held]])]
    if expert_in[slot] >= 0:
        slot_of[expert_in[slot]] = expert_in[slot] = -1
    guess.slot[layer] = sum(map(len, cache.slot_to_expert[:layer])) + slot
    worth = weights * weights * (warmth[likely] + np.float32(PREFETCH_SCORE_BIAS))
    guess.expert[layer] = likely[worth == worth.max()].min()
    cache.counters[4] += 1


def _heats(cache: ExpertCache, layer: int, now: int) -> tuple[F32, F32, F32]:
    """Of every expert: heat and long heat as of now, and its warmth."""
    fading, age = cache.fading, (cache.last_used[layer] - now).astype(np.float32)
    rate, long_rate = np.float32(1 / fading.half_life), np.float32(1 / fading.long_half_life)
    short = cache.short_count[layer] * np.exp2(age * rate)
    long = cache.long_count[layer] * np.exp2(age * long_rate)
    grown = 1 - np.exp2(np.float32(-(now + fading.prior_steps)) * long_rate)
    return short, long, np.asarray(grown * short + np.float32(fading.long_scale) * long, np.float32)
