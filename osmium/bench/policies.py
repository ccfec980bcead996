"""Cache policies on routing traces: what share of uses each would hit.

A simulator of the expert cache, all layers side by side.  Every miss is fetched and admitted, and
an expert of the present token never leaves, as in ops.assign_slots.  Policies differ in who leaves:

    static     nobody: the experts used most in the trace's first half stay, misses pass through
    lru        who was used longest ago
    decayed N  who has the least decayed count, half-life N tokens, ties to who was used longest ago
    popular    decayed 16 and, on the same scale, the share of all tokens so far that used it
    mixed      decayed 8 and, on the same scale, decayed 512: who was popular for long
               (types.DecayConfig); what ships, until the engine has an idle moment
    shared     mixed, slots shared out among layers by the heat after 1,024 tokens, 2,048, 4,096 and
               so on: as shipped, on a first start, if the engine idles at each of these
    quotas     decayed 24, slots shared out among layers by what they gain, found on the first half
    both       mixed, slots shared out as by quotas
    belady     who will be needed last: the bound for any that admits every miss (Belady 1966)

Where a trace has predicted experts, one per layer can be prefetched, as ops.assign_slots does.
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
    "POLICIES", "RULES", "SHIPPED", "SHIPPED_RULE", "Guesses", "guess", "hit_rate", "recall",
    "simulate", "warm_start_hit_rate",
]  # fmt: skip

F64 = npt.NDArray[np.float64]

HALF_LIVES = (4, 8, 16, 24, 32, 64, 128)


@dataclass
class PolicyState:
    """What a policy sees: all arrays [L, E]."""

    count: F64
    """Decayed count of uses, as of the last use."""
    uses: F64
    """All uses so far."""
    slow: F64
    """Decayed count of uses with the long half-life of what ships, as of now."""
    last: npt.NDArray[np.int64]
    """The token of the last use, -1 for never."""
    after: npt.NDArray[np.int64]
    """The token of the next use."""
    now: int = 0


ScoreFn = Callable[[PolicyState], F64]
"""How much each expert is worth keeping, [L, E]; the least leaves first."""


def _lru(cache: PolicyState) -> F64:
    return cache.last.astype(np.float64)


def _belady(cache: PolicyState) -> F64:
    return -cache.after.astype(np.float64)


def _decayed(half_life: float) -> ScoreFn:
    def worth(cache: PolicyState) -> F64:
        faded = cache.count * np.exp2((cache.last - cache.now) / half_life)
        return faded + 1e-9 * cache.last  # ties by recency

    return worth


def _popular(cache: PolicyState) -> F64:
    recent = cache.count * np.exp2((cache.last - cache.now) / 16) * (1 - 2 ** (-1 / 16))
    return recent + cache.uses / (cache.now + 20) + 1e-9 * cache.last


def _mixed(cache: PolicyState) -> F64:
    recent = cache.count * np.exp2((cache.last - cache.now) / DECAY.half_life)
    step = cache.now + 1  # the operation counts from 1
    grown = 1 - 2 ** (-(step + DECAY.prior_steps) / DECAY.long_half_life)
    warmth = grown * recent + DECAY.long_scale * cache.slow  # types.DecayConfig's
    return np.asarray(warmth + 1e-9 * cache.last)


POLICIES = (
    "static", "lru", *(f"decayed {n}" for n in HALF_LIVES), "popular", "mixed", "shared", "quotas",
    "both", "belady",
)  # fmt: skip

SHIPPED = "shared"
"""What the engine does: ops.assign_slots evicts, SlotRebalancer moves slots between layers."""

RULES = ("shipped", "first", "warmest")
"""Who of the predicted that are in no slot is guessed: by the square of the router's weight times
warmth + COLD (by warmth where a trace has no weights), in the router's order, or by warmth."""

SHIPPED_RULE = "shipped"
"""The rule by which ops.assign_slots picks the expert to prefetch."""


@dataclass
class Guesses:
    """A guess a token in each layer but the first: from what, and what came of it, [L] each."""

    predicted: npt.NDArray[np.int64]
    """[T, L, A]."""
    weights: npt.NDArray[np.float32]
    """[T, L, A]."""
    rule: str
    made: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]


def hit_rate(trace: RoutingTrace, slots: int, policy: str, skip: int = 256) -> float:
    """The share of uses hit after the first `skip` tokens, by a policy of POLICIES."""
    if policy == "static":
        return _static(trace, slots, skip)
    each, worth, half_life = np.full(trace.ids.shape[1], slots), _decayed(24), 24.0
    if policy in ("quotas", "both"):
        each = _quotas(trace, slots)
    if policy in ("mixed", "shared", "both"):
        worth, half_life = _mixed, DECAY.half_life
    elif policy == "popular":
        worth, half_life = _popular, 16
    elif policy in ("lru", "belady"):
        worth = _lru if policy == "lru" else _belady
    elif policy != "quotas":
        half_life = float(policy.removeprefix("decayed "))
        worth = _decayed(half_life)
    shared = policy == "shared"
    return float(simulate(trace, each, worth, half_life, skip, shared=shared).mean())


def simulate(
    trace: RoutingTrace,
    slots: npt.NDArray[np.int64],
    worth: ScoreFn,
    half_life: float,
    skip: int,
    guesses: Guesses | None = None,
    shared: bool = False,
) -> F64:
    """The share of uses hit after `skip` tokens, a layer.  slots [L], at least A each.  A guess
    that is right is no hit.  With `shared` slots are shared out anew as the engine does it, at an
    idle moment after each number of tokens that it waits for."""
    ids = trace.ids.astype(np.int64)
    tokens, layers, top_k = ids.shape
    assert (slots >= top_k).all(), "every layer needs a slot for each expert of a token"
    rows = np.arange(layers)[:, None]
    after = _next_uses(ids, trace.experts)
    shape = (layers, trace.experts)
    count, uses, slow = (np.zeros(shape) for _ in range(3))
    cache = PolicyState(count, uses, slow, np.full(shape, -1), np.full(shape, tokens))
    slower = 2 ** (-1 / DECAY.long_half_life)
    inside = np.zeros(shape, bool)
    hits, due = np.zeros(layers), FIRST_REBALANCE_TOKENS
    for t in range(tokens):
        mine = ids[t]
        if shared and t == due:
            slots, inside = _share(_heat_now(cache, inside), slots, top_k)
            due *= 2
        cache.now = t
        cache.slow *= slower
        if guesses is not None:
            named, weights = guesses.predicted[t], guesses.weights[t].astype(np.float64)
            who = _guess(named, weights, inside, worth(cache), slots, guesses.rule)
            if t >= skip:
                guesses.made += who >= 0
                guesses.right += (mine == who[:, None]).any(axis=1)
        hit = inside[rows, mine]
        if t >= skip:
            hits += hit.sum(axis=1)
        inside[rows, mine] = True
        cache.count[rows, mine] = (
            cache.count[rows, mine] * np.exp2((cache.last[rows, mine] - t) / half_life) + 1
        )
        cache.uses[rows, mine] += 1
        cache.slow[rows, mine] += 1
        cache.last[rows, mine] = t
        cache.after[rows, mine] = after[t]
        over = inside.sum(axis=1) - slots
        most = int(over.max())
        if most > 0:
            value = np.where(inside, worth(cache), np.inf)
            value[rows, mine] = np.inf
            leaving = np.argpartition(value, most - 1, axis=1)[:, :most]
            order = np.take_along_axis(value, leaving, axis=1).argsort(axis=1)
            leaving = np.take_along_axis(leaving, order, axis=1)
            goes = np.arange(most) < over[:, None]
            inside[np.broadcast_to(rows, goes.shape)[goes], leaving[goes]] = False
    return np.asarray(hits / ((tokens - skip) * top_k))


def _heat_now(cache: PolicyState, inside: npt.NDArray[np.bool_]) -> UsageSnapshot:
    """As experts.heat has it, once the token `now` is done."""
    used = cache.last >= 0
    age = np.where(used, cache.now - cache.last, -1)
    heat = np.where(used, cache.count * np.exp2(-age / DECAY.half_life), 0)
    long_heat = cache.slow.astype(np.float32)
    return UsageSnapshot(
        heat.astype(np.float32), long_heat, cache.now + 1, age.astype(np.int32), inside
    )


def _share(
    heat: UsageSnapshot, slots: npt.NDArray[np.int64], top_k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """How many slots each layer has from now on, and who is in them: the warmest of all that were
    ever used, if anything changes."""
    each = rebalanced_slots(heat, slots.tolist(), top_k)
    if each is None:
        return slots, heat.resident
    inside = np.zeros_like(heat.resident)
    for layer, own in enumerate(each):
        inside[layer, heat.top_experts(layer, own)] = True
    return np.array(each), inside


def _guess(
    named: npt.NDArray[np.int64],
    weights: F64,
    inside: npt.NDArray[np.bool_],
    value: F64,
    slots: npt.NDArray[np.int64],
    rule: str,
) -> npt.NDArray[np.int64]:
    """Who is guessed in each layer, or -1.  For its slot, if none is free, the coldest that was
    not predicted leaves.  named, weights [L, A]    inside, value [L, E]"""
    rows = np.arange(len(named))[:, None]
    if rule != "first":  # ties to the lower id
        by_id = np.argsort(named, axis=1, kind="stable")
        named, weights = named[rows, by_id], weights[rows, by_id]
    likely = ~inside[rows, named]
    held = inside.copy()
    held[rows, named] = False
    able = np.asarray(likely.any(axis=1))
    able[0] = False
    gain = {
        "shipped": weights**2 * (value[rows, named] + PREFETCH_SCORE_BIAS),
        "first": np.zeros(named.shape),
        "warmest": value[rows, named],
    }[rule]
    who = named[rows[:, 0], np.where(likely, gain, -np.inf).argmax(axis=1)]
    leaving = np.where(held, value, np.inf).argmin(axis=1)
    leaves = able & (inside.sum(axis=1) >= slots)  # as likely ones are not inside, others are held
    inside[leaves, leaving[leaves]] = False
    return np.where(able, who, -1)


def guess(
    trace: RoutingTrace, slots: int, skip: int = 256, rule: str = SHIPPED_RULE
) -> tuple[float, float, float]:
    """With mixed and a guess a token in each layer but the first: the share of uses hit after
    `skip` tokens, guesses a layer and token, and the share of these that are right."""
    assert trace.predicted is not None, "guesses are from what was predicted"
    tokens, layers, top_k = trace.ids.shape
    weights, none = trace.predicted_weights, np.zeros(layers, np.int64)
    if weights is None:
        weights = np.full(trace.ids.shape, 1 / top_k, np.float32)
    guesses = Guesses(trace.predicted.astype(np.int64), weights, rule, none, none.copy())
    each = np.full(layers, slots)
    hits = simulate(trace, each, _mixed, DECAY.half_life, skip, guesses)
    made, right = int(guesses.made.sum()), int(guesses.right.sum())
    return float(hits.mean()), made / ((tokens - skip) * (layers - 1)), right / max(made, 1)


def recall(trace: RoutingTrace) -> F64:
    """Of each layer, the share of the predicted experts that were asked for; the first has no
    prediction."""
    assert trace.predicted is not None, "a recall is of what was predicted"
    found = (trace.predicted[..., None] == trace.ids[:, :, None]).any(axis=-1)
    return np.asarray(found.mean(axis=(0, 2)))


def _next_uses(ids: npt.NDArray[np.int64], experts: int) -> npt.NDArray[np.int64]:
    """[T, L, A]: the next token that uses the same expert in the same layer."""
    tokens, layers, _ = ids.shape
    rows = np.arange(layers)[:, None]
    soonest = np.full((layers, experts), tokens)
    after = np.empty_like(ids)
    for t in range(tokens - 1, -1, -1):
        after[t] = soonest[rows, ids[t]]
        soonest[rows, ids[t]] = t
    return after


def _counts(ids: npt.NDArray[np.int64], experts: int) -> npt.NDArray[np.int64]:
    """Uses of each expert, [L, E]."""
    layers = [np.bincount(layer.ravel(), minlength=experts) for layer in ids.swapaxes(0, 1)]
    return np.stack(layers)


def _static(trace: RoutingTrace, slots: int, skip: int) -> float:
    ids = trace.ids.astype(np.int64)
    half = len(ids) // 2
    order = np.argsort(-_counts(ids[:half], trace.experts), axis=1)[:, :slots]
    inside = np.zeros((ids.shape[1], trace.experts), bool)
    np.put_along_axis(inside, order, True, axis=1)
    rest = ids[max(half, skip) :]
    return float(inside[np.arange(ids.shape[1])[:, None], rest].mean())


def warm_start_hit_rate(
    trace: RoutingTrace, slots: int, tokens: int, skip: int = 256
) -> tuple[float, float]:
    """The share of uses hit after `tokens` + `skip` tokens by an engine that starts anew after
    `tokens`, by mixed: slots the same in all layers, and by the heat of the first tokens."""
    layers = trace.ids.shape[1]
    rest, same = RoutingTrace(trace.ids[tokens:], np.array([0]), trace.experts), [slots] * layers
    each = slots_per_layer(_heat(trace.ids[:tokens], trace.experts), slots, trace.ids.shape[2])
    alike, shared = (
        simulate(rest, np.array(one), _mixed, DECAY.half_life, skip).mean()
        for one in (same, each or same)
    )
    return float(alike), float(shared)


def _heat(ids: npt.NDArray[np.uint16], experts: int) -> UsageSnapshot:
    """What is kept after these tokens [T, L, A], but for ages and places, which quotas ignore."""
    tokens, layers, _ = ids.shape
    rows, none = np.arange(layers)[:, None], np.zeros((layers, experts), np.int32)
    counts = np.zeros((2, layers, experts))
    fade = 2 ** (-1 / np.array([DECAY.half_life, DECAY.long_half_life]))
    for mine in ids.astype(np.int64):
        counts *= fade[:, None, None]
        counts[:, rows, mine] += 1
    short, long = counts.astype(np.float32)
    return UsageSnapshot(short, long, tokens, none, none > 0)


def _quotas(trace: RoutingTrace, slots: int) -> npt.NDArray[np.int64]:
    """Slots a layer, the same in all: by steps of 1/16 of a layer's, from the layer that loses
    least to the one that gains most, on the first half of the trace."""
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
