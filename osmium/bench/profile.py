"""Where a token's time goes: every kind of launch of one decoded token, by itself.

Method.  The launches of one step are listed, not run, and put together by kernel and grid.  All
launches of a kind, one a layer and each on its own layer's arrays, are recorded as one graph, which
is timed, less what a graph of one small kernel takes: what the layers read is far more than L2
holds, so nothing is measured from there.  What kinds do beside each other, and what a graph lets
begin early, is not in the sum; the token's own time, measured in the same run, is beside it.

The kernel that prefetches experts runs beside the whole token until other kernels stop it: it is
listed without a time.  GB/s are left out where the bytes depend on which experts are resident.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from osmium.cuda.stream import Event
from osmium.engine.engine import Engine
from osmium.engine.request import Request, SamplingParams
from osmium.engine.runner import DecodeSession, ModelRunner
from osmium.engine.scheduler import Batch
from osmium.errors import ConfigError
from osmium.ops.gpu import GpuOps
from osmium.ops.gpu_experts import FETCH, FETCH_EARLY

__all__ = [
    "Launch", "LaunchRecorder", "SerialStreams", "bytes_depend_on_hits", "launch_bytes",
    "list_launches", "milliseconds", "profile", "profile_table", "start_single_decode",
    "time_calls",
]  # fmt: skip

ROUNDS = 7

Launch = tuple[Any, tuple[int, ...], tuple[Any, ...]]


@dataclass
class LaunchRecorder:
    """A stream that writes down what it is asked to launch."""

    launches: list[Launch]

    def launch(self, kernel: Any, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        self.launches.append((kernel, grid, values))


@dataclass
class SerialStreams:
    """A machine's fork and join with one stream: side streams are the main one."""

    stream: LaunchRecorder

    def fork_side_stream(self, early: bool = False) -> LaunchRecorder:
        return self.stream

    def join_side_stream(self, early: bool = False) -> None:
        pass


@contextmanager
def list_launches(ops: GpuOps) -> Iterator[list[Launch]]:
    """Launches inside are listed, in order and of all streams, and do not run."""
    machine: Any = ops.machine
    launches: list[Launch] = []
    streams = SerialStreams(LaunchRecorder(launches))
    before = ops.stream, machine.stream, machine.fork_side_stream, machine.join_side_stream
    ops.stream = machine.stream = streams.stream
    machine.fork_side_stream, machine.join_side_stream = (
        streams.fork_side_stream,
        streams.join_side_stream,
    )
    try:
        yield launches
    finally:
        ops.stream, machine.stream, machine.fork_side_stream, machine.join_side_stream = before


def profile(engine: Engine, depth: int) -> dict[str, Any]:
    """One sequence at a depth; a document for JSON.  To be called when nothing else is measured
    any more: experts and states are changed.  Raises: ConfigError without a GPU."""
    return engine.run_on_engine_thread(lambda: _profile(engine, depth))


def _profile(engine: Engine, depth: int) -> dict[str, Any]:
    runner = engine.runner
    ops = runner.ops
    if not isinstance(ops, GpuOps):
        raise ConfigError("--profile times a GPU's kernels; this engine runs on the CPU.")
    machine: Any = ops.machine
    replay = start_single_decode(runner, depth).replay
    with list_launches(ops) as noted:
        runner.launch_decode_step(1)
    main = machine.stream
    kinds: dict[tuple[Any, ...], list[Launch]] = {}
    for kernel, grid, values in noted:
        kinds.setdefault((kernel.name, grid, _options(kernel, values)), []).append(
            (kernel, grid, values)
        )
    rows = []
    empty = 1e3 * milliseconds(
        machine, machine.capture_graph(lambda: _launch(main, [_smallest(noted)]))
    )
    for (name, grid, _), launches in kinds.items():
        row: dict[str, Any] = {"kernel": name, "grid": list(grid), "launches": len(launches)}
        rows.append(row)
        if name == FETCH_EARLY.name:
            continue
        again = machine.capture_graph(lambda launches=launches: _launch(main, launches))
        us = max(0.5, 1e3 * milliseconds(machine, again) - empty) / len(launches)
        row |= {"us": round(us, 2), "share_us": round(us * len(launches), 1)}
        nbytes = 0 if bytes_depend_on_hits(launches[0]) else launch_bytes(launches[0])
        if nbytes:
            row["gb_s"] = round(nbytes / us / 1e3, 1)
    rows.sort(key=lambda row: -row.get("share_us", 0.0))
    return {
        "depth": depth,
        "nodes": len(noted),
        "sum_ms": round(sum(row.get("share_us", 0.0) for row in rows) / 1e3, 3),
        "token_ms": round(milliseconds(machine, replay), 3),
        "rows": rows,
    }


def start_single_decode(runner: ModelRunner, depth: int) -> DecodeSession:
    """One sequence's decoding, from a depth on."""
    request = Request([1] * (depth + 1), SamplingParams(temperature=0), lambda _: None, None, 0)
    request.num_computed_tokens, request.state_slot = depth, 0
    request.pages = list(range(-(-(depth + 1) // runner.state.page_size)))
    return runner.start_decode(Batch([(request, 1)]))


def profile_table(found: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"one token at a depth of {found['depth']}: {found['token_ms']:.3f} ms as one graph of "
        f"{found['nodes']} kernels, {found['sum_ms']:.3f} ms kind by kind",
        f"{'kernel':28}{'grid':>16}{'times':>7}{'us each':>10}{'us in all':>11}{'GB/s':>9}",
    ]
    for row in found["rows"]:
        line = f"{row['kernel']:28}{'x'.join(map(str, row['grid'])):>16}{row['launches']:7}"
        for key, width, digits in (("us", 10, 2), ("share_us", 11, 1), ("gb_s", 9, 1)):
            line += f"{row[key]:{width}.{digits}f}" if key in row else f"{'-':>{width}}"
        lines.append(line)
    return "\n".join(lines)


def bytes_depend_on_hits(launch: Launch) -> bool:
    """Whether what it moves depends on where experts are: its contract counts as if all were."""
    kernel, _, values = launch
    named = {p.name: v for p, v in zip(kernel.contract.params, values, strict=True)}
    return bool(kernel.name == FETCH.name or named.get("which"))


def _options(kernel: Any, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """What else kinds of launches of one kernel differ in: which part, and absent arrays."""
    named = zip(kernel.contract.params, values, strict=True)
    return tuple(v for p, v in named if p.name == "which" or (p.is_array and v == 0))


def _smallest(launches: list[Launch]) -> Launch:
    """The launch of the fewest blocks: about what starting a graph costs."""
    return min(launches, key=lambda one: int(np.prod(one[1])))


def _launch(stream: Any, launches: list[Launch]) -> None:
    for kernel, grid, values in launches:
        stream.launch(kernel, grid, values)


def milliseconds(machine: Any, run: Any) -> float:
    """The median time of what `run` launches, after one round that does not count."""
    times = []
    for _ in range(ROUNDS + 1):
        start = Event(machine.device).record(machine.stream)
        run()
        end = Event(machine.device).record(machine.stream)
        times.append(end - start)
        start.close()
        end.close()
    return statistics.median(times[1:])


def time_calls(ops: GpuOps, calls: Sequence[Callable[[], None]]) -> tuple[float, list[Launch]]:
    """Microseconds of each of some calls of operations, as one graph, and what they launch."""

    def run() -> None:
        for call in calls:
            call()

    with list_launches(ops) as listing:
        run()
    run()  # launched before it is recorded: modules are loaded at first use
    ops.synchronize()
    return 1e3 * milliseconds(ops.machine, ops.capture_graph(run)) / len(calls), listing


def launch_bytes(launch: Launch) -> int:
    """Bytes that a launch moves, by its contract; 0 where the contract does not say."""
    kernel, grid, values = launch
    contract = kernel.contract
    if contract.traffic_bytes is None:
        return 0  # tables, not data
    named = {p.name: v for p, v in zip(contract.params, values, strict=True)}
    sizes = [_size(name, contract, grid, named) for name in contract.sizes]
    nbytes: int = kernel.bytes_moved((*sizes, *values))
    return nbytes


def _size(name: str, contract: Any, grid: tuple[int, ...], named: dict[str, Any]) -> int:
    """A launcher size, from the axis of the grid that is it, or a multiple of it."""
    for axis, length in zip(contract.grid, grid, strict=True):
        if name in axis.names:
            return int(length // axis({**named, name: 1}))
    raise ValueError(f"{contract.entry}: no axis gives {name}")
