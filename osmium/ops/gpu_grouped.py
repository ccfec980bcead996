"""The operations of GpuOps on routed pairs in order of their experts."""

from osmium.kernels.group_by_expert import (
    EXPERT_HISTOGRAM,
    GROUP_BY_EXPERT,
    MAX_BLOCKS,
    MAX_EXPERTS,
)
from osmium.kernels.ptx import kernel
from osmium.ops.gpu_rows import GpuRows
from osmium.ops.grouped import ExpertGroups
from osmium.ops.types import Array

__all__ = ["GpuGrouped", "pairs_per_block"]

GATHER_ADD = kernel("gather_add_f32")

ROUND_PAIRS = 512
"""Pairs of a thread block are a multiple of this: a round of the kernel has one per thread."""


def pairs_per_block(pairs: int) -> int:
    """Pairs that a thread block sorts, so that at most MAX_BLOCKS blocks sort all."""
    return ROUND_PAIRS * -(-pairs // (ROUND_PAIRS * MAX_BLOCKS))


class GpuGrouped(GpuRows):
    """See ops.Ops for every method's formula, shapes and source."""

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
