"""Estimates for fewer and more expert slots: hit rate, MB missed per token, tok/s."""

from collections.abc import Sequence
from dataclasses import dataclass

from osmium.engine.speed_estimate import TokenCost, hit_rate

__all__ = ["SlotEstimate", "estimate_slots", "slot_estimate_table"]

GIB = 1 << 30

STEPS_GIB = (-4, -2, 0, 2, 4, 8)


@dataclass(frozen=True)
class SlotEstimate:
    """The estimate for one number of slots."""

    gib: int
    """VRAM beyond the plan, GiB; may be negative."""
    expert_slots: int
    """Per layer."""
    hit_rate: float
    missed_mb_per_token: float
    tokens_per_s: float | None


def estimate_slots(cost: TokenCost, slots: int, experts: int) -> list[SlotEstimate]:
    """Estimates for `slots` per layer and for STEPS_GIB fewer or more, up to all experts."""
    rows: list[SlotEstimate] = []
    for gib in STEPS_GIB:
        count = min(experts, slots + gib * GIB // cost.slot_bytes)
        if count < cost.min_slots or any(row.expert_slots == count for row in rows):
            continue
        hits = hit_rate(count / experts)
        missed = (1 - hits) * cost.expert_bytes / 1e6
        rows.append(SlotEstimate(gib, count, hits, missed, cost.tokens_per_s(hits)))
    return rows


def slot_estimate_table(rows: Sequence[SlotEstimate]) -> str:
    """A text table of estimates."""
    lines = [f"{'expert slots':18}{'per layer':>10}{'hit rate':>10}{'MB missed':>11}{'tok/s':>8}"]
    for row in rows:
        name = "as planned" if row.gib == 0 else f"{row.gib:+} GiB of VRAM"
        speed = "" if row.tokens_per_s is None else f"{row.tokens_per_s:8.0f}"
        lines.append(
            f"  {name:16}{row.expert_slots:10}{row.hit_rate:10.2f}"
            f"{row.missed_mb_per_token:11.0f}{speed}"
        )
    return "\n".join(lines)
