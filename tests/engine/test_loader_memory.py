"""Memory while a model is loaded: peak use, and no leak when loading fails."""

import errno
import gc
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium import loader
from osmium.config import EngineConfig
from osmium.cuda.memory import HostKind
from osmium.engine.engine import Engine
from osmium.engine.request import SamplingParams
from osmium.errors import CheckpointError, ConfigError, CudaError, OutOfMemory
from osmium.experts.cache import resident, verify
from osmium.experts.runner import ExpertCounters
from osmium.experts.usage import slots_per_layer, snapshot_usage
from osmium.ops import LinearWeight
from osmium.planning import hardware
from osmium.weights import PackedModel, open_model, open_packed
from tests.engine.conftest import CASE
from tests.engine.fake_gpu import FakeGpu
from tests.models.build import write_checkpoint

KINDS: list[HostKind] = ["registered-huge", "pinned", "write-combined"]

REAL = os.preadv


@pytest.fixture
def copy(packed: PackedModel, tmp_path: Path) -> Path:
    """A copy of the packed file for damage."""
    model_loader = tmp_path / "copy.osmium"
    model_loader.write_bytes(packed.path.read_bytes())
    return model_loader


def options(packed: Path, **more: Any) -> dict[str, Any]:
    settings = {
        "context": 64,
        "prefill_chunk": 16,
        "page_size": 16,
        "vram": 2 << 30,
        "ram": 1 << 30,
    }
    return {"cache_dir": str(packed.parent), **settings, **more}


def all_experts(packed: PackedModel) -> npt.NDArray[np.uint8]:
    return packed.all_packed_experts()


@pytest.mark.parametrize("kind", KINDS)
def test_resident_experts_are_loaded_through_one_layer_of_host_memory(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch, kind: HostKind
) -> None:
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch, kind)
    seen: list[tuple[str, int, int]] = []
    engine = loader.load(
        packed.path, "gpu", progress=lambda *one: seen.append(one), **options(packed.path)
    )
    cache = engine.runner.expert_runner.cache
    assert cache.capacity == cache.num_experts
    count = cache.num_experts * len(CASE.kinds)
    assert verify(engine.runner.ops, cache, all_experts(packed), 10**6, 0) == count
    planned = sum(engine.plan.ram.values())
    assert set(engine.plan.ram) == {"embedding", "loading buffer"}
    # Each token ring of the decode state takes a page or two.
    assert gpu.peak_bytes["host"] <= planned + 8 * 4096
    assert gpu.host_bytes() <= engine.plan.ram["embedding"] + 8 * 4096
    assert [done for stage, done, _ in seen if stage == "experts"] == [1, 2, 3, 4, 5, 6]
    engine.close()
    assert not gpu.held


@pytest.mark.parametrize("kind", KINDS)
def test_host_experts_hold_every_packed_expert(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch, kind: HostKind
) -> None:
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch, kind)
    engine = loader.load(packed.path, "gpu", **options(packed.path, expert_slots=8))
    runner = engine.runner
    assert runner.expert_runner.host_experts is not None
    host_bytes = runner.ops.host_view(runner.expert_runner.host_experts.packed)
    assert np.array_equal(host_bytes, all_experts(packed))
    assert gpu.peak_bytes["host"] <= sum(engine.plan.ram.values()) + 8 * 4096
    engine.close()
    assert not gpu.held


def test_matrices_with_scales_are_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    write_checkpoint(CASE, folder)
    quantised: dict[str, Any] = {"gpu_expert_bits": 8, "attention_quant": "int4"}
    packed = open_model(folder, EngineConfig(cache_dir=str(tmp_path), **quantised))
    assert isinstance(packed, PackedModel)
    FakeGpu(4 << 30).install(monkeypatch)
    model_loader = loader.Loader(packed.path, "gpu", **options(packed.path, **quantised))
    model_loader.engine().close()
    assert model_loader._weights is not None
    for name, of in (("layers.0.qkvz", 2), ("layers.0.shared_up", 1)):
        uploaded, wanted = model_loader._weights[name], packed.tensor(name)
        assert isinstance(wanted, LinearWeight) and wanted.scale is not None
        assert wanted.scale.ndim == of and uploaded.group == wanted.group
        for have, want in ((uploaded.data, wanted.data), (uploaded.scale, wanted.scale)):
            assert np.array_equal(model_loader.ops.copy_d2h(have), want)
    model_loader.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("staging_bytes", [8192, 5 * 4096, 1 << 20])
def test_uploaded_weights_equal_the_files_weights(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch, kind: HostKind, staging_bytes: int
) -> None:
    monkeypatch.setattr(loader, "STAGING_BYTES", staging_bytes)
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch, kind)
    model_loader = loader.Loader(packed.path, "gpu", **options(packed.path))
    engine = model_loader.engine()
    assert model_loader._weights is not None
    for name, uploaded in model_loader._weights.items():
        if name not in packed.parts:
            assert name == "head" and CASE.tied
            continue
        wanted = packed.tensor(name)
        if isinstance(wanted, LinearWeight):
            pairs = [(uploaded.data, wanted.data), (uploaded.scale, wanted.scale)]
        else:
            pairs = [(uploaded, wanted)]
        for have, want in pairs:
            if want is not None:
                assert np.array_equal(model_loader.ops.copy_d2h(have), want), name
    engine.close()
    model_loader.close()
    assert not gpu.held


@pytest.mark.parametrize("slots", [None, 8])
def test_any_refused_allocation_frees_everything(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch, slots: int | None
) -> None:
    more: dict[str, Any] = {} if slots is None else {"expert_slots": slots}
    unlimited = FakeGpu(4 << 30)
    unlimited.install(monkeypatch)
    loader.load(packed.path, "gpu", **options(packed.path, **more)).close()
    assert unlimited.num_allocations > 60
    for number in range(0, unlimited.num_allocations, 7):
        gpu = FakeGpu(4 << 30, refuse=number)
        gpu.install(monkeypatch)
        with pytest.raises(OutOfMemory, match=r"Cannot allocate"):
            loader.load(packed.path, "gpu", **options(packed.path, **more))
        assert not gpu.held, f"allocation {number}"


@pytest.mark.parametrize("slots", [None, 8])
def test_a_loader_can_be_used_again_after_out_of_memory(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch, slots: int | None
) -> None:
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch)
    model_loader = loader.Loader(packed.path, "gpu", **options(packed.path))
    more: dict[str, Any] = {} if slots is None else {"expert_slots": slots}
    model_loader.engine(**more).close()
    gc.collect()
    host_bytes = (
        0 if model_loader._host_experts is None else model_loader._host_experts.packed.nbytes
    )
    weights = gpu.bytes_of("cuMemAlloc")
    gpu.refuse = gpu.num_allocations + 3
    with pytest.raises(OutOfMemory):
        model_loader.engine(**more)
    gc.collect()
    assert gpu.bytes_of("cuMemAlloc") <= weights
    assert gpu.host_bytes() <= host_bytes + model_loader.packed.parts["embed"].nbytes + 16 * 4096
    engine = model_loader.engine(**more)
    cache = engine.runner.expert_runner.cache
    assert cache.capacity == (slots or cache.num_experts)
    engine.close()
    model_loader.close()
    assert not gpu.held


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_a_device_without_bulk_copies_does_not_prefetch(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    gpu = FakeGpu(4 << 30, capability=capability)
    gpu.install(monkeypatch)
    engine = loader.load(packed.path, "gpu", **options(packed.path, expert_slots=8))
    assert (engine.runner.expert_runner.prefetch_state(1) is not None) == (capability[0] >= 9)
    engine.close()


def test_out_of_vram_while_loading_names_the_owners_of_memory(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes VRAM after the plan; the error lists the allocations."""
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch)

    def progress(stage: str, done: int, total: int) -> None:
        gpu.vram = gpu.bytes_of("cuMemAlloc")

    with pytest.raises(OutOfMemory, match=r"are free; Osmium uses"):
        loader.load(packed.path, "gpu", progress=progress, **options(packed.path))
    assert not gpu.held


@pytest.mark.parametrize("slots", [None, 8])
def test_a_file_that_shrinks_while_loading_is_refused(
    copy: Path, monkeypatch: pytest.MonkeyPatch, slots: int | None
) -> None:
    more: dict[str, Any] = {} if slots is None else {"expert_slots": slots}
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch)
    remaining = open_packed(copy).entry("experts.2").offset + 4096

    def progress(stage: str, done: int, total: int) -> None:
        os.truncate(copy, remaining)

    with pytest.raises(CheckpointError, match=rf"copy\.osmium ends at byte {remaining};.*expected"):
        loader.load(copy, "gpu", progress=progress, **options(copy, **more))
    assert not gpu.held


@pytest.mark.parametrize("slots", [None, 8])
def test_a_wrong_byte_is_found_while_loading(
    copy: Path, monkeypatch: pytest.MonkeyPatch, slots: int | None
) -> None:
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch)
    more: dict[str, Any] = {} if slots is None else {"expert_slots": slots}
    for name in ("experts.5", "layers.0.qkvz.data", "embed.data"):
        entry = open_packed(copy).entry(name)
        with open(copy, "r+b") as file:
            for flip in (1, 0):
                file.seek(entry.offset + entry.nbytes - 1)
                old = file.read(1)[0]
                file.seek(entry.offset + entry.nbytes - 1)
                file.write(bytes([old ^ 1]))
                file.flush()
                if flip:
                    with pytest.raises(CheckpointError, match=f"{re.escape(name)} has checksum"):
                        loader.load(copy, "gpu", **options(copy, **more))
                    assert not gpu.held


def test_a_read_error_while_loading_names_the_byte(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch)
    at = open_packed(copy).entry("experts.4").offset

    def broken(file: int, buffers: Sequence[Any], offset: int) -> int:
        if offset <= at < offset + len(buffers[0]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return REAL(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match=rf"copy\.osmium .* byte {at}: Input/output error"):
        loader.load(copy, "gpu", **options(copy))
    assert not gpu.held


@pytest.mark.parametrize("slots", [None, 8])
def test_one_missing_byte_of_host_memory_is_refused_by_the_plan(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch, slots: int | None
) -> None:
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch)
    more: dict[str, Any] = {} if slots is None else {"expert_slots": slots}
    settings = options(packed.path, **{**more, "ram": None})
    plan = loader.plan_for(packed.path, "gpu", **settings)
    needed = sum(plan.ram.values())
    monkeypatch.setattr(hardware, "available_ram", lambda: (needed - 1, 0))
    with pytest.raises(ConfigError, match=r"needs [\d.]+ GiB of host memory.* [\d.]+ GiB can be"):
        loader.load(packed.path, "gpu", **settings)
    assert gpu.num_allocations == 0, "no memory was allocated"
    monkeypatch.setattr(hardware, "available_ram", lambda: (needed, 0))
    loader.load(packed.path, "gpu", **settings).close()
    assert not gpu.held


# -- usage saved between starts --------------------------------------------------------------------


def load_with_usage(packed: PackedModel, folder: Path, **more: Any) -> Engine:
    settings = {"expert_slots": 6, "cache_dir": str(folder), **more}
    return loader.load(packed.path, "cpu", **options(packed.path, **settings))


def generate(engine: Engine, seed: int = 1) -> list[int]:
    ids = np.random.default_rng(seed).integers(0, CASE.vocab, 20).tolist()
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=12)
    return [token.id for token in engine.generate(ids, params)]


def resident_experts(engine: Engine) -> npt.NDArray[np.bool_]:
    return engine.run_on_engine_thread(
        lambda: resident(engine.runner.ops, engine.runner.expert_runner.cache)
    )


def most_used(engine: Engine, slots: int) -> npt.NDArray[np.bool_]:
    """The experts that a start with this mean number of slots per layer loads: bool [L, E]."""
    usage = engine.run_on_engine_thread(
        lambda: snapshot_usage(engine.runner.ops, engine.runner.expert_runner.cache)
    )
    out = np.zeros_like(usage.resident)
    slots_per_layer_ = slots_per_layer(usage, slots, engine.config.top_k) or [slots] * len(out)
    for layer, (row, num_slots) in enumerate(zip(out, slots_per_layer_, strict=True)):
        row[usage.top_experts(layer, num_slots)] = True
    return out


def usage_files(folder: Path) -> list[Path]:
    return [*folder.glob("*.usage*")]


@pytest.mark.parametrize("stop", [Engine.close, lambda one: one.stop("Host memory is down.")])
def test_a_second_start_begins_with_the_most_used_experts(
    packed: PackedModel, tmp_path: Path, stop: Callable[[Engine], None]
) -> None:
    first = load_with_usage(packed, tmp_path)
    assert not resident_experts(first).any()
    response = generate(first)
    expected, first_counters = most_used(first, 6), first.status()["experts"]
    stop(first)
    first.close()
    (file,) = usage_files(tmp_path)
    second = load_with_usage(packed, tmp_path)
    cache = second.runner.expert_runner.cache
    assert np.array_equal(resident_experts(second), expected) and expected.sum() == 6 * len(
        CASE.kinds
    )
    assert (
        verify(second.runner.ops, cache, all_experts(packed), 1000, 0)
        == resident_experts(second).sum()
    )
    assert second.status()["experts"] == vars(ExpertCounters(0, 0, 0, 0))
    assert generate(second) == response, "residency changes no token"
    second_counters = second.status()["experts"]
    assert (
        second_counters["routed"]
        == first_counters["routed"]
        == second_counters["hit"] + second_counters["missed"]
    )
    assert second_counters["hit"] > first_counters["hit"]
    assert verify(second.runner.ops, cache, all_experts(packed), 1000, 0) > 0
    second.close()
    assert usage_files(tmp_path) == [file], "the same file, and no temporary file"


def test_a_start_with_another_number_of_slots_loads_the_most_used_experts(
    packed: PackedModel, tmp_path: Path
) -> None:
    first = load_with_usage(packed, tmp_path, expert_slots=12)
    generate(first)
    wanted = {slots: most_used(first, slots) for slots in (4, 9, 15)}
    assert len({*wanted[9].sum(axis=1)}) > 1, "some layers have more slots than others"
    first.close()
    for slots, experts in wanted.items():
        second = load_with_usage(packed, tmp_path, expert_slots=slots)
        assert np.array_equal(resident_experts(second), experts)
        second.close()


def test_damaged_usage_is_ignored(
    packed: PackedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = load_with_usage(packed, tmp_path)
    generate(first)
    first.close()
    (file,) = usage_files(tmp_path)
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    second = load_with_usage(packed, tmp_path)
    assert file.name in caplog.text and "damaged" in caplog.text
    assert not resident_experts(second).any()
    generate(second)
    second.close()
    third = load_with_usage(packed, tmp_path)
    assert resident_experts(third).any(), "saved again"
    third.close()


@pytest.mark.parametrize(
    "more", [{"enable_expert_cache": False}, {"expert_slots": None}, {"expert_slots": 16}]
)
def test_without_an_expert_cache_no_usage_is_saved(
    packed: PackedModel, tmp_path: Path, more: dict[str, Any]
) -> None:
    engine = load_with_usage(packed, tmp_path, **more)
    generate(engine)
    engine.close()
    assert not usage_files(tmp_path)


def test_synthetic_models_and_benchmarks_save_no_usage(packed: PackedModel, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cache_dir": str(tmp_path), "context": 64, "expert_slots": 4}
    synthetic = loader.load("synthetic:tiny", "cpu", **settings)
    list(synthetic.generate([1, 2, 3], SamplingParams(max_tokens=3)))
    synthetic.close()
    model_loader = loader.Loader(packed.path, "cpu", **settings)
    engine = model_loader.engine()
    generate(engine)
    engine.close()
    model_loader.close()
    assert not usage_files(tmp_path)


def test_a_failed_engine_saves_no_usage(packed: PackedModel, tmp_path: Path) -> None:
    engine = load_with_usage(packed, tmp_path)
    generate(engine)

    def fail() -> None:
        raise CudaError("gone", call="cuLaunchKernel", name="x", code=700, context_lost=True)

    with pytest.raises(CudaError):
        engine.run_on_engine_thread(fail)
    engine.close()
    assert engine.failure is not None
    assert not usage_files(tmp_path)


def test_an_unwritable_cache_folder_does_not_fail_close(
    packed: PackedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = load_with_usage(packed, tmp_path / "file")
    generate(engine)
    (tmp_path / "file").write_text("")
    engine.close()
    assert engine.failure is None and "cannot be saved" in caplog.text


def test_on_a_gpu_saved_usage_fills_the_slots(
    packed: PackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_with_usage(packed, tmp_path)
    generate(first)
    expected = most_used(first, 6)
    first.close()
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch)
    settings = options(packed.path, expert_slots=6, cache_dir=str(tmp_path))
    engine = loader.load(packed.path, "gpu", **settings)
    cache = engine.runner.expert_runner.cache
    assert np.array_equal(resident_experts(engine), expected)
    assert (
        verify(engine.runner.ops, cache, all_experts(packed), 1000, 0)
        == resident_experts(engine).sum()
    )
    engine.close()
    assert not gpu.held


def test_bench_load_reports_load_and_disk_speed(packed: PackedModel) -> None:
    tool = Path(__file__).parents[2] / "tools" / "bench_load"
    command = [sys.executable, str(tool), str(packed.path), "--gpu-expert-bits", "16"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--context", "64"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["reader_mode"] in ("direct", "cached")
    assert found["bounced_mode"] in ("bounced", "cached")
    for name in ("reader", "bounced", "load"):
        assert found[f"{name}_ratio"] == found[f"{name}_gb_s"] / max(found["raw_gb_s"])
        median = statistics.median(found["raw_gb_s"])
        assert found[f"{name}_ratio_median"] == found[f"{name}_gb_s"] / median
    assert 0 < found["load_s"] <= found["first_token_s"]
