"""Operations of ReferenceOps on routed pairs in order of their experts, and on gated outputs."""

import numpy as np

from osmium.ops.formulas import sigmoid, silu
from osmium.ops.grouped import TILE_ROWS, ExpertGroups, GroupedExperts
from osmium.ops.types import Array
from osmium.quant.expert_layout import ExpertLayout

__all__ = ["ReferenceGroupedOps"]


class ReferenceGroupedOps:
    """See ops.Ops for every method's formula, shapes and source."""

    def empty_grouped(
        self, tokens: int, top_k: int, num_experts: int, layout: ExpertLayout
    ) -> GroupedExperts | None:
        return None  # expert_up and expert_down compute token by token

    def group_by_expert(
        self,
        groups: ExpertGroups,
        ids: Array,
        num_experts: int,
        expert_to_slot: Array | None = None,
    ) -> None:
        experts = ids.reshape(-1)
        order = np.argsort(experts, kind="stable")
        groups.order[: ids.size] = order
        groups.position[order] = np.arange(ids.size)
        slots = np.arange(num_experts) if expert_to_slot is None else expert_to_slot
        first, tiles = 0, []
        for expert, count in enumerate(np.bincount(experts, minlength=num_experts)):
            for row in range(0, int(count), TILE_ROWS):
                rows = min(int(count) - row, TILE_ROWS)
                tiles.append((int(slots[expert]), first + row, rows, expert))
            first += int(count)
        groups.tiles[: len(tiles)] = tiles
        groups.num_tiles[0] = len(tiles)

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
        row = position[: weights.size].reshape(weights.shape) - start  # of y, [T, A]
        by_expert = np.argsort(row, axis=1)
        for a in by_expert.T:  # [T], a token's next pair
            token = np.arange(len(out))
            token = token[(row[token, a] >= 0) & (row[token, a] < len(y))]
            pair = token, a[token]
            out[token] += weights[pair][:, None] * y[row[pair]]
        if shared_out is not None:
            assert router_logits is not None, "the shared expert's gate is among these logits"
            out += sigmoid(router_logits[:, gate_column : gate_column + 1]) * shared_out

    def silu_and_mul(self, out: Array, x: Array) -> None:
        size = out.shape[1]
        np.multiply(silu(x[:, :size]), x[:, size:], out=out)

    def add_sigmoid_gated(self, out: Array, x: Array, gate: Array, column: int) -> None:
        out += sigmoid(gate[:, column : column + 1]) * x
