"""Rates of the host link, measured on a loaded engine without changing its state."""

import statistics
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.cuda.stream import Event
from osmium.engine.engine import Engine

__all__ = ["copy_rate", "link_rate"]


def link_rate(engine: Engine, experts: int | None = None) -> float:
    """GB/s of fetching `experts` packed experts at once with nothing else running.

    None takes as many as a step may fetch.  0 if the engine never fetches.
    Each resident expert is fetched into its own slot, so that no slot changes.
    """
    ops, store = engine.runner.ops, engine.runner.expert_runner
    cache, plan = store.cache, store.assignment
    machine = getattr(ops, "runtime", None)
    if store.host_experts is None or machine is None:
        return 0.0
    counters = ops.copy_d2h(cache.counters)
    resident: npt.NDArray[Any] = ops.copy_d2h(cache.slot_to_expert[0])
    count = min(len(resident), plan.expert.shape[0], experts or len(resident))
    slots = np.arange(count, dtype=np.int32)
    expert = np.where(resident[slots] < 0, slots, resident[slots])  # a free slot: any expert
    entries = np.zeros((4, plan.expert.shape[0]), np.int32)
    entries[0, : len(slots)], entries[1, : len(slots)], entries[2:, : len(slots)] = (
        expert, slots, 1,
    )  # fmt: skip
    ops.copy_h2d(plan.count, np.array([len(slots)], np.int32))
    for array, values in zip(
        (plan.expert, plan.slot, plan.fetch_flags, plan.uses), entries, strict=True
    ):
        ops.copy_h2d(array, values)
    times = []
    for _ in range(9):
        start = Event(machine.device).record(machine.stream)
        for _ in range(4):
            ops.fetch_experts(cache, plan, store.host_experts, 0)
        end = Event(machine.device).record(machine.stream)
        times.append((end - start) / 4)
    ops.copy_h2d(cache.counters, counters)
    return float(len(slots) * cache.layout.nbytes / statistics.median(times) / 1e6)


def copy_rate(engine: Engine) -> float:
    """GB/s of the copy engine from host experts to slots with nothing else running.

    0 if the engine never fetches.  Each resident expert of the first layer is copied to its own
    slot, so that no slot changes.
    """
    ops, store = engine.runner.ops, engine.runner.expert_runner
    machine = getattr(ops, "runtime", None)
    if store.host_experts is None or machine is None:
        return 0.0
    cache, packed = store.cache, store.host_experts.packed[0]
    resident: npt.NDArray[Any] = ops.copy_d2h(cache.slot_to_expert[0])[: cache.slots[0].shape[0]]
    pairs = [  # a free slot: any expert
        (slot, slot if expert < 0 else expert) for slot, expert in enumerate(resident.tolist())
    ]
    times = []
    for _ in range(9):
        start = Event(machine.device).record(machine.stream)
        for slot, expert in pairs:
            ops.copy(cache.slots[0][slot : slot + 1], packed[expert : expert + 1])
        times.append(Event(machine.device).record(machine.stream) - start)
    return float(len(pairs) * cache.layout.nbytes / statistics.median(times) / 1e6)
