"""Measured rates of the copy engine and of VRAM, and VRAM that the driver keeps in host memory."""

import contextlib
import statistics
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from osmium.cuda.driver import Device
from osmium.cuda.memory import DeviceArray, DevicePool, HostBuffer, HostKind
from osmium.cuda.stream import CudaRuntime, Event, Stream
from osmium.errors import CudaError, OutOfMemory

__all__ = ["measure_h2d_rates", "measure_vram_rate", "spilled_bytes"]


def measure_h2d_rates(
    device: Device, kinds: Sequence[HostKind], nbytes: int = 64 << 20
) -> dict[HostKind, float]:
    """GB/s of the copy engine from each kind of host memory; 0 where the kind is unavailable.

    Copies alternate between the kinds, and the best round of each counts.  A link in power saving,
    or one that another process uses, is slow for all kinds.
    """
    pool, sources = DevicePool(device), dict[HostKind, HostBuffer]()
    out = pool.empty((nbytes,), np.uint8)
    for kind in kinds:
        with contextlib.suppress(OutOfMemory, CudaError):
            sources[kind] = HostBuffer(device, nbytes, kind)
    arrays = [source.device_array((nbytes,), np.uint8) for source in sources.values()]
    rates = {kind: max(x) for kind, x in zip(sources, _rates(device, out, arrays, 9), strict=True)}
    for source in sources.values():
        source.close()
    return {kind: rates.get(kind, 0.0) for kind in kinds}


def measure_vram_rate(device: Device, nbytes: int = 1 << 30) -> float:
    """GB/s of a copy inside VRAM, bytes read plus bytes written.

    Copies `nbytes`, or an eighth of free VRAM if that is less.
    """
    nbytes = min(nbytes, device.memory()[0] // 8)
    pool = DevicePool(device)
    out, source = pool.empty((nbytes,), np.uint8), pool.empty((nbytes,), np.uint8)
    return 2 * statistics.median(_rates(device, out, [source], 9)[0])


SPILL_PROBE_BYTES = 64 << 20
"""Bytes of a probe copy: 0.1 ms within VRAM, 3 ms over a link."""

MIN_VRAM_FRACTION = 0.25
"""A probe slower than this fraction of the VRAM rate reads host memory.  Examples of host memory:
2 x 25 GB/s (PCIe 4) of 330 (RTX 3060) is .15, 2 x 50 of 1,500 (RTX 5090) is .07."""

MAX_SPILLED_GB_S = 300.0
"""A probe of more GB/s, bytes read plus written, reads VRAM: no link is half as fast.  In VRAM of
4,000 GB/s a probe takes .03 ms, and the host may delay a copy for longer."""

SPILL_PROBES = 3
"""Copies that must all be slow for a piece to count as spilled."""


def spilled_bytes(runtime: CudaRuntime) -> int:
    """Bytes of the pool that the driver keeps in host memory, found by timing a copy of each piece.

    Some drivers (Windows and WSL2) oversubscribe VRAM instead of failing.  Array contents stay.
    Needs `memory_gb_s`.  Returns 0 where no VRAM is left for the scratch piece.
    """
    device, stream = runtime.device, runtime.stream
    pieces = [
        DeviceArray(ptr + at, (min(SPILL_PROBE_BYTES, nbytes - at),), np.uint8, None)
        for ptr, nbytes in runtime.pool.allocations()
        for at in range(0, nbytes, SPILL_PROBE_BYTES)
        if nbytes - at >= SPILL_PROBE_BYTES // 4  # launch time would dominate a shorter copy
    ]
    if not pieces or not runtime.memory_gb_s:
        return 0
    try:
        scratch = DevicePool(device).empty((SPILL_PROBE_BYTES,), np.uint8)
    except OutOfMemory:
        return 0
    stream.memset(scratch, 0)  # fault it in before the timed copies
    suspects = pieces
    for _ in range(SPILL_PROBES):  # repeat for slow pieces: the host may have delayed a copy
        marks = [Event(device).record(stream)]
        for piece in suspects:
            stream.copy(scratch[: piece.nbytes], piece)
            marks.append(Event(device).record(stream))
        slowest = min(MIN_VRAM_FRACTION * runtime.memory_gb_s, MAX_SPILLED_GB_S)
        limits_ms = [2e-6 * piece.nbytes / slowest for piece in suspects]
        times_ms = [end - start for start, end in pairwise(marks)]
        suspects = [
            piece
            for piece, ms, limit_ms in zip(suspects, times_ms, limits_ms, strict=True)
            if ms > limit_ms
        ]
        for mark in marks:
            mark.close()
    return sum(piece.nbytes for piece in suspects)


def _rates(
    device: Device, out: DeviceArray, sources: Sequence[DeviceArray], rounds: int
) -> list[list[float]]:
    """GB/s of `rounds` copies of each source, after one warm-up round."""
    stream = Stream(device)
    times_ms: list[list[float]] = [[] for _ in sources]
    for _ in range(rounds + 1):
        for source, source_ms in zip(sources, times_ms, strict=True):
            start, end = Event(device).record(stream), Event(device)
            stream.copy(out, source)
            end.record(stream)
            source_ms.append(end - start)
            start.close()
            end.close()
    stream.close()
    return [[out.nbytes / ms / 1e6 for ms in source_ms[1:]] for source_ms in times_ms]
