"""Plans with something changed: what would run instead, and what would be faster.

Each is planned itself: nothing is suggested that would not run.
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
    "Change", "Shapes", "faster", "instead", "longest_context", "plan_shapes", "with_context",
]  # fmt: skip

GIB = 1 << 30

SMALLER = ("qwen3.5-122b-a10b", "qwen3.5-35b-a3b")
"""Published models to run instead, the largest first."""

NAMES = {"qwen3.5-122b-a10b": "Qwen/Qwen3.5-122B-A10B", "qwen3.5-35b-a3b": "Qwen/Qwen3.5-35B-A3B"}
"""Their hub ids."""

OTHER_GPUS = ("RTX 3090", "RTX 5090", "RTX PRO 6000", "H200")
"""GPUs that a plan is compared with, the smallest first."""


class Shapes(Protocol):
    """A model's shapes: of a ModelInfo, a packed file or a made-up model."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def formats(self) -> Formats: ...

    @property
    def record(self) -> ExpertLayout: ...

    @property
    def parts(self) -> Mapping[str, TensorSpec]: ...


@dataclass(frozen=True)
class Change:
    """A plan with something changed."""

    name: str
    """What is changed, for people: flags, or hardware."""
    expert_slots: int
    """Per layer."""
    hit_rate: float
    tokens_per_s: float | None


def plan_shapes(model: Shapes, config: EngineConfig, hardware: HardwareInfo) -> MemoryPlan:
    """The memory plan of a model.  Raises: DoesNotFit, ConfigError."""
    weights = [(name, part.nbytes) for name, part in model.parts.items()]
    return make_plan(model.config, model.record, weights, config, hardware)


def _tried(name: str, model: Shapes, config: EngineConfig, hardware: HardwareInfo) -> Change | None:
    """A change, planned; None where that does not run either."""
    try:
        plan = plan_shapes(model, config, hardware)
    except (ConfigError, CheckpointError):
        return None
    return Change(name, plan.expert_slots, plan.hit_rate, plan.expected_tokens_per_s)


def _formatted(
    model: Shapes, config: EngineConfig, **formats: Any
) -> tuple[Shapes, EngineConfig] | None:
    """The model in other formats; None where it has them already, or cannot have them."""
    own = model.formats
    stored: dict[str, Any] = {
        "gpu_expert_bits": own.expert_bits, "attention_quant": own.attention,
        "shared_expert_quant": own.shared, "lm_head_quant": own.head,
    }  # fmt: skip
    if formats.get("gpu_expert_bits", own.expert_bits) != own.expert_bits:
        stored |= {name: getattr(config, name) for name in ("shared_expert_quant", "lm_head_quant")}
    wanted = replace(config, **{**stored, **formats})
    if Formats.of(wanted) == own:
        return None
    try:
        return shapes_info("", model.config, Formats.of(wanted)), wanted
    except (ConfigError, CheckpointError):
        return None


_INT4: tuple[dict[str, Any], ...] = (
    {"attention_quant": "int8"},
    {"attention_quant": "int4"},
    {"attention_quant": "int4", "lm_head_quant": "int4", "shared_expert_quant": "int4"},
)
"""Smaller formats of what is not a routed expert, the smallest last."""


def _flags(formats: Mapping[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in formats.items())


def _smaller_formats(
    model: Shapes, config: EngineConfig
) -> Iterator[tuple[str, Shapes, EngineConfig]]:
    """The model in formats of fewer bytes, with their flags.  Those of a packed file stay: it has
    to be packed again."""
    packed = isinstance(model, ModelInfo) and model.kind == "packed"
    again = "pack the checkpoint with " if packed else ""
    size = sum(part.nbytes for part in model.parts.values())
    for bits in (8, 4):
        if bits < model.record.bits and (made := _formatted(model, config, gpu_expert_bits=bits)):
            yield f"{again}--gpu-expert-bits {bits}", *made
    for formats in _INT4:
        made = _formatted(model, config, **formats)
        if made and sum(part.nbytes for part in made[0].parts.values()) < size:
            yield again + _flags(formats), *made


def instead(
    model: Shapes,
    config: EngineConfig,
    hardware: HardwareInfo,
    error: DoesNotFit,
    everything: bool = False,
) -> Iterator[Change]:
    """What would run where a plan does not fit: first this model with other options, then, with
    `everything`, other hardware and other models."""
    found = []

    def tried(name: str, *plan: Any) -> Iterator[Change]:
        made = _tried(name, *plan)
        if made is not None:
            found.append(made)
            yield made

    for name, other, changed in _smaller_formats(model, config):
        yield from tried(name, other, changed, hardware)
    context = longest_context(model, config, hardware)
    if context:
        instead = "" if config.kv_cache_mb is None else " without --kv-cache-mb"
        yield from tried(
            f"--context {context}{instead}", model, with_context(config, context), hardware
        )
    if config.max_num_seqs != 1:
        yield from tried("--max-num-seqs 1", model, replace(config, max_num_seqs=1), hardware)
    if not found:
        least = replace(with_context(config, min(2048, model.config.max_context)), max_num_seqs=1)
        for name, other, changed in [("", model, least), *_smaller_formats(model, least)]:
            if found:
                break
            flags = f"{name} --context {least.context} --max-num-seqs 1".strip()
            yield from tried(flags, other, changed, hardware)
    if (
        error.memory == "host memory"
        and config.ram is None
        and error.need <= hardware.ram_available
    ):
        gib = -(-error.need // GIB)
        spare = replace(config, ram=gib * GIB)
        if gib * GIB <= hardware.ram_available:
            yield from tried(f"--ram {gib}G (kept for other programs else)", model, spare, hardware)
    if everything:
        yield from _elsewhere(model, config, hardware)
        yield from _smaller_models(model, config, hardware)


def _elsewhere(model: Shapes, config: EngineConfig, hardware: HardwareInfo) -> Iterator[Change]:
    """The least VRAM, or the least host memory, with which it would run."""

    def with_vram(gib: int) -> Change | None:
        much = replace(hardware, vram_free=gib * GIB - CUDA_CONTEXT_BYTES, vram_total=gib * GIB)
        limit = None if config.vram is None else gib * GIB
        name = f"a GPU with {gib} GiB of VRAM"
        return _tried(name, model, replace(config, vram=limit), much) if hardware.gpu else None

    def with_ram(gib: int) -> Change | None:
        return _tried(f"{gib} GiB of host memory", model, replace(config, ram=gib * GIB), hardware)

    ways: tuple[Callable[[int], Change | None], ...] = (with_vram, with_ram)
    for way in ways:
        gib = _least(lambda n, way=way: way(n) is not None, 1, 2048)  # type: ignore[misc]
        found = None if gib is None else way(gib)
        if found is not None:
            yield found


def _least(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """The least number from low to high that holds, where all above it hold, too."""
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
    """Published models that are smaller than this one."""
    for name in SMALLER:
        other = open_synthetic(PREFIX + name, config)
        if _experts(other) < _experts(model):
            made = _tried(NAMES[name], other, config, hardware)
            if made is not None:
                yield made


def _experts(model: Shapes) -> int:
    config = model.config
    size = config.hidden_size * config.moe_intermediate_size
    return config.num_layers * config.num_experts * size


def with_context(config: EngineConfig, context: int) -> EngineConfig:
    """With a context for which the KV cache is as large as it has to be, unless that is given and
    holds it."""
    return replace(config, context=context, kv_cache_mb=None)


def longest_context(model: Shapes, config: EngineConfig, hardware: HardwareInfo) -> int:
    """Tokens of the longest context that fits; 0 where none does."""
    page = config.page_size
    most = model.config.max_context
    if config.kv_cache_mb is not None:
        most = min(most, kv_capacity_tokens(model.config, config, hardware.gpu))

    def too_long(pages: int) -> bool:
        context = min(pages * page, most)
        return _tried("", model, with_context(config, context), hardware) is None

    pages = -(-most // page)
    first = _least(too_long, 1, pages)
    if first is None:
        return most
    return (first - 1) * page


def faster(
    model: Shapes, config: EngineConfig, hardware: HardwareInfo, plan: MemoryPlan
) -> Iterator[Change]:
    """What would make a plan faster, and by how much."""
    if not hardware.gpu or plan.expected_tokens_per_s is None:
        return
    own = plan.expected_tokens_per_s
    tried: list[Change | None] = []
    if not plan.resident:
        more = replace(
            hardware, vram_free=hardware.vram_free + GIB, vram_total=plan.vram_limit + GIB
        )
        budget = config if config.vram is None else replace(config, vram=config.vram + GIB)
        tried.append(_tried("+1 GiB of VRAM", model, budget, more))
    for name, other, changed in _smaller_formats(model, config):
        if "int8" not in name:
            tried.append(_tried(name, other, changed, hardware))
    if not plan.resident and plan.vram["KV cache"] > GIB // 2:
        short = with_context(config, 8192)
        tried.append(_tried("--context 8k", model, short, hardware))
    if not plan.resident and hardware.link_gb_s < 45:
        fast = replace(hardware, link_gb_s=53.0)
        tried.append(_tried("PCIe 5.0 x16 (53 GB/s)", model, config, fast))
    cards = []
    for name in OTHER_GPUS:
        spec = find_gpu(name)
        card = replace(
            specified(spec, spec.vram_bytes, None),
            ram_available=hardware.ram_available, ram_total=hardware.ram_total,
        )  # fmt: skip
        if spec.vram_bytes > hardware.vram_total and spec.name != hardware.name:
            cards.append(_tried(spec.name, model, replace(config, vram=None), card))
    best = own
    for change in cards:
        if change is not None and (change.tokens_per_s or 0) > 1.15 * best:
            tried.append(change)
            best = change.tokens_per_s or best
    for change in tried:
        if change is not None and (change.tokens_per_s or 0) > 1.005 * own:
            yield change
