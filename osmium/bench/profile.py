"""Where a token's time goes: each kind of launch of one decoded token, timed in isolation.

Method.  The launches of one step are listed, not run, and grouped by kernel and grid.  One graph
holds all launches of a group, one per layer on that layer's arrays.  Its time is measured, less the
time of a graph of one small kernel.  The layers read far more than L2 holds, so the reads come from
VRAM.  The sum has no overlap of side streams or by PDL; the token's own time stands beside it.

The kernel that prefetches experts runs on a side stream until other kernels stop it: its row has no
time.  Rows whose bytes depend on which experts are resident have no GB/s.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from osmium.cuda.stream import Event
from osmium.engine.decode_session import DecodeSession
from osmium.engine.engine import Engine
from osmium.engine.request import Request, SamplingParams
from osmium.engine.runner import ModelRunner
from osmium.engine.scheduler import Batch
from osmium.errors import ConfigError
from osmium.ops.gpu import GpuOps
from osmium.ops.gpu_experts import FETCH_EXPERTS, PREFETCH_EXPERTS

__all__ = [
    "Launch", "LaunchRecorder", "SerialStreams", "bytes_depend_on_hits", "launch_bytes",
    "list_launches", "milliseconds", "profile", "profile_table", "start_single_decode",
    "time_calls",
]  # fmt: skip

ROUNDS = 7

Launch = tuple[Any, tuple[int, ...], tuple[Any, ...]]


@dataclass
class LaunchRecorder:
    """Stands in for a stream: appends each launch to a list."""

    launches: list[Launch]

    def launch(self, kernel: Any, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        self.launches.append((kernel, grid, values))


@dataclass
class SerialStreams:
    """The fork and join of a DeviceRuntime with one stream: side streams are the main stream."""

    stream: LaunchRecorder

    def fork_side_stream(self, prefetch: bool = False) -> LaunchRecorder:
        return self.stream

    def join_side_stream(self, prefetch: bool = False) -> None:
        pass


@contextmanager
def list_launches(ops: GpuOps) -> Iterator[list[Launch]]:
    """Inside, launches of all streams are listed in order and do not run."""
    machine: Any = ops.runtime
    launches: list[Launch] = []
    streams = SerialStreams(LaunchRecorder(launches))
    saved = ops.stream, machine.stream, machine.fork_side_stream, machine.join_side_stream
    ops.stream = machine.stream = streams.stream
    machine.fork_side_stream, machine.join_side_stream = (
        streams.fork_side_stream,
        streams.join_side_stream,
    )
    try:
        yield launches
    finally:
        ops.stream, machine.stream, machine.fork_side_stream, machine.join_side_stream = saved


def profile(engine: Engine, depth: int) -> dict[str, Any]:
    """Profile the decode step of one sequence with `depth` tokens of context: a document for JSON.

    Call it after all other measurements: it changes cached experts and states.
    Raises: ConfigError without a GPU.
    """
    return engine.run_on_engine_thread(lambda: _profile(engine, depth))


def _profile(engine: Engine, depth: int) -> dict[str, Any]:
    runner = engine.runner
    ops = runner.ops
    if not isinstance(ops, GpuOps):
        raise ConfigError("--profile times a GPU's kernels; this engine runs on the CPU.")
    machine: Any = ops.runtime
    replay = start_single_decode(runner, depth).replay
    with list_launches(ops) as step_launches:
        runner.launch_decode_step(1)
    main_stream = machine.stream
    groups: dict[tuple[Any, ...], list[Launch]] = {}
    for kernel, grid, values in step_launches:
        groups.setdefault((kernel.name, grid, _options(kernel, values)), []).append(
            (kernel, grid, values)
        )
    rows = []
    overhead_us = 1e3 * milliseconds(
        machine, machine.capture_graph(lambda: _launch(main_stream, [_smallest(step_launches)]))
    )
    for (name, grid, _), launches in groups.items():
        row: dict[str, Any] = {"kernel": name, "grid": list(grid), "launches": len(launches)}
        rows.append(row)
        if name == PREFETCH_EXPERTS.name:
            continue
        graph = machine.capture_graph(lambda launches=launches: _launch(main_stream, launches))
        us = max(0.5, 1e3 * milliseconds(machine, graph) - overhead_us) / len(launches)
        row |= {"us": round(us, 2), "total_us": round(us * len(launches), 1)}
        nbytes = 0 if bytes_depend_on_hits(launches[0]) else launch_bytes(launches[0])
        if nbytes:
            row["gb_s"] = round(nbytes / us / 1e3, 1)
    rows.sort(key=lambda row: -row.get("total_us", 0.0))
    return {
        "depth": depth,
        "nodes": len(step_launches),
        "sum_ms": round(sum(row.get("total_us", 0.0) for row in rows) / 1e3, 3),
        "token_ms": round(milliseconds(machine, replay), 3),
        "rows": rows,
    }


def start_single_decode(runner: ModelRunner, depth: int) -> DecodeSession:
    """Start the decoding of one sequence with `depth` tokens of context, in state slot 0."""
    request = Request([1] * (depth + 1), SamplingParams(temperature=0), lambda _: None, None, 0)
    request.num_computed_tokens, request.state_slot = depth, 0
    request.pages = list(range(-(-(depth + 1) // runner.state.page_size)))
    return runner.start_decode(Batch([(request, 1)]))


def profile_table(document: dict[str, Any]) -> str:
    """The document of profile() as a table of text."""
    lines = [
        f"one token at a depth of {document['depth']}: {document['token_ms']:.3f} ms as one graph "
        f"of {document['nodes']} kernels, {document['sum_ms']:.3f} ms as the sum of the rows",
        f"{'kernel':28}{'grid':>16}{'times':>7}{'us each':>10}{'us in all':>11}{'GB/s':>9}",
    ]
    for row in document["rows"]:
        line = f"{row['kernel']:28}{'x'.join(map(str, row['grid'])):>16}{row['launches']:7}"
        for key, width, digits in (("us", 10, 2), ("total_us", 11, 1), ("gb_s", 9, 1)):
            line += f"{row[key]:{width}.{digits}f}" if key in row else f"{'-':>{width}}"
        lines.append(line)
    return "\n".join(lines)


def bytes_depend_on_hits(launch: Launch) -> bool:
    """Whether a launch's bytes depend on which experts are resident; its contract counts all."""
    kernel, _, values = launch
    named = {p.name: v for p, v in zip(kernel.contract.params, values, strict=True)}
    return bool(kernel.name == FETCH_EXPERTS.name or named.get("subset"))


def _options(kernel: Any, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Options that separate groups of one kernel: `which` part, and null array pointers."""
    named = zip(kernel.contract.params, values, strict=True)
    return tuple(v for p, v in named if p.name == "subset" or (p.is_array and v == 0))


def _smallest(launches: list[Launch]) -> Launch:
    """The launch with the fewest blocks: its graph costs about what starting a graph costs."""
    return min(launches, key=lambda launch: int(np.prod(launch[1])))


def _launch(stream: Any, launches: list[Launch]) -> None:
    for kernel, grid, values in launches:
        stream.launch(kernel, grid, values)


def milliseconds(machine: Any, run: Any) -> float:
    """The median time in ms of what `run` launches, after one untimed round."""
    times = []
    for _ in range(ROUNDS + 1):
        start = Event(machine.device).record(machine.stream)
        run()
        end = Event(machine.device).record(machine.stream)
        times.append(end - start)
        start.close()
        end.close()
    return statistics.median(times[1:])


def time_calls(
    ops: GpuOps, calls: Sequence[Callable[[], None]], timed: str = ""
) -> tuple[float, list[Launch]]:
    """Microseconds per call when one graph holds all calls, and the launches of the calls.

    With `timed`, the graph and the list have only kernels whose name contains it; the others run
    once, before.
    """

    def run() -> None:
        for call in calls:
            call()

    with list_launches(ops) as launches:
        run()
    run()  # before the capture, as the first use of a kernel loads its module
    ops.synchronize()
    chosen = [launch for launch in launches if timed in launch[0].name]
    assert chosen, f"no kernel's name contains {timed!r}"
    stream = ops.stream
    graph = ops.capture_graph(run if not timed else lambda: _launch(stream, chosen))
    return 1e3 * milliseconds(ops.runtime, graph) / len(calls), chosen


def launch_bytes(launch: Launch) -> int:
    """Bytes that a launch moves by its contract; 0 for a contract without `traffic`."""
    kernel, grid, values = launch
    contract = kernel.contract
    if contract.traffic_bytes is None:
        return 0
    named = {p.name: v for p, v in zip(contract.params, values, strict=True)}
    sizes = [_size(name, contract, grid, named) for name in contract.sizes]
    nbytes: int = kernel.bytes_moved((*sizes, *values))
    return nbytes


def _size(name: str, contract: Any, grid: tuple[int, ...], named: dict[str, Any]) -> int:
    """A launcher size, from the grid axis that equals it or is a multiple of it.

    Raises: ValueError if no axis contains it.
    """
    for axis, length in zip(contract.grid, grid, strict=True):
        if name in axis.names:
            return int(length // axis({**named, name: 1}))
    raise ValueError(f"{contract.entry}: no grid axis contains the size {name}")
