"""The hardware of a plan: this machine, measured, or a GPU by its specification."""

from dataclasses import fields, replace
from typing import Any

from osmium.config import EngineConfig
from osmium.cuda.select import open_gpu
from osmium.cuda.stream import CudaRuntime as Gpu
from osmium.engine.gpus import GENERIC_GB_S, GpuSpec, find_gpu, generic_gpu
from osmium.engine.host_memory import available_ram
from osmium.engine.plan import CUDA_CONTEXT_BYTES, HardwareInfo
from osmium.errors import ConfigError

__all__ = ["config_of", "hardware_for", "hardware_of", "specified"]

GIB = 1 << 30


def config_of(device: str, options: dict[str, Any]) -> EngineConfig:
    """The config of a call's options.  Raises: ConfigError for an unknown name or invalid value."""
    known = {field.name for field in fields(EngineConfig)}
    for name in options:
        if name not in known:
            raise ConfigError(f"There is no option {name!r}; options: {', '.join(sorted(known))}.")
    return EngineConfig(**{"device": device, **options})


def hardware_of(gpu: Gpu | None, vram_bytes: int = 0, host_bytes: int = 0) -> HardwareInfo:
    """This machine.

    `vram_bytes` of VRAM and `host_bytes` of host memory that this process has allocated count as
    free, as the plan covers them.
    """
    available, ram = available_ram()
    if gpu is None:
        return HardwareInfo(False, ram_available=available, ram_total=ram, name="the CPU")
    free, total = gpu.device.memory()
    return HardwareInfo(
        True, free + vram_bytes, total, available + host_bytes, ram, gpu.link_gb_s, gpu.memory_gb_s,
        gpu.device.capability, gpu.device.name,
    )  # fmt: skip


def specified(spec: GpuSpec, vram: int, link_gb_s: float | None) -> HardwareInfo:
    """A GPU by its specification, with this machine's host memory."""
    available, ram = available_ram()
    return HardwareInfo(
        True, vram - CUDA_CONTEXT_BYTES, vram, available, ram, link_gb_s or spec.link_gb_s,
        spec.vram_copy_gb_s, spec.capability, spec.name,
    )  # fmt: skip


def hardware_for(
    config: EngineConfig, gpu: str | None, link_gb_s: float | None
) -> tuple[HardwareInfo, tuple[str, ...]]:
    """The hardware to plan for, and the assumptions about it in sentences.  Raises: ConfigError."""
    if link_gb_s is not None and not 0 < link_gb_s < 10_000:
        raise ConfigError(f"--link is {link_gb_s:g}; it must be GB/s, as 25 of a PCIe 4.0 x16.")
    if gpu is not None and config.device == "cpu":
        raise ConfigError(f"--gpu {gpu} and --device cpu contradict each other; omit one.")
    assumed = []
    if gpu is not None:
        spec = find_gpu(gpu)
        hardware = specified(spec, spec.vram_bytes, link_gb_s)
        assumed.append(
            f"{spec.name} by its specification, with nothing else running on it: "
            f"{spec.vram_bytes / GIB:.1f} of {spec.vram_gib} GiB, copies inside VRAM at "
            f"{spec.vram_copy_gb_s:.0f} GB/s, {_link(spec, link_gb_s)}"
        )
    else:
        opened = open_gpu(config)
        try:
            if opened is not None or config.vram is None or config.device == "cpu":
                measured = hardware_of(opened)
                if opened is not None and link_gb_s is not None:
                    assumed.append(f"a link of {link_gb_s:g} GB/s")
                    measured = replace(measured, link_gb_s=link_gb_s)
                if opened is None and config.device == "auto":
                    assumed.append("there is no GPU here; --gpu NAME or --vram SIZE plans for one")
                return measured, tuple(assumed)
        finally:
            if opened is not None:
                opened.close()
        spec = generic_gpu(config.vram)
        hardware = specified(spec, config.vram, link_gb_s)
        assumed.append(
            f"there is no GPU here: {spec.name}, VRAM of {GENERIC_GB_S} GB/s, compute capability "
            f"8.6, {_link(spec, link_gb_s)}; --gpu NAME plans for a known one"
        )
    if config.ram is None:
        assumed.append(
            f"this machine's host memory, {hardware.ram_total / GIB:.1f} GiB of which "
            f"{hardware.ram_available / GIB:.1f} are available; --ram SIZE plans for another"
        )
    return hardware, tuple(assumed)


def _link(spec: GpuSpec, link_gb_s: float | None) -> str:
    if link_gb_s is not None:
        return f"a link of {link_gb_s:g} GB/s"
    generation, lanes = spec.pcie
    return f"PCIe {generation}.0 x{lanes} at {spec.link_gb_s:g} GB/s"
