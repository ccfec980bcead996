"""Operations of ReferenceOps on routed pairs in order of their experts, and on gated outputs."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from osmium.ops.formulas import expert_matrices, sigmoid, silu
from osmium.ops.grouped import TILE_ROWS, ExpertGroups, GroupedExperts, TileRange
from osmium.ops.types import Array, ExpertCache, HostExperts, MatmulInput
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

    @contextlib.contextmanager
    def prefill(self) -> Iterator[None]:
        yield

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
        groups, top_k = grouped.groups, ids.shape[1]
        some = tiles or TileRange(0, int(groups.num_tiles[0]), 0, ids.size)
        for _, start, count, expert in groups.tiles[some.first :][: some.count].tolist():
            slot = expert_slots[expert]
            if slot < 0:
                continue
            up, down = expert_matrices(layout, slots[slot])
            rows = slice(start - some.start, start - some.start + count)
            projected = h.f32[groups.order[start : start + count] // top_k] @ up.T
            inner.f32[rows] = silu(projected[:, : layout.inner]) * projected[:, layout.inner :]
            grouped.pair_out[rows] = inner.f32[rows] @ down.T

    def count_uses(self, groups: ExpertGroups, cache: ExpertCache, layer: int, ids: Array) -> None:
        (tokens, top_k), step = ids.shape, int(cache.step[0]) + 1
        tiles = groups.tiles[: groups.num_tiles[0]]
        is_hit = tiles[:, 0] >= 0
        cache.counters[1] += int(tiles[is_hit, 2].sum())
        cache.counters[2] += int(tiles[~is_hit, 2].sum())
        experts = ids.reshape(-1)
        token_age = np.arange(ids.size) // top_k - (tokens - 1)  # of each pair, at most 0
        is_used = np.bincount(experts, minlength=cache.num_experts) > 0
        last_used = cache.last_used[layer]
        age = np.where(is_used, last_used - step, 0) - (tokens - 1)
        for counts, half_life in (
            (cache.short_count[layer], cache.decay.half_life),
            (cache.long_count[layer], cache.decay.long_half_life),
        ):
            rate = np.float32(1 / half_life)
            new = np.bincount(
                experts, np.exp2(token_age.astype(np.float32) * rate), cache.num_experts
            )
            counts[...] = counts * np.exp2(age.astype(np.float32) * rate) + new
        last_used[is_used] = step
        if layer + 1 == cache.expert_to_slot.shape[0]:
            cache.step[0] = step

    def stage_experts(
        self,
        out: Array,
        buffer: int,
        host_experts: HostExperts,
        layer: int,
        experts: Sequence[int],
        slots: Sequence[int],
    ) -> None:
        out[list(slots)] = host_experts.packed[layer, list(experts)]

    def wait_staged(self, buffer: int) -> None:
        pass

    def release_staged(self, buffer: int) -> None:
        pass

    def start_timer(self) -> None:
        pass

    def readback(self, copies: Sequence[tuple[Array, Array]]) -> None:
        for out, source in copies:
            out[...] = source

    def wait_readback(self) -> float:
        return 0.0

    def limit_queue(self, depth: int) -> None:
        pass

    def silu_and_mul(self, out: Array, x: Array) -> None:
        size = out.shape[1]
        np.multiply(silu(x[:, :size]), x[:, size:], out=out)

    def add_sigmoid_gated(self, out: Array, x: Array, gate: Array, column: int) -> None:
        out += sigmoid(gate[:, column : column + 1]) * x
