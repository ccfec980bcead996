#!/usr/bin/env python3
"""Measure which kind of host memory has the fastest copies to and from the GPU.

Needs the NVIDIA driver, cuda-bindings and NumPy, not Osmium.

Method.  A measurement has one kind of host memory, block size, engine and direction.  It queues
blocks, up to 256 MiB in total, on a stream between two events; the rate is bytes / time, GB = 1e9
bytes.  Each round measures all kinds, so that a machine that slows down affects all of them.  A
figure is the median over the rounds, its spread the distance between the quartiles.

Kinds     pageable                plain memory; the driver stages it
          pinned                  cuMemHostAlloc
          write-combined          cuMemHostAlloc, WRITECOMBINED: CPU writes bypass its caches
          registered              mmap, touched, cuMemHostRegister
          registered-huge         the same, with transparent huge pages requested
Engines   copy                    cuMemcpyHtoDAsync / cuMemcpyDtoHAsync, one call per block
          sm                      a kernel that reads or writes mapped memory, 16 thread blocks
          both                    half of the blocks by each, on two streams

Result.  The recommended kind is the fastest to the GPU with `sm`, one expert at a time, as in
decode.  Its lead over the next kind must exceed twice their spreads.  Otherwise, among the tied
kinds, the one that the CPU fills fastest is recommended.  Kernels cannot read pageable memory.
"""

import argparse
import ctypes
import json
import mmap
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

try:
    import numpy as np
except ImportError as error:
    print(f"dma_bandwidth.py: NumPy is missing ({error}): pip install numpy", file=sys.stderr)
    sys.exit(2)

EXPERT = 4_866_048  # bytes: one INT4 expert of Qwen3.5-122B-A10B
SIZES = (64 << 10, 256 << 10, 1 << 20, EXPERT, 16 << 20, 64 << 20, 512 << 20)
KINDS = ("pageable", "pinned", "write-combined", "registered", "registered-huge")
ENGINES = ("copy", "sm", "both")
DIRECTIONS = ("to-gpu", "to-host")
BLOCKS, THREADS = 16, 256
PER_ROUND = 256 << 20  # bytes of one measurement, if blocks are smaller

COPY_KERNEL = """
// Copies `count` 16-byte words from `from` to `to`, four loads in flight per thread.
.version 7.8
.target sm_80
.address_size 64
.visible .entry copy_words(.param .u64 to, .param .u64 from, .param .u64 count)
.maxntid 256
{
    .reg .pred  %more;
    .reg .u32   %thread, %block, %width, %blocks;
    .reg .u64   %to, %from, %count, %i, %stride, %left, %p, %q, %step;
    .reg .b32   %a<4>, %b<4>, %c<4>, %d<4>;
    ld.param.u64    %to, [to];
    ld.param.u64    %from, [from];
    ld.param.u64    %count, [count];
    cvta.to.global.u64 %to, %to;
    cvta.to.global.u64 %from, %from;
    mov.u32         %thread, %tid.x;
    mov.u32         %block, %ctaid.x;
    mov.u32         %width, %ntid.x;
    mov.u32         %blocks, %nctaid.x;
    mad.lo.u32      %thread, %block, %width, %thread;
    mul.lo.u32      %width, %width, %blocks;
    cvt.u64.u32     %i, %thread;
    cvt.u64.u32     %stride, %width;
    shl.b64         %step, %stride, 4;
four:
    mad.lo.u64      %left, %stride, 3, %i;      // the last of this thread's next four words
    setp.lt.u64     %more, %left, %count;
    @!%more bra     one;
    shl.b64         %p, %i, 4;
    add.u64         %q, %to, %p;
    add.u64         %p, %from, %p;
    ld.global.v4.u32 {%a0, %a1, %a2, %a3}, [%p];
    add.u64         %p, %p, %step;
    ld.global.v4.u32 {%b0, %b1, %b2, %b3}, [%p];
    add.u64         %p, %p, %step;
    ld.global.v4.u32 {%c0, %c1, %c2, %c3}, [%p];
    add.u64         %p, %p, %step;
    ld.global.v4.u32 {%d0, %d1, %d2, %d3}, [%p];
    st.global.v4.u32 [%q], {%a0, %a1, %a2, %a3};
    add.u64         %q, %q, %step;
    st.global.v4.u32 [%q], {%b0, %b1, %b2, %b3};
    add.u64         %q, %q, %step;
    st.global.v4.u32 [%q], {%c0, %c1, %c2, %c3};
    add.u64         %q, %q, %step;
    st.global.v4.u32 [%q], {%d0, %d1, %d2, %d3};
    mad.lo.u64      %i, %stride, 4, %i;
    bra             four;
one:
    setp.lt.u64     %more, %i, %count;
    @!%more bra     done;
    shl.b64         %p, %i, 4;
    add.u64         %q, %to, %p;
    add.u64         %p, %from, %p;
    ld.global.v4.u32 {%a0, %a1, %a2, %a3}, [%p];
    st.global.v4.u32 [%q], {%a0, %a1, %a2, %a3};
    add.u64         %i, %i, %stride;
    bra             one;
done:
    ret;
}
"""


class Failed(Exception):
    """A driver call failed, or the driver cannot be used."""


def say(*words: object) -> None:
    """Print to stderr, so that stdout has only the JSON line."""
    print(*words, file=sys.stderr, flush=True)


class Driver:
    """The driver API, on the primary context of one GPU."""

    def __init__(self, ordinal: int) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise Failed(f"cuda-bindings is missing ({error}): pip install cuda-bindings") from None
        self.cu = driver
        try:
            self("cuInit", 0)
        except Exception as error:  # the binding raises its own types if libcuda is missing
            raise Failed(f"There is no usable NVIDIA driver here: {error}") from None
        count = self("cuDeviceGetCount")
        if ordinal >= count:
            raise Failed(f"--gpu is {ordinal}; the driver has {count} GPUs, from 0.")
        self.device = self("cuDeviceGet", ordinal)
        self.context = self("cuDevicePrimaryCtxRetain", self.device)
        self("cuCtxSetCurrent", self.context)
        module = self("cuModuleLoadData", COPY_KERNEL.encode() + b"\0")
        self.kernel = self("cuModuleGetFunction", module, b"copy_words")
        self.streams = [self("cuStreamCreate", 1) for _ in range(2)]  # 1: non-blocking

    def __call__(self, name: str, *args: Any) -> Any:
        result = getattr(self.cu, name)(*args)
        if int(result[0]) != 0:
            text = self.cu.cuGetErrorName(result[0])[1]
            raise Failed(f"{name}: {text.decode() if text else result[0]}")
        return result[1] if len(result) == 2 else result[1:]

    def copy_words(self, to: int, source: int, nbytes: int, stream: Any) -> None:
        values = (to, source, nbytes // 16)
        types = (ctypes.c_uint64,) * 3
        self(
            "cuLaunchKernel", self.kernel, BLOCKS, 1, 1, THREADS, 1, 1, 0, stream,
            (values, types), 0,
        )  # fmt: skip


class HostMemory:
    """`nbytes` of one kind.

    `address` is for the CPU and copies, `mapped` for kernels; None if they cannot reach it.
    """

    def __init__(self, driver: Driver, kind: str, nbytes: int) -> None:
        self.driver, self.kind, self.nbytes = driver, kind, nbytes
        self.map: mmap.mmap | None = None
        start = time.perf_counter()
        if kind in ("pinned", "write-combined"):
            flags = 3 | (4 if kind == "write-combined" else 0)  # portable, mapped, write-combined
            self.address = int(driver("cuMemHostAlloc", nbytes, flags))
            view = (ctypes.c_uint8 * nbytes).from_address(self.address)
            self.array = np.frombuffer(view, np.uint8)
        else:
            self.map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if kind == "registered-huge":
                self.map.madvise(mmap.MADV_HUGEPAGE)
            self.array = np.frombuffer(self.map, np.uint8)
            self.address = self.array.ctypes.data
            self.array[:: mmap.PAGESIZE] = 1
            if kind != "pageable":
                driver("cuMemHostRegister", self.address, nbytes, 3)
        self.allocate_s = time.perf_counter() - start
        self.mapped = None
        if kind != "pageable":
            self.mapped = int(driver("cuMemHostGetDevicePointer", self.address, 0))
        pattern = np.random.default_rng(1).integers(0, 256, 1 << 20, dtype=np.uint8)
        start = time.perf_counter()
        for i in range(0, nbytes, len(pattern)):
            self.array[i : i + len(pattern)] = pattern[: nbytes - i]
        self.fill_gb_s = nbytes / (time.perf_counter() - start) / 1e9

    def close(self) -> None:
        if self.kind in ("pinned", "write-combined"):
            self.driver("cuMemFreeHost", self.address)
        elif self.kind != "pageable":
            self.driver("cuMemHostUnregister", self.address)


def measure(
    driver: Driver, memory: HostMemory, vram: int, size: int, engine: str, direction: str
) -> float:
    """GB/s of one round."""
    blocks = max(1, min(PER_ROUND, memory.nbytes) // size)

    def copy(i: int, stream: Any) -> None:
        host, device = memory.address + i * size, vram + i * size
        if direction == "to-gpu":
            driver("cuMemcpyHtoDAsync", device, host, size, stream)
        else:
            driver("cuMemcpyDtoHAsync", host, device, size, stream)

    def load(i: int, stream: Any) -> None:
        assert memory.mapped is not None, "kernels cannot reach pageable memory"
        host, device = memory.mapped + i * size, vram + i * size
        if direction == "to-gpu":
            driver.copy_words(device, host, size, stream)
        else:
            driver.copy_words(host, device, size, stream)

    plans: dict[str, list[tuple[Callable[[int, Any], None], range]]] = {
        "copy": [(copy, range(blocks))],
        "sm": [(load, range(blocks))],
        "both": [(copy, range(0, blocks, 2)), (load, range(1, blocks, 2))],
    }
    main, other = driver.streams
    start, split, end = (driver("cuEventCreate", 0) for _ in range(3))
    driver("cuCtxSynchronize")
    driver("cuEventRecord", start, main)
    driver("cuStreamWaitEvent", other, start, 0)
    for (move, which), stream in zip(plans[engine], (main, other), strict=False):
        for i in which:
            move(i, stream)
    driver("cuEventRecord", split, other)
    driver("cuStreamWaitEvent", main, split, 0)
    driver("cuEventRecord", end, main)
    driver("cuEventSynchronize", end)
    seconds = driver("cuEventElapsedTime", start, end) / 1e3
    for event in (start, split, end):
        driver("cuEventDestroy", event)
    return float(size * blocks / seconds / 1e9)


def cells(kind: str, sizes: tuple[int, ...], nbytes: int) -> Iterator[tuple[int, str, str]]:
    """Yield (block size, engine, direction) of all measurements with one kind of memory."""
    for size in sizes:
        for engine in ENGINES:
            one_block = size * 2 > min(PER_ROUND, nbytes) and engine == "both"
            if size <= nbytes and not one_block and (kind != "pageable" or engine == "copy"):
                for direction in DIRECTIONS:
                    yield size, engine, direction


def quartiles(values: list[float]) -> float:
    """The distance between the quartiles."""
    low, _, high = (
        statistics.quantiles(values, n=4) if len(values) > 2 else (min(values), 0, max(values))
    )
    return high - low


def link(driver: Driver) -> dict[str, Any]:
    """Generation and width of the PCIe link, from NVML; empty without NVML."""
    bus = driver("cuDeviceGetPCIBusId", 32, driver.device)
    bus = bus.split(b"\0")[0]
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return {}
    handle, values = ctypes.c_void_p(), {}
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(handle)):
        return {}
    for name, call in (
        ("generation", "nvmlDeviceGetCurrPcieLinkGeneration"),
        ("width", "nvmlDeviceGetCurrPcieLinkWidth"),
        ("most_generation", "nvmlDeviceGetMaxPcieLinkGeneration"),
        ("most_width", "nvmlDeviceGetMaxPcieLinkWidth"),
    ):
        value = ctypes.c_uint()
        if getattr(nvml, call)(handle, ctypes.byref(value)) == 0:
            values[name] = value.value
    return values


def recommend(report: dict[str, Any]) -> dict[str, Any]:
    """The recommended kind, and whether its lead exceeds the noise."""
    rates = {
        row["kind"]: row
        for row in report["rows"]
        if (row["bytes"], row["engine"], row["direction"]) == (report["expert"], "sm", "to-gpu")
    }
    order = sorted(rates, key=lambda kind: -rates[kind]["gb_s"])
    if not order:
        return {"kind": "pageable", "sure": False, "why": "no kind of page-locked memory worked"}
    best, rest = rates[order[0]], [rates[kind] for kind in order[1:]]
    tied = [best["kind"]]
    for row in rest:
        if best["gb_s"] - row["gb_s"] <= 2 * max(best["spread"], row["spread"]):
            tied.append(row["kind"])
    kind = max(tied, key=lambda name: report["kinds"][name]["fill_gb_s"])
    reason = f"{rates[kind]['gb_s']:.1f} GB/s one expert at a time by kernels"
    if len(tied) > 1:
        reason += f"; {', '.join(tied)} differ by less than twice their spread, "
        reason += "the CPU fills this one fastest"
    elif rest:
        lead = best["gb_s"] - rest[0]["gb_s"]
        spread = max(best["spread"], rest[0]["spread"])
        reason += f"; {lead:.1f} ahead of {rest[0]['kind']}, spread {spread:.2f}"
    return {"kind": kind, "sure": len(tied) == 1, "tied": tied, "why": reason}


def table(report: dict[str, Any]) -> None:
    """Print one table per direction: rows are kind and engine, columns block sizes."""
    for direction in DIRECTIONS:
        say(f"\nGB/s {direction} (median, +- half the distance between the quartiles)")
        say(f"{'':24}" + "".join(f"{size_text(size):>14}" for size in report["sizes"]))
        for kind in report["kinds"]:
            for engine in ENGINES:
                cell = {
                    row["bytes"]: row
                    for row in report["rows"]
                    if (row["kind"], row["engine"], row["direction"]) == (kind, engine, direction)
                }
                if cell:
                    line = "".join(
                        f"{cell[s]['gb_s']:8.1f} +-{cell[s]['spread'] / 2:4.1f}" if s in cell
                        else f"{'-':>14}"
                        for s in report["sizes"]
                    )  # fmt: skip
                    say(f"{kind:16}{engine:8}{line}")
    say(f"\n{'':16}{'allocate':>12}{'CPU fills at':>16}")
    for kind, cost in report["kinds"].items():
        say(f"{kind:16}{cost['allocate_s_per_gib']:8.2f} s/GiB{cost['fill_gb_s']:11.1f} GB/s")


def size_text(nbytes: int) -> str:
    """64 KiB, 4.6 MiB, 512 MiB."""
    value, unit = (nbytes / 1024, "KiB") if nbytes < 1 << 20 else (nbytes / (1 << 20), "MiB")
    return f"{value:.3g} {unit}"


def probe(args: argparse.Namespace) -> dict[str, Any]:
    """Run all measurements."""
    driver = Driver(args.gpu)
    nbytes = args.size << 20
    sizes = tuple(sorted({s for s in SIZES if s <= nbytes} | {args.expert}))
    name = driver("cuDeviceGetName", 64, driver.device).split(b"\0")[0].decode()
    report: dict[str, Any] = {
        "gpu": name, "driver": driver("cuDriverGetVersion"), "link": link(driver),
        "date": time.strftime("%Y-%m-%d"), "expert": args.expert, "sizes": list(sizes),
        "rounds": args.rounds, "kinds": {}, "rows": [],
    }  # fmt: skip
    say(f"{name}, PCIe {report['link'] or 'link unknown'}, {args.rounds} rounds of {args.size} MiB")
    vram = int(driver("cuMemAlloc", nbytes))
    memories: list[HostMemory] = []
    for kind in KINDS:
        try:
            memory = HostMemory(driver, kind, nbytes)
        except (Failed, OSError) as error:
            say(f"{kind}: skipped, {error}")
            continue
        memories.append(memory)
        report["kinds"][kind] = {
            "allocate_s_per_gib": memory.allocate_s / (nbytes / (1 << 30)),
            "fill_gb_s": memory.fill_gb_s,
        }
    rates: dict[tuple[str, int, str, str], list[float]] = {}
    for round_ in range(args.rounds + 1):  # the first is an untimed warm-up
        for memory in memories:
            for cell in cells(memory.kind, sizes, nbytes):
                rate = measure(driver, memory, vram, *cell)
                if round_:
                    rates.setdefault((memory.kind, *cell), []).append(rate)
        say(f"round {round_} of {args.rounds}")
    for (kind, size, engine, direction), values in rates.items():
        report["rows"].append(
            {
                "kind": kind, "bytes": size, "engine": engine, "direction": direction,
                "gb_s": statistics.median(values), "spread": quartiles(values),
            }
        )  # fmt: skip
    report["recommended"] = recommend(report)
    for memory in memories:
        memory.close()
    driver("cuMemFree", vram)
    return report


def main() -> int:
    """Print the table to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", type=int, default=0, help="index of the GPU (0)")
    parser.add_argument("--size", type=int, default=512, help="MiB of each kind of memory (512)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (7)")
    parser.add_argument("--expert", type=int, default=EXPERT, help=f"bytes of an expert ({EXPERT})")
    args = parser.parse_args()
    if args.expert % 16 or not 16 <= args.expert <= args.size << 20:
        parser.error(f"--expert is {args.expert}; it must be a multiple of 16 and fit in --size")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; it must be at least 1")
    try:
        report = probe(args)
    except Failed as error:
        say(f"dma_bandwidth.py: {error}")
        print(json.dumps({"error": str(error)}))
        return 2
    table(report)
    best = report["recommended"]
    say(f"\nRecommended: {best['kind']} ({'sure' if best['sure'] else 'a tie'}): {best['why']}")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
