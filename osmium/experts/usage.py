"""Heat that outlives the engine: how much each expert was used, and which were resident.

    0      magic "OSMHEAT\\3", u32 crc32 of all that follows, u32 length of the JSON
    16     JSON: fingerprint of the model, shape [L, E], steps counted
    ...    heat, long heat f32 [L, E] as of when they were saved; age i32 [L, E], steps since the
           last use (-1: never); resident u8 [L, E]

It can be lost at any time: what is damaged, another version's or another model's is left aside with
a warning.
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
from osmium.ops import ExpertCache, HostExperts, Ops

__all__ = [
    "UsageSnapshot", "read_heat", "rebalanced_slots", "save_heat", "slots_per_layer",
    "snapshot_usage", "try_save_usage", "warm_cache",
]  # fmt: skip

LOG = logging.getLogger("osmium.experts")

MAGIC = b"OSMHEAT\3"

MAX_STEPS = 32 * int(DECAY.long_half_life)
"""Steps from which on one more changes no warmth: the rest of the long heat's weights is below
f32's last bit.  No more are said to have been counted, however long an engine has run."""

FIRST_REBALANCE_TOKENS = 1024
"""Tokens after which heat first says how many slots each layer needs; it is asked anew at twice as
many each time."""

MIN_MOVED_FRACTION = 32
"""Of so many slots one must change its layer, or they are not shared out anew: all of them are
filled again for it, and heat that has not settled moves some each time."""


@dataclass(frozen=True)
class UsageSnapshot:
    """Of every expert, as of one moment."""

    heat: npt.NDArray[np.float32]
    """f32 [L, E]."""
    long_heat: npt.NDArray[np.float32]
    """f32 [L, E]."""
    steps: int
    """Steps that were counted, ENDLESS at most."""
    age: npt.NDArray[np.int32]
    """i32 [L, E], steps since the last use; -1: never used."""
    resident: npt.NDArray[np.bool_]
    """bool [L, E]."""

    @property
    def eviction_scores(self) -> npt.NDArray[np.float32]:
        """f32 [L, E], as of now (types.DecayConfig)."""
        grown = np.float32(1 - 2 ** (-(self.steps + DECAY.prior_steps) / DECAY.long_half_life))
        return grown * self.heat + np.float32(DECAY.long_scale) * self.long_heat

    def top_experts(self, layer: int, most: int) -> npt.NDArray[np.intp]:
        """Up to `most` experts that were used or resident, the warmest first (types.DecayConfig);
        equals by the later use, then those that were resident, then by number."""
        known = (self.long_heat[layer] > 0) | self.resident[layer]
        age = np.where(self.age[layer] < 0, np.iinfo(np.int32).max, self.age[layer])
        order = np.lexsort((~self.resident[layer], age, -self.eviction_scores[layer]))
        return cast(npt.NDArray[np.intp], order[known[order]][:most])


def snapshot_usage(ops: Ops, cache: ExpertCache) -> UsageSnapshot:
    """A cache's heat as of now; see types.ExpertCache for how it is kept."""
    arrays: list[npt.NDArray[Any]] = [
        ops.copy_d2h(one)
        for one in (
            cache.short_count,
            cache.long_count,
            cache.last_used,
            cache.step,
            cache.expert_to_slot,
        )
    ]
    heat, long_heat, stamp, step, slot_of = arrays
    used = stamp > 0
    ages = np.where(used, step[0] - stamp, -1).astype(np.int32)

    def faded(count: npt.NDArray[Any], half_life: float) -> npt.NDArray[np.float32]:
        decay = np.exp2(-np.maximum(ages, 0).astype(np.float32) * np.float32(1 / half_life))
        return np.where(used, count * decay, 0).astype(np.float32)

    short = faded(heat, cache.decay.half_life)
    long = faded(long_heat, cache.decay.long_half_life)
    return UsageSnapshot(short, long, min(int(step[0]), MAX_STEPS), ages, slot_of >= 0)


def save_heat(path: Path, fingerprint: str, heat: UsageSnapshot) -> None:
    """Under a temporary name, then renamed.  Raises: OSError."""
    about = {"fingerprint": fingerprint, "shape": heat.heat.shape, "steps": heat.steps}
    head = json.dumps(about).encode()
    floats = (heat.heat.astype("<f4"), heat.long_heat.astype("<f4"))
    arrays = (*floats, heat.age.astype("<i4"), heat.resident.astype(np.uint8))
    body = len(head).to_bytes(4, "little") + head + b"".join(one.tobytes() for one in arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(MAGIC + zlib.crc32(body).to_bytes(4, "little") + body)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def try_save_usage(path: Path, fingerprint: str, ops: Ops, cache: ExpertCache) -> None:
    """`save_heat` of a cache, or a warning: an engine that closes does not fail of it."""
    try:
        heat = snapshot_usage(ops, cache)
        if heat.long_heat.any():
            save_heat(path, fingerprint, heat)
    except (OSError, DeviceError) as error:
        LOG.warning("Expert usage cannot be saved to %s: %s", path, error)


def read_heat(path: Path, fingerprint: str, layers: int, experts: int) -> UsageSnapshot | None:
    """What was saved; None, and a warning where there is a file, if it is not of this model."""
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
    """Raises: ValueError, KeyError, TypeError for what no such heat can be."""
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
    heats = np.frombuffer(raw, "<f4", 2 * size, start).reshape(2, *shape).astype(np.float32)
    age = np.frombuffer(raw, "<i4", size, start + 8 * size).reshape(shape)
    there = np.frombuffer(raw, np.uint8, size, start + 12 * size).reshape(shape) != 0
    if not (np.isfinite(heats).all() and (heats >= 0).all()):
        raise ValueError("a count in it is negative or not finite")
    if not (isinstance(steps, int) and 0 < steps <= MAX_STEPS):
        raise ValueError(f"its number of steps is {steps}")
    return UsageSnapshot(heats[0], heats[1], steps, age.astype(np.int32), there)


def slots_per_layer(heat: UsageSnapshot, slots: int, top_k: int) -> list[int] | None:
    """Slots of each layer, `slots` in the mean, by what each had hot: the least for every layer,
    the others one by one where the next expert has the largest share of its layer's uses.

    The least is half of them, and room for the experts of a token and a half: with less a layer
    keeps hardly anyone from one token to the next, and its every use is a miss.  None, for layers
    alike, if there is no more than that least to share out, or a layer was not used.
    """
    warmth = heat.eviction_scores.astype(np.float64)
    layers = len(warmth)
    uses, least = warmth.sum(axis=1, keepdims=True), max(top_k + top_k // 2, slots // 2)
    if slots <= least or not uses.all():
        return None
    shares = -np.sort(-warmth / uses, axis=1)[:, least:]  # of the others, the largest first
    layer, rank = (index.reshape(-1) for index in np.indices(shares.shape))
    order = np.lexsort((layer, rank, -shares.reshape(-1)))[: layers * (slots - least)]
    more = np.bincount(layer[order], minlength=layers)
    return [least + int(count) for count in more]


def rebalanced_slots(heat: UsageSnapshot, now: Sequence[int], top_k: int) -> list[int] | None:
    """`quotas` where layers own `now` slots each; None, too, if that would move fewer than one slot
    in WORTH."""
    each = slots_per_layer(heat, sum(now) // len(now), top_k)
    if each is None:
        return None
    moved = sum(max(0, new - old) for new, old in zip(each, now, strict=True))
    return each if MIN_MOVED_FRACTION * moved >= sum(now) else None


def warm_cache(ops: Ops, cache: ExpertCache, host_experts: HostExperts, heat: UsageSnapshot) -> int:
    """Put the heat into a cache that nobody has used, and the hottest experts into its slots;
    how many.  What was in the slots is out.

    All are stamped alike, as used at the last step that was counted, with their heats as of now:
    their order is as it was, and from now on they cool alike.  Of equal warmth the lower slot
    leaves first, so that slots are given from the coldest up.
    """
    slot_of = np.full(cache.expert_to_slot.shape, -1, np.int32)
    for layer, slots in enumerate(cache.slots):
        expert_in, records = np.full(slots.shape[0], -1, np.int32), host_experts.packed[layer]
        for slot, expert in enumerate(heat.top_experts(layer, slots.shape[0])[::-1]):
            slot_of[layer, expert], expert_in[slot] = slot, expert
            ops.copy(slots[slot : slot + 1], records[int(expert) : int(expert) + 1])
        ops.copy_h2d(cache.slot_to_expert[layer], expert_in)
    ops.copy_h2d(cache.expert_to_slot, slot_of)
    ops.copy_h2d(cache.short_count, np.ascontiguousarray(heat.heat, np.float32))
    ops.copy_h2d(cache.long_count, np.ascontiguousarray(heat.long_heat, np.float32))
    ops.copy_h2d(cache.last_used, np.where(heat.long_heat > 0, heat.steps, 0).astype(np.int32))
    ops.copy_h2d(cache.step, np.array([heat.steps], np.int32))
    ops.synchronize()
    return int((slot_of >= 0).sum())
