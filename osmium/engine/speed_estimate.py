"""How fast decoding may be expected to be, from bytes and two rates.

    on the GPU   G = VRAM bytes / (VRAM_SHARE x copy rate in VRAM) + layers x LAYER_US
    all resident t = G
    else         F = missed bytes / (LINK_SHARE x copy rate of the link)
                 t = G + layers x MISS_LAYER_US + F - hidden x min(G, F)

A layer costs its kernels' starts and ends, whatever it reads.  Fetches overlap the hits' kernels,
and with prefetch the link also works while nothing is missed: `hidden` is the share of the shorter
of both that this saves.  The five constants are fitted to 27 rows of `osmium bench` on an H100 and
an H200 (LOG.md, 2026-11-25 to 2026-11-30), INT4 experts and attention, 1k to 236k of context; they
are within 7.5 % of each.  Ten more of 2026-11-30, BF16 attention included, are within 10 %
(tests/engine/test_speed_estimate.py).  Other cards have not been measured.

The hit rate is itself an estimate: a curve of published routing statistics.
"""

from dataclasses import dataclass
from itertools import pairwise

__all__ = ["NO_COST", "STANDARD_CONTEXT", "TokenCost", "TokenTime", "hit_rate"]

VRAM_SHARE = 0.9
"""Rate at which kernels read VRAM, of a copy's."""

LAYER_US = 18.5
"""Of a layer, beyond its bytes."""

LINK_SHARE = 0.93
"""Rate at which kernels fetch experts, of the copy engine's: 51 of 55 GB/s."""

MISS_LAYER_US = 7.0
"""Of a layer more, where experts are placed and fetched."""

HIDDEN, HIDDEN_PREFETCH = 0.20, 0.39
"""What of the shorter of both, link and GPU, is hidden behind the other: without prefetch, with."""

ERROR = 0.15
"""Stated accuracy of an estimate on the GPUs that were measured."""

MEASURED = ("H100", "H200")
"""GPUs that the constants are fitted to, as in the driver's names."""

STANDARD_CONTEXT = 1024
"""Tokens of context that an estimate is for, where none are named: `osmium bench`'s."""

_HIT = ((0.0, 0.0), (0.05, 0.41), (0.10, 0.54), (0.15, 0.62), (0.20, 0.68), (0.30, 0.77),
        (0.36, 0.81), (0.40, 0.83), (0.50, 0.88), (0.60, 0.92), (0.70, 0.95), (0.80, 0.97),
        (1.0, 1.0))  # fmt: skip
"""Share of experts resident -> share of uses hit, by what ships on a trace made from published
routing statistics of Qwen3.5-122B-A10B: `tools/make_trace.py T.npz`, then `tools/simulate_cache
T.npz --tokens 1500 --shares .05 .1 ...`, the line mixed (2026-11-25)."""


def hit_rate(share: float) -> float:
    """The share of uses that hit where this share of the experts is resident."""
    for (x0, y0), (x1, y1) in pairwise(_HIT):
        if share <= x1:
            return y0 + (y1 - y0) * (share - x0) / (x1 - x0)
    return 1.0


@dataclass(frozen=True)
class TokenTime:
    """Where the time of one decoded token goes, in ms."""

    vram_ms: float
    """VRAM reads and writes."""
    overhead_ms: float
    """Kernels' starts and ends."""
    link_ms: float
    """Missed experts over PCIe."""
    overlap_ms: float
    """What of the link's time is hidden behind the GPU's."""

    @property
    def total_ms(self) -> float:
        """Of the token."""
        return self.vram_ms + self.overhead_ms + self.link_ms - self.overlap_ms


@dataclass(frozen=True)
class TokenCost:
    """Bytes that a decoded token moves, and how fast copies were measured to be."""

    slot_bytes: int
    """VRAM of one slot more in every layer."""
    expert_bytes: int
    """Of the experts that a token uses, all layers together."""
    vram_bytes: int
    """VRAM that a token reads and writes beside its context: weights, its experts, its recurrent
    states."""
    min_slots: int
    """Slots per layer that there have to be."""
    link_gb_s: float = 0.0
    """Of large copies from host memory; 0: not known."""
    memory_gb_s: float = 0.0
    """Of a copy inside VRAM, read and written; 0: not known."""
    kv_token_bytes: int = 0
    """KV cache of one token of context, which every decoded token reads."""
    num_layers: int = 0
    prefetch: bool = False
    """Whether experts are copied before the router has picked them."""

    def time(self, hits: float, context: int = STANDARD_CONTEXT) -> TokenTime | None:
        """At a hit rate (1: all experts are resident); None where the rates are not known."""
        if not self.link_gb_s or not self.memory_gb_s:
            return None
        read = self.vram_bytes + self.kv_token_bytes * context
        vram = read / (VRAM_SHARE * self.memory_gb_s) / 1e6
        overhead = self.num_layers * LAYER_US / 1e3
        if hits >= 1:
            return TokenTime(vram, overhead, 0.0, 0.0)
        link = (1 - hits) * self.expert_bytes / (LINK_SHARE * self.link_gb_s) / 1e6
        hidden = HIDDEN_PREFETCH if self.prefetch else HIDDEN
        overlap = hidden * min(link, vram + overhead)
        overhead += self.num_layers * MISS_LAYER_US / 1e3
        return TokenTime(vram, overhead, link, overlap)

    def tokens_per_s(self, hits: float, context: int = STANDARD_CONTEXT) -> float | None:
        """At a hit rate; None where the rates are not known."""
        time = self.time(hits, context)
        return None if time is None else 1e3 / time.total_ms


NO_COST = TokenCost(0, 0, 0, 0)
