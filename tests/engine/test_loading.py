"""How a model gets into memory: what is held meanwhile, and what is left when it goes wrong."""

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
    """A packed file to be hurt."""
    made = tmp_path / "copy.osmium"
    made.write_bytes(packed.path.read_bytes())
    return made


def options(packed: Path, **more: Any) -> dict[str, Any]:
    settings = {
        "context": 64,
        "prefill_chunk": 16,
        "page_size": 16,
        "vram": 2 << 30,
        "ram": 1 << 30,
    }
    return {"cache_dir": str(packed.parent), **settings, **more}


def records(packed: PackedModel) -> npt.NDArray[np.uint8]:
    return packed.all_records()


@pytest.mark.parametrize("kind", KINDS)
def test_resident_slots_are_read_through_one_layer_of_host_memory(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch, kind: HostKind
) -> None:
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch, kind)
    seen: list[tuple[str, int, int]] = []
    engine = loader.load(
        packed.path, "gpu", progress=lambda *one: seen.append(one), **options(packed.path)
    )
    cache = engine.runner.expert_runner.cache
    assert cache.capacity == cache.experts
    count = cache.experts * len(CASE.kinds)
    assert verify(engine.runner.ops, cache, records(packed), 10**6, 0) == count
    planned = sum(engine.plan.ram.values())
    assert set(engine.plan.ram) == {"embedding", "loading buffer"}
    # The mailboxes of replies are a page or two each.
    assert gpu.most["host"] <= planned + 8 * 4096
    assert gpu.host_bytes() <= engine.plan.ram["embedding"] + 8 * 4096
    assert [done for stage, done, _ in seen if stage == "experts"] == [1, 2, 3, 4, 5, 6]
    engine.close()
    assert not gpu.held


@pytest.mark.parametrize("kind", KINDS)
def test_an_arena_holds_every_record(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch, kind: HostKind
) -> None:
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch, kind)
    engine = loader.load(packed.path, "gpu", **options(packed.path, expert_slots=8))
    runner = engine.runner
    assert runner.expert_runner.host_experts is not None
    arena = runner.ops.host_view(runner.expert_runner.host_experts.records)
    assert np.array_equal(arena, records(packed))
    assert gpu.most["host"] <= sum(engine.plan.ram.values()) + 8 * 4096
    engine.close()
    assert not gpu.held


def test_matrices_with_scales_are_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    write_checkpoint(CASE, folder)
    quantised: dict[str, Any] = {"gpu_expert_bits": 8, "attention_quant": "int4"}
    packed = open_model(folder, EngineConfig(cache_dir=str(tmp_path), **quantised))
    assert isinstance(packed, PackedModel)
    FakeGpu(4 << 30).install(monkeypatch)
    made = loader.Loader(packed.path, "gpu", **options(packed.path, **quantised))
    made.engine().close()
    assert made._weights is not None
    for name, of in (("layers.0.qkvz", 2), ("layers.0.shared_up", 1)):
        placed, wanted = made._weights[name], packed.tensor(name)
        assert isinstance(wanted, LinearWeight) and wanted.scale is not None
        assert wanted.scale.ndim == of and placed.group == wanted.group
        for have, want in ((placed.data, wanted.data), (placed.scale, wanted.scale)):
            assert np.array_equal(made.ops.copy_d2h(have), want)
    made.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [8192, 5 * 4096, 1 << 20])
def test_weights_on_the_device_are_those_of_the_file(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch, kind: HostKind, room: int
) -> None:
    monkeypatch.setattr(loader, "STAGING_BYTES", room)
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch, kind)
    made = loader.Loader(packed.path, "gpu", **options(packed.path))
    engine = made.engine()
    assert made._weights is not None
    for name, placed in made._weights.items():
        if name not in packed.parts:
            assert name == "head" and CASE.tied
            continue
        wanted = packed.tensor(name)
        if isinstance(wanted, LinearWeight):
            pairs = [(placed.data, wanted.data), (placed.scale, wanted.scale)]
        else:
            pairs = [(placed, wanted)]
        for have, want in pairs:
            if want is not None:
                assert np.array_equal(made.ops.copy_d2h(have), want), name
    engine.close()
    made.close()
    assert not gpu.held


@pytest.mark.parametrize("slots", [None, 8])
def test_whichever_allocation_is_refused_all_is_given_back(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch, slots: int | None
) -> None:
    more: dict[str, Any] = {} if slots is None else {"expert_slots": slots}
    whole = FakeGpu(4 << 30)
    whole.install(monkeypatch)
    loader.load(packed.path, "gpu", **options(packed.path, **more)).close()
    assert whole.asked > 60
    for number in range(0, whole.asked, 7):
        gpu = FakeGpu(4 << 30, refuse=number)
        gpu.install(monkeypatch)
        with pytest.raises(OutOfMemory, match=r"Cannot allocate"):
            loader.load(packed.path, "gpu", **options(packed.path, **more))
        assert not gpu.held, f"allocation {number}"


@pytest.mark.parametrize("slots", [None, 8])
def test_a_loader_goes_on_after_memory_was_refused(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch, slots: int | None
) -> None:
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch)
    made = loader.Loader(packed.path, "gpu", **options(packed.path))
    more: dict[str, Any] = {} if slots is None else {"expert_slots": slots}
    made.engine(**more).close()
    gc.collect()
    arena = 0 if made._host_experts is None else made._host_experts.records.nbytes
    weights = gpu.bytes_of("cuMemAlloc")
    gpu.refuse = gpu.asked + 3
    with pytest.raises(OutOfMemory):
        made.engine(**more)
    gc.collect()
    assert gpu.bytes_of("cuMemAlloc") <= weights
    assert gpu.host_bytes() <= arena + made.packed.parts["embed"].nbytes + 16 * 4096
    engine = made.engine(**more)
    cache = engine.runner.expert_runner.cache
    assert cache.capacity == (slots or cache.experts)
    engine.close()
    made.close()
    assert not gpu.held


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_a_device_that_cannot_copy_in_bulk_does_not_guess(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    gpu = FakeGpu(4 << 30, capability=capability)
    gpu.install(monkeypatch)
    engine = loader.load(packed.path, "gpu", **options(packed.path, expert_slots=8))
    assert (engine.runner.expert_runner.prefetch_state(1) is not None) == (capability[0] >= 9)
    engine.close()


def test_vram_that_ends_while_it_is_filled(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else takes it after the plan was made: the error says who holds what."""
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch)

    def progress(stage: str, done: int, total: int) -> None:
        gpu.vram = gpu.bytes_of("cuMemAlloc")

    with pytest.raises(OutOfMemory, match=r"are free; Osmium uses"):
        loader.load(packed.path, "gpu", progress=progress, **options(packed.path))
    assert not gpu.held


@pytest.mark.parametrize("slots", [None, 8])
def test_a_file_that_shrinks_while_it_is_loaded(
    copy: Path, monkeypatch: pytest.MonkeyPatch, slots: int | None
) -> None:
    more: dict[str, Any] = {} if slots is None else {"expert_slots": slots}
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch)
    left = open_packed(copy).entry("experts.2").offset + 4096

    def progress(stage: str, done: int, total: int) -> None:
        os.truncate(copy, left)

    with pytest.raises(CheckpointError, match=rf"copy\.osmium ends at byte {left};.*expected"):
        loader.load(copy, "gpu", progress=progress, **options(copy, **more))
    assert not gpu.held


@pytest.mark.parametrize("slots", [None, 8])
def test_a_byte_that_is_wrong_is_found_while_loading(
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


def test_a_disk_that_fails_while_loading(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_host_memory_that_is_a_little_short_is_refused_by_the_plan(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch, slots: int | None
) -> None:
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch)
    more: dict[str, Any] = {} if slots is None else {"expert_slots": slots}
    settings = options(packed.path, **{**more, "ram": None})
    plan = loader.plan_for(packed.path, "gpu", **settings)
    need = sum(plan.ram.values())
    monkeypatch.setattr(hardware, "available_ram", lambda: (need - 1, 0))
    with pytest.raises(ConfigError, match=r"needs [\d.]+ GiB of host memory.* [\d.]+ GiB can be"):
        loader.load(packed.path, "gpu", **settings)
    assert gpu.asked == 0, "nothing was allocated"
    monkeypatch.setattr(hardware, "available_ram", lambda: (need, 0))
    loader.load(packed.path, "gpu", **settings).close()
    assert not gpu.held


# -- heat, from one start to the next --------------------------------------------------------------


def warm(packed: PackedModel, folder: Path, **more: Any) -> Engine:
    settings = {"expert_slots": 6, "cache_dir": str(folder), **more}
    return loader.load(packed.path, "cpu", **options(packed.path, **settings))


def talk(engine: Engine, seed: int = 1) -> list[int]:
    ids = np.random.default_rng(seed).integers(0, CASE.vocab, 20).tolist()
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=12)
    return [token.id for token in engine.generate(ids, params)]


def residents(engine: Engine) -> npt.NDArray[np.bool_]:
    return engine.run_on_engine_thread(
        lambda: resident(engine.runner.ops, engine.runner.expert_runner.cache)
    )


def hottest(engine: Engine, slots: int) -> npt.NDArray[np.bool_]:
    """Who a start with so many slots a layer, in the mean, begins with: bool [L, E]."""
    heat = engine.run_on_engine_thread(
        lambda: snapshot_usage(engine.runner.ops, engine.runner.expert_runner.cache)
    )
    out = np.zeros_like(heat.resident)
    each = slots_per_layer(heat, slots, engine.config.top_k) or [slots] * len(out)
    for layer, (row, own) in enumerate(zip(out, each, strict=True)):
        row[heat.top_experts(layer, own)] = True
    return out


def kept(folder: Path) -> list[Path]:
    return [*folder.glob("*.usage*")]


@pytest.mark.parametrize("stop", [Engine.close, lambda one: one.stop("Host memory is down.")])
def test_a_second_start_begins_with_what_was_hot(
    packed: PackedModel, tmp_path: Path, stop: Callable[[Engine], None]
) -> None:
    first = warm(packed, tmp_path)
    assert not residents(first).any()
    said = talk(first)
    hot, cold = hottest(first, 6), first.status()["experts"]
    stop(first)
    first.close()
    (file,) = kept(tmp_path)
    second = warm(packed, tmp_path)
    cache = second.runner.expert_runner.cache
    assert np.array_equal(residents(second), hot) and hot.sum() == 6 * len(CASE.kinds)
    assert verify(second.runner.ops, cache, records(packed), 1000, 0) == residents(second).sum()
    assert second.status()["experts"] == vars(ExpertCounters(0, 0, 0, 0))
    assert talk(second) == said, "where experts are changes no token"
    again = second.status()["experts"]
    assert again["routed"] == cold["routed"] == again["hit"] + again["missed"]
    assert again["hit"] > cold["hit"]
    assert verify(second.runner.ops, cache, records(packed), 1000, 0) > 0
    second.close()
    assert kept(tmp_path) == [file], "the same file, and no temporary one"


def test_another_number_of_slots_takes_the_hottest(packed: PackedModel, tmp_path: Path) -> None:
    first = warm(packed, tmp_path, expert_slots=12)
    talk(first)
    wanted = {slots: hottest(first, slots) for slots in (4, 9, 15)}
    assert len({*wanted[9].sum(axis=1)}) > 1, "some layers have more slots than others"
    first.close()
    for slots, who in wanted.items():
        second = warm(packed, tmp_path, expert_slots=slots)
        assert np.array_equal(residents(second), who)
        second.close()


def test_heat_that_is_damaged_is_left_aside(
    packed: PackedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = warm(packed, tmp_path)
    talk(first)
    first.close()
    (file,) = kept(tmp_path)
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    second = warm(packed, tmp_path)
    assert file.name in caplog.text and "damaged" in caplog.text
    assert not residents(second).any()
    talk(second)
    second.close()
    third = warm(packed, tmp_path)
    assert residents(third).any(), "written anew"
    third.close()


@pytest.mark.parametrize(
    "more", [{"enable_expert_cache": False}, {"expert_slots": None}, {"expert_slots": 16}]
)
def test_where_nothing_is_cached_nothing_is_kept(
    packed: PackedModel, tmp_path: Path, more: dict[str, Any]
) -> None:
    engine = warm(packed, tmp_path, **more)
    talk(engine)
    engine.close()
    assert not kept(tmp_path)


def test_of_made_up_models_and_of_benchmarks_nothing_is_kept(
    packed: PackedModel, tmp_path: Path
) -> None:
    where: dict[str, Any] = {"cache_dir": str(tmp_path), "context": 64, "expert_slots": 4}
    made_up = loader.load("synthetic:tiny", "cpu", **where)
    list(made_up.generate([1, 2, 3], SamplingParams(max_tokens=3)))
    made_up.close()
    made = loader.Loader(packed.path, "cpu", **where)
    engine = made.engine()
    talk(engine)
    engine.close()
    made.close()
    assert not kept(tmp_path)


def test_an_engine_that_fails_keeps_nothing(packed: PackedModel, tmp_path: Path) -> None:
    engine = warm(packed, tmp_path)
    talk(engine)

    def fail() -> None:
        raise CudaError("gone", call="cuLaunchKernel", name="x", code=700, context_lost=True)

    with pytest.raises(CudaError):
        engine.run_on_engine_thread(fail)
    engine.close()
    assert engine.failure is not None
    assert not kept(tmp_path)


def test_a_cache_folder_that_cannot_be_written_fails_no_close(
    packed: PackedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = warm(packed, tmp_path / "file")
    talk(engine)
    (tmp_path / "file").write_text("")
    engine.close()
    assert engine.failure is None and "cannot be saved" in caplog.text


def test_on_a_gpu_heat_fills_slots_by_the_copy_engine(
    packed: PackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = warm(packed, tmp_path)
    talk(first)
    hot = hottest(first, 6)
    first.close()
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch)
    settings = options(packed.path, expert_slots=6, cache_dir=str(tmp_path))
    engine = loader.load(packed.path, "gpu", **settings)
    cache = engine.runner.expert_runner.cache
    assert np.array_equal(residents(engine), hot)
    assert verify(engine.runner.ops, cache, records(packed), 1000, 0) == residents(engine).sum()
    engine.close()
    assert not gpu.held


def test_the_speed_of_loading_is_measured_beside_the_disks(packed: PackedModel) -> None:
    tool = Path(__file__).parents[2] / "tools" / "bench_load"
    command = [sys.executable, str(tool), str(packed.path), "--gpu-expert-bits", "16"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--context", "64"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["reader_way"] in ("direct", "cached")
    assert found["bounced_way"] in ("bounced", "cached")
    for name in ("reader", "bounced", "load"):
        assert found[f"{name}_ratio"] == found[f"{name}_gb_s"] / max(found["raw_gb_s"])
        median = statistics.median(found["raw_gb_s"])
        assert found[f"{name}_ratio_median"] == found[f"{name}_gb_s"] / median
    assert 0 < found["load_s"] <= found["first_token_s"]
