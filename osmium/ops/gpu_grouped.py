"""The operations of GpuOps on routed pairs in order of their experts."""

from collections.abc import Sequence

import numpy as np

from osmium.kernels.count_uses import COUNT_STEP, COUNT_USES
from osmium.kernels.group_by_expert import (
    EXPERT_HISTOGRAM,
    GROUP_BY_EXPERT,
    MAX_BLOCKS,
    MAX_EXPERTS,
    TILE_ROWS,
)
from osmium.kernels.ptx import kernel
from osmium.ops.gpu_rows import GpuRows
from osmium.ops.grouped import ExpertGroups, GroupedExperts, TileRange
from osmium.ops.tiling import (
    MATVEC_MAX_TOKENS,
    bf16_gemm_stages,
    gemm_stages,
    supports_grouped_experts,
    wgmma_stages,
)
from osmium.ops.types import Array, ExpertCache, HostExperts, MatmulInput
from osmium.quant.expert_layout import ExpertLayout

__all__ = ["GpuGrouped", "pairs_per_block"]

GATHER_ADD = kernel("gather_add_f32")
SPLIT_DIGITS_OF_TILES = kernel("split_digits_of_tiles_f32")
MOE_GEMM_UP = {8: kernel("int8_moe_gemm_up_f32"), 4: kernel("int4_moe_gemm_up_f32")}
MOE_GEMM_DOWN = {8: kernel("int8_moe_gemm_down_f32"), 4: kernel("int4_moe_gemm_down_f32")}
WGMMA_MOE_GEMM_UP = {bits: kernel(f"int{bits}_moe_gemm_up_wgmma_f32") for bits in (8, 4)}
WGMMA_MOE_GEMM_DOWN = {bits: kernel(f"int{bits}_moe_gemm_down_wgmma_f32") for bits in (8, 4)}
BF16_MOE_GEMM_UP = kernel("bf16_moe_gemm_up_f32")
BF16_MOE_GEMM_DOWN = kernel("bf16_moe_gemm_down_f32")

ROUND_PAIRS = 512
"""Pairs of a thread block are a multiple of this: a round of the kernel has one per thread."""


def pairs_per_block(pairs: int) -> int:
    """Pairs that a thread block sorts, so that at most MAX_BLOCKS blocks sort all."""
    return ROUND_PAIRS * -(-pairs // (ROUND_PAIRS * MAX_BLOCKS))


Tiles = tuple[int, Array, Array, Array, int]
"""Blocks of a launch, its tiles, the number of all tiles, expert_slots, and the first position."""


def _tiles(groups: ExpertGroups, ids: Array, expert_slots: Array, tiles: TileRange | None) -> Tiles:
    """The arguments of the expert kernels for some tiles; without `tiles` for the most of `ids`.

    The last tile of each expert may have few rows.
    """
    if tiles is None:
        pairs: int = ids.shape[0] * ids.shape[1]
        most = -(-pairs // TILE_ROWS) + min(int(expert_slots.shape[0]), pairs)
        return most, groups.tiles, groups.num_tiles, expert_slots, 0
    array = groups.tiles[tiles.first : tiles.first + tiles.count]
    return tiles.count, array, groups.num_tiles, expert_slots, tiles.start


class GpuGrouped(GpuRows):
    """See ops.Ops for every method's formula, shapes and source."""

    def empty_grouped(
        self, tokens: int, top_k: int, num_experts: int, layout: ExpertLayout
    ) -> GroupedExperts | None:
        if tokens <= MATVEC_MAX_TOKENS or not supports_grouped_experts(layout, num_experts):
            return None
        shapes = ExpertGroups.shapes(tokens, top_k, num_experts)
        groups = {name: self.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}
        pair_out = self.empty((tokens * top_k, layout.hidden), np.float32)
        return GroupedExperts(ExpertGroups(**groups), pair_out)

    def grouped_up(
        self,
        grouped: GroupedExperts,
        inner: MatmulInput,
        h: MatmulInput,
        ids: Array,
        cache: ExpertCache,
        layer: int,
    ) -> None:
        """inner = silu(gate_e h[t]) * (up_e h[t]) of each pair, by sorted position.

        Stored in inner.f32, of BF16 experts in inner.hi_lo.
        """
        self.group_by_expert(grouped.groups, ids, cache.num_experts, cache.expert_to_slot[layer])
        part = _tiles(grouped.groups, ids, cache.expert_to_slot[layer], None)
        self._moe_up(grouped, inner, h, ids, cache.layout, cache.slots[layer], part)

    def grouped_down(
        self,
        grouped: GroupedExperts,
        inner: MatmulInput,
        ids: Array,
        cache: ExpertCache,
        layer: int,
    ) -> None:
        """pair_out = the experts' outputs of inner, by sorted position."""
        if cache.layout.bits != 16:
            self.split_digits(inner)
        part = _tiles(grouped.groups, ids, cache.expert_to_slot[layer], None)
        self._moe_down(grouped, inner, cache.layout, cache.slots[layer], part)

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
        part = _tiles(grouped.groups, ids, expert_slots, tiles)
        self._moe_up(grouped, inner, h, ids, layout, slots, part)
        if layout.bits != 16:
            blocks, array, num_tiles, places, start = part
            SPLIT_DIGITS_OF_TILES(
                self.stream, blocks, inner.digits, inner.units, inner.f32, array, num_tiles,
                places, layout.inner, start,
            )  # fmt: skip
        self._moe_down(grouped, inner, layout, slots, part)

    def _moe_up(
        self,
        grouped: GroupedExperts,
        inner: MatmulInput,
        h: MatmulInput,
        ids: Array,
        layout: ExpertLayout,
        slots: Array,
        part: "Tiles",
    ) -> None:
        """inner of the experts that have a slot."""
        blocks, tiles, num_tiles, expert_slots, start = part
        if layout.bits == 16:
            BF16_MOE_GEMM_UP(
                self.stream, blocks, inner.hi_lo, h.hi_lo, h.square_sums or 0, slots, tiles,
                num_tiles, expert_slots, grouped.groups.order, ids.shape[1], layout.inner,
                layout.hidden, layout.nbytes, 0, start, bf16_gemm_stages(self.runtime), h.eps,
            )  # fmt: skip
            return
        values = (
            self.stream, blocks, inner.f32, h.digits, h.units, slots, tiles, num_tiles,
            expert_slots, grouped.groups.order, ids.shape[1], layout.inner, layout.hidden,
            layout.nbytes, 0, layout.up_scale, start,
        )  # fmt: skip
        bits, width = layout.bits, layout.hidden
        if stages := wgmma_stages(self.runtime, bits, width, blocks):
            WGMMA_MOE_GEMM_UP[bits](*values, stages)
        else:
            MOE_GEMM_UP[bits](*values, gemm_stages(self.runtime, bits, width))

    def _moe_down(
        self,
        grouped: GroupedExperts,
        inner: MatmulInput,
        layout: ExpertLayout,
        slots: Array,
        part: "Tiles",
    ) -> None:
        """pair_out of the experts that have a slot."""
        blocks, tiles, num_tiles, expert_slots, start = part
        if layout.bits == 16:
            BF16_MOE_GEMM_DOWN(
                self.stream, blocks, grouped.pair_out, inner.hi_lo, slots, tiles, num_tiles,
                expert_slots, layout.hidden, layout.inner, layout.nbytes, layout.down, start,
                bf16_gemm_stages(self.runtime),
            )  # fmt: skip
            return
        values = (
            self.stream, blocks, grouped.pair_out, inner.digits, inner.units, slots, tiles,
            num_tiles, expert_slots, layout.hidden, layout.inner, layout.nbytes, layout.down,
            layout.down_scale, start,
        )  # fmt: skip
        bits, width = layout.bits, layout.inner
        if stages := wgmma_stages(self.runtime, bits, width, blocks):
            WGMMA_MOE_GEMM_DOWN[bits](*values, stages)
        else:
            MOE_GEMM_DOWN[bits](*values, gemm_stages(self.runtime, bits, width))

    def count_uses(self, groups: ExpertGroups, cache: ExpertCache, layer: int, ids: Array) -> None:
        (tokens, top_k), decay = ids.shape, cache.decay
        COUNT_USES(
            self.stream, cache.short_count[layer], cache.long_count[layer], cache.last_used[layer],
            cache.step, cache.counters, groups.tiles, groups.num_tiles, groups.order, tokens, top_k,
            cache.num_experts, 1 / decay.half_life, 1 / decay.long_half_life,
        )  # fmt: skip
        if layer + 1 == cache.expert_to_slot.shape[0]:
            COUNT_STEP(self.stream, cache.step)

    def stage_experts(
        self,
        out: Array,
        buffer: int,
        host_experts: HostExperts,
        layer: int,
        experts: Sequence[int],
        slots: Sequence[int],
    ) -> None:
        packed, copies, start = host_experts.packed[layer], [], 0
        for end in range(1, len(experts) + 1):
            if (
                end == len(experts)
                or experts[end] != experts[end - 1] + 1
                or slots[end] != slots[end - 1] + 1
            ):
                slot, expert, count = slots[start], experts[start], end - start
                copies.append((out[slot : slot + count], packed[expert : expert + count]))
                start = end
        self.runtime.stage(buffer, copies)

    def wait_staged(self, buffer: int) -> None:
        self.runtime.wait_staged(buffer)

    def release_staged(self, buffer: int) -> None:
        self.runtime.release_staged(buffer)

    def start_timer(self) -> None:
        self.runtime.start_timer()

    def readback(self, copies: Sequence[tuple[Array, Array]]) -> None:
        for out, source in copies:
            self.runtime.copy(out, source)
            self.d2h_bytes += source.nbytes
        self.runtime.record_readback()

    def wait_readback(self) -> float:
        return self.runtime.wait_readback()

    def limit_queue(self, depth: int) -> None:
        self.runtime.limit_queue(depth)

    def group_by_expert(
        self,
        groups: ExpertGroups,
        ids: Array,
        num_experts: int,
        expert_to_slot: Array | None = None,
    ) -> None:
        assert num_experts <= MAX_EXPERTS, f"{num_experts} experts, more than {MAX_EXPERTS}"
        tokens, top_k = ids.shape
        pairs = tokens * top_k
        sizes = pairs, num_experts, pairs_per_block(pairs)
        EXPERT_HISTOGRAM(self.stream, groups.block_counts, ids, *sizes)
        GROUP_BY_EXPERT(
            self.stream, groups.order, groups.position, groups.tiles, groups.num_tiles,
            groups.block_counts, ids, 0 if expert_to_slot is None else expert_to_slot, *sizes,
            int(expert_to_slot is not None),
        )  # fmt: skip

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
        (tokens, dim), top_k = out.shape, weights.shape[1]
        shared: tuple[Array | int, Array | int, int] = (0, 0, 0)
        if shared_out is not None:
            assert router_logits is not None, "the shared expert's gate is among these logits"
            shared = shared_out, router_logits, router_logits.shape[1]
        GATHER_ADD(
            self.stream, tokens, out, y, weights, position, *shared[:2], dim, top_k, y.shape[0],
            start, shared[2], gate_column,
        )  # fmt: skip
