"""Streaming: a step of many tokens copies each layer's missing experts once, beside computation.

The first part of a layer's experts is those in its slots.  Each further part is missing experts, by
ascending id, which the copy engine brings into one half of a staging buffer.  One half is copied
while the other is computed.  Slots and their tables stay as they are.  See docs/expert-cache.md.
"""

import numpy as np
import numpy.typing as npt

from osmium.ops import Array, ExpertCache, GroupedExperts, HostExperts, MatmulInput, Ops
from osmium.ops.tiling import supports_grouped_experts
from osmium.quant.expert_layout import ExpertLayout

__all__ = ["STREAM_MIN_TOKENS", "ExpertStreamer", "staging_bytes", "staging_experts"]

STREAM_MIN_TOKENS = 96
"""Most tokens of a step that fetches its experts into slots, in blocks of rows; more are streamed.

An estimate.  Streaming copies all missing experts of a layer, whether they are routed or not."""

MIN_STAGING_EXPERTS = 8
"""Fewest experts of a half of the staging buffer."""

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
    """Most parts of a layer: the resident experts, and no more than all others."""
    return 1 + -(-num_experts // staged)


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
        self._parts: list[list[list[int]]] = [[] for _ in range(layers)]
        """Missing experts of each layer, by part from 1 on."""
        self._half = 0
        """The half for the next part."""

    def start_step(self, cache: ExpertCache) -> None:
        """Divide the experts of all layers into parts; no slot may change until the step's end.

        Waits for earlier launches: the host reads which experts have slots.
        """
        expert_to_slot: npt.NDArray[np.generic] = self.ops.copy_d2h(cache.expert_to_slot)
        self._host_slots[...] = -1
        self._host_slots[:, 0] = expert_to_slot
        for layer, slots in enumerate(expert_to_slot):
            missing = np.flatnonzero(slots < 0)
            count = -(-len(missing) // self.experts)
            parts = np.array_split(missing, count) if count else []
            for number, experts in enumerate(parts, 1):
                self._host_slots[layer, number, experts] = np.arange(len(experts))
            self._parts[layer] = [experts.tolist() for experts in parts]
        self.ops.copy_h2d(self.part_slots, self._host_slots)

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
        ops, slots, parts = self.ops, self.part_slots[layer], self._parts[layer]
        ops.group_by_expert(grouped.groups, ids, cache.num_experts, cache.expert_to_slot[layer])
        ops.prepare_digits(h)
        ops.expert_part(grouped, inner, h, ids, cache.layout, cache.slots[layer], slots[0])
        for number, experts in enumerate(parts, 1):
            half, self._half = self._half, 1 - self._half
            ops.stage_experts(self.staging, half, self.host_experts, layer, experts)
            ops.wait_staged(half)
            staged = self.staging[half]
            ops.expert_part(grouped, inner, h, ids, cache.layout, staged, slots[number])
            ops.release_staged(half)
        copied = sum(map(len, parts))
        ops.count_uses(grouped.groups, cache, layer, ids, copied)
