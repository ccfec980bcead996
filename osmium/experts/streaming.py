"""Streaming: a step of many tokens copies each layer's missing experts once, beside computation.

The first part of a layer's experts is those in its slots.  Each further part is missing experts, by
ascending id, which the copy engine brings into one half of a staging buffer.  One half is copied
while the other is computed.  Missing experts for which there is a slot are copied there instead.
See docs/expert-cache.md.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from osmium.experts.cache import empty_slots
from osmium.experts.usage import snapshot_usage
from osmium.ops import Array, ExpertCache, GroupedExperts, HostExperts, MatmulInput, Ops
from osmium.ops.tiling import supports_grouped_experts
from osmium.quant.expert_layout import ExpertLayout

__all__ = ["STREAM_MIN_TOKENS", "ExpertStreamer", "staging_bytes", "staging_experts"]

STREAM_MIN_TOKENS = 96
"""Most tokens of a step that fetches its experts into slots, in blocks of rows; more are streamed.

An estimate.  Streaming copies all missing experts of a layer, whether they are routed or not."""

MIN_STAGING_EXPERTS = 8
"""Fewest experts of a half of the staging buffer."""

MAX_REPLACED = 8
"""Most experts of a layer that a prompt's last step replaces: each is one more copy."""

SLOTS_BUFFER = 2
"""Number of the cache's slots among the buffers of Ops.stage_experts; the halves are 0 and 1."""

STAGING_FRACTION = 0.005
"""Fraction of VRAM for each half of the staging buffer."""


def staging_experts(
    layout: ExpertLayout, num_experts: int, rows: int, vram_bytes: int, missing: int
) -> int:
    """Experts of each half of the staging buffer, for steps of up to `rows` tokens.

    `missing`: experts of a layer without a slot.  0 where no step is streamed: steps are too short,
    or no kernel takes the layout.
    """
    if rows <= STREAM_MIN_TOKENS or not supports_grouped_experts(layout, num_experts):
        return 0
    count = int(STAGING_FRACTION * vram_bytes) // layout.nbytes
    return min(num_experts, max(MIN_STAGING_EXPERTS, min(count, missing)))


def staging_bytes(layout: ExpertLayout, layers: int, num_experts: int, experts: int) -> int:
    """Bytes of an ExpertStreamer with `experts` experts per half; 0 experts: none."""
    if not experts:
        return 0
    return 2 * experts * layout.nbytes + 4 * layers * _max_parts(num_experts, experts) * num_experts


def _max_parts(num_experts: int, staged: int) -> int:
    """Most parts of a layer: experts in slots, those copied to slots, and all others."""
    return 2 + -(-num_experts // staged)


class ExpertStreamer:
    """The staging buffer, and the parts of each layer in a step."""

    def __init__(
        self, ops: Ops, host_experts: HostExperts, layers: int, num_experts: int, experts: int
    ) -> None:
        """Each half of the staging buffer has `experts` experts.  Raises: OutOfMemory."""
        self.ops, self.host_experts, self.experts = ops, host_experts, experts
        self.staging = ops.empty((2, experts, host_experts.layout.nbytes), np.uint8)
        shape = (layers, _max_parts(num_experts, experts), num_experts)
        self.part_slots = ops.empty(shape, np.int32)
        """i32 [L, parts, E]: the slot, or place in a half, of each expert of a part; -1: others."""
        self._host_slots = np.empty(shape, np.int32)
        self._admitted: list[dict[int, int]] = [{} for _ in range(layers)]
        """Slots of the missing experts of each layer that are copied to slots: part 1."""
        self._staged: list[list[list[int]]] = [[] for _ in range(layers)]
        """Other missing experts of each layer, by part from 2 on."""
        self._half = 0
        """The half for the next part."""

    def start_step(self, cache: ExpertCache, replaces: bool) -> None:
        """Divide the experts of all layers into parts, and admit some to slots.

        Free slots are filled.  With `replaces` up to MAX_REPLACED experts of each layer give their
        slots to missing experts with higher scores.  Waits for earlier launches: the host reads
        tables and use counts.
        """
        scores = snapshot_usage(self.ops, cache).eviction_scores
        tables = np.array(self.ops.copy_d2h(cache.expert_to_slot), np.int32)
        self._host_slots[...] = -1
        for layer, table in enumerate(tables):
            slots, num_slots = self._host_slots[layer], cache.slots[layer].shape[0]
            admitted = _admitted(table, num_slots, scores[layer], MAX_REPLACED if replaces else 0)
            slots[0] = table
            if admitted:
                places = list(admitted.values())
                slots[0, np.isin(table, places)] = -1
                slots[1, list(admitted)] = places
                self._store_tables(cache, layer, np.maximum(slots[0], slots[1]))
            (others,) = np.nonzero(np.maximum(slots[0], slots[1]) < 0)
            count = -(-len(others) // self.experts)
            parts = np.array_split(others, count) if count else []
            for number, experts in enumerate(parts, 2):
                slots[number, experts] = np.arange(len(experts))
            self._admitted[layer] = admitted
            self._staged[layer] = [experts.tolist() for experts in parts]
        self.ops.copy_h2d(self.part_slots, self._host_slots)

    def abandon_step(self, cache: ExpertCache) -> None:
        """Empty all slots after a failed step: tables may name experts that were not copied."""
        empty_slots(self.ops, cache)

    def _store_tables(
        self, cache: ExpertCache, layer: int, expert_to_slot: npt.NDArray[np.int32]
    ) -> None:
        """Store the tables of a layer whose slots change."""
        slot_to_expert = np.full(cache.slots[layer].shape[0], -1, np.int32)
        (experts,) = np.nonzero(expert_to_slot >= 0)
        slot_to_expert[expert_to_slot[experts]] = experts
        self.ops.copy_h2d(cache.expert_to_slot[layer], expert_to_slot)
        self.ops.copy_h2d(cache.slot_to_expert[layer], slot_to_expert)

    def compute(
        self,
        grouped: GroupedExperts,
        inner: MatmulInput,
        h: MatmulInput,
        ids: Array,
        cache: ExpertCache,
        layer: int,
    ) -> None:
        """grouped.pair_out = the outputs of all experts, by sorted position; counts the uses.

        h [T, D]    ids u16 [T, A]    inner [T * A, I], scratch
        """
        ops, slots, layout = self.ops, self.part_slots[layer], cache.layout
        admitted, parts = self._admitted[layer], self._staged[layer]
        rows = (grouped, inner, h, ids, layout)
        ops.group_by_expert(grouped.groups, ids, cache.num_experts, slots[0])
        ops.prepare_digits(h)
        if admitted:
            self._stage(cache.slots[layer], SLOTS_BUFFER, layer, list(admitted), admitted.values())
        try:
            ops.expert_part(*rows, cache.slots[layer], slots[0])
        finally:  # after an error, too, no copy that still runs may meet a slot's next use
            if admitted:
                ops.wait_staged(SLOTS_BUFFER)
        if admitted:
            ops.expert_part(*rows, cache.slots[layer], slots[1])
        for number, experts in enumerate(parts, 2):
            half, self._half = self._half, 1 - self._half
            self._stage(self.staging[half], half, layer, experts, range(len(experts)))
            ops.wait_staged(half)
            ops.expert_part(*rows, self.staging[half], slots[number])
            ops.release_staged(half)
        copied = len(admitted) + sum(map(len, parts))
        ops.count_uses(grouped.groups, cache, layer, ids, copied)

    def _stage(
        self, out: Array, buffer: int, layer: int, experts: Sequence[int], slots: Iterable[int]
    ) -> None:
        self.ops.stage_experts(out, buffer, self.host_experts, layer, experts, list(slots))


def _admitted(
    table: npt.NDArray[np.int32], num_slots: int, scores: npt.NDArray[np.float32], replaced: int
) -> dict[int, int]:
    """Slots for missing experts of a layer, by expert, ascending.

    The missing experts with the highest scores get the free slots.  The next ones replace up to
    `replaced` experts, the lowest scores first, as long as theirs are higher.
    """
    (held,) = np.nonzero(table >= 0)
    if len(held) == num_slots and not replaced:
        return {}
    (missing,) = np.nonzero(table < 0)
    missing = missing[np.argsort(-scores[missing], kind="stable")]
    held = held[np.argsort(scores[held], kind="stable")][:replaced]
    free = np.setdiff1d(np.arange(num_slots), table)
    found = dict(zip(missing.tolist(), free.tolist(), strict=False))
    for expert, evicted in zip(missing[len(free) :].tolist(), held.tolist(), strict=False):
        if scores[expert] > scores[evicted]:
            found[expert] = int(table[evicted])
    return dict(sorted(found.items()))
