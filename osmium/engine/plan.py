"""The memory plan: the bytes of every part, before anything is allocated.

Pure arithmetic over a model's shapes, the user's options and the hardware.  A model that does not
fit raises DoesNotFit with the numbers, before loading.  planning/alternatives.py searches for
options that fit.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from osmium.config import EngineConfig, ModelConfig
from osmium.engine.prefill_estimate import (
    PrefillCost,
    prefill_cost,
    reading_lines,
    reading_values,
)
from osmium.engine.prefill_plan import (
    CPU_CHUNK,
    RESIDENT_PIECE_ROWS,
    default_chunk,
    default_piece_rows,
    prefill_bytes,
    step_rows,
    workspace_bytes_of,
)
from osmium.engine.runner import runner_bytes
from osmium.engine.slot_estimates import SlotEstimate, estimate_slots, slot_estimate_table
from osmium.engine.speed_estimate import NO_COST, STANDARD_CONTEXT, TokenCost, TokenTime, hit_rate
from osmium.errors import ConfigError
from osmium.experts.cache import cache_bytes
from osmium.experts.prefetch import MIN_BULK_COPY_CC, prefetch_state_bytes
from osmium.experts.streaming import staging_experts
from osmium.models.state import state_bytes
from osmium.ops.grouped import STAGING_GROUPS
from osmium.quant.expert_layout import ExpertLayout

__all__ = [
    "CUDA_CONTEXT_BYTES", "DoesNotFit", "HardwareInfo", "MemoryPlan", "kv_capacity_tokens",
    "make_plan",
]  # fmt: skip

GIB = 1 << 30

CUDA_CONTEXT_BYTES = 600 << 20
"""VRAM of a CUDA context with this engine's kernels loaded (estimate)."""

CPU_COPIES = 4 << 30
"""Most bytes of f32 copies of matrices that the CPU backend keeps (ReferenceOps)."""


@dataclass(frozen=True)
class HardwareInfo:
    """The memory and rates of a machine; sizes in bytes."""

    gpu: bool
    vram_free: int = 0
    """VRAM free after the CUDA context was created."""
    vram_total: int = 0
    ram_available: int = 0
    ram_total: int = 0
    link_gb_s: float = 0.0
    """Rate of large copies from host memory; 0: unknown."""
    memory_gb_s: float = 0.0
    """Rate of a copy inside VRAM, bytes read plus written; 0: unknown."""
    capability: tuple[int, int] = (0, 0)
    """Compute capability; (0, 0): unknown."""
    name: str = ""


class DoesNotFit(ConfigError):
    """A plan needs more memory than the machine has."""

    def __init__(self, message: str, memory: str, need: int, limit: int) -> None:
        """`memory` is "VRAM" or "host memory"; `need` and `limit` are bytes of it."""
        super().__init__(message)
        self.memory, self.need, self.limit = memory, need, limit


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes of the engine's parts, and their bytes."""

    device: str
    context: int
    """Most tokens of a sequence."""
    page_size: int
    num_pages: int
    max_num_seqs: int
    prefill_chunk: int
    """Most tokens of a prefill pass."""
    piece_rows: int
    """Most rows of a step, and of a piece of a pass."""
    kv_dtype: str
    num_experts: int
    expert_slots: int
    """Expert slots per layer."""
    vram: dict[str, int]
    """Bytes by purpose; empty on the CPU."""
    vram_limit: int
    ram: dict[str, int]
    """Host memory, bytes by purpose."""
    ram_limit: int
    token_cost: TokenCost = NO_COST
    """Bytes that a decoded token moves, and the rates."""
    prefetch: bool = False
    """Whether experts are copied before their layer's routing."""
    staging_experts: int = 0
    """Experts in each group of the staging slots of prefill passes; 0: there are none."""
    prefill: PrefillCost | None = None
    """Operations and bytes of a token of a prompt, and the rates; None: no estimate."""

    @property
    def max_pages_per_seq(self) -> int:
        """Page table entries of a sequence."""
        return -(-self.context // self.page_size)

    @property
    def link_gb_s(self) -> float:
        """Rate of large copies from host memory; 0: unknown."""
        return self.token_cost.link_gb_s

    @property
    def resident(self) -> bool:
        """Whether VRAM holds every expert; then none is fetched."""
        return self.expert_slots == self.num_experts

    @property
    def hit_rate(self) -> float:
        """Expected hit rate, an estimate from published routing statistics."""
        return hit_rate(self.expert_slots / self.num_experts)

    @property
    def expected_tokens_per_s(self) -> float | None:
        """Estimated decode speed of one sequence at 1k of context: engine/speed_estimate.py.

        None on the CPU, and where the GPU's rates are unknown.
        """
        return self.tokens_per_s_at(STANDARD_CONTEXT)

    def tokens_per_s_at(self, context: int) -> float | None:
        """Estimated decode speed of one sequence with `context` tokens."""
        return self.token_cost.tokens_per_s(self.hit_rate, context) if self.vram else None

    def token_time(self, context: int = STANDARD_CONTEXT) -> TokenTime | None:
        """Estimated parts of a decoded token's time; None where the rates are unknown."""
        return self.token_cost.time(self.hit_rate, context) if self.vram else None

    def fewer_slots(self, nbytes: int) -> int:
        """Slots per layer that free at least `nbytes` more VRAM.  Raises: ConfigError."""
        left = self.expert_slots + -nbytes // self.token_cost.slot_bytes
        if left < self.token_cost.min_slots:
            raise ConfigError(
                f"Cannot free {_gib(nbytes)} of VRAM: {max(0, left)} expert slots per layer of "
                f"{_gib(self.token_cost.slot_bytes)} each would remain, "
                f"{self.token_cost.min_slots} are needed. Close other programs that use the GPU, "
                "or lower --vram."
            )
        return left

    def slot_estimates(self) -> list[SlotEstimate]:
        """Estimates for fewer and more GiB of expert slots; empty on the CPU."""
        if not self.vram:
            return []
        return estimate_slots(self.token_cost, self.expert_slots, self.num_experts)

    def as_dict(self) -> dict[str, Any]:
        """The plan for JSON; names are stable and end in their units."""
        speed = self.expected_tokens_per_s
        return {
            "device": self.device,
            "context_tokens": self.context,
            "kv_capacity_tokens": self.num_pages * self.page_size,
            "page_size_tokens": self.page_size,
            "num_pages": self.num_pages,
            "max_num_seqs": self.max_num_seqs,
            "prefill_chunk_tokens": self.prefill_chunk,
            "piece_rows": self.piece_rows,
            "kv_dtype": self.kv_dtype,
            "num_experts": self.num_experts,
            "expert_slots": self.expert_slots,
            "prefetch": self.prefetch,
            "staging_experts": self.staging_experts,
            "vram_bytes": self.vram,
            "vram_limit_bytes": self.vram_limit,
            "ram_bytes": self.ram,
            "ram_limit_bytes": self.ram_limit,
            "expected_hit_rate": round(self.hit_rate, 3),
            "expected_tokens_per_s": None if speed is None else round(speed, 1),
            "token_cost": asdict(self.token_cost),
            **reading_values(self),
            "slot_estimates": [asdict(estimate) for estimate in self.slot_estimates()],
        }

    def table(self) -> str:
        """The plan as a text table."""
        lines = [
            f"device     {self.device}",
            f"context    {self.context:,} tokens per sequence, "
            f"{self.num_pages * self.page_size:,} in all, KV cache in {self.kv_dtype}",
            f"sequences  {self.max_num_seqs} at once, prompts in passes of up to "
            f"{self.prefill_chunk:,} tokens",
        ]
        if self.vram:
            lines.append(
                f"experts    {self.expert_slots} of {self.num_experts} have slots per layer; "
                f"expected hit rate {self.hit_rate:.2f} (estimate)"
            )
            speed = self.expected_tokens_per_s
            if speed is not None:
                lines.append(
                    f"speed      about {speed:.0f} tok/s (estimate; link {self.link_gb_s:.1f} "
                    f"GB/s, VRAM {self.token_cost.memory_gb_s:.0f} GB/s)"
                )
            lines += [*reading_lines(self), "", slot_estimate_table(self.slot_estimates())]
        for name, parts, limit in (
            ("VRAM", self.vram, self.vram_limit), ("RAM", self.ram, self.ram_limit),
        ):  # fmt: skip
            if parts:
                lines.append(f"\n{name:24}{'GiB':>8}")
                lines += [f"  {part:22}{size / GIB:8.2f}" for part, size in parts.items()]
                total = sum(parts.values())
                lines.append(f"  {'in all':22}{total / GIB:8.2f}   of {limit / GIB:.2f}")
        return "\n".join(lines)


def make_plan(
    config: ModelConfig,
    layout: ExpertLayout,
    weights: Sequence[tuple[str, int]],
    options: EngineConfig,
    hardware: HardwareInfo,
) -> MemoryPlan:
    """Divide the memory.  `weights` are (name, bytes) of everything but the routed experts.

    Raises: ConfigError for invalid options, DoesNotFit where memory does not suffice.
    """
    if hardware.gpu:
        with suppress(ConfigError):
            plan = _plan_with_rows(config, layout, weights, options, hardware, RESIDENT_PIECE_ROWS)
            if plan.resident:
                return plan
    rows = default_piece_rows(config)
    return _plan_with_rows(config, layout, weights, options, hardware, rows)


def _plan_with_rows(
    config: ModelConfig,
    layout: ExpertLayout,
    weights: Sequence[tuple[str, int]],
    options: EngineConfig,
    hardware: HardwareInfo,
    piece_rows: int,
) -> MemoryPlan:
    """The plan with pieces of at most `piece_rows` rows: see make_plan."""
    context = options.context or _default_context(config, options, hardware.gpu)
    if context > config.max_context:
        raise ConfigError(
            f"--context is {context}; the model's maximum is {config.max_context} tokens."
        )
    kv_dtype = _kv_dtype(options, hardware.gpu)
    if hardware.gpu and kv_dtype == "f32":
        raise ConfigError("--kv-dtype is f32; on the GPU it must be fp8_e4m3 or bf16.")
    vram_limit = 0
    if hardware.gpu:
        free = hardware.vram_free + CUDA_CONTEXT_BYTES
        vram_limit = free if options.vram is None else options.vram
    chunk = options.prefill_chunk
    if chunk is None:
        resident = piece_rows == RESIDENT_PIECE_ROWS
        chunk = default_chunk(config, layout, vram_limit, resident) if hardware.gpu else CPU_CHUNK
    chunk = min(chunk, context)
    rows = min(chunk, piece_rows)
    sequences = min(4, rows) if options.max_num_seqs is None else options.max_num_seqs
    if sequences > rows:
        raise ConfigError(
            f"--max-num-seqs is {sequences}; it must be at most {rows}, the rows of a step: "
            f"{piece_rows}, or fewer with --prefill-chunk {chunk}."
        )
    pages = _pages(config, options, context, kv_dtype)
    layers, experts = config.num_layers, config.num_experts
    fixed = {
        # One more page: the null page, where rows that have ended write.
        "KV cache": state_bytes(config, pages + 1, options.page_size, 0, kv_dtype),
        "recurrent state": state_bytes(config, 0, options.page_size, sequences, kv_dtype),
        "workspace": workspace_bytes_of(config, layout, sequences, rows, hardware.gpu)
        + prefetch_state_bytes(layers, experts, config.top_k)
        + runner_bytes(
            config.vocab_size,
            step_rows(sequences),
            sequences,
            -(-context // options.page_size),
            rows,
            chunk,
        ),
        "prefill": prefill_bytes(config, layout, chunk, rows, hardware.gpu),
    }
    host_experts = layers * experts * layout.nbytes
    embed = sum(size for name, size in weights if name == "embed")
    rest = sum(size for name, size in weights) - embed
    if config.tie_word_embeddings:
        rest += embed  # the head has its own copy
    if not hardware.gpu:
        copies = min(CPU_COPIES, 4 * (rest + embed) + 8 * host_experts)
        ram = {"weights": host_experts + embed + rest, "f32 copies": copies, **fixed}
        slots, vram, staged = experts, {}, 0
        if options.expert_slots is not None:
            slots = _checked_slots(options.expert_slots, config)
            ram["expert slots"] = cache_bytes(layout, layers, experts, slots)
    else:
        if vram_limit > hardware.vram_free + CUDA_CONTEXT_BYTES:
            raise ConfigError(
                f"--vram is {_gib(vram_limit)}, "
                f"{_gib(hardware.vram_free + CUDA_CONTEXT_BYTES)} are free of "
                f"{_gib(hardware.vram_total)}. Lower --vram, or close other programs that use the "
                "GPU; `osmium plan --gpu NAME` plans for another one."
            )
        # A user's --vram already leaves memory for other programs, so its reserve is smaller.
        reserve = max(256 << 20, vram_limit // (50 if options.vram is None else 100))
        vram = {"CUDA context": CUDA_CONTEXT_BYTES, "weights": rest, **fixed, "reserve": reserve}
        slots = _slots(config, layout, options, vram_limit - sum(vram.values()), vram)
        staged = 0
        if slots < experts:
            staged = staging_experts(layout, experts, vram_limit, experts - slots)
        if staged:
            vram["prefill"] += STAGING_GROUPS * staged * layout.nbytes
            slots = _slots(config, layout, options, vram_limit - sum(vram.values()), vram)
        vram["expert slots"] = cache_bytes(layout, layers, experts, slots)
        resident = slots == experts
        ram = {"embedding": embed, "loading buffer": experts * layout.nbytes}
        if not resident:
            ram = {"host experts": host_experts, "embedding": embed}
    ram_limit = _ram_limit(options, hardware)
    need = sum(ram.values())
    if need > ram_limit:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in ram.items() if size > GIB // 8)
        raise DoesNotFit(
            f"The model needs {_gib(need)} of host memory{f' ({parts})' * bool(parts)}, "
            f"{_gib(ram_limit)} can be used of {_gib(options.ram or hardware.ram_total)}.",
            "host memory", need, ram_limit,
        )  # fmt: skip
    token_experts = layers * config.top_k * layout.nbytes
    states = 2 * fixed["recurrent state"] // sequences  # read and written
    prefetch = (
        hardware.gpu and hardware.capability >= MIN_BULK_COPY_CC
        and options.prefetch and options.enable_expert_cache and slots < experts
    )  # fmt: skip
    # On sm_120 it is not measured whether prefetch blocks fit beside other kernels, so the
    # estimate leaves prefetch out.
    estimate_prefetch = prefetch and hardware.capability < (12, 0)
    kv = state_bytes(config, 1, options.page_size, 0, kv_dtype) // options.page_size
    token_cost = TokenCost(
        slot_bytes=layers * (layout.nbytes + 4), expert_bytes=token_experts,
        vram_bytes=rest + token_experts + states, min_slots=config.top_k,
        link_gb_s=hardware.link_gb_s, memory_gb_s=hardware.memory_gb_s,
        kv_token_bytes=kv, num_layers=layers, prefetch=estimate_prefetch,
    )  # fmt: skip
    return MemoryPlan(
        "gpu" if hardware.gpu else "cpu", context, options.page_size, pages, sequences, chunk, rows,
        kv_dtype, experts, slots, vram, vram_limit, ram, ram_limit, token_cost, prefetch, staged,
        prefill_cost(config, layout, weights, kv_dtype, hardware),
    )  # fmt: skip


def _default_context(config: ModelConfig, options: EngineConfig, gpu: bool) -> int:
    """Tokens of a sequence without --context: the model's maximum, at most 32768.

    --kv-cache-mb also limits it, unless its capacity is below one page; _pages then raises.
    """
    most = min(config.max_context, 32768)
    capacity = most if options.kv_cache_mb is None else kv_capacity_tokens(config, options, gpu)
    return most if capacity < options.page_size else min(most, capacity)


def _pages(config: ModelConfig, options: EngineConfig, context: int, kv_dtype: str) -> int:
    """KV pages, at least those of a whole context.  Raises: ConfigError."""
    least = -(-context // options.page_size)
    if options.kv_cache_mb is None:
        return least
    page_bytes = state_bytes(config, 1, options.page_size, 0, kv_dtype)
    if page_bytes == 0:
        return least  # no layer has a KV cache
    pages = (options.kv_cache_mb << 20) // page_bytes - 1  # one is the null page
    if pages < least:
        raise ConfigError(
            f"--kv-cache-mb {options.kv_cache_mb} holds {pages * options.page_size} tokens, the "
            f"context is {context}. Raise it to {-(-(least + 1) * page_bytes >> 20)}, or lower "
            "--context."
        )
    return pages


def kv_capacity_tokens(config: ModelConfig, options: EngineConfig, gpu: bool) -> int:
    """Tokens that --kv-cache-mb holds, up to the model's maximum context."""
    assert options.kv_cache_mb is not None
    page_bytes = state_bytes(config, 1, options.page_size, 0, _kv_dtype(options, gpu))
    pages = (options.kv_cache_mb << 20) // max(1, page_bytes) - 1
    return max(2, min(config.max_context, pages * options.page_size))


def _kv_dtype(options: EngineConfig, gpu: bool) -> str:
    return ("fp8_e4m3" if gpu else "f32") if options.kv_dtype == "auto" else options.kv_dtype


def _checked_slots(slots: int, config: ModelConfig) -> int:
    if slots < config.top_k:
        raise ConfigError(
            f"--expert-slots is {slots}; it must be at least {config.top_k}, the experts per token."
        )
    return min(slots, config.num_experts)


def _slots(
    config: ModelConfig,
    layout: ExpertLayout,
    options: EngineConfig,
    vram_left: int,
    vram: dict[str, int],
) -> int:
    """Expert slots per layer in `vram_left` bytes of VRAM.

    `vram` has the other parts, for the error.  Raises: ConfigError, DoesNotFit.
    """
    most = (
        config.num_experts
        if options.expert_slots is None
        else _checked_slots(options.expert_slots, config)
    )
    if not options.enable_expert_cache:
        most = config.top_k
    tables = cache_bytes(layout, config.num_layers, config.num_experts, 0)
    slots = min(most, max(0, vram_left - tables) // (config.num_layers * (layout.nbytes + 4)))
    if slots < config.top_k:
        need = cache_bytes(layout, config.num_layers, config.num_experts, config.top_k)
        held = ", ".join(f"{name} {_gib(size)}" for name, size in vram.items() if size > GIB // 8)
        total = sum(vram.values())
        raise DoesNotFit(
            f"The smallest expert cache needs {_gib(need)} of VRAM, {_gib(max(0, vram_left))} are "
            f"left of {_gib(total + vram_left)} ({held}).",
            "VRAM", total + need, total + vram_left,
        )  # fmt: skip
    return slots


def _ram_limit(options: EngineConfig, hardware: HardwareInfo) -> int:
    """Bytes of host memory to use: --ram, else available memory minus a reserve for the desktop.

    The reserve is 6 GiB or a tenth of all memory, whichever is more, but at most a quarter.
    """
    if options.ram is not None:
        return options.ram
    total = hardware.ram_total
    return max(0, hardware.ram_available - min(max(6 * GIB, total // 10), total // 4))


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB"
