"""Estimated time of a prompt: operations and bytes of its tokens, and the GPU's rates.

A pass over the layers reads up to --prefill-chunk tokens.  For a pass of m tokens

    GPU    G = matrices / (GEMM_EFFICIENCY x int8 rate) + attention / (ATTENTION_EFFICIENCY x f16
               rate) + delta rule / (DELTA_EFFICIENCY x f16 rate)
               + bytes of activations / (VRAM_EFFICIENCY x copy rate in VRAM)
    link   F = bytes of missing experts / (efficiency x copy rate of the link)
    pass   t = the smaller of max(G, F), where the copy engine copies all missing experts,
               and G + F, where a pass of few tokens fetches those that its tokens use

and a prompt takes its passes and PROMPT_MS.  Matrices are two passes of int8 digits over each
quantised weight; rows of an expert come in tiles of TILE_ROWS.  Fit and errors:
docs/memory-plan.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from osmium.config import ModelConfig
from osmium.engine.gpus import mma_rates
from osmium.engine.speed_estimate import LINK_EFFICIENCY, VRAM_EFFICIENCY
from osmium.ops.tiling import PREFILL_HEAD_DIMS, supports_grouped_experts
from osmium.quant.expert_layout import ExpertLayout

if TYPE_CHECKING:
    from osmium.engine.plan import HardwareInfo, MemoryPlan

__all__ = [
    "PrefillCost", "missing_fraction", "prefill_cost", "reading_lines", "reading_speed_text",
    "reading_values", "reading_vram_text", "touched_fraction",
]  # fmt: skip

GIB = 1 << 30

GEMM_EFFICIENCY = 0.44
"""Rate of matrices of many tokens, as a fraction of the rate of mma.sync."""

WGMMA_GAIN = 1.7
"""Rate of integer matrices on compute capability 9.0, by wgmma, as a multiple of that."""

ATTENTION_EFFICIENCY = 0.42
"""Rate of attention, as a fraction of the f16 rate of mma.sync."""

DELTA_EFFICIENCY = 0.10
"""Rate of the delta rule, as a fraction of the f16 rate of mma.sync."""

LAYER_MS = 0.18
"""Launches and barriers of a layer in a pass, in which tensor cores wait."""

PROMPT_MS = 9.0
"""Schedule, head and sampling of the first token."""

STREAM_EFFICIENCY = 0.96
"""Rate of the copy engine over a pass, as a fraction of its rate for large copies."""

TILE_ROWS = 64
"""Rows of an expert that a block of the matrix kernel computes, also where fewer have a token."""

DIGITS, HI_LO = 2, 2
"""Passes over a quantised matrix, and over a bf16 one."""

DELTA_PRODUCTS = 9
"""Products of a token with a state [dk, dv] in the delta rule: three, each of pairs of halves."""

MATRICES = {
    "delta_net": ("qkvz", "delta_out", "ab"), "attention": ("qgkv", "attention_out"),
    "experts": ("router", "shared_up", "shared_down"),
}  # fmt: skip
"""Matrices of a layer but the routed experts: names of weights/checkpoint.py."""

LENGTHS, SHORT = (4096, 20480), 64
"""Tokens of the prompts of a report."""

PROMPTS = ((64, 0), (1024, 0), (4096, 0), (20480, 0), (64, 8192), (2048, 8192))
"""(new tokens, tokens before them in the KV cache) of a JSON report."""

READING_PARTS = ("prefill",)
"""Parts of the VRAM that only prompts need."""


def touched_fraction(tokens: int, num_experts: int, top_k: int) -> float:
    """The expected fraction of a layer's experts that `tokens` consecutive tokens use.

    Fitted to traces of tools/make_trace.py with top 8 of 256 (tests/engine/test_prefill_estimate).
    """
    expected_uses = tokens * top_k / num_experts
    return 1 - math.exp(-((expected_uses / 3) ** 0.68))


def missing_fraction(tokens: int, resident: float, num_experts: int, top_k: int) -> float:
    """The expected fraction of a layer's experts that `tokens` use and that have no slot.

    `resident`: fraction of experts with a slot.  Slots have the experts that recent tokens used
    most, so few tokens use fewer of the others.
    """
    touched = touched_fraction(tokens, num_experts, top_k)
    return float(touched * (1 - resident) ** (1 + 1.4 * (1 - touched)))


@dataclass(frozen=True)
class PrefillCost:
    """Operations and bytes of a token of a prompt in all layers, and the rates."""

    int8_ops: int
    """Operations on int8 digits, routed experts excepted."""
    pair_ops: int
    """Operations of one row of a routed expert, in one layer."""
    bf16_experts: bool
    """Whether these are on bf16; else on int8 digits."""
    bf16_ops: int
    """Operations on bf16 halves of bf16 matrices."""
    delta_ops: int
    """Operations on f16 of the delta rule."""
    context_ops: int
    """Operations on f16 per token before it: attention."""
    activation_bytes: int
    """VRAM bytes of arrays between kernels, written and read."""
    expert_bytes: int
    """Bytes of a packed expert."""
    layers: int
    num_experts: int
    top_k: int
    link_gb_s: float
    """Rate of large copies from host memory."""
    memory_gb_s: float
    """Rate of a copy inside VRAM, bytes read plus written."""
    int8_tops: float
    """Rate of mma.sync on int8, on compute capability 9.0 with the gain of wgmma."""
    f16_tflops: float
    """The same on f16 and bf16."""

    def gpu_s(self, tokens: int, cached: int) -> float:
        """Seconds of the GPU for a pass of `tokens` after `cached` tokens, without copies."""
        touched = self.num_experts * touched_fraction(tokens, self.num_experts, self.top_k)
        # Rows of an expert are taken as distributed exponentially.
        tiles = touched / -math.expm1(-TILE_ROWS * touched / (tokens * self.top_k))
        expert_ops = self.layers * tiles * TILE_ROWS * self.pair_ops
        int8_ops: float = tokens * self.int8_ops
        bf16_ops: float = tokens * self.bf16_ops
        if self.bf16_experts:
            bf16_ops += expert_ops
        else:
            int8_ops += expert_ops
        matrix_s = (int8_ops / self.int8_tops + bf16_ops / self.f16_tflops) / 1e12
        # Each token attends to those before it in its pass: half of them in the mean.
        attention_ops = tokens * (cached + tokens / 2) * self.context_ops
        f16_ops = attention_ops / ATTENTION_EFFICIENCY + tokens * self.delta_ops / DELTA_EFFICIENCY
        mixer_s = f16_ops / (self.f16_tflops * 1e12)
        memory_s = tokens * self.activation_bytes / (VRAM_EFFICIENCY * self.memory_gb_s * 1e9)
        return matrix_s / GEMM_EFFICIENCY + mixer_s + memory_s + self.layers * LAYER_MS / 1e3

    def pass_s(self, tokens: int, cached: int, slots: int) -> float:
        """Seconds of a pass of `tokens` after `cached` tokens, with `slots` per layer."""
        resident = slots / self.num_experts
        all_experts_s = self.layers * self.num_experts * self.expert_bytes / self.link_gb_s / 1e9
        streamed_s = (1 - resident) * all_experts_s / STREAM_EFFICIENCY
        touched = missing_fraction(tokens, resident, self.num_experts, self.top_k)
        fetched_s = touched * all_experts_s / LINK_EFFICIENCY
        gpu_s = self.gpu_s(tokens, cached)
        return min(max(gpu_s, streamed_s), gpu_s + fetched_s)

    def seconds(self, tokens: int, cached: int, slots: int, chunk: int) -> float:
        """Seconds to the first token of a prompt of `tokens` after `cached` tokens.

        In passes of up to `chunk` tokens.
        """
        starts = range(0, tokens, chunk)
        passes = [
            self.pass_s(min(chunk, tokens - start), cached + start, slots) for start in starts
        ]
        return sum(passes) + PROMPT_MS / 1e3


def prefill_cost(
    config: ModelConfig,
    layout: ExpertLayout,
    weights: Sequence[tuple[str, int]],
    kv_dtype: str,
    hardware: "HardwareInfo",
) -> PrefillCost | None:
    """The cost of a model's prompts; `weights` are (name, bytes) of all but the routed experts.

    None on the CPU, where a rate is unknown, and for shapes that the kernels for many tokens do not
    take.
    """
    rates = mma_rates(hardware.name, hardware.vram_total) if hardware.gpu else None
    if rates is None or not hardware.link_gb_s or not hardware.memory_gb_s:
        return None
    if not supports_grouped_experts(layout, config.num_experts):
        return None
    if config.head_dim not in PREFILL_HEAD_DIMS or (config.key_dim, config.value_dim) != (128, 128):
        return None
    sizes, present = _matrix_sizes(config), dict(weights)
    int8_ops = bf16_ops = delta_ops = activations = 0
    for index, kind in enumerate(config.layer_types):
        for name in (*MATRICES[kind], *MATRICES["experts"]):
            is_bf16 = present.get(f"layers.{index}.{name}", 0) >= 2 * sizes[name]
            int8_ops += 0 if is_bf16 else 2 * DIGITS * sizes[name]
            bf16_ops += 2 * HI_LO * sizes[name] if is_bf16 else 0
        activations += _activation_bytes(config, kind)
        if kind == "delta_net":
            states = config.value_heads * config.key_dim * config.value_dim
            delta_ops += 2 * DELTA_PRODUCTS * states
    attention_layers = config.layer_types.count("attention")
    kv_passes = HI_LO if kv_dtype == "bf16" else 1
    # Scores and values: two products each.
    context_ops = 4 * kv_passes * config.num_heads * config.head_dim * attention_layers
    gain = WGMMA_GAIN if hardware.capability == (9, 0) else 1.0
    return PrefillCost(
        int8_ops=int8_ops, bf16_experts=layout.bits == 16,
        pair_ops=2 * (HI_LO if layout.bits == 16 else DIGITS) * 3 * layout.hidden * layout.inner,
        bf16_ops=bf16_ops, delta_ops=delta_ops, context_ops=context_ops,
        activation_bytes=activations, expert_bytes=layout.nbytes, layers=config.num_layers,
        num_experts=config.num_experts, top_k=config.top_k, link_gb_s=hardware.link_gb_s,
        memory_gb_s=hardware.memory_gb_s, int8_tops=gain * rates.int8_tops,
        f16_tflops=rates.f16_tflops,
    )  # fmt: skip


def _matrix_sizes(config: ModelConfig) -> dict[str, int]:
    """Weights of each matrix of MATRICES."""
    hidden, shared = config.hidden_size, config.shared_intermediate_size
    values = config.value_heads * config.value_dim
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "qkvz": hidden * (config.channels + values),
        "delta_out": hidden * values,
        "ab": hidden * 2 * config.value_heads,
        "qgkv": hidden * 2 * (queries + keys),
        "attention_out": hidden * queries,
        "router": hidden * (config.num_experts + 1),
        "shared_up": hidden * 2 * shared,
        "shared_down": hidden * shared,
    }


def _activation_bytes(config: ModelConfig, kind: str) -> int:
    """VRAM bytes of a token in a layer, f32 arrays written once and read once."""
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    values = 6 * hidden  # x and its digits, for the mixer, the experts and the shared expert
    values += config.top_k * (hidden + inner) + config.num_experts
    values += hidden + 2 * config.shared_intermediate_size
    if kind == "attention":
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return 8 * (values + 3 * queries + 2 * keys)
    heads = config.value_heads * config.value_dim
    scratch = (config.value_heads * 2 + config.key_heads) * 128  # chunks of the delta rule
    return 8 * (values + 2 * config.channels + 2 * heads + scratch)


# -- reports ---------------------------------------------------------------------------------------


def reading_speed_text(plan: "MemoryPlan") -> str:
    """The estimated speed of prompts; "" where there is no estimate."""
    if plan.prefill is None:
        return ""
    lengths = [length for length in LENGTHS if length < plan.context] or [plan.context]
    speeds = [_rounded(length / _seconds(plan, length, 0)) for length in lengths]
    first, *others = zip(map(_count, lengths), speeds, strict=True)
    text = f"{first[0]} tokens at about {first[1]:,} tok/s"
    text += "".join(f", {length} at {speed:,}" for length, speed in others)
    if plan.context > SHORT:
        text += f"; {SHORT} tokens in {_seconds(plan, SHORT, 0):.2f} s"
    return text + " (estimate)"


def reading_vram_text(plan: "MemoryPlan") -> str:
    """What reading takes of VRAM and of expert slots."""
    nbytes = _reading_bytes(plan)
    text = f"reading takes {nbytes / GIB:.2f} GiB"
    if not plan.resident:
        text += f", {nbytes / plan.token_cost.slot_bytes:.1f} slots per layer"
    return text


def reading_lines(plan: "MemoryPlan") -> list[str]:
    """Both as lines of a plan's table; none on the CPU."""
    if not plan.vram:
        return []
    texts = (reading_speed_text(plan), reading_vram_text(plan))
    return [
        f"{label:11}{text}"
        for label, text in zip(("reading", ""), filter(None, texts), strict=False)
    ]


def reading_values(plan: "MemoryPlan") -> dict[str, Any]:
    """The same for JSON; names are stable and end in their units."""
    rows: list[dict[str, int | float]] = []
    for new, cached in PROMPTS:
        if plan.prefill is not None and new + cached < plan.context:
            seconds = _seconds(plan, new, cached)
            rows.append(
                {
                    "new_tokens": new,
                    "cached_tokens": cached,
                    "seconds": round(seconds, 4),
                    "tokens_per_s": round(new / seconds, 1),
                }
            )
    nbytes = _reading_bytes(plan)
    slots = nbytes / plan.token_cost.slot_bytes if plan.vram and not plan.resident else 0.0
    return {
        "prefill_vram_bytes": nbytes,
        "prefill_slots_per_layer": round(slots, 2),
        "prefill_estimates": rows,
    }


def _seconds(plan: "MemoryPlan", tokens: int, cached: int) -> float:
    assert plan.prefill is not None
    return plan.prefill.seconds(tokens, cached, plan.expert_slots, plan.prefill_chunk)


def _reading_bytes(plan: "MemoryPlan") -> int:
    """VRAM of arrays of long steps and of missing experts that are copied ahead."""
    return sum(plan.vram.get(part, 0) for part in READING_PARTS)


def _count(tokens: int) -> str:
    return f"{tokens >> 10}k" if tokens % 1024 == 0 else f"{tokens:,}"


def _rounded(speed: float) -> int:
    """A speed with three digits."""
    digits = max(0, math.floor(math.log10(max(1, speed))) - 2)
    return int(round(speed, -digits))
