"""`osmium bench kernels` without a GPU: inputs fit each operation, and every kernel has a byte
count."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from osmium.bench import mma_rate, profile
from osmium.bench.kernels import (
    HEADER,
    MODELS,
    bench_kernels,
    row_text,
    selected_names,
    time_decode_op,
    time_prefill_op,
)
from osmium.bench.op_cases import OpCases
from osmium.bench.prefill_cases import PrefillCases
from osmium.bench.profile import LaunchRecorder, launch_bytes
from osmium.cli import main
from osmium.cuda.driver import Device
from osmium.errors import ConfigError, NoDevice
from osmium.ops import LinearWeight
from osmium.ops.gpu import GpuOps
from osmium.ops.reference import ReferenceOps
from tests.ptx.interpreter import InterpretedRuntime

OPERATIONS, PREFILL = OpCases.names(), PrefillCases.names()

RATES = {"VRAM": 1.0, "link": 1.0, "mma_s8_tops": 1000.0}


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
    row = time_decode_op(ops, "router", OpCases(ops, "tiny", 1, sets_bytes=4), RATES)
    assert (row["op"], row["sets"], row["us"]) == ("router", 4, 2.0)
    assert row["kernels"] and row["bytes"] > 9 * 64 * 2
    assert row["gb_s"] == pytest.approx(row["bytes"] / 2e3, abs=0.06)
    assert row["rate_fraction"] == pytest.approx(row["gb_s"], abs=0.06)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_timed_on_a_gpu(gpu: GpuOps, name: str, tokens: int) -> None:
    cases = OpCases(gpu, "qwen3.5-35b-a3b:4", tokens, sets_bytes=1 << 20)
    row = time_decode_op(gpu, name, cases, RATES)
    assert row["us"] > 0 and row["sets"] >= 4 and row["kernels"]
    assert (row["bytes"] > 0) == (name != "assign_slots")


def test_every_benchmark_model_is_a_known_synthetic_model() -> None:
    for model in MODELS:
        main(["plan", f"synthetic:{model}", "--device", "cpu", "--ram", "1T"])


def test_a_filter_selects_operations_by_part_of_their_name() -> None:
    assert selected_names("expert_")[0] == ["expert_up", "expert_down"]
    decode, prefill = selected_names("gemm")
    assert not decode and len(prefill) > 12 and all("gemm" in name for name in prefill)
    assert selected_names(None) == (OPERATIONS, PREFILL)
    assert not set(OPERATIONS) & set(PREFILL)
    with pytest.raises(ConfigError, match=r"gated_attention.*int4_gemm"):
        selected_names("no such")


class PrefillOnTheCpu(PrefillCases):
    """KV in the CPU's format, and at most 40 rows and 100 tokens of context."""

    def __init__(self, name: str) -> None:
        super().__init__(ReferenceOps(), "tiny", name, sets_bytes=20_000, max_set_bytes=40_000)
        self.kv_dtype = "f32"

    def _gemm(self, name: str, rows: int) -> Any:
        return super()._gemm(name, 40)

    def _grouped(self, part: str, rows: int) -> Any:
        return super()._grouped(part, rows // 16)

    def _attention_rows(self, context: int) -> Any:
        return super()._attention_rows(100)


@pytest.mark.parametrize("name", PREFILL)
def test_every_prefill_case_runs_on_the_cpu(name: str) -> None:
    case = PrefillOnTheCpu(name).make()
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for call in case.calls[:2]:
            call()
    assert case.multiply_adds > 0 or "gemm" not in name
    assert (case.digit_passes == 2) == ("gemm" in name)


@pytest.mark.parametrize("name", PREFILL)
def test_every_prefill_case_launches_its_timed_kernel(name: str) -> None:
    """Lists the launches without running them."""
    ops = GpuOps(InterpretedRuntime())
    launches: list[Any] = []
    ops.stream = LaunchRecorder(launches)
    cases = PrefillCases(ops, "qwen3.5-35b-a3b:4", name, sets_bytes=4_000, max_set_bytes=20 << 20)
    case = cases.make()
    launches.clear()
    for call in case.calls:
        call()
    timed = [launch for launch in launches if case.timed in launch[0].name]
    assert len(timed) >= len(case.calls)
    assert sum(map(launch_bytes, timed)) > 0 or name.startswith("group_by_expert")
    for launch, _, _ in timed if "gemm" in name else ():
        assert launch.name.startswith(name.split(" ")[0])


def test_each_expert_of_a_grouped_case_has_equal_rows() -> None:
    cases = PrefillCases(ReferenceOps(), "tiny", "int4_moe_gemm_up 64", max_set_bytes=300_000)
    ids = cases._balanced_ids(4, 64)
    assert ids.shape == (128, 2) and (np.bincount(ids.reshape(-1)) == 64).all()
    assert (ids[:, 0] != ids[:, 1]).all()
    case = cases.make()
    assert case.sizes["experts"] == 4 < cases.config.num_experts, "the set fits its bytes"
    assert case.multiply_adds == 4 * 64 * case.sizes["n"] * case.sizes["k"]
    assert cases._grouped_bytes(4, 64) <= 300_000 < cases._grouped_bytes(8, 64)


def test_a_prefill_row_has_its_share_of_the_mma_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A multiplication by two digits is twice the operations in int8."""
    monkeypatch.setattr(profile, "milliseconds", lambda machine, run: run() or 4e-3)
    ops = GpuOps(InterpretedRuntime())
    cases = PrefillCases(ops, "tiny", "int4_gemm qkvz 512")
    data, scale = cases._noise((4, 64), np.uint8), cases._noise((4, 1), np.float16)
    matrix = LinearWeight("int4", 4, 128, data, scale, 128)
    monkeypatch.setattr(cases, "_matrices", lambda name: [matrix] * 4)
    monkeypatch.setattr(cases, "make", lambda: cases._gemm("any", 9))
    row = time_prefill_op(ops, cases, RATES)
    assert row["kernels"] == ["int4_gemm_f32"], "splitting into digits is not timed"
    assert row["us"] == 1.0
    operations = 2 * 9 * 4 * 128
    assert row["tflops"] == round(operations / 1e6, 1)
    assert row["s8_fraction"] == round(2 * operations / 1e9, 3)
    assert len(f"{'':24}{row_text(row)}") == len(HEADER) + len("  int4_gemm_f32")


def test_the_mma_rate_counts_the_operations_of_all_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter of milliseconds stands in for CUDA events; the sums go to an array of bytes."""
    for name, count in (("ROUNDS", 2), ("LAUNCHES", 1), ("SAMPLES", 1)):
        monkeypatch.setattr(mma_rate, name, count)
    ticks = iter(range(1000))
    mark = SimpleNamespace(record=lambda _: Tick(next(ticks)))
    monkeypatch.setattr(mma_rate, "Event", lambda device: mark)
    runtime: Any = InterpretedRuntime()
    runtime.device = None
    ops = GpuOps(runtime)
    out = ops.empty((2, 5, 256), np.uint8)
    found = mma_rate.mma_rates(ops, out)
    warps, blocks = 8, 2  # 2,560 bytes hold the sums of two blocks
    instructions = blocks * warps * 2 * 16  # in 2 rounds
    assert found["mma_s8_tops"] == pytest.approx(instructions * 2 * 16 * 8 * 32 / 1e9)
    assert found["mma_bf16_tflops"] == pytest.approx(found["mma_s8_tops"] / 2)
    sums = ops.copy_d2h(out).reshape(-1)[:2048].view(np.float32)
    assert (sums >= 2 * 64 * 16).all(), "the sums of bf16 products of at least 1"
    assert mma_rate.mma_rates(ReferenceOps()) == {"mma_s8_tops": 0, "mma_bf16_tflops": 0}


class Tick(int):
    """A time in milliseconds that can be closed like an event."""

    def close(self) -> None:
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("name", PREFILL)
def test_every_prefill_case_is_timed_on_a_gpu(gpu: GpuOps, name: str) -> None:
    cases = PrefillCases(
        gpu, "qwen3.5-35b-a3b:4", name, sets_bytes=1 << 20, max_set_bytes=100 << 20
    )
    row = time_prefill_op(gpu, cases, RATES)
    assert row["us"] > 0 and row["kernels"]
    assert (row["bytes"] > 0) == (not name.startswith("group_by_expert"))
    assert ("s8_fraction" in row) == ("gemm" in name)


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
