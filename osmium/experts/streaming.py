"""The routed experts of a prefill pass: once per layer, for all its tokens.

Missing experts cross the link at most once per layer and pass.  The copy engine brings them to
groups of staging slots: some are copied while one is computed.  A layer's experts are computed in
parts of ascending ids.  A part has the experts of one group, and those of its ids that have a slot.
So the order of sums does not depend on which experts are resident.  The host reads which experts
the tokens use, while the device computes the shared expert.  See docs/expert-cache.md.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from osmium.experts.runner import ExpertRunner
from osmium.experts.usage import eviction_scores
from osmium.ops import Array, GroupedExperts, MatmulInput, Ops, TileRange
from osmium.ops.grouped import STAGING_GROUPS, TILE_ROWS, ExpertGroups
from osmium.ops.tiling import input_shapes, supports_grouped_experts
from osmium.ops.types import Empty
from osmium.quant.expert_layout import ExpertLayout

__all__ = [
    "PrefillExperts", "pair_bytes", "pair_shapes", "prefill_expert_bytes", "staging_experts",
]  # fmt: skip

STAGING_EXPERTS = 24
"""Most experts of a group."""

STAGING_FRACTION = 0.0034
"""Largest fraction of VRAM for a group of staging slots."""

MIN_STAGING_EXPERTS = 2
"""Fewest experts of a group."""

MIN_GROUP_EXPERTS = 4
"""Fewest experts of a group, if as many are missing: each part has its own launches."""

MOST_USED = 0.9
"""Fraction of a layer's missing experts used by its tokens, above which all are copied ahead."""


def staging_experts(layout: ExpertLayout, num_experts: int, vram_bytes: int, missing: int) -> int:
    """Experts of each group of the staging slots; 0 where no kernel takes the layout.

    `missing`: experts of a layer without a slot.
    """
    if not missing or not supports_grouped_experts(layout, num_experts):
        return 0
    count = min(STAGING_EXPERTS, int(STAGING_FRACTION * vram_bytes) // layout.nbytes)
    return min(missing, max(MIN_STAGING_EXPERTS, count))


def pair_shapes(
    layout: ExpertLayout, pairs: int
) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    """Shape and dtype of the arrays of `pairs` routed pairs: outputs, and fields of MatmulInput."""
    shapes = input_shapes(pairs, layout.inner, False, gpu=True)
    fields = ("hi_lo",) if layout.bits == 16 else ("f32", "digits", "units")
    return {
        "pair_out": ((pairs, layout.hidden), np.float32), **{name: shapes[name] for name in fields},
    }  # fmt: skip


def pair_bytes(layout: ExpertLayout) -> int:
    """Bytes of the arrays of a routed pair."""
    return sum(
        int(np.prod(shape)) * np.dtype(dtype).itemsize
        for shape, dtype in pair_shapes(layout, 1).values()
    )


def prefill_expert_bytes(layout: ExpertLayout, num_experts: int, top_k: int, tokens: int) -> int:
    """Bytes of a PrefillExperts without the arrays of pairs; 0 where no kernel takes the layout."""
    if not supports_grouped_experts(layout, num_experts):
        return 0
    return ExpertGroups.nbytes(tokens, top_k, num_experts) + 4 * num_experts


@dataclass
class _StagedGroup:
    """Experts that are copied together to one group of the staging slots."""

    experts: list[int] = field(default_factory=list)
    number: int = 0
    """0 to STAGING_GROUPS - 1, the group of staging slots."""
    is_copied: bool = False
    """Whether its copies are issued."""
    is_waited: bool = False
    """Whether later launches wait for its copies."""


@dataclass
class _Part:
    """Experts that are computed together: ids from `first` to `end` - 1."""

    first: int
    end: int
    group: _StagedGroup | None = None
    """The group with those that have no slot."""


@dataclass(frozen=True)
class _Layer:
    """What the host has read of a layer's routing."""

    tiles: npt.NDArray[np.int32]
    """i32 [tiles, 4], as in ExpertGroups."""
    first_tile: npt.NDArray[np.int64]
    """i64 [E + 1], the first tile of each expert."""
    uses: npt.NDArray[np.int64]
    """i64 [E], routed pairs of each expert."""
    scores: npt.NDArray[np.float32]
    """f32 [E], eviction scores with these uses; zeros where nothing can be admitted."""


class PrefillExperts:
    """The staging slots, and the experts of one layer at a time."""

    def __init__(
        self,
        ops: Ops,
        runner: ExpertRunner,
        tokens: int,
        pairs: int,
        empty: Empty,
        link_gb_s: float,
    ) -> None:
        """For passes of up to `tokens` tokens, of which `pairs` routed pairs are computed at once.

        `empty` allocates the arrays of these pairs, which are scratch.  Raises: OutOfMemory.
        """
        assert pairs >= TILE_ROWS, f"{pairs} pairs, fewer than a tile has"
        cache, self.ops, self.runner = runner.cache, ops, runner
        self.pairs = pairs
        layers, experts = cache.expert_to_slot.shape
        shapes = ExpertGroups.shapes(tokens, runner.top_k, experts)
        groups = {name: ops.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}
        arrays = {name: empty(*shape) for name, shape in pair_shapes(cache.layout, pairs).items()}
        self.grouped = GroupedExperts(ExpertGroups(**groups), arrays.pop("pair_out"))
        if "f32" not in arrays:  # which no kernel uses then
            arrays["f32"] = arrays["hi_lo"].reshape(pairs, 2 * cache.layout.inner).view(np.float32)
        self.inner = MatmulInput(**arrays)
        self.staged = 0
        """Experts of each group of the staging slots; 0 where every expert has a slot."""
        if runner.host_experts is not None:
            assert cache.storage is not None, "a partial cache has storage"
            slots, slot_to_expert = cache.storage
            self.staged = (slots.shape[0] - slot_to_expert.shape[0]) // STAGING_GROUPS
            assert self.staged, "a partial cache needs staging slots"
        self.index = ops.empty((experts,), np.int32)
        """i32 [E]: where each expert of a layer is, in slots from the layer's first one on."""
        self._tiles = ops.zeros_mapped(shapes["tiles"][0], np.int32)
        self._num_tiles = ops.zeros_mapped((1,), np.int32)
        self._counts = ops.zeros_mapped((2, experts), np.float32)
        self._last_used = ops.zeros_mapped((experts,), np.int32)
        self._link_gb_s = link_gb_s
        self._table = np.full((layers, experts), -1, np.int32)
        """i32 [L, E], the slot of each expert, as in ExpertCache."""
        self._step = 0
        """Forward passes of the cache."""
        self._is_stale = True
        """Whether the cache's tables may have changed since the host read them."""
        self._copied: dict[int, _StagedGroup] = {}
        """The groups whose copies are issued and that are not released, by number."""
        self._ahead: list[_StagedGroup] = []
        """Copies for the next layer that are issued before its routing is known."""
        self._used_fraction = 0.0
        """Fraction of the last layer's missing experts that its tokens used."""
        self._mixer_s = 0.0
        """Seconds from the end of the last layer's experts to the routing of the next layer."""

    def invalidate(self) -> None:
        """Read the cache's tables again: other steps have run, or a pass has ended early."""
        for group in list(self._copied.values()):
            self._release(group)
        self._ahead = []
        self._is_stale = True

    def start_layer(self, layer: int) -> None:
        """Copy the first missing experts of a layer beside its mixer, while the link is idle.

        Copies of experts that no token uses cost nothing if they end before the routing is known.
        They cost little if the last layer's tokens used nearly all.
        """
        self.ops.start_timer()
        if self.runner.host_experts is None or self._ahead:
            return
        self._refresh()
        (missing,) = np.nonzero(self._table[layer] < 0)
        copy_s, started_s = 0.0, 0.0
        if self._link_gb_s:
            copy_s = self.staged * self.runner.cache.layout.nbytes / self._link_gb_s / 1e9
        for number in range(STAGING_GROUPS):
            experts = missing[number * self.staged : (number + 1) * self.staged].tolist()
            is_idle = started_s + (1 - self._used_fraction) * copy_s <= self._mixer_s
            if not experts or not (is_idle or self._used_fraction > MOST_USED):
                return
            group = _StagedGroup(experts, number)
            self._ahead.append(group)
            self._copy(layer, group)
            started_s += copy_s

    def group(self, layer: int, ids: Array, admits: bool) -> None:
        """Sort a layer's routed pairs by expert, count the uses, and begin to read them.

        ids u16 [T, A]    admits: as for `compute`
        """
        ops, cache, groups = self.ops, self.runner.cache, self.grouped.groups
        table = cache.expert_to_slot[layer]
        ops.group_by_expert(groups, ids, cache.num_experts, table)
        if self.runner.host_experts is not None:
            ops.count_uses(groups, cache, layer, ids)
        elif self._is_one_part(ids):
            return
        tokens, top_k = ids.shape
        tiles = min(groups.tiles.shape[0], -(-tokens * top_k // TILE_ROWS) + cache.num_experts)
        copies = [(self._tiles[:tiles], groups.tiles[:tiles]), (self._num_tiles, groups.num_tiles)]
        if self._may_admit(layer, admits):
            copies += [
                (self._counts[0], cache.short_count[layer]),
                (self._counts[1], cache.long_count[layer]),
                (self._last_used, cache.last_used[layer]),
            ]
        ops.readback(copies)

    def compute(
        self, layer: int, x: Array, h: MatmulInput, ids: Array, weights: Array, admits: bool
    ) -> Iterator[bool]:
        """x[t] += sum over a of weights[t, a] * expert ids[t, a] of h[t], by ascending expert.

        After `group` of the same layer and ids.  Yields after each part whether more follow; steps
        that run meanwhile need `invalidate`.  Missing experts get free slots; with `admits` also
        those of experts with lower scores.

        x f32 [T, D]    h [T, D]    ids u16 [T, A]    weights f32 [T, A]
        """
        if self.runner.host_experts is None and self._is_one_part(ids):
            self._compute_tiles(layer, x, h, ids, weights, None)
            yield False
            return
        routed = self._wait_routing(layer, admits)
        parts = self._plan(layer, routed, 0)
        while parts:
            part = parts.popleft()
            group = part.group
            if group is not None:
                self._copy(layer, group)
                self._wait(group)
            for tiles in self._tile_ranges(routed, part):
                self._compute_tiles(layer, x, h, ids, weights, tiles)
            if group is not None and not (parts and parts[0].group is group):
                self._admit(layer, group, routed, part.end, admits)
                self._release(group)
            self._copy_next(layer, parts)
            yield bool(parts)
            if self._is_stale and parts:
                self._refresh()
                parts = self._plan(layer, routed, part.end)

    # -- the parts of a layer ----------------------------------------------------------------------

    def _is_one_part(self, ids: Array) -> bool:
        return bool(ids.shape[0] * ids.shape[1] <= self.pairs)

    def _wait_routing(self, layer: int, admits: bool) -> _Layer:
        """The routing that `group` has begun to read."""
        ops, cache = self.ops, self.runner.cache
        self._mixer_s = ops.wait_readback() / 1e3
        count = int(ops.host_view(self._num_tiles)[0])
        tiles = np.array(ops.host_view(self._tiles)[:count], np.int32)
        experts = np.arange(cache.num_experts + 1)
        first_tile = np.searchsorted(tiles[:, 3], experts)
        rows = np.concatenate([[0], np.cumsum(tiles[:, 2], dtype=np.int64)])
        uses = np.diff(rows[first_tile])
        scores = np.zeros(cache.num_experts, np.float32)
        if self.runner.host_experts is not None:
            self._refresh()
            if self._may_admit(layer, admits):
                short_count, long_count = ops.host_view(self._counts)
                last_used = np.asarray(ops.host_view(self._last_used), np.int32)
                scores = eviction_scores(
                    short_count, long_count, last_used, self._step + 1, cache.decay
                )
            missing = self._table[layer] < 0
            used = int(np.count_nonzero(uses[missing]))
            self._used_fraction = used / max(1, int(np.count_nonzero(missing)))
        return _Layer(tiles, first_tile, uses, scores)

    def _plan(self, layer: int, routed: _Layer, first: int) -> deque[_Part]:
        """The parts of the used experts from id `first` on; stores where each expert is."""
        table, index = self._table[layer], self._table[layer].copy()
        ahead, self._ahead = self._ahead, []
        group_of = {expert: group for group in ahead for expert in group.experts}
        used = first + np.flatnonzero(routed.uses[first:])
        missing = set(used[table[used] < 0].tolist()) if self.staged else set()
        # Few experts are divided among the groups, so that copies run beside computation.
        each = -(-len(missing - group_of.keys()) // STAGING_GROUPS)
        most = min(self.staged, max(MIN_GROUP_EXPERTS, each))
        parts: deque[_Part] = deque()
        part, pairs = _Part(first, first), 0
        for expert in used.tolist():
            group = part.group
            if expert in missing:
                group = group_of.get(expert)
                if group is None:
                    group = part.group
                    if group is None or group.is_copied or len(group.experts) == most:
                        group = _StagedGroup()
                    group.experts.append(expert)
            uses = int(routed.uses[expert])
            is_other = part.group is not None and group is not part.group
            if is_other or (pairs and pairs + uses > self.pairs):
                parts.append(part)
                part, pairs = _Part(expert, expert, group), 0
            part.group, part.end, pairs = group, expert + 1, pairs + uses
        if pairs:
            parts.append(part)
        groups = {id(p.group): p.group for p in parts if p.group is not None}
        for group in ahead:
            if id(group) not in groups:
                self._release(group)
        last = -1
        for group in groups.values():  # in turns: some are copied while one is computed
            if not group.is_copied:
                group.number = (last + 1) % STAGING_GROUPS
            last = group.number
            place = self._first_staging_slot(layer) + group.number * self.staged
            index[group.experts] = place + np.arange(len(group.experts))
        if self.runner.host_experts is not None:
            self.ops.copy_h2d(self.index, index)
        return parts

    def _tile_ranges(self, routed: _Layer, part: _Part) -> Iterator[TileRange]:
        """The tiles of a part, in ranges of at most `pairs` sorted positions."""
        tile, end = (int(routed.first_tile[e]) for e in (part.first, part.end))
        ends = routed.tiles[:, 1] + routed.tiles[:, 2]
        while tile < end:
            start = int(routed.tiles[tile, 1])
            stop = min(end, int(np.searchsorted(ends, start + self.pairs, side="right")))
            yield TileRange(tile, stop - tile, start, int(ends[stop - 1]) - start)
            tile = stop

    def _compute_tiles(
        self, layer: int, x: Array, h: MatmulInput, ids: Array, weights: Array,
        tiles: TileRange | None,
    ) -> None:  # fmt: skip
        """Add the outputs of some tiles to x; without `tiles` of all."""
        ops, cache = self.ops, self.runner.cache
        rows = ids.shape[0] * ids.shape[1] if tiles is None else tiles.rows
        start = 0 if tiles is None else tiles.start
        slots, index = cache.slots[layer], cache.expert_to_slot[layer]
        if self.runner.host_experts is not None:
            assert cache.storage is not None, "a partial cache has storage"
            slots, index = cache.storage[0][self._first_slot(layer) :], self.index
        ops.expert_part(self.grouped, self.inner[:rows], h, ids, cache.layout, slots, index, tiles)
        ops.gather_add(
            x, self.grouped.pair_out[:rows], weights, self.grouped.groups.position, start
        )

    # -- staging slots -----------------------------------------------------------------------------

    def _first_slot(self, layer: int) -> int:
        return sum(slots.shape[0] for slots in self.runner.cache.slots[:layer])

    def _first_staging_slot(self, layer: int) -> int:
        """Number of the first staging slot, counted from the layer's first slot."""
        return sum(slots.shape[0] for slots in self.runner.cache.slots[layer:])

    def _copy_next(self, layer: int, parts: Iterable[_Part]) -> None:
        """Issue the copies of the next groups, one after another, as long as slots are free."""
        for part in parts:
            if part.group is not None and not part.group.is_copied:
                if part.group.number in self._copied:
                    return
                self._copy(layer, part.group)

    def _copy(self, layer: int, group: _StagedGroup) -> None:
        """Issue the copies of a group once; it has been released by its last experts."""
        if group.is_copied:
            return
        assert group.number not in self._copied, "a group's slots are in use"
        cache, host_experts = self.runner.cache, self.runner.host_experts
        assert cache.storage is not None and host_experts is not None, "experts are missing"
        first = cache.storage[1].shape[0] + group.number * self.staged
        self.ops.stage_experts(
            cache.storage[0][first : first + self.staged], group.number, host_experts, layer,
            group.experts, range(len(group.experts)),
        )  # fmt: skip
        group.is_copied = True
        self._copied[group.number] = group
        self.runner.experts_streamed += len(group.experts)

    def _wait(self, group: _StagedGroup) -> None:
        if not group.is_waited:
            group.is_waited = True
            self.ops.wait_staged(group.number)

    def _release(self, group: _StagedGroup) -> None:
        """The next copies to this group come after all launches so far."""
        self._wait(group)
        self.ops.release_staged(group.number)
        del self._copied[group.number]

    # -- the cache's tables ------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Read the cache's tables if they may have changed; waits for earlier launches."""
        if self._is_stale:
            cache = self.runner.cache
            self._table = np.array(self.ops.copy_d2h(cache.expert_to_slot), np.int32)
            self._step = int(self.ops.copy_d2h(cache.step)[0])
            self._is_stale = False

    def _may_admit(self, layer: int, admits: bool) -> bool:
        """Whether missing experts of a layer may get slots."""
        if self.runner.host_experts is None:
            return False
        num_slots = self.runner.cache.slots[layer].shape[0]
        return admits or self._is_stale or np.count_nonzero(self._table[layer] >= 0) < num_slots

    def _admit(
        self, layer: int, group: _StagedGroup, routed: _Layer, end: int, admits: bool
    ) -> None:
        """Copy used experts of a group to slots: free ones, or those of lower scores.

        A slot is taken from an expert that this layer no longer needs: below `end`, or unused.
        """
        if not self._may_admit(layer, admits):
            return
        ops, cache, table, scores = self.ops, self.runner.cache, self._table[layer], routed.scores
        assert cache.storage is not None, "a partial cache has storage"
        found = [
            (expert, place) for place, expert in enumerate(group.experts) if routed.uses[expert]
        ]
        found.sort(key=lambda one: -scores[one[0]])
        free = np.setdiff1d(np.arange(cache.slots[layer].shape[0]), table).tolist()
        is_free = (routed.uses == 0) | (np.arange(len(table)) < end)
        evictable: list[int] = []
        if admits:
            (evictable_ids,) = np.nonzero((table >= 0) & is_free)
            evictable = evictable_ids[np.argsort(scores[evictable_ids], kind="stable")].tolist()
        is_changed = False
        for expert, place in found:
            if free:
                slot = free.pop(0)
            elif evictable and scores[expert] > scores[evictable[0]]:
                evicted = evictable.pop(0)
                slot, table[evicted] = int(table[evicted]), -1
            else:
                break
            staged = cache.storage[1].shape[0] + group.number * self.staged + place
            source = cache.storage[0][staged : staged + 1]
            ops.copy(cache.slots[layer][slot : slot + 1], source)
            table[expert], is_changed = slot, True
        if is_changed:
            slot_to_expert = np.full(cache.slots[layer].shape[0], -1, np.int32)
            (held,) = np.nonzero(table >= 0)
            slot_to_expert[table[held]] = held
            ops.copy_h2d(cache.expert_to_slot[layer], table)
            ops.copy_h2d(cache.slot_to_expert[layer], slot_to_expert)
