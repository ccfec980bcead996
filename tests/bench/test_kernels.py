"""`osmium bench kernels` without a GPU: inputs fit each operation, and every kernel has a byte
count."""

from typing import Any

import numpy as np
import pytest

from osmium.bench import kernels, profile
from osmium.bench.kernels import MODELS, OpCases, bench_kernels
from osmium.bench.profile import LaunchRecorder, launch_bytes
from osmium.cli import main
from osmium.cuda.driver import Device
from osmium.errors import ConfigError, NoDevice
from osmium.ops.gpu import GpuOps
from osmium.ops.reference import ReferenceOps
from tests.ptx.interpreter import InterpretedRuntime

OPERATIONS = OpCases.names()

RATES = {"VRAM": 1.0, "link": 1.0}


class OnTheCpu(OpCases):
    """KV in the CPU's format."""

    def _attention(self) -> Any:
        self.kv_dtype = "f32"
        return super()._attention()


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_accepts_its_benchmark_inputs(name: str, tokens: int) -> None:
    cases = OnTheCpu(ReferenceOps(), "tiny", tokens, sets_bytes=20_000, depth=70)
    calls = cases.make_calls(name)
    assert len(calls) >= 4
    with np.errstate(over="ignore", invalid="ignore"):
        for call in calls[:4]:
            call()
    assert cases.uncounted_bytes(name) >= 0


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_launches_kernels_with_known_traffic(name: str) -> None:
    """Lists the launches without running them, as `bench kernels` does to count bytes."""
    ops = GpuOps(InterpretedRuntime())
    cases = OpCases(ops, "tiny", 1, sets_bytes=4_000, depth=70)
    calls = cases.make_calls(name)
    recorded: list[Any] = []
    ops.stream = LaunchRecorder(recorded)
    for call in calls:
        call()
    assert len(recorded) >= len(calls)
    nbytes = sum(map(launch_bytes, recorded)) / len(calls)
    assert nbytes > 0 or name in ("assign_slots", "sample", "sample_controlled")
    if name.startswith("fetch"):
        count = 1 if name == "fetch 1" else 2
        assert nbytes == 2 * count * cases.layout.nbytes


def test_a_row_has_time_bytes_rate_and_utilization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "milliseconds", lambda machine, run: run() or 0.008)
    ops = GpuOps(InterpretedRuntime())
    row = kernels._time(ops, "router", OpCases(ops, "tiny", 1, sets_bytes=4), RATES)
    assert (row["op"], row["sets"], row["us"]) == ("router", 4, 2.0)
    assert row["kernels"] and row["bytes"] > 9 * 64 * 2
    assert row["gb_s"] == pytest.approx(row["bytes"] / 2e3, abs=0.06)
    assert row["rate_fraction"] == pytest.approx(row["gb_s"], abs=0.06)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_timed_on_a_gpu(gpu: GpuOps, name: str, tokens: int) -> None:
    cases = OpCases(gpu, "qwen3.5-35b-a3b:4", tokens, sets_bytes=1 << 20)
    row = kernels._time(gpu, name, cases, RATES)
    assert row["us"] > 0 and row["sets"] >= 4 and row["kernels"]
    assert (row["bytes"] > 0) == (name != "assign_slots")


def test_every_benchmark_model_is_a_known_synthetic_model() -> None:
    for model in MODELS:
        main(["plan", f"synthetic:{model}", "--device", "cpu", "--ram", "1T"])


def test_a_filter_selects_operations_by_part_of_their_name() -> None:
    assert OpCases.names("expert") == ["expert_up", "expert_down"]
    with pytest.raises(ConfigError, match="gated_attention"):
        OpCases.names("no such")


def test_without_a_gpu_bench_kernels_fails_with_one_clear_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        Device().close()
    except NoDevice:
        pass
    else:
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match="GPU"):
        bench_kernels(None, print)
    assert main(["bench", "kernels", "--filter", "sample"]) == 2
    assert "bench kernels" in capsys.readouterr().err
