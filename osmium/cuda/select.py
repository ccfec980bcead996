"""Open the GPU of an engine, and choose the kind of host memory by measuring copies from it."""

import logging

from osmium.config import EngineConfig
from osmium.cuda.driver import Device, cuda_version
from osmium.cuda.memory import HostKind
from osmium.cuda.rates import measure_h2d_rates, measure_vram_rate
from osmium.cuda.stream import CudaRuntime
from osmium.errors import NoDevice

__all__ = ["open_gpu"]

LOG = logging.getLogger("osmium.cuda")


def open_gpu(config: EngineConfig) -> CudaRuntime | None:
    """The GPU, with its link and VRAM rates measured; None on the CPU.

    Without a usable GPU, `device` "auto" also gives None, and "gpu" raises.
    Raises: DeviceError for a GPU that cannot be used as it is; one older than sm_80 counts as none.
    """
    if config.device == "cpu":
        return None
    try:
        device = Device()
    except NoDevice as error:
        if config.device == "gpu":
            raise
        level = logging.INFO if cuda_version() is None else logging.WARNING
        LOG.log(level, "Running on the CPU. %s", error)
        return None
    kinds: list[HostKind] = ["registered-huge", "pinned", "write-combined"]
    if config.write_combined is not None:
        kinds = ["write-combined"] if config.write_combined else kinds[:2]
    rates = measure_h2d_rates(device, kinds)
    # The first kind is allocated and filled fastest, so another one must copy 3 % faster.
    best = max(kinds, key=lambda kind: rates[kind] * (1.03 if kind == kinds[0] else 1))
    LOG.info("host memory: %s (%s)", best, ", ".join(f"{k} {r:.1f} GB/s" for k, r in rates.items()))
    gpu = CudaRuntime(device, best)
    gpu.link_gb_s, gpu.memory_gb_s = rates[best], measure_vram_rate(device)
    return gpu
