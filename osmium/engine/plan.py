"""The memory plan: where every byte goes, before anything is allocated.

Pure arithmetic over a model's shapes, the user's options and the hardware.  A model that does not
fit is an error here, before loading, with the numbers that do not add up; what would fit instead is
planning.py's to find.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from osmium.config import EngineConfig, ModelConfig
from osmium.engine.runner import runner_bytes
from osmium.engine.slot_estimates import SlotEstimate, estimate_slots, slot_estimate_table
from osmium.engine.speed_estimate import NO_COST, STANDARD_CONTEXT, TokenCost, TokenTime, hit_rate
from osmium.errors import ConfigError
from osmium.experts.cache import cache_bytes
from osmium.experts.prefetch import MIN_BULK_COPY_CC, guess_bytes
from osmium.experts.runner import store_bytes
from osmium.models.state import state_bytes
from osmium.models.workspace import workspace_bytes
from osmium.quant.expert_layout import ExpertLayout

__all__ = [
    "CUDA_CONTEXT_BYTES", "DoesNotFit", "HardwareInfo", "MemoryPlan", "available_ram",
    "kv_capacity_tokens", "make_plan",
]  # fmt: skip

GIB = 1 << 30

CUDA_CONTEXT_BYTES = 600 << 20
"""A CUDA context with this engine's kernels loaded, to be refined by measuring."""

CPU_COPIES = 4 << 30
"""f32 copies of matrices that the CPU backend may keep (ReferenceOps)."""


@dataclass(frozen=True)
class HardwareInfo:
    """What there is to plan with."""

    gpu: bool
    vram_free: int = 0
    """Bytes free now, the context already made."""
    vram_total: int = 0
    ram_available: int = 0
    ram_total: int = 0
    link_gb_s: float = 0.0
    """Rate of large copies from host memory; 0: not known."""
    memory_gb_s: float = 0.0
    """Rate of a copy inside VRAM, read and written; 0: not known."""
    capability: tuple[int, int] = (0, 0)
    """Compute capability; (0, 0): not known."""
    name: str = ""


class DoesNotFit(ConfigError):
    """A plan that needs more memory than there is."""

    def __init__(self, message: str, memory: str, need: int, limit: int) -> None:
        """`memory` is "VRAM" or "host memory"; `need` and `limit` are bytes of it."""
        super().__init__(message)
        self.memory, self.need, self.limit = memory, need, limit


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes, and the bytes they take."""

    device: str
    context: int
    """Most tokens of a sequence."""
    page_size: int
    num_pages: int
    max_num_seqs: int
    prefill_chunk: int
    """Most tokens of a step."""
    kv_dtype: str
    num_experts: int
    expert_slots: int
    """Expert slots a layer."""
    vram: dict[str, int]
    """Bytes by what they are for; empty on the CPU."""
    vram_limit: int
    ram: dict[str, int]
    ram_limit: int
    traffic: TokenCost = NO_COST
    """What a decoded token moves, and how fast that goes."""
    prefetch: bool = False
    """Whether experts are copied before the router has picked them."""

    @property
    def table_pages(self) -> int:
        """Entries of the page table a sequence."""
        return -(-self.context // self.page_size)

    @property
    def link_gb_s(self) -> float:
        """Rate of large copies from host memory; 0: not known."""
        return self.traffic.link_gb_s

    @property
    def resident(self) -> bool:
        """Whether VRAM holds every expert, so that none is ever fetched."""
        return self.expert_slots == self.num_experts

    @property
    def hit_rate(self) -> float:
        """What the slots may be expected to hit, an estimate from published routing statistics."""
        return hit_rate(self.expert_slots / self.num_experts)

    @property
    def expected_tokens_per_s(self) -> float | None:
        """Decoding speed of one sequence at 1k of context, an estimate: engine/speed_estimate.py.

        None on the CPU, and where rates of the GPU are not known.
        """
        return self.tokens_per_s_at(STANDARD_CONTEXT)

    def tokens_per_s_at(self, context: int) -> float | None:
        """The same with so many tokens of context."""
        return self.traffic.tokens_per_s(self.hit_rate, context) if self.vram else None

    def token_time(self, context: int = STANDARD_CONTEXT) -> TokenTime | None:
        """Where the time of a decoded token is expected to go; None where that is not known."""
        return self.traffic.time(self.hit_rate, context) if self.vram else None

    def fewer_slots(self, nbytes: int) -> int:
        """Slots a layer that leave at least so many bytes more free.  Raises: ConfigError."""
        left = self.expert_slots + -nbytes // self.traffic.slot_bytes
        if left < self.traffic.min_slots:
            raise ConfigError(
                f"Cannot free {_gib(nbytes)} of VRAM: {max(0, left)} expert slots per layer of "
                f"{_gib(self.traffic.slot_bytes)} each would remain, {self.traffic.min_slots} are "
                "needed. Close other programs that use the GPU, or lower --vram."
            )
        return left

    def slot_estimates(self) -> list[SlotEstimate]:
        """What fewer and more GiB of slots would bring; nothing where there are none."""
        return (
            estimate_slots(self.traffic, self.expert_slots, self.num_experts) if self.vram else []
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: names are stable and end in their units."""
        speed = self.expected_tokens_per_s
        return {
            "device": self.device,
            "context_tokens": self.context,
            "kv_capacity_tokens": self.num_pages * self.page_size,
            "page_size_tokens": self.page_size,
            "num_pages": self.num_pages,
            "max_num_seqs": self.max_num_seqs,
            "prefill_chunk_tokens": self.prefill_chunk,
            "kv_dtype": self.kv_dtype,
            "num_experts": self.num_experts,
            "expert_slots": self.expert_slots,
            "prefetch": self.prefetch,
            "vram_bytes": self.vram,
            "vram_limit_bytes": self.vram_limit,
            "ram_bytes": self.ram,
            "ram_limit_bytes": self.ram_limit,
            "expected_hit_rate": round(self.hit_rate, 3),
            "expected_tokens_per_s": None if speed is None else round(speed, 1),
            "token_cost": asdict(self.traffic),
            "slot_estimates": [asdict(one) for one in self.slot_estimates()],
        }

    def table(self) -> str:
        """For people."""
        lines = [
            f"device     {self.device}",
            f"context    {self.context:,} tokens per sequence, "
            f"{self.num_pages * self.page_size:,} in all, KV cache in {self.kv_dtype}",
            f"sequences  {self.max_num_seqs} at once, steps of up to {self.prefill_chunk} tokens",
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
                    f"GB/s, VRAM {self.traffic.memory_gb_s:.0f} GB/s)"
                )
            lines += ["", slot_estimate_table(self.slot_estimates())]
        for name, parts, limit in (
            ("VRAM", self.vram, self.vram_limit), ("RAM", self.ram, self.ram_limit),
        ):  # fmt: skip
            if parts:
                lines.append(f"\n{name:24}{'GiB':>8}")
                lines += [f"  {what:22}{size / GIB:8.2f}" for what, size in parts.items()]
                total = sum(parts.values())
                lines.append(f"  {'in all':22}{total / GIB:8.2f}   of {limit / GIB:.2f}")
        return "\n".join(lines)


def make_plan(
    config: ModelConfig,
    record: ExpertLayout,
    weights: Sequence[tuple[str, int]],
    options: EngineConfig,
    machine: HardwareInfo,
) -> MemoryPlan:
    """Share out the memory.  `weights` are (name, bytes) of everything but the routed experts.

    Raises: ConfigError for options that cannot be, DoesNotFit where memory does not suffice.
    """
    context = options.context or _context(config, options, machine.gpu)
    if context > config.max_context:
        raise ConfigError(
            f"--context is {context}; the model was made for {config.max_context} tokens at most."
        )
    kv_dtype = _kv_dtype(options, machine.gpu)
    if machine.gpu and kv_dtype == "f32":
        raise ConfigError("--kv-dtype is f32; the GPU keeps KV in fp8_e4m3 or bf16.")
    rows = min(options.prefill_chunk, context)
    sequences = min(4, rows) if options.max_num_seqs is None else options.max_num_seqs
    if sequences > rows:
        raise ConfigError(
            f"--max-num-seqs is {sequences}; it must be at most --prefill-chunk, {rows} tokens."
        )
    pages = _pages(config, options, context, kv_dtype)
    layers, experts = config.num_layers, config.num_experts
    fixed = {
        # a page and a slot more than are given out: rows of a step that have ended write there
        "KV cache": state_bytes(config, pages + 1, options.page_size, 0, kv_dtype),
        "recurrent state": state_bytes(config, 0, options.page_size, sequences + 1, kv_dtype),
        "workspace": workspace_bytes(config, rows, machine.gpu)
        + store_bytes(
            rows, experts, experts, config.top_k, config.moe_intermediate_size, machine.gpu
        )
        + guess_bytes(layers, experts, config.top_k)
        + runner_bytes(config.vocab_size, rows, sequences, -(-context // options.page_size)),
    }
    arena = layers * experts * record.nbytes
    embed = sum(size for name, size in weights if name == "embed")
    rest = sum(size for name, size in weights) - embed
    if config.tie_word_embeddings:
        rest += embed  # the head reads a copy of its own
    if not machine.gpu:
        copies = min(CPU_COPIES, 4 * (rest + embed) + 8 * arena)
        ram = {"weights, mapped": arena + embed + rest, "f32 copies": copies, **fixed}
        slots, vram, vram_limit = experts, {}, 0
        if options.expert_slots is not None:
            slots = _capped(options.expert_slots, config)
            ram["expert slots"] = cache_bytes(record, layers, experts, slots)
    else:
        vram_limit = (
            options.vram if options.vram is not None else machine.vram_free + CUDA_CONTEXT_BYTES
        )
        if vram_limit > machine.vram_free + CUDA_CONTEXT_BYTES:
            raise ConfigError(
                f"--vram is {_gib(vram_limit)}, "
                f"{_gib(machine.vram_free + CUDA_CONTEXT_BYTES)} are free of "
                f"{_gib(machine.vram_total)}. Lower --vram, or close what else uses the GPU; "
                "`osmium plan --gpu NAME` plans for another one."
            )
        # of a share that the user has given, other programs' has been taken out already
        reserve = max(256 << 20, vram_limit // (50 if options.vram is None else 100))
        vram = {"CUDA context": CUDA_CONTEXT_BYTES, "weights": rest, **fixed, "reserve": reserve}
        slots = _slots(config, record, options, vram_limit - sum(vram.values()), vram)
        vram["expert slots"] = cache_bytes(record, layers, experts, slots)
        resident = slots == experts
        ram = {"embedding": embed, "loading buffer": experts * record.nbytes}
        if not resident:
            ram = {"host experts": arena, "embedding": embed}
    ram_limit = _ram_limit(options, machine)
    need = sum(ram.values())
    if need > ram_limit:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in ram.items() if size > GIB // 8)
        raise DoesNotFit(
            f"The model needs {_gib(need)} of host memory{f' ({parts})' * bool(parts)}, "
            f"{_gib(ram_limit)} can be used of {_gib(options.ram or machine.ram_total)}.",
            "host memory", need, ram_limit,
        )  # fmt: skip
    each = layers * config.top_k * record.nbytes
    states = 2 * fixed["recurrent state"] // (sequences + 1)  # read and written
    prefetch = (
        machine.gpu and machine.capability >= MIN_BULK_COPY_CC
        and options.prefetch and options.enable_expert_cache and slots < experts
    )  # fmt: skip
    # On sm_120 it is not known yet whether prefetch finds room beside other kernels: not counted.
    counted = prefetch and machine.capability < (12, 0)
    kv = state_bytes(config, 1, options.page_size, 0, kv_dtype) // options.page_size
    traffic = TokenCost(
        slot_bytes=layers * (record.nbytes + 4), expert_bytes=each, vram_bytes=rest + each + states,
        min_slots=config.top_k, link_gb_s=machine.link_gb_s, memory_gb_s=machine.memory_gb_s,
        kv_token_bytes=kv, num_layers=layers, prefetch=counted,
    )  # fmt: skip
    return MemoryPlan(
        "gpu" if machine.gpu else "cpu", context, options.page_size, pages, sequences, rows,
        kv_dtype, experts, slots, vram, vram_limit, ram, ram_limit, traffic, prefetch,
    )  # fmt: skip


def _context(config: ModelConfig, options: EngineConfig, gpu: bool) -> int:
    """Tokens of a sequence where nobody says: the model's, up to 32768, and up to what
    --kv-cache-mb holds, unless that is not a page."""
    most = min(config.max_context, 32768)
    held = most if options.kv_cache_mb is None else kv_capacity_tokens(config, options, gpu)
    return most if held < options.page_size else min(most, held)


def _pages(config: ModelConfig, options: EngineConfig, context: int, kv_dtype: str) -> int:
    """Pages of KV, at least a whole context's."""
    least = -(-context // options.page_size)
    if options.kv_cache_mb is None:
        return least
    page = state_bytes(config, 1, options.page_size, 0, kv_dtype)
    if page == 0:
        return least  # no attention layer keeps anything
    pages = (options.kv_cache_mb << 20) // page - 1  # one is nobody's
    if pages < least:
        raise ConfigError(
            f"--kv-cache-mb {options.kv_cache_mb} holds {pages * options.page_size} tokens, the "
            f"context is {context}. Raise it to {-(-(least + 1) * page >> 20)}, or lower --context."
        )
    return pages


def kv_capacity_tokens(config: ModelConfig, options: EngineConfig, gpu: bool) -> int:
    """Tokens that --kv-cache-mb holds, up to the model's longest context."""
    assert options.kv_cache_mb is not None
    page = state_bytes(config, 1, options.page_size, 0, _kv_dtype(options, gpu))
    pages = (options.kv_cache_mb << 20) // max(1, page) - 1
    return max(2, min(config.max_context, pages * options.page_size))


def _kv_dtype(options: EngineConfig, gpu: bool) -> str:
    return ("fp8_e4m3" if gpu else "f32") if options.kv_dtype == "auto" else options.kv_dtype


def _capped(slots: int, config: ModelConfig) -> int:
    if slots < config.top_k:
        raise ConfigError(
            f"--expert-slots is {slots}; it must be at least {config.top_k}, the experts per token."
        )
    return min(slots, config.num_experts)


def _slots(
    config: ModelConfig,
    record: ExpertLayout,
    options: EngineConfig,
    room: int,
    vram: dict[str, int],
) -> int:
    """Expert slots a layer that `room` bytes of VRAM hold.  Raises: ConfigError."""
    most = (
        config.num_experts
        if options.expert_slots is None
        else _capped(options.expert_slots, config)
    )
    if not options.enable_expert_cache:
        most = config.top_k
    tables = cache_bytes(record, config.num_layers, config.num_experts, 0)
    slots = min(most, max(0, room - tables) // (config.num_layers * (record.nbytes + 4)))
    if slots < config.top_k:
        need = cache_bytes(record, config.num_layers, config.num_experts, config.top_k)
        held = ", ".join(f"{name} {_gib(size)}" for name, size in vram.items() if size > GIB // 8)
        total = sum(vram.values())
        raise DoesNotFit(
            f"The smallest expert cache needs {_gib(need)} of VRAM, {_gib(max(0, room))} are left "
            f"of {_gib(total + room)} ({held}).",
            "VRAM", total + need, total + room,
        )  # fmt: skip
    return slots


def _ram_limit(options: EngineConfig, machine: HardwareInfo) -> int:
    """What may be used: all of --ram; else what is available, with a part kept for the desktop:
    6 GiB or a tenth, but not more than a quarter of a small machine."""
    if options.ram is not None:
        return options.ram
    total = machine.ram_total
    return max(0, machine.ram_available - min(max(6 * GIB, total // 10), total // 4))


def available_ram(
    cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> tuple[int, int]:
    """Bytes of host memory that are available, and in all, by the system and by cgroup limits."""
    memory = psutil.virtual_memory()
    available, total = int(memory.available), int(memory.total)
    for folder in _memory_cgroups(cgroups, own):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _integer(folder / limit_name), _integer(folder / used_name)
            if limit is not None and used is not None and limit < total:
                # Cached file pages count as used, and make room when asked to.
                available = min(available, max(0, limit - used + _cached(folder / "memory.stat")))
                total = limit
    return min(available, total), total


def _memory_cgroups(cgroups: Path, own: Path) -> list[Path]:
    """The folders whose memory limits hold for this process: its own and all above it.

    Inside a container its own path may not be there; the top folder is then the container's.
    """
    found = []
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = cgroups / "memory" if controllers else cgroups
        inside = top / path.lstrip("/")
        found += [one for one in (inside, *inside.parents) if one.is_relative_to(top)]
    return found or [cgroups, cgroups / "memory"]


def _cached(stat: Path) -> int:
    """Bytes of file pages that a cgroup would give up first; version 1 sums under total_."""
    values = dict(line.split(maxsplit=1) for line in _text(stat).splitlines())
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


def _integer(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB"
