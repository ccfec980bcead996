"""Estimated decode speed, from bytes per token and two measured rates.

    on the GPU   G = VRAM bytes / (VRAM_EFFICIENCY x copy rate in VRAM) + layers x LAYER_US
    all resident t = G
    else         F = missed bytes / (LINK_EFFICIENCY x copy rate of the link)
                 t = G + layers x MISS_LAYER_US + F - overlap x min(G, F)

Fit of the constants and its error: docs/memory-plan.md.  The hit rate is itself an estimate.
"""

from dataclasses import dataclass
from itertools import pairwise

__all__ = ["NO_COST", "STANDARD_CONTEXT", "TokenCost", "TokenTime", "hit_rate"]

VRAM_EFFICIENCY = 0.9
"""Rate at which kernels read VRAM, as a fraction of the copy rate in VRAM."""

LAYER_US = 18.5
"""Launch overhead of a layer's kernels, microseconds."""

LINK_EFFICIENCY = 0.93
"""Rate at which kernels fetch experts, as a fraction of the copy engine's: 51 of 55 GB/s."""

MISS_LAYER_US = 7.0
"""Extra overhead of a layer with slot assignment and fetch, microseconds."""

OVERLAP_FRACTION, OVERLAP_FRACTION_PREFETCH = 0.20, 0.39
"""Fraction of the shorter of link and GPU time that overlaps the other."""

ERROR = 0.15
"""Stated relative error of an estimate on the measured GPUs."""

MEASURED = ("H100", "H200")
"""GPUs that the constants are fitted to, as parts of the driver's device names."""

STANDARD_CONTEXT = 1024
"""Default tokens of context of an estimate: that of `osmium bench`."""

_HIT = ((0.0, 0.0), (0.05, 0.41), (0.10, 0.54), (0.15, 0.62), (0.20, 0.68), (0.30, 0.77),
        (0.36, 0.81), (0.40, 0.83), (0.50, 0.88), (0.60, 0.92), (0.70, 0.95), (0.80, 0.97),
        (1.0, 1.0))  # fmt: skip
"""(fraction of experts resident, hit rate) with the eviction policy of this engine.

The trace is synthetic, from published routing statistics of Qwen3.5-122B-A10B.  It comes from
`tools/make_trace.py T.npz`, then `tools/simulate_cache T.npz --tokens 1500 --shares .05 .1 ...`,
the line mixed (2026-11-25)."""


def hit_rate(resident_fraction: float) -> float:
    """The expected hit rate with this fraction of the experts resident, interpolated linearly."""
    for (x0, y0), (x1, y1) in pairwise(_HIT):
        if resident_fraction <= x1:
            return y0 + (y1 - y0) * (resident_fraction - x0) / (x1 - x0)
    return 1.0


@dataclass(frozen=True)
class TokenTime:
    """The parts of one decoded token's time, ms."""

    vram_ms: float
    """VRAM reads and writes."""
    overhead_ms: float
    """Launch overhead of kernels."""
    link_ms: float
    """Missed experts over PCIe."""
    overlap_ms: float
    """The part of link_ms that overlaps GPU work; subtracted."""

    @property
    def total_ms(self) -> float:
        """The time of the token."""
        return self.vram_ms + self.overhead_ms + self.link_ms - self.overlap_ms


@dataclass(frozen=True)
class TokenCost:
    """Bytes that a decoded token moves, and the measured copy rates."""

    slot_bytes: int
    """VRAM of one more slot in every layer."""
    expert_bytes: int
    """Bytes of a token's top-k experts, all layers together."""
    vram_bytes: int
    """VRAM bytes that a token reads and writes without its context: weights, experts and recurrent
    states."""
    min_slots: int
    """Fewest slots per layer."""
    link_gb_s: float = 0.0
    """Rate of large copies from host memory; 0: unknown."""
    memory_gb_s: float = 0.0
    """Rate of a copy inside VRAM, bytes read plus written; 0: unknown."""
    kv_token_bytes: int = 0
    """KV bytes per token of context; each decoded token reads them all."""
    num_layers: int = 0
    prefetch: bool = False
    """Whether experts are copied before their layer's routing."""

    def time(self, hit_rate: float, context: int = STANDARD_CONTEXT) -> TokenTime | None:
        """Token time at a hit rate (1: all experts resident); None where the rates are unknown."""
        if not self.link_gb_s or not self.memory_gb_s:
            return None
        nbytes = self.vram_bytes + self.kv_token_bytes * context
        vram_ms = nbytes / (VRAM_EFFICIENCY * self.memory_gb_s) / 1e6
        overhead_ms = self.num_layers * LAYER_US / 1e3
        if hit_rate >= 1:
            return TokenTime(vram_ms, overhead_ms, 0.0, 0.0)
        link_ms = (1 - hit_rate) * self.expert_bytes / (LINK_EFFICIENCY * self.link_gb_s) / 1e6
        fraction = OVERLAP_FRACTION_PREFETCH if self.prefetch else OVERLAP_FRACTION
        overlap_ms = fraction * min(link_ms, vram_ms + overhead_ms)
        overhead_ms += self.num_layers * MISS_LAYER_US / 1e3
        return TokenTime(vram_ms, overhead_ms, link_ms, overlap_ms)

    def tokens_per_s(self, hit_rate: float, context: int = STANDARD_CONTEXT) -> float | None:
        """Decode speed at a hit rate; None where the rates are unknown."""
        time = self.time(hit_rate, context)
        return None if time is None else 1e3 / time.total_ms


NO_COST = TokenCost(0, 0, 0, 0)
