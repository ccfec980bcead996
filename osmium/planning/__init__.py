"""What a model needs and does on a machine, before it is downloaded, packed or loaded.

`plan_report` answers for `osmium plan`; `memory_plan` is what a load goes by.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from osmium.config import EngineConfig, Progress
from osmium.engine.plan import CUDA_CONTEXT_BYTES, DoesNotFit, HardwareInfo, MemoryPlan
from osmium.planning.alternatives import (
    Change,
    faster,
    instead,
    longest_context,
    plan_shapes,
    with_context,
)
from osmium.planning.hardware import config_of, hardware_for, hardware_of
from osmium.planning.report import PlanReport
from osmium.weights import DEMO, ModelInfo, inspect_model

__all__ = [
    "Change", "PlanReport", "config_of", "hardware_of", "memory_plan", "plan_for", "plan_report",
]  # fmt: skip

GIB = 1 << 30

LOG = logging.getLogger("osmium.planning")

DEMO_MAX_CONTEXT = 262144
"""Longest --context of the demo, in tokens; it was trained for 4,096."""


def with_demo_context(model: ModelInfo, config: EngineConfig) -> ModelInfo:
    """The demo accepts a --context beyond its training, with a warning, so that clients with long
    prompts can be tried on it; other models refuse that."""
    most, asked = model.config.max_context, config.context
    if model.packed_path != DEMO or asked is None:
        return model
    if not most < asked <= DEMO_MAX_CONTEXT:
        return model
    LOG.warning(
        "--context is %d; the demo was trained for %d tokens: its text after longer prompts makes "
        "no sense.", asked, most,
    )  # fmt: skip
    return replace(model, config=replace(model.config, max_context=DEMO_MAX_CONTEXT))


def memory_plan(model: ModelInfo, config: EngineConfig, hardware: HardwareInfo) -> MemoryPlan:
    """Where every byte of a model goes.

    Raises: DoesNotFit, with what would run instead; ConfigError for options that cannot be.
    """
    model = with_demo_context(model, config)
    try:
        return plan_shapes(model, config, hardware)
    except DoesNotFit as error:
        ways = [change.name for change in instead(model, config, hardware, error)][:4]
        used = hardware.vram_total - hardware.vram_free - CUDA_CONTEXT_BYTES
        if error.memory == "VRAM" and config.vram is None and error.need <= error.limit + used:
            ways.append(f"other programs closed, which use {used / GIB:.2f} GiB of VRAM")
        advice = f" What helps: {'; '.join(ways)}." if ways else " No option makes it fit."
        raise DoesNotFit(str(error) + advice, error.memory, error.need, error.limit) from None


def plan_for(
    path: str | Path | None = None,
    device: str = "auto",
    *,
    gpu: str | None = None,
    link_gb_s: float | None = None,
    **options: Any,
) -> MemoryPlan:
    """The memory plan of what `load` would do.  Downloads no weights, packs nothing, loads nothing.

    `gpu` names one to plan for instead of this machine's ("RTX 4090"), `link_gb_s` is the rate of
    its link; `options` are EngineConfig's fields.  Raises: ConfigError, CheckpointError,
    DeviceError; DoesNotFit, a ConfigError, where memory does not suffice.
    """
    config = config_of(device, options)
    hardware, _ = hardware_for(config, gpu, link_gb_s)
    return memory_plan(inspect_model(path, config), config, hardware)


def plan_report(
    path: str | Path | None = None,
    device: str = "auto",
    *,
    gpu: str | None = None,
    link_gb_s: float | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> PlanReport:
    """As `plan_for`, with all that there is to say of the plan, also where there is none because
    memory does not suffice.

    Raises: ConfigError, CheckpointError, DeviceError.
    """
    config = config_of(device, options)
    hardware, assumptions = hardware_for(config, gpu, link_gb_s)
    model = with_demo_context(inspect_model(path, config, progress), config)
    try:
        plan = plan_shapes(model, config, hardware)
    except DoesNotFit as error:
        ways = tuple(instead(model, config, hardware, error, everything=True))
        return PlanReport(model, config, hardware, assumptions, None, error, ways)
    most = longest_context(model, config, hardware)
    at_most = plan_shapes(model, with_context(config, most), hardware)
    return PlanReport(
        model, config, hardware, assumptions, plan, None,
        tuple(faster(model, config, hardware, plan)), most, at_most.tokens_per_s_at(most),
    )  # fmt: skip
