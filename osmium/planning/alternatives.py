"""Alternative plans: changes that make a model fit, or faster.

Each change has a plan of its own, so that every suggestion fits.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from osmium.config import EngineConfig, ModelConfig
from osmium.engine.gpus import find_gpu
from osmium.engine.plan import (
    CUDA_CONTEXT_BYTES,
    DoesNotFit,
    HardwareInfo,
    MemoryPlan,
    kv_capacity_tokens,
    make_plan,
)
from osmium.errors import CheckpointError, ConfigError
from osmium.planning.hardware import specified
from osmium.quant.expert_layout import ExpertLayout
from osmium.weights import ModelInfo, shapes_info
from osmium.weights.checkpoint import Formats, TensorSpec
from osmium.weights.synthetic import PREFIX, open_synthetic

__all__ = [
    "Change", "Shapes", "alternatives", "faster", "longest_context", "plan_shapes", "with_context",
]  # fmt: skip

GIB = 1 << 30

SMALLER = ("qwen3.5-122b-a10b", "qwen3.5-35b-a3b")
"""Published models to suggest, the largest first."""

NAMES = {"qwen3.5-122b-a10b": "Qwen/Qwen3.5-122B-A10B", "qwen3.5-35b-a3b": "Qwen/Qwen3.5-35B-A3B"}
"""Their hub ids."""

OTHER_GPUS = ("RTX 3090", "RTX 5090", "RTX PRO 6000", "H200")
"""GPUs that a plan is compared with, the smallest first."""


class Shapes(Protocol):
    """The shapes of a ModelInfo, a packed file or a synthetic model."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def formats(self) -> Formats: ...

    @property
    def layout(self) -> ExpertLayout: ...

    @property
    def parts(self) -> Mapping[str, TensorSpec]: ...


@dataclass(frozen=True)
class Change:
    """A change, and the figures of its plan."""

    name: str
    """The change in text: flags, or hardware."""
    expert_slots: int
    """Expert slots per layer."""
    hit_rate: float
    """Expected hits / routed pairs, 0 to 1."""
    tokens_per_s: float | None
    """Expected decode speed of one sequence; None if unknown."""


def plan_shapes(model: Shapes, config: EngineConfig, hardware: HardwareInfo) -> MemoryPlan:
    """The memory plan of a model.  Raises: DoesNotFit, ConfigError."""
    weights = [(name, part.nbytes) for name, part in model.parts.items()]
    return make_plan(model.config, model.layout, weights, config, hardware)


def _plan_change(
    name: str, model: Shapes, config: EngineConfig, hardware: HardwareInfo
) -> Change | None:
    """Plan a change; None if it does not fit."""
    try:
        plan = plan_shapes(model, config, hardware)
    except (ConfigError, CheckpointError):
        return None
    return Change(name, plan.expert_slots, plan.hit_rate, plan.expected_tokens_per_s)


def _formatted(
    model: Shapes, config: EngineConfig, **formats: Any
) -> tuple[Shapes, EngineConfig] | None:
    """The model in other formats; None if they equal its formats, or do not fit its shapes."""
    present = model.formats
    stored: dict[str, Any] = {
        "gpu_expert_bits": present.expert_bits, "attention_quant": present.attention,
        "shared_expert_quant": present.shared, "lm_head_quant": present.head,
    }  # fmt: skip
    if formats.get("gpu_expert_bits", present.expert_bits) != present.expert_bits:
        stored |= {name: getattr(config, name) for name in ("shared_expert_quant", "lm_head_quant")}
    changed = replace(config, **{**stored, **formats})
    if Formats.of(changed) == present:
        return None
    try:
        return shapes_info("", model.config, Formats.of(changed)), changed
    except (ConfigError, CheckpointError):
        return None


_SMALLER_FORMATS: tuple[dict[str, Any], ...] = (
    {"attention_quant": "int8"},
    {"attention_quant": "int4"},
    {"attention_quant": "int4", "lm_head_quant": "int4", "shared_expert_quant": "int4"},
)
"""Smaller formats of all weights but the routed experts, the smallest last."""


def _flags(formats: Mapping[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in formats.items())


def _smaller_formats(
    model: Shapes, config: EngineConfig
) -> Iterator[tuple[str, Shapes, EngineConfig]]:
    """The model in formats of fewer bytes, with their flags.

    A packed file's name has the advice to pack the checkpoint again.
    """
    packed = isinstance(model, ModelInfo) and model.kind == "packed"
    again = "pack the checkpoint with " if packed else ""
    size = sum(part.nbytes for part in model.parts.values())
    for bits in (8, 4):
        if bits >= model.layout.bits:
            continue
        if other := _formatted(model, config, gpu_expert_bits=bits):
            yield f"{again}--gpu-expert-bits {bits}", *other
    for formats in _SMALLER_FORMATS:
        other = _formatted(model, config, **formats)
        if other and sum(part.nbytes for part in other[0].parts.values()) < size:
            yield again + _flags(formats), *other


def alternatives(
    model: Shapes,
    config: EngineConfig,
    hardware: HardwareInfo,
    error: DoesNotFit,
    everything: bool = False,
) -> Iterator[Change]:
    """Changes that fit if a plan does not: first other options of this model.

    With `everything`, then other hardware and other models.
    """
    fitting = []

    def tried(name: str, *plan: Any) -> Iterator[Change]:
        change = _plan_change(name, *plan)
        if change is not None:
            fitting.append(change)
            yield change

    for name, other, changed in _smaller_formats(model, config):
        yield from tried(name, other, changed, hardware)
    context = longest_context(model, config, hardware)
    if context:
        suffix = "" if config.kv_cache_mb is None else " without --kv-cache-mb"
        yield from tried(
            f"--context {context}{suffix}", model, with_context(config, context), hardware
        )
    if config.max_num_seqs != 1:
        yield from tried("--max-num-seqs 1", model, replace(config, max_num_seqs=1), hardware)
    if not fitting:
        small = replace(with_context(config, min(2048, model.config.max_context)), max_num_seqs=1)
        for name, other, changed in [("", model, small), *_smaller_formats(model, small)]:
            if fitting:
                break
            flags = f"{name} --context {small.context} --max-num-seqs 1".strip()
            yield from tried(flags, other, changed, hardware)
    if (
        error.memory == "host memory"
        and config.ram is None
        and error.need <= hardware.ram_available
    ):
        gib = -(-error.need // GIB)
        more_ram = replace(config, ram=gib * GIB)
        if gib * GIB <= hardware.ram_available:
            name = f"--ram {gib}G (kept for other programs else)"
            yield from tried(name, model, more_ram, hardware)
    if everything:
        yield from _larger_hardware(model, config, hardware)
        yield from _smaller_models(model, config, hardware)


def _larger_hardware(
    model: Shapes, config: EngineConfig, hardware: HardwareInfo
) -> Iterator[Change]:
    """The least VRAM and the least host memory with which the model fits."""

    def with_vram(gib: int) -> Change | None:
        larger = replace(hardware, vram_free=gib * GIB - CUDA_CONTEXT_BYTES, vram_total=gib * GIB)
        limit = None if config.vram is None else gib * GIB
        name = f"a GPU with {gib} GiB of VRAM"
        return (
            _plan_change(name, model, replace(config, vram=limit), larger) if hardware.gpu else None
        )

    def with_ram(gib: int) -> Change | None:
        return _plan_change(
            f"{gib} GiB of host memory", model, replace(config, ram=gib * GIB), hardware
        )

    planners: tuple[Callable[[int], Change | None], ...] = (with_vram, with_ram)
    for plan in planners:
        gib = _least(lambda n, plan=plan: plan(n) is not None, 1, 2048)  # type: ignore[misc]
        change = None if gib is None else plan(gib)
        if change is not None:
            yield change


def _least(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """The least n from low to high with holds(n), None without any.  holds is monotonic."""
    if not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _smaller_models(
    model: Shapes, config: EngineConfig, hardware: HardwareInfo
) -> Iterator[Change]:
    """Published models with smaller experts that fit."""
    for name in SMALLER:
        other = open_synthetic(PREFIX + name, config)
        if _expert_weights(other) < _expert_weights(model):
            change = _plan_change(NAMES[name], other, config, hardware)
            if change is not None:
                yield change


def _expert_weights(model: Shapes) -> int:
    """Weights of a matrix of all routed experts, to compare models."""
    config = model.config
    size = config.hidden_size * config.moe_intermediate_size
    return config.num_layers * config.num_experts * size


def with_context(config: EngineConfig, context: int) -> EngineConfig:
    """The config with another context, whose size then determines the KV cache."""
    return replace(config, context=context, kv_cache_mb=None)


def longest_context(model: Shapes, config: EngineConfig, hardware: HardwareInfo) -> int:
    """Tokens of the longest context that fits; 0 if none fits."""
    page = config.page_size
    longest = model.config.max_context
    if config.kv_cache_mb is not None:
        longest = min(longest, kv_capacity_tokens(model.config, config, hardware.gpu))

    def too_long(pages: int) -> bool:
        context = min(pages * page, longest)
        return _plan_change("", model, with_context(config, context), hardware) is None

    pages = -(-longest // page)
    too_many = _least(too_long, 1, pages)
    if too_many is None:
        return longest
    return (too_many - 1) * page


def faster(
    model: Shapes, config: EngineConfig, hardware: HardwareInfo, plan: MemoryPlan
) -> Iterator[Change]:
    """Changes that make a plan faster."""
    if not hardware.gpu or plan.expected_tokens_per_s is None:
        return
    present = plan.expected_tokens_per_s
    tried: list[Change | None] = []
    if not plan.resident:
        larger = replace(
            hardware, vram_free=hardware.vram_free + GIB, vram_total=plan.vram_limit + GIB
        )
        budget = config if config.vram is None else replace(config, vram=config.vram + GIB)
        tried.append(_plan_change("+1 GiB of VRAM", model, budget, larger))
    for name, other, changed in _smaller_formats(model, config):
        if "int8" not in name:
            tried.append(_plan_change(name, other, changed, hardware))
    if not plan.resident and plan.vram["KV cache"] > GIB // 2:
        short = with_context(config, 8192)
        tried.append(_plan_change("--context 8k", model, short, hardware))
    if not plan.resident and hardware.link_gb_s < 45:
        fast = replace(hardware, link_gb_s=53.0)
        tried.append(_plan_change("PCIe 5.0 x16 (53 GB/s)", model, config, fast))
    cards = []
    for name in OTHER_GPUS:
        spec = find_gpu(name)
        card = replace(
            specified(spec, spec.vram_bytes, None),
            ram_available=hardware.ram_available, ram_total=hardware.ram_total,
        )  # fmt: skip
        if spec.vram_bytes > hardware.vram_total and spec.name != hardware.name:
            cards.append(_plan_change(spec.name, model, replace(config, vram=None), card))
    best = present
    for change in cards:
        if change is not None and (change.tokens_per_s or 0) > 1.15 * best:
            tried.append(change)
            best = change.tokens_per_s or best
    for change in tried:
        if change is not None and (change.tokens_per_s or 0) > 1.005 * present:
            yield change
