"""`bench --profile` without a GPU: launches of a streaming model are listed and timed by
FakeGpu."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from osmium import loader
from osmium.bench.profile import (
    SerialStreams,
    bytes_depend_on_hits,
    list_launches,
    profile,
    profile_table,
)
from osmium.cuda.stream import CudaRuntime
from osmium.engine.engine import Engine
from osmium.kernels.ptx import kernel
from osmium.ops import runtime as protocol
from osmium.ops.gpu import GpuOps
from tests.engine.fake_gpu import FakeGpu
from tests.ptx.interpreter import InterpretedRuntime

SMALL: dict[str, Any] = {
    "context": 256, "prefill_chunk": 16, "vram": 2 << 30, "ram": 1 << 30,
}  # fmt: skip


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[FakeGpu, Engine]]]:
    """A tiny synthetic model on a fake GPU."""
    engines: list[Engine] = []

    def make(**options: Any) -> tuple[FakeGpu, Engine]:
        gpu = FakeGpu(4 << 30)
        gpu.install(monkeypatch)
        engines.append(loader.load("synthetic:tiny", "gpu", **SMALL, **options))
        return gpu, engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("expert_slots", [8, 4, 2])
def test_every_launch_of_a_token_is_in_the_profile(
    start: Callable[..., tuple[FakeGpu, Engine]], expert_slots: int
) -> None:
    gpu, engine = start(expert_slots=expert_slots)
    runner = engine.runner
    gpu.launched.clear()
    engine.run_on_engine_thread(lambda: runner.launch_decode_step(1))
    launched = Counter(gpu.launched)
    found = profile(engine, 64)
    listed: Counter[str] = Counter()
    for row in found["rows"]:
        listed[row["kernel"]] += row["launches"]
    assert listed == launched and found["nodes"] == launched.total()
    streams = expert_slots < engine.config.num_experts
    layers = engine.config.num_layers
    assert listed["fetch_experts"] == (layers if streams else 0)
    assert listed["prefetch_experts"] == (1 if streams else 0)
    untimed = {row["kernel"] for row in found["rows"] if "us" not in row}
    assert untimed == ({"prefetch_experts"} if streams else set()), (
        "it waits for other kernels, so it cannot be timed alone"
    )
    table = profile_table(found).splitlines()
    assert len(table) == 2 + len(found["rows"])
    assert not any("gb_s" in row for row in found["rows"] if row["kernel"].startswith("fetch"))
    assert any("gb_s" in row for row in found["rows"])


@pytest.mark.parametrize(("which", "depends"), [(0, False), (1, True), (2, True)])
def test_traffic_of_a_partial_expert_kernel_depends_on_residency(which: int, depends: bool) -> None:
    up = kernel("int4_moe_up_fused_f32")
    values = tuple(which if p.name == "subset" else 1 for p in up.contract.params)
    assert bytes_depend_on_hits((up, (1,), values)) is depends


def test_a_response_after_a_profile_runs_its_launches(
    start: Callable[..., tuple[FakeGpu, Engine]],
) -> None:
    """The profile restores the streams."""
    gpu, engine = start(expert_slots=4)
    ops = engine.runner.ops
    assert isinstance(ops, GpuOps)
    before = (
        ops.stream,
        ops.runtime.stream,
        ops.runtime.fork_side_stream(True),
        ops.runtime.join_side_stream,
    )
    profile(engine, 64)
    assert (
        ops.stream,
        ops.runtime.stream,
        ops.runtime.fork_side_stream(True),
        ops.runtime.join_side_stream,
    ) == before
    gpu.launched.clear()
    engine.run_on_engine_thread(lambda: engine.runner.launch_decode_step(1))
    assert gpu.launched.count("fetch_experts") == engine.config.num_layers


def test_list_launches_records_without_running(
    start: Callable[..., tuple[FakeGpu, Engine]],
) -> None:
    gpu, engine = start(expert_slots=4)
    ops: Any = engine.runner.ops
    gpu.launched.clear()
    with list_launches(ops) as launches:
        engine.runner.launch_decode_step(1)
    assert launches and not gpu.launched
    with pytest.raises(ZeroDivisionError), list_launches(ops):
        raise ZeroDivisionError
    ops.copy_h2d(engine.runner.decode_state.decode_step, np.zeros(1, np.int32))
    assert isinstance(ops.runtime, CudaRuntime) and ops.stream is ops.runtime.stream


def parameters(method: Any) -> list[tuple[str, Any]]:
    """Names and kinds of a method's parameters, without self."""
    found = list(inspect.signature(method).parameters.values())[1:]
    return [(one.name, one.kind) for one in found]


@pytest.mark.parametrize("stand_in", [CudaRuntime, InterpretedRuntime, SerialStreams])
def test_every_device_runtime_takes_the_same_arguments(stand_in: type) -> None:
    wanted = {
        name: parameters(method)
        for name, method in vars(protocol.DeviceRuntime).items()
        if inspect.isfunction(method) and not name.startswith("_")
    }
    assert {"fork_side_stream", "join_side_stream", "capture_graph"} <= set(wanted)
    names = ["fork_side_stream", "join_side_stream"] if stand_in is SerialStreams else list(wanted)
    for name in names:
        assert parameters(getattr(stand_in, name)) == wanted[name], name
