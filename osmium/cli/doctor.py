"""`osmium doctor`: checks this machine and advises what to change.

A finding has a name, a value, and advice if something should change.
"""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import osmium
from osmium.config import user_cache
from osmium.cuda.driver import BINDING, Device, cuda_version
from osmium.distribution import NAME, REINSTALL, conflict, gpu_extra, how_to_install, version
from osmium.engine.host_memory import available_ram
from osmium.errors import DeviceError, KernelError, NoDevice
from osmium.ops.gpu import check_kernels

__all__ = ["Finding", "run_checks"]

GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    value: str
    advice: str = ""
    """What to change; empty if nothing."""


def run_checks() -> list[Finding]:
    """Run all checks; a problem is a finding, not an exception."""
    checks: list[Callable[[], list[Finding]]] = [
        _python, _package, _bindings, _gpus, _memory, _swap, _limits, _huge_pages, _disk,
    ]  # fmt: skip
    return [finding for check in checks for finding in check()]


def _python() -> list[Finding]:
    name = f"Python {platform.python_version()}, {platform.system()} {platform.release()}"
    wsl = "microsoft" in platform.release().lower()
    advice = "WSL2 pins about half of its RAM at most: raise memory= in .wslconfig." if wsl else ""
    return [Finding("system", name, advice)]


def _package() -> list[Finding]:
    """This package, conflicts with another package, and whether all kernels are installed."""
    folder = Path(__file__).parents[1]
    findings = [Finding(NAME, f"{version() or 'not installed'}, {folder}")]
    clash = conflict()
    if clash:
        findings.append(Finding("another osmium", "in the same folder", clash))
    if not hasattr(osmium, "load"):  # the other package has overwritten or removed it
        findings.append(Finding("import osmium", "another package", REINSTALL))
    try:
        findings.append(Finding("kernels", f"{check_kernels()}, all there"))
    except KernelError as error:
        findings.append(Finding("kernels", "not usable", str(error)))
    return findings


def _bindings() -> list[Finding]:
    """The version of cuda-bindings, and whether it matches the driver."""
    cuda = cuda_version()
    try:
        installed = importlib.metadata.version(BINDING)
    except importlib.metadata.PackageNotFoundError:
        if cuda is None:
            advice = f"With a GPU: {how_to_install('cu13')} (cu12 for drivers before 580)."
        else:
            advice = f"This machine has a GPU: {how_to_install(gpu_extra(cuda))}."
        return [Finding("CUDA bindings", "not installed", advice)]
    advice = ""
    if cuda is not None and int(installed.partition(".")[0]) > cuda // 1000:
        advice = (
            f"They are for a newer driver than this one (CUDA {cuda // 1000}); if the GPU cannot "
            f"be used: {how_to_install(gpu_extra(cuda))}."
        )
    return [Finding("CUDA bindings", installed, advice)]


def _gpus() -> list[Finding]:
    try:
        device = Device()
    except NoDevice as error:
        return [Finding("GPU", "none", str(error))]
    except DeviceError as error:
        return [Finding("GPU", "not usable", str(error))]
    try:
        free, total = device.memory()
        major, minor = device.capability
        version = device.driver_version
        findings = [
            Finding("driver", f"CUDA {version // 1000}.{version % 1000 // 10}"),
            Finding("GPU", f"{device.name}, sm_{major}{minor}, {total / GIB:.1f} GiB"),
        ]
        used = total - free
        advice = ""
        if used > max(total // 10, GIB):
            advice = "Other programs use VRAM; each GiB freed caches a GiB of experts."
        findings.append(Finding("VRAM free", f"{free / GIB:.1f} GiB", advice))
        return findings + _links()
    finally:
        device.close()


def _links() -> list[Finding]:
    """Generation and width of the PCIe links, from NVML."""
    import pynvml  # only this function needs libnvidia-ml, and not every machine has it

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [Finding("PCIe link", f"unknown ({error})")]
    findings = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle: Any = pynvml.nvmlDeviceGetHandleByIndex(index)
        try:
            now = pynvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)
            best = pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)
            width = pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle)
            widest = pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)
        except pynvml.NVMLError as error:
            findings.append(Finding(f"PCIe link {index}", f"unknown ({error})"))
            continue
        advice = ""
        if width < widest:
            advice = (
                f"The card supports x{widest}, and decode speed depends on the link: use another "
                "slot, or remove a second card that shares the lanes."
            )
        text = f"generation {now} of {best}, x{width} of x{widest} (idle links may slow down)"
        findings.append(Finding(f"PCIe link {index}", text, advice))
    pynvml.nvmlShutdown()
    return findings


def _memory() -> list[Finding]:
    memory = psutil.virtual_memory()
    text = f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB available"
    findings = [Finding("memory", text)]
    available, limit = available_ram()
    if limit < memory.total:
        findings.append(
            Finding(
                "memory limit",
                f"{limit / GIB:.1f} GiB, {available / GIB:.1f} GiB of it available",
                "The container allows less than the machine has; raise its memory limit.",
            )
        )
    return findings


def _swap() -> list[Finding]:
    swap = psutil.swap_memory()
    text = f"{swap.total / GIB:.1f} GiB, {swap.used / GIB:.1f} GiB used"
    return [Finding("swap", text + " (not needed: page-locked experts never swap)")]


def _limits() -> list[Finding]:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / GIB:.2f} GiB"
    return [Finding("memlock limit", text + " (the driver's own allocations do not count)")]


def _huge_pages() -> list[Finding]:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return [Finding("huge pages", "not available")]
    chosen = text[text.index("[") + 1 : text.index("]")] if "[" in text else text.strip()
    advice = ""
    if chosen == "never":
        advice = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
    return [Finding("huge pages", chosen, advice)]


def _disk() -> list[Finding]:
    cache = user_cache()
    folder = next((path for path in (cache, cache.parent) if path.exists()), Path.home())
    free = shutil.disk_usage(folder).free
    advice = ""
    if free < 70 * GIB:
        advice = "A packed 122B model takes 71 GB; --cache-dir puts it on another disk."
    writable = os.access(folder, os.W_OK)
    if not writable:
        advice = f"{folder} cannot be written; set XDG_CACHE_HOME or --cache-dir."
    return [Finding("packed models", f"{cache}, {free / GIB:.0f} GiB free", advice)]
