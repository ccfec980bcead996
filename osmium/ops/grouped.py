"""GroupedOps: operations on experts of many tokens, and ExpertGroups, their table of routed pairs.

Matrix kernels of many tokens read the rows of one expert together.  Letters, and how to read
shapes, are in types.py; pair t * A + a is entry a of token t.  P is the number of rows of an array
whose rows are consecutive sorted positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from osmium.cuda.stream import MAX_QUEUE_DEPTH, STAGING_GROUPS
from osmium.kernels.group_by_expert import MAX_BLOCKS, MAX_EXPERTS, TILE_ROWS
from osmium.ops.types import Array, ExpertCache, HostExperts, MatmulInput
from osmium.quant.expert_layout import ExpertLayout

__all__ = [
    "MAX_EXPERTS", "MAX_QUEUE_DEPTH", "STAGING_GROUPS", "TILE_ROWS", "ExpertGroups",
    "GroupedExperts", "GroupedOps", "TileRange",
]  # fmt: skip


@dataclass(frozen=True)
class ExpertGroups:
    """Routed pairs sorted by expert, and tiles of them.  Written by `Ops.group_by_expert`.

    The arrays have room for the most tokens of a call; fewer use their first entries.
    """

    order: Array
    """i32 [>= T * A], pairs by ascending expert; pairs of one expert by ascending pair."""
    position: Array
    """i32 [>= T * A], the sorted position of each pair: order[position[p]] == p."""
    tiles: Array
    """i32 [max_tiles, 4]: slot, start, rows, expert.

    A tile is 1 to TILE_ROWS consecutive sorted positions of one expert, from `start` on.  Tiles
    cover all positions in ascending order; all but an expert's last have TILE_ROWS rows.  The slot
    is -1 if the expert is not resident."""
    num_tiles: Array
    """i32 [1], the number of tiles; `tiles` is not written from there on."""
    block_counts: Array
    """u16 [MAX_BLOCKS, E], scratch: pairs per expert of a thread block's pairs."""

    @staticmethod
    def shapes(
        tokens: int, top_k: int, num_experts: int
    ) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Shape and dtype of each array, for calls of up to `tokens` tokens."""
        pairs = tokens * top_k
        max_tiles = -(-pairs // TILE_ROWS) + num_experts
        return {
            "order": ((pairs,), np.int32),
            "position": ((pairs,), np.int32),
            "tiles": ((max_tiles, 4), np.int32),
            "num_tiles": ((1,), np.int32),
            "block_counts": ((MAX_BLOCKS, num_experts), np.uint16),
        }

    @staticmethod
    def nbytes(tokens: int, top_k: int, num_experts: int) -> int:
        """Bytes of all arrays."""
        shapes = ExpertGroups.shapes(tokens, top_k, num_experts).values()
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes)


@dataclass(frozen=True)
class TileRange:
    """Consecutive tiles of ExpertGroups, and the sorted positions that they cover."""

    first: int
    """The first tile."""
    count: int
    """Tiles."""
    start: int
    """The first sorted position."""
    rows: int
    """Sorted positions."""


@dataclass(frozen=True)
class GroupedExperts:
    """Arrays of the experts of many tokens, for `Ops.expert_up` and `Ops.expert_down`."""

    groups: ExpertGroups
    pair_out: Array
    """f32 [T * A, D], the experts' outputs by sorted position."""

    @staticmethod
    def nbytes(tokens: int, top_k: int, num_experts: int, hidden: int) -> int:
        """Bytes of all arrays for calls of up to `tokens` tokens."""
        return ExpertGroups.nbytes(tokens, top_k, num_experts) + 4 * tokens * top_k * hidden


class GroupedOps(Protocol):
    """Operations on routed pairs in order of their experts; part of `Ops`."""

    def empty_grouped(
        self, tokens: int, top_k: int, num_experts: int, layout: ExpertLayout
    ) -> GroupedExperts | None:
        """Arrays for the experts of up to `tokens` tokens; None where no kernel takes them."""

    def group_by_expert(
        self,
        groups: ExpertGroups,
        ids: Array,
        num_experts: int,
        expert_to_slot: Array | None = None,
    ) -> None:
        """groups.order = the pairs 0 to T * A - 1, stably sorted by ids; position is its inverse;
        tiles and num_tiles cut the pairs of each expert into tiles of at most TILE_ROWS.

        ids u16 [T, A]    expert_to_slot i32 [E] of a layer, or None where expert e is in slot e
        E <= MAX_EXPERTS
        """

    def gather_add(
        self,
        out: Array,
        y: Array,
        weights: Array,
        position: Array,
        start: int = 0,
        shared_out: Array | None = None,
        router_logits: Array | None = None,
        gate_column: int = 0,
    ) -> None:
        """out[t] += weights[t, a] * y[r] for each a with 0 <= r < P, one by one, by ascending r;
            r = position[t * A + a] - start
        out[t] += sigmoid(router_logits[t, gate_column]) * shared_out[t], if there is `shared_out`.

        The order of sums is that of ascending expert ids.  Calls for consecutive parts of the
        sorted positions give the same bits as one call for all.

        out f32 [T, D]    y f32 [P, D]: row r of sorted position start + r    weights f32 [T, A]
        position i32 [>= T * A], of ExpertGroups    shared_out f32 [T, D]
        router_logits f32 [T, columns]    D % 4 == 0    A <= 32
        """

    def expert_part(
        self,
        grouped: GroupedExperts,
        inner: MatmulInput,
        h: MatmulInput,
        ids: Array,
        layout: ExpertLayout,
        slots: Array,
        expert_slots: Array,
        tiles: TileRange | None = None,
    ) -> None:
        """grouped.pair_out[i] = down_e (silu(gate_e h[t]) * (up_e h[t])) for each sorted position i
        whose expert e has expert_slots[e] >= 0: expert e is slots[expert_slots[e]].

        With `tiles` only for their positions, from row 0 on: pair_out[i - tiles.start].
        `group_by_expert` of the same ids comes first.  h is that of an `rms_norm` inside
        `MemoryOps.prefill`, or of more than 8 rows.  Calls that together have each position once
        give the bits of one call for all.

        inner [P, I], scratch    h [T, D]    ids u16 [T, A]
        slots u8 [S, nbytes]    expert_slots i32 [E]
        """

    def count_uses(self, groups: ExpertGroups, cache: ExpertCache, layer: int, ids: Array) -> None:
        """Count the step's routed pairs of `layer`, without a slot assignment.

        Counts are those of T steps with a token each.  A use by token t adds
        2^(-(T - 1 - t) / half_life), and older counts decay by T steps.  `last_used` of the routed
        experts is the cache's step + 1; the last layer adds one to the step.
        counters[1] += pairs whose tile has a slot; counters[2] += other pairs.

        groups: of `group_by_expert` with the slots of the experts that are hits    ids u16 [T, A]
        """

    def stage_experts(
        self,
        out: Array,
        buffer: int,
        host_experts: HostExperts,
        layer: int,
        experts: Sequence[int],
        slots: Sequence[int],
    ) -> None:
        """out[slots[i]] = host_experts.packed[layer, experts[i]], in parallel with launches.

        The copies begin after all launches before the last `release_staged` of this buffer.
        Where both ids and slots are adjacent, there is one copy.

        out u8 [S, nbytes]    buffer: 0 to 3
        """

    def wait_staged(self, buffer: int) -> None:
        """Later launches read what the last `stage_experts` of this buffer has copied."""

    def release_staged(self, buffer: int) -> None:
        """The next `stage_experts` of this buffer waits for all launches so far."""

    def start_timer(self) -> None:
        """`wait_readback` measures from the end of all launches so far."""

    def readback(self, copies: Sequence[tuple[Array, Array]]) -> None:
        """out = source for each (out, source), in order of launches; `wait_readback` waits.

        out: of `zeros_mapped`
        """

    def wait_readback(self) -> float:
        """Wait for the last `readback`; returns milliseconds since the last `start_timer`."""

    def limit_queue(self, depth: int) -> None:
        """Wait until at most the launches since the `depth`-th last call are left to run.

        depth: 1 to MAX_QUEUE_DEPTH
        """
