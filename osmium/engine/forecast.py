"""What expert slots may be expected to bring: hits, bytes over the link, tokens a second.

Estimates, and said to be: the hit rate is read off a curve of published routing statistics, and

    seconds a token = missed bytes / link + bytes of VRAM / memory rate * OVERHEAD

with both rates measured at start.  Nothing of a fetch is taken to hide behind computing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = [
    "NO_COST",
    "OVERHEAD",
    "SlotEstimate",
    "TokenCost",
    "estimate_slots",
    "hit_rate",
    "slot_estimate_table",
]

GIB = 1 << 30

STEPS_GIB = (-4, -2, 0, 2, 4, 8)

OVERHEAD = 1.6
"""How much longer than moving its bytes a token takes on the GPU, fetches apart: in the middle of
what `osmium bench` gave (H100, 2026-11-26) for the 122B in 32 GB, the 35B all resident and in 12
GB, of its JSON (ms_per_token - mb_fetched_per_token / rates.link_gb_s) / (mb_read_per_token /
rates.memory_gb_s), 1.1, 2.1 and 2.0.  To be lowered as kernels get faster."""

_HIT = ((0.0, 0.0), (0.05, 0.41), (0.10, 0.54), (0.15, 0.62), (0.20, 0.68), (0.30, 0.77),
        (0.36, 0.81), (0.40, 0.83), (0.50, 0.88), (0.60, 0.92), (0.70, 0.95), (0.80, 0.97),
        (1.0, 1.0))  # fmt: skip
"""Share of experts resident -> share of uses hit, by what ships on a trace made from published
routing statistics of Qwen3.5-122B-A10B: `tools/make_trace.py T.npz`, then `tools/simulate_cache
T.npz --tokens 1500 --resident-fractions .05 .1 ...`, the line mixed (2026-11-25)."""


def hit_rate(share: float) -> float:
    """The share of uses that hit where this share of the experts is resident."""
    for (x0, y0), (x1, y1) in pairwise(_HIT):
        if share <= x1:
            return y0 + (y1 - y0) * (share - x0) / (x1 - x0)
    return 1.0


@dataclass(frozen=True)
class TokenCost:
    """Bytes that a token moves, and how fast that was measured to go."""

    slot_bytes: int
    """Of one slot more in every layer."""
    expert_bytes: int
    """Of the experts that a token uses, all layers together."""
    vram_bytes: int
    """Of VRAM that a token reads and writes: weights, its experts, its recurrent states."""
    min_slots: int
    """Slots a layer that there have to be."""
    link_gb_s: float = 0.0
    memory_gb_s: float = 0.0

    def tokens_per_s(self, hits: float) -> float | None:
        """At a hit rate; None where the rates were not measured."""
        if not self.link_gb_s or not self.memory_gb_s:
            return None
        link = (1 - hits) * self.expert_bytes / self.link_gb_s
        return 1e9 / (link + self.vram_bytes / self.memory_gb_s * OVERHEAD)


NO_COST = TokenCost(0, 0, 0, 0)


@dataclass(frozen=True)
class SlotEstimate:
    """A row of the table."""

    gib: int
    """More than planned."""
    expert_slots: int
    hit_rate: float
    missed_mb_per_token: float
    tokens_per_s: float | None


def estimate_slots(traffic: TokenCost, slots: int, experts: int) -> list[SlotEstimate]:
    """What so many GiB fewer and more of slots bring, as far as there are experts to fill them."""
    rows: list[SlotEstimate] = []
    for gib in STEPS_GIB:
        count = min(experts, slots + gib * GIB // traffic.slot_bytes)
        if count < traffic.min_slots or any(row.expert_slots == count for row in rows):
            continue
        hits = hit_rate(count / experts)
        missed = (1 - hits) * traffic.expert_bytes / 1e6
        rows.append(SlotEstimate(gib, count, hits, missed, traffic.tokens_per_s(hits)))
    return rows


def slot_estimate_table(rows: Sequence[SlotEstimate], traffic: TokenCost) -> str:
    """For people."""
    lines = [f"{'slots, estimates':18}{'a layer':>8}{'hit rate':>10}{'MB missed':>11}{'tok/s':>8}"]
    for row in rows:
        name = "as planned" if row.gib == 0 else f"{row.gib:+} GiB"
        speed = "" if row.tokens_per_s is None else f"{row.tokens_per_s:8.0f}"
        lines.append(
            f"  {name:16}{row.expert_slots:8}{row.hit_rate:10.2f}"
            f"{row.missed_mb_per_token:11.0f}{speed}"
        )
    if traffic.link_gb_s:
        lines.append(
            f"  link {traffic.link_gb_s:.1f} GB/s, VRAM {traffic.memory_gb_s:.0f} GB/s, as measured"
        )
    return "\n".join(lines)
