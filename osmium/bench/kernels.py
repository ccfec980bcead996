"""`osmium bench kernels`: time of each operation of decode and prefill, in shapes of real models.

No model is loaded: operations run on random weights, states, KV pages and packed experts, in enough
sets to fill the largest L2 four times.  The time is the median of seven replays of a graph with one
call per set.  Method: docs/benchmarks.md.
"""

import gc
import time
from collections.abc import Callable
from itertools import product
from typing import Any

from osmium.bench.environment import environment
from osmium.bench.mma_rate import mma_rates
from osmium.bench.op_cases import DEPTH, OpCases
from osmium.bench.prefill_cases import PrefillCases
from osmium.bench.profile import launch_bytes, time_calls
from osmium.cuda.driver import Device
from osmium.cuda.rates import measure_h2d_rates, measure_vram_rate
from osmium.cuda.stream import CudaRuntime
from osmium.errors import ConfigError, NoDevice
from osmium.ops.gpu import GpuOps

__all__ = ["bench_kernels", "selected_names"]

MODELS, BATCHES = ("qwen3.5-122b-a10b", "qwen3.5-35b-a3b"), (1, 4)

HEADER = (
    f"{'model':18}{'seq':>4}  {'operation':30}{'us':>9}{'MB':>10}{'GB/s':>9}{'fraction':>9}"
    f"{'TFLOP/s':>9}{'of s8':>7}"
)


def bench_kernels(name_filter: str | None, show: Callable[[str], None]) -> dict[str, Any]:
    """A document for JSON; `show` is called with the text of each row.

    Raises: ConfigError without a GPU, or if no operation's name contains `name_filter`.
    """
    decode, prefill = selected_names(name_filter)
    try:
        device = Device()
    except NoDevice as error:
        raise ConfigError(f"`osmium bench kernels` needs a GPU. {error}") from None
    rates = {
        "VRAM": measure_vram_rate(device),
        "link": measure_h2d_rates(device, ["pinned"])["pinned"],
    }
    machine, rows = CudaRuntime(device, "pinned"), list[dict[str, Any]]()
    try:
        ops = GpuOps(machine)
        rates |= mma_rates(ops)
        show(
            f"VRAM {rates['VRAM']:.0f} GB/s, link {rates['link']:.1f} GB/s, "
            f"mma s8 {rates['mma_s8_tops']:.0f} TOPS, bf16 {rates['mma_bf16_tflops']:.0f} TFLOP/s"
        )
        show(HEADER)
        start = time.perf_counter()
        cases = [
            *product(MODELS, BATCHES, decode),
            *((model, 1, name) for model in MODELS for name in prefill),
        ]
        for number, (model, tokens, name) in enumerate(cases, 1):
            if name in decode:
                row = time_decode_op(ops, name, OpCases(ops, model, tokens), rates)
            else:
                row = time_prefill_op(ops, PrefillCases(ops, model, name), rates)
            rows.append({"model": model, "sequences": tokens, **row})
            show(f"{model:18}{tokens:4}  {row_text(row)}")
            gc.collect()  # frees this operation's VRAM before the next one allocates
            if number % 16 == 0 and number < len(cases):
                left = (time.perf_counter() - start) / number * (len(cases) - number)
                show(f"  ({len(cases) - number} of {len(cases)} rows left, about {left:.0f} s)")
        return {**environment(device.name, device), "depth": DEPTH, "rates": rates, "rows": rows}
    finally:
        machine.close()


def selected_names(name_filter: str | None) -> tuple[list[str], list[str]]:
    """Operations of decode, and those of prefill, whose name contains `name_filter`.

    Raises: ConfigError if there is none.
    """
    decode, prefill = (
        [name for name in cases.names() if name_filter is None or name_filter in name]
        for cases in (OpCases, PrefillCases)
    )
    if not decode and not prefill:
        names = ", ".join((*OpCases.names(), *PrefillCases.names()))
        raise ConfigError(f"--filter is {name_filter!r}; the operations are {names}.")
    return decode, prefill


def time_decode_op(
    ops: GpuOps, name: str, cases: OpCases, rates: dict[str, float]
) -> dict[str, Any]:
    """Time, bytes and rate of an operation of decode."""
    calls = cases.make_calls(name)
    us, launches = time_calls(ops, calls)
    fetched = name.startswith("fetch")
    nbytes = sum(map(launch_bytes, launches)) / len(calls) + cases.uncounted_bytes(name)
    nbytes /= 2 if fetched else 1  # the contract counts both ends
    max_rate = rates["link" if fetched else "VRAM"]
    return _row(name, launches, len(calls), us, nbytes, max_rate)


def time_prefill_op(ops: GpuOps, cases: PrefillCases, rates: dict[str, float]) -> dict[str, Any]:
    """Time, bytes, rate and operations per second of the timed kernels of a prefill case."""
    case = cases.make()
    us, launches = time_calls(ops, case.calls, case.timed)
    nbytes = sum(map(launch_bytes, launches)) / len(case.calls) + case.uncounted_bytes
    row = _row(cases.name, launches, len(case.calls), us, nbytes, rates["VRAM"])
    row |= case.sizes
    if case.multiply_adds:
        row["tflops"] = round(2 * case.multiply_adds / us / 1e6, 1)
    if case.digit_passes and rates["mma_s8_tops"]:
        operations = 2 * case.digit_passes * case.multiply_adds
        row["s8_fraction"] = round(operations / us / 1e6 / rates["mma_s8_tops"], 3)
    return row


def _row(
    name: str, launches: Any, sets: int, us: float, nbytes: float, max_rate: float
) -> dict[str, Any]:
    rate = nbytes / us / 1e3
    return {
        "op": name, "kernels": list(dict.fromkeys(kernel.name for kernel, _, _ in launches)),
        "sets": sets, "us": round(us, 2), "bytes": round(nbytes), "gb_s": round(rate, 1),
        "rate_fraction": round(rate / max_rate, 3) if max_rate else 0.0,
    }  # fmt: skip


def row_text(row: dict[str, Any]) -> str:
    """The columns of HEADER from the operation on, then the kernels."""
    tflops = f"{row['tflops']:9.1f}" if "tflops" in row else f"{'':9}"
    share = f"{row['s8_fraction']:7.3f}" if "s8_fraction" in row else f"{'':7}"
    return (
        f"{row['op']:30}{row['us']:9.2f}{row['bytes'] / 1e6:10.3f}{row['gb_s']:9.1f}"
        f"{row['rate_fraction']:9.2f}{tflops}{share}  {' '.join(row['kernels'])}"
    )
