"""Cache policies on routing traces: a simulator of the expert cache, and the hit rate of each.

Each token updates all layers at once.  As in ops.assign_slots, every miss is fetched and admitted,
and experts of the present token are never evicted; a policy decides which expert is evicted.
What each policy does: docs/expert-cache.md.  Where a trace has predicted experts, one per layer can
be prefetched.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from osmium.experts.cache import DECAY
from osmium.experts.routing import RoutingTrace
from osmium.experts.usage import (
    FIRST_REBALANCE_TOKENS,
    UsageSnapshot,
    rebalanced_slots,
    slots_per_layer,
)
from osmium.ops.types import PREFETCH_SCORE_BIAS

__all__ = [
    "POLICIES", "RULES", "SHIPPED", "SHIPPED_RULE", "PrefetchTally", "hit_rate", "recall",
    "simulate", "simulate_prefetch", "warm_start_hit_rate",
]  # fmt: skip

F64 = npt.NDArray[np.float64]

HALF_LIVES = (4, 8, 16, 24, 32, 64, 128)


@dataclass
class PolicyState:
    """The input of a score function: all arrays [L, E]."""

    short_count: F64
    """Decayed count of uses, as of the last use."""
    uses: F64
    """All uses so far."""
    long_count: F64
    """Decayed count of uses with DECAY's long half-life, as of token `now`."""
    last_used: npt.NDArray[np.int64]
    """The token of the last use, -1 for never."""
    next_use: npt.NDArray[np.int64]
    """The token of the next use."""
    now: int = 0
    """The present token."""


ScoreFn = Callable[[PolicyState], F64]
"""The eviction score of each expert, [L, E]; the lowest is evicted first."""


def _lru(state: PolicyState) -> F64:
    return state.last_used.astype(np.float64)


def _belady(state: PolicyState) -> F64:
    return -state.next_use.astype(np.float64)


def _decayed(half_life: float) -> ScoreFn:
    def score(state: PolicyState) -> F64:
        decayed = state.short_count * np.exp2((state.last_used - state.now) / half_life)
        return decayed + 1e-9 * state.last_used  # ties by recency

    return score


def _popular(state: PolicyState) -> F64:
    recent = state.short_count * np.exp2((state.last_used - state.now) / 16) * (1 - 2 ** (-1 / 16))
    return recent + state.uses / (state.now + 20) + 1e-9 * state.last_used


def _mixed(state: PolicyState) -> F64:
    recent = state.short_count * np.exp2((state.last_used - state.now) / DECAY.half_life)
    step = state.now + 1  # the operation counts from 1
    long_weights = 1 - 2 ** (-(step + DECAY.prior_steps) / DECAY.long_half_life)
    score = long_weights * recent + DECAY.long_scale * state.long_count  # types.DecayConfig
    return np.asarray(score + 1e-9 * state.last_used)


POLICIES = (
    "static", "lru", *(f"decayed {n}" for n in HALF_LIVES), "popular", "mixed", "shared", "quotas",
    "both", "belady",
)  # fmt: skip

SHIPPED = "shared"
"""The policy of the engine: ops.assign_slots evicts, SlotRebalancer moves slots between layers."""

RULES = ("shipped", "first", "warmest")
"""Rules that pick the expert to prefetch among the predicted experts without a slot.

    shipped  the largest weight² * (eviction score + PREFETCH_SCORE_BIAS), weight of the router's
             prediction; a trace without weights has 1 / A for all
    first    the first in the router's order
    warmest  the highest eviction score
"""

SHIPPED_RULE = "shipped"
"""The rule by which ops.assign_slots picks the expert to prefetch."""


@dataclass
class PrefetchTally:
    """Predictions of a trace, and counts [L] of one prefetch per token and layer but the first."""

    predicted: npt.NDArray[np.int64]
    """[T, L, A]."""
    weights: npt.NDArray[np.float32]
    """[T, L, A]."""
    rule: str
    """One of RULES."""
    prefetched: npt.NDArray[np.int64]
    """Prefetches of each layer."""
    prefetch_hits: npt.NDArray[np.int64]
    """Prefetches of an expert that the token used."""


def hit_rate(trace: RoutingTrace, slots: int, policy: str, skip: int = 256) -> float:
    """Hits / uses after the first `skip` tokens, by a policy of POLICIES, `slots` per layer."""
    if policy == "static":
        return _static(trace, slots, skip)
    layer_slots, score, half_life = np.full(trace.ids.shape[1], slots), _decayed(24), 24.0
    if policy in ("quotas", "both"):
        layer_slots = _quotas(trace, slots)
    if policy in ("mixed", "shared", "both"):
        score, half_life = _mixed, DECAY.half_life
    elif policy == "popular":
        score, half_life = _popular, 16
    elif policy in ("lru", "belady"):
        score = _lru if policy == "lru" else _belady
    elif policy != "quotas":
        half_life = float(policy.removeprefix("decayed "))
        score = _decayed(half_life)
    rebalance = policy == "shared"
    return float(simulate(trace, layer_slots, score, half_life, skip, rebalance=rebalance).mean())


def simulate(
    trace: RoutingTrace,
    slots: npt.NDArray[np.int64],
    score: ScoreFn,
    half_life: float,
    skip: int,
    prefetch: PrefetchTally | None = None,
    rebalance: bool = False,
) -> F64:
    """Hits / uses of each layer [L] after `skip` tokens.  slots [L], at least A each.

    A useful prefetch is no hit.  `prefetch` receives its counts.  With `rebalance` slots move
    between layers as in the engine that is idle after each of its numbers of tokens.
    """
    ids = trace.ids.astype(np.int64)
    tokens, layers, top_k = ids.shape
    assert (slots >= top_k).all(), "every layer needs a slot for each expert of a token"
    rows = np.arange(layers)[:, None]
    next_use = _next_uses(ids, trace.experts)
    shape = (layers, trace.experts)
    short_count, uses, long_count = (np.zeros(shape) for _ in range(3))
    state = PolicyState(short_count, uses, long_count, np.full(shape, -1), np.full(shape, tokens))
    long_decay = 2 ** (-1 / DECAY.long_half_life)
    resident = np.zeros(shape, bool)
    hits, rebalance_at = np.zeros(layers), FIRST_REBALANCE_TOKENS
    for t in range(tokens):
        used = ids[t]
        if rebalance and t == rebalance_at:
            slots, resident = _rebalance(_snapshot(state, resident), slots, top_k)
            rebalance_at *= 2
        state.now = t
        state.long_count *= long_decay
        if prefetch is not None:
            predicted, weights = prefetch.predicted[t], prefetch.weights[t].astype(np.float64)
            chosen = _prefetch(predicted, weights, resident, score(state), slots, prefetch.rule)
            if t >= skip:
                prefetch.prefetched += chosen >= 0
                prefetch.prefetch_hits += (used == chosen[:, None]).any(axis=1)
        hit = resident[rows, used]
        if t >= skip:
            hits += hit.sum(axis=1)
        resident[rows, used] = True
        state.short_count[rows, used] = (
            state.short_count[rows, used] * np.exp2((state.last_used[rows, used] - t) / half_life)
            + 1
        )
        state.uses[rows, used] += 1
        state.long_count[rows, used] += 1
        state.last_used[rows, used] = t
        state.next_use[rows, used] = next_use[t]
        num_over = resident.sum(axis=1) - slots
        max_over = int(num_over.max())
        if max_over > 0:
            scores = np.where(resident, score(state), np.inf)
            scores[rows, used] = np.inf
            lowest = np.argpartition(scores, max_over - 1, axis=1)[:, :max_over]
            order = np.take_along_axis(scores, lowest, axis=1).argsort(axis=1)
            lowest = np.take_along_axis(lowest, order, axis=1)
            evict = np.arange(max_over) < num_over[:, None]
            resident[np.broadcast_to(rows, evict.shape)[evict], lowest[evict]] = False
    return np.asarray(hits / ((tokens - skip) * top_k))


def _snapshot(state: PolicyState, resident: npt.NDArray[np.bool_]) -> UsageSnapshot:
    """The counts after the token `now`, as experts.usage.snapshot_usage returns them."""
    used = state.last_used >= 0
    age = np.where(used, state.now - state.last_used, -1)
    short_count = np.where(used, state.short_count * np.exp2(-age / DECAY.half_life), 0)
    long_count = state.long_count.astype(np.float32)
    return UsageSnapshot(
        short_count.astype(np.float32), long_count, state.now + 1, age.astype(np.int32), resident
    )


def _rebalance(
    usage: UsageSnapshot, slots: npt.NDArray[np.int64], top_k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Slots per layer [L], and which experts are resident [L, E], after a rebalancing.

    If the numbers change, the used or resident experts with the highest scores fill the slots.
    """
    layer_slots = rebalanced_slots(usage, slots.tolist(), top_k)
    if layer_slots is None:
        return slots, usage.resident
    resident = np.zeros_like(usage.resident)
    for layer, count in enumerate(layer_slots):
        resident[layer, usage.top_experts(layer, count)] = True
    return np.array(layer_slots), resident


def _prefetch(
    predicted: npt.NDArray[np.int64],
    weights: F64,
    resident: npt.NDArray[np.bool_],
    scores: F64,
    slots: npt.NDArray[np.int64],
    rule: str,
) -> npt.NDArray[np.int64]:
    """The expert to prefetch in each layer [L], or -1.

    If no slot is free, it evicts the lowest score among the experts not predicted, in `resident`.
    predicted, weights [L, A]    resident, scores [L, E]
    """
    rows = np.arange(len(predicted))[:, None]
    if rule != "first":  # ties to the lower id
        by_id = np.argsort(predicted, axis=1, kind="stable")
        predicted, weights = predicted[rows, by_id], weights[rows, by_id]
    absent = ~resident[rows, predicted]
    evictable = resident.copy()
    evictable[rows, predicted] = False
    has_candidate = np.asarray(absent.any(axis=1))
    has_candidate[0] = False
    gain = {
        "shipped": weights**2 * (scores[rows, predicted] + PREFETCH_SCORE_BIAS),
        "first": np.zeros(predicted.shape),
        "warmest": scores[rows, predicted],
    }[rule]
    chosen = predicted[rows[:, 0], np.where(absent, gain, -np.inf).argmax(axis=1)]
    lowest = np.where(evictable, scores, np.inf).argmin(axis=1)
    # A full layer has an evictable expert, as a predicted one is absent.
    evicts = has_candidate & (resident.sum(axis=1) >= slots)
    resident[evicts, lowest[evicts]] = False
    return np.where(has_candidate, chosen, -1)


def simulate_prefetch(
    trace: RoutingTrace, slots: int, skip: int = 256, rule: str = SHIPPED_RULE
) -> tuple[float, float, float]:
    """ "mixed" with one prefetch per token in each layer but the first, after `skip` tokens.

    Returns hits / uses, prefetches per layer and token, and the fraction of prefetches used.
    """
    assert trace.predicted is not None, "a prefetch needs a trace with predictions"
    tokens, layers, top_k = trace.ids.shape
    weights, zeros = trace.predicted_weights, np.zeros(layers, np.int64)
    if weights is None:
        weights = np.full(trace.ids.shape, 1 / top_k, np.float32)
    tally = PrefetchTally(trace.predicted.astype(np.int64), weights, rule, zeros, zeros.copy())
    layer_slots = np.full(layers, slots)
    hits = simulate(trace, layer_slots, _mixed, DECAY.half_life, skip, tally)
    prefetched, useful = int(tally.prefetched.sum()), int(tally.prefetch_hits.sum())
    per_layer = prefetched / ((tokens - skip) * (layers - 1))
    return float(hits.mean()), per_layer, useful / max(prefetched, 1)


def recall(trace: RoutingTrace) -> F64:
    """The fraction of predicted experts that were used, by layer [L].

    Layer 0 has no prediction: RoutingRecorder records the used experts there.
    """
    assert trace.predicted is not None, "recall needs a trace with predictions"
    used = (trace.predicted[..., None] == trace.ids[:, :, None]).any(axis=-1)
    return np.asarray(used.mean(axis=(0, 2)))


def _next_uses(ids: npt.NDArray[np.int64], experts: int) -> npt.NDArray[np.int64]:
    """[T, L, A]: the next token that uses the same expert in the same layer."""
    tokens, layers, _ = ids.shape
    rows = np.arange(layers)[:, None]
    upcoming = np.full((layers, experts), tokens)
    next_use = np.empty_like(ids)
    for t in range(tokens - 1, -1, -1):
        next_use[t] = upcoming[rows, ids[t]]
        upcoming[rows, ids[t]] = t
    return next_use


def _counts(ids: npt.NDArray[np.int64], experts: int) -> npt.NDArray[np.int64]:
    """Uses of each expert, [L, E]."""
    layers = [np.bincount(layer.ravel(), minlength=experts) for layer in ids.swapaxes(0, 1)]
    return np.stack(layers)


def _static(trace: RoutingTrace, slots: int, skip: int) -> float:
    ids = trace.ids.astype(np.int64)
    half = len(ids) // 2
    order = np.argsort(-_counts(ids[:half], trace.experts), axis=1)[:, :slots]
    resident = np.zeros((ids.shape[1], trace.experts), bool)
    np.put_along_axis(resident, order, True, axis=1)
    counted = ids[max(half, skip) :]
    return float(resident[np.arange(ids.shape[1])[:, None], counted].mean())


def warm_start_hit_rate(
    trace: RoutingTrace, slots: int, tokens: int, skip: int = 256
) -> tuple[float, float]:
    """Hits / uses of "mixed" in an engine that restarts after `tokens`, `skip` tokens later.

    First with the same number of slots in all layers, then with slots by the saved usage counts.
    """
    layers = trace.ids.shape[1]
    counted, uniform = (
        RoutingTrace(trace.ids[tokens:], np.array([0]), trace.experts),
        [slots] * layers,
    )
    usage = _usage(trace.ids[:tokens], trace.experts)
    by_usage = slots_per_layer(usage, slots, trace.ids.shape[2])
    uniform_rate, usage_rate = (
        simulate(counted, np.array(layer_slots), _mixed, DECAY.half_life, skip).mean()
        for layer_slots in (uniform, by_usage or uniform)
    )
    return float(uniform_rate), float(usage_rate)


def _usage(ids: npt.NDArray[np.uint16], experts: int) -> UsageSnapshot:
    """Usage counts after the tokens of ids [T, L, A].

    Ages and residency are 0, as slots_per_layer ignores them.
    """
    tokens, layers, _ = ids.shape
    rows, zeros = np.arange(layers)[:, None], np.zeros((layers, experts), np.int32)
    counts = np.zeros((2, layers, experts))
    decay = 2 ** (-1 / np.array([DECAY.half_life, DECAY.long_half_life]))
    for used in ids.astype(np.int64):
        counts *= decay[:, None, None]
        counts[:, rows, used] += 1
    short, long = counts.astype(np.float32)
    return UsageSnapshot(short, long, tokens, zeros, zeros > 0)


def _quotas(trace: RoutingTrace, slots: int) -> npt.NDArray[np.int64]:
    """Slots per layer [L], with the sum slots * L.

    1/16 of `slots` moves at a time, from the layer that loses least hits to the layer that gains
    most.  Hits are those of the trace's first half.
    """
    half = RoutingTrace(trace.ids[: len(trace.ids) // 2], trace.starts, trace.experts)
    layers, top_k = trace.ids.shape[1:]
    step = max(1, slots // 16)
    sizes = [slots + i * step for i in range(-4, 5)]
    sizes = [size for size in sizes if top_k <= size <= trace.experts]
    rates = np.stack(
        [simulate(half, np.full(layers, size), _decayed(24), 24, 64) for size in sizes]
    )
    at = np.full(layers, sizes.index(slots))
    while True:
        up = np.where(at + 1 < len(sizes), rates[np.minimum(at + 1, len(sizes) - 1), range(layers)]
                      - rates[at, range(layers)], -np.inf)  # fmt: skip
        down = np.where(at > 0, rates[at, range(layers)]
                        - rates[np.maximum(at - 1, 0), range(layers)], np.inf)  # fmt: skip
        gains, loses = int(up.argmax()), int(down.argmin())
        if gains == loses or up[gains] <= down[loses] + 1e-4:
            return np.array([sizes[i] for i in at])
        at[gains] += 1
        at[loses] -= 1
