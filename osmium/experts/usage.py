"""Expert usage: snapshots of the use counts, the usage file, and slots per layer by usage.

The usage file keeps a snapshot between runs of the engine:

    0      magic "OSMUSED\\3", u32 crc32 of all that follows, u32 length of the JSON
    16     JSON: fingerprint of the model, shape [L, E], steps counted
    ...    short and long count f32 [L, E], decayed to the time of saving; age i32 [L, E], steps
           since the last use (-1: never); resident u8 [L, E]

The file is only a cache.  A damaged file, or one of another version or model, is ignored with a
warning.
"""

import contextlib
import json
import logging
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from osmium.errors import DeviceError
from osmium.experts.cache import DECAY
from osmium.ops import DecayConfig, ExpertCache, HostExperts, Ops

__all__ = [
    "UsageSnapshot", "eviction_scores", "read_usage", "rebalanced_slots", "save_usage",
    "slots_per_layer", "snapshot_usage", "try_save_usage", "warm_cache",
]  # fmt: skip

LOG = logging.getLogger("osmium.experts")

MAGIC = b"OSMUSED\3"

MAX_STEPS = 32 * int(DECAY.long_half_life)
"""Cap on the counted steps.  Beyond it the long count's older weights are below f32's last bit, so
that one more step changes no eviction score."""

FIRST_REBALANCE_TOKENS = 1024
"""Tokens before the first rebalancing of slots between layers; each next one waits for twice as
many."""

MIN_MOVED_FRACTION = 32
"""Rebalance only if at least one slot in this many changes its layer.  Rebalancing refills every
slot, and counts that still fluctuate move a few each time."""


@dataclass(frozen=True)
class UsageSnapshot:
    """Use counts of every expert at one step."""

    short_count: npt.NDArray[np.float32]
    """f32 [L, E], uses decayed with DECAY.half_life."""
    long_count: npt.NDArray[np.float32]
    """f32 [L, E], uses decayed with DECAY.long_half_life."""
    steps: int
    """Steps counted, at most MAX_STEPS."""
    age: npt.NDArray[np.int32]
    """i32 [L, E], steps since the last use; -1: never used."""
    resident: npt.NDArray[np.bool_]
    """bool [L, E]."""

    @property
    def eviction_scores(self) -> npt.NDArray[np.float32]:
        """f32 [L, E], at this step; the formula is that of types.DecayConfig."""
        return _score(self.short_count, self.long_count, self.steps, DECAY)

    def top_experts(self, layer: int, most: int) -> npt.NDArray[np.intp]:
        """Up to `most` experts that were used or resident, the highest eviction score first.

        Ties go to the later use, then to resident experts, then to the lower id.
        """
        candidates = (self.long_count[layer] > 0) | self.resident[layer]
        age = np.where(self.age[layer] < 0, np.iinfo(np.int32).max, self.age[layer])
        order = np.lexsort((~self.resident[layer], age, -self.eviction_scores[layer]))
        return cast(npt.NDArray[np.intp], order[candidates[order]][:most])


def _score(
    short_count: npt.NDArray[np.float32],
    long_count: npt.NDArray[np.float32],
    steps: int,
    decay: DecayConfig,
) -> npt.NDArray[np.float32]:
    """Eviction scores from counts decayed to step `steps`; the formula of types.DecayConfig."""
    short_weight = np.float32(1 - 2 ** (-(steps + decay.prior_steps) / decay.long_half_life))
    return short_weight * short_count + np.float32(decay.long_scale) * long_count


def eviction_scores(
    short_count: npt.NDArray[np.float32],
    long_count: npt.NDArray[np.float32],
    last_used: npt.NDArray[np.int32],
    step: int,
    decay: DecayConfig,
) -> npt.NDArray[np.float32]:
    """Eviction scores at `step`, of counts as ExpertCache stores them: as of `last_used`."""
    short = _decayed(short_count, last_used, step, decay.half_life)
    long = _decayed(long_count, last_used, step, decay.long_half_life)
    return _score(short, long, min(step, MAX_STEPS), decay)


def _decayed(
    count: npt.NDArray[np.float32], last_used: npt.NDArray[np.int32], step: int, half_life: float
) -> npt.NDArray[np.float32]:
    """Counts at `step`, of counts as ExpertCache stores them: as of `last_used`."""
    age = np.maximum(step - last_used, 0).astype(np.float32)
    now = count * np.exp2(-age * np.float32(1 / half_life))
    return np.where(last_used > 0, now, 0).astype(np.float32)


def snapshot_usage(ops: Ops, cache: ExpertCache) -> UsageSnapshot:
    """The usage of a cache, decayed to its current step; synchronises.

    types.ExpertCache says how the device keeps the counts.
    """
    arrays: list[npt.NDArray[Any]] = [
        ops.copy_d2h(array)
        for array in (
            cache.short_count,
            cache.long_count,
            cache.last_used,
            cache.step,
            cache.expert_to_slot,
        )
    ]
    short_count, long_count, last_used, step, expert_to_slot = arrays
    now = int(step[0])
    ages = np.where(last_used > 0, now - last_used, -1).astype(np.int32)
    short = _decayed(short_count, last_used, now, cache.decay.half_life)
    long = _decayed(long_count, last_used, now, cache.decay.long_half_life)
    return UsageSnapshot(short, long, min(now, MAX_STEPS), ages, expert_to_slot >= 0)


def save_usage(path: Path, fingerprint: str, usage: UsageSnapshot) -> None:
    """Write a usage file under a temporary name, then rename it.  Raises: OSError."""
    metadata = {"fingerprint": fingerprint, "shape": usage.short_count.shape, "steps": usage.steps}
    head = json.dumps(metadata).encode()
    floats = (usage.short_count.astype("<f4"), usage.long_count.astype("<f4"))
    arrays = (*floats, usage.age.astype("<i4"), usage.resident.astype(np.uint8))
    body = len(head).to_bytes(4, "little") + head + b"".join(array.tobytes() for array in arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        with open(partial, "xb") as file:  # a new file: no link is followed
            file.write(MAGIC + zlib.crc32(body).to_bytes(4, "little") + body)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def try_save_usage(path: Path, fingerprint: str, ops: Ops, cache: ExpertCache) -> None:
    """Save the usage of a cache; log a warning where that fails, so that closing goes on."""
    try:
        usage = snapshot_usage(ops, cache)
        if usage.long_count.any():
            save_usage(path, fingerprint, usage)
    except (OSError, DeviceError) as error:
        LOG.warning("Expert usage cannot be saved to %s: %s", path, error)


def read_usage(path: Path, fingerprint: str, layers: int, experts: int) -> UsageSnapshot | None:
    """Read a usage file; None without a file, or with a warning if it is not of this model."""
    try:
        if not path.exists():
            return None
        if path.stat().st_size > 4096 + 13 * layers * experts:
            raise ValueError("it is too large")
        return _parsed(path.read_bytes(), fingerprint, (layers, experts))
    except (OSError, ValueError, KeyError, TypeError) as error:
        LOG.warning("Ignoring %s: %s.", path, error)
        return None


def _parsed(raw: bytes, fingerprint: str, shape: tuple[int, int]) -> UsageSnapshot:
    """A usage file's snapshot.  Raises: ValueError, KeyError, TypeError for invalid contents."""
    if raw[:7] != MAGIC[:7] or len(raw) < 16:
        raise ValueError("it is not a usage file")
    if raw[7] != MAGIC[7]:
        raise ValueError(f"its version is {raw[7]}, this engine reads {MAGIC[7]}")
    if zlib.crc32(raw[12:]) != int.from_bytes(raw[8:12], "little"):
        raise ValueError("it is damaged")
    start = 16 + int.from_bytes(raw[12:16], "little")
    head, size = json.loads(raw[16:start]), shape[0] * shape[1]
    if head["fingerprint"] != fingerprint:
        raise ValueError("it belongs to another model")
    if tuple(head["shape"]) != shape or len(raw) != start + 13 * size:
        raise ValueError(f"its shape is {head['shape']}, the model has {list(shape)}")
    steps = head["steps"]
    counts = np.frombuffer(raw, "<f4", 2 * size, start).reshape(2, *shape).astype(np.float32)
    age = np.frombuffer(raw, "<i4", size, start + 8 * size).reshape(shape)
    resident = np.frombuffer(raw, np.uint8, size, start + 12 * size).reshape(shape) != 0
    if not (np.isfinite(counts).all() and (counts >= 0).all()):
        raise ValueError("a count in it is negative or not finite")
    if not (isinstance(steps, int) and 0 < steps <= MAX_STEPS):
        raise ValueError(f"its number of steps is {steps}")
    return UsageSnapshot(counts[0], counts[1], steps, age.astype(np.int32), resident)


def slots_per_layer(usage: UsageSnapshot, slots: int, top_k: int) -> list[int] | None:
    """Slots of each layer by usage, `slots` per layer on average.

    Each layer gets a minimum.  Each further slot goes to the layer whose next expert has the
    largest fraction of its layer's eviction scores.  The minimum is half of `slots`, and at least
    1.5 top_k: with fewer slots hardly an expert stays from one token to the next.
    Returns None, for equal layers, if `slots` is at most the minimum or a layer was not used.
    """
    scores = usage.eviction_scores.astype(np.float64)
    layers = len(scores)
    totals, minimum = scores.sum(axis=1, keepdims=True), max(top_k + top_k // 2, slots // 2)
    if slots <= minimum or not totals.all():
        return None
    fractions = -np.sort(-scores / totals, axis=1)[:, minimum:]  # beyond the minimum, descending
    layer, rank = (index.reshape(-1) for index in np.indices(fractions.shape))
    order = np.lexsort((layer, rank, -fractions.reshape(-1)))[: layers * (slots - minimum)]
    extra = np.bincount(layer[order], minlength=layers)
    return [minimum + int(count) for count in extra]


def rebalanced_slots(usage: UsageSnapshot, current: Sequence[int], top_k: int) -> list[int] | None:
    """`slots_per_layer` for layers that have `current` slots now.

    Returns None, too, if fewer than one slot in MIN_MOVED_FRACTION would change its layer.
    """
    target = slots_per_layer(usage, sum(current) // len(current), top_k)
    if target is None:
        return None
    moved = sum(max(0, new - old) for new, old in zip(target, current, strict=True))
    return target if MIN_MOVED_FRACTION * moved >= sum(current) else None


def warm_cache(
    ops: Ops, cache: ExpertCache, host_experts: HostExperts, usage: UsageSnapshot
) -> int:
    """Set the counts of a cache from `usage`, and fill its slots with the most used experts.

    Every used expert is marked as used at the last counted step, with its count decayed to that
    step.  The order of the eviction scores stays.  Eviction breaks ties by the lower slot, so
    slots are filled from the lowest score up.  Returns the number of experts copied.
    """
    expert_to_slot = np.full(cache.expert_to_slot.shape, -1, np.int32)
    for layer, slots in enumerate(cache.slots):
        slot_to_expert = np.full(slots.shape[0], -1, np.int32)
        packed = host_experts.packed[layer]
        for slot, expert in enumerate(usage.top_experts(layer, slots.shape[0])[::-1]):
            expert_to_slot[layer, expert], slot_to_expert[slot] = slot, expert
            ops.copy(slots[slot : slot + 1], packed[int(expert) : int(expert) + 1])
        ops.copy_h2d(cache.slot_to_expert[layer], slot_to_expert)
    ops.copy_h2d(cache.expert_to_slot, expert_to_slot)
    ops.copy_h2d(cache.short_count, np.ascontiguousarray(usage.short_count, np.float32))
    ops.copy_h2d(cache.long_count, np.ascontiguousarray(usage.long_count, np.float32))
    last_used = np.where(usage.long_count > 0, usage.steps, 0).astype(np.int32)
    ops.copy_h2d(cache.last_used, last_used)
    ops.copy_h2d(cache.step, np.array([usage.steps], np.int32))
    ops.synchronize()
    return int((expert_to_slot >= 0).sum())
