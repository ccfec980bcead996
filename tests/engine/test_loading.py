"""How a model gets into memory: what is held meanwhile, and what is left when it goes wrong."""

import errno
import gc
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium import loader
from osmium.config import EngineConfig
from osmium.cuda.memory import HostKind
from osmium.errors import CheckpointError, ConfigError, OutOfMemory
from osmium.experts.cache import verify
from osmium.ops import Linear
from osmium.weights import Packed, open_model, open_packed
from tests.engine.fake_gpu import FakeGpu
from tests.models.build import CASES, write_checkpoint

CASE = CASES[3]
"""Six layers of sixteen experts."""

KINDS: list[HostKind] = ["registered-huge", "pinned", "write-combined"]

REAL = os.preadv


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("packed")
    write_checkpoint(CASE, folder / "model")
    return open_model(folder / "model", EngineConfig(cache_dir=str(folder), gpu_expert_bits=16))


@pytest.fixture
def copy(packed: Packed, tmp_path: Path) -> Path:
    """A packed file to be hurt."""
    made = tmp_path / "copy.osmium"
    made.write_bytes(packed.path.read_bytes())
    return made


def options(packed: Path, **more: Any) -> dict[str, Any]:
    settings = {"context": 64, "chunk": 16, "page": 16, "vram": 2 << 30, "ram": 1 << 30}
    return {"cache_dir": str(packed.parent), **settings, **more}


def records(packed: Packed) -> npt.NDArray[np.uint8]:
    return packed.all_records()


@pytest.mark.parametrize("kind", KINDS)
def test_resident_slots_are_read_through_one_layer_of_host_memory(
    packed: Packed, monkeypatch: pytest.MonkeyPatch, kind: HostKind
) -> None:
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch, kind)
    seen: list[tuple[str, int, int]] = []
    engine = loader.load(
        packed.path, "gpu", progress=lambda *one: seen.append(one), **options(packed.path)
    )
    cache = engine.runner.store.cache
    assert cache.capacity == cache.experts
    count = cache.experts * len(CASE.kinds)
    assert verify(engine.runner.ops, cache, records(packed), 10**6, 0) == count
    planned = sum(engine.plan.ram.values())
    assert set(engine.plan.ram) == {"embedding", "one layer, loading"}
    # The mailboxes of replies are a page or two each.
    assert gpu.most["host"] <= planned + 8 * 4096
    assert gpu.host_bytes() <= engine.plan.ram["embedding"] + 8 * 4096
    assert [done for stage, done, _ in seen if stage == "experts"] == [1, 2, 3, 4, 5, 6]
    engine.close()
    assert not gpu.held


@pytest.mark.parametrize("kind", KINDS)
def test_an_arena_holds_every_record(
    packed: Packed, monkeypatch: pytest.MonkeyPatch, kind: HostKind
) -> None:
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch, kind)
    engine = loader.load(packed.path, "gpu", **options(packed.path, slots=8))
    runner = engine.runner
    assert runner.store.arena is not None
    arena = runner.ops.host_view(runner.store.arena.records)
    assert np.array_equal(arena, records(packed))
    assert gpu.most["host"] <= sum(engine.plan.ram.values()) + 8 * 4096
    engine.close()
    assert not gpu.held


@pytest.mark.parametrize("kind", KINDS)
def test_weights_on_the_device_are_those_of_the_file(
    packed: Packed, monkeypatch: pytest.MonkeyPatch, kind: HostKind
) -> None:
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
        if isinstance(wanted, Linear):
            pairs = [(placed.data, wanted.data), (placed.scale, wanted.scale)]
        else:
            pairs = [(placed, wanted)]
        for have, want in pairs:
            if want is not None:
                assert np.array_equal(made.ops.copy_out(have), want), name
    engine.close()
    made.close()
    assert not gpu.held


@pytest.mark.parametrize("slots", [None, 8])
def test_whichever_allocation_is_refused_all_is_given_back(
    packed: Packed, monkeypatch: pytest.MonkeyPatch, slots: int | None
) -> None:
    more: dict[str, Any] = {} if slots is None else {"slots": slots}
    whole = FakeGpu(4 << 30)
    whole.install(monkeypatch)
    loader.load(packed.path, "gpu", **options(packed.path, **more)).close()
    assert whole.asked > 60
    for number in range(0, whole.asked, 7):
        gpu = FakeGpu(4 << 30, refuse=number)
        gpu.install(monkeypatch)
        with pytest.raises(OutOfMemory, match=r"asked for"):
            loader.load(packed.path, "gpu", **options(packed.path, **more))
        assert not gpu.held, f"allocation {number}"


@pytest.mark.parametrize("slots", [None, 8])
def test_a_loader_goes_on_after_memory_was_refused(
    packed: Packed, monkeypatch: pytest.MonkeyPatch, slots: int | None
) -> None:
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch)
    made = loader.Loader(packed.path, "gpu", **options(packed.path))
    more: dict[str, Any] = {} if slots is None else {"slots": slots}
    made.engine(**more).close()
    gc.collect()
    arena = 0 if made._arena is None else made._arena.records.nbytes
    weights = gpu.bytes_of("cuMemAlloc")
    gpu.refuse = gpu.asked + 3
    with pytest.raises(OutOfMemory):
        made.engine(**more)
    gc.collect()
    assert gpu.bytes_of("cuMemAlloc") <= weights
    assert gpu.host_bytes() <= arena + made.packed.parts["embed"].nbytes + 16 * 4096
    engine = made.engine(**more)
    cache = engine.runner.store.cache
    assert cache.capacity == (slots or cache.experts)
    engine.close()
    made.close()
    assert not gpu.held


def test_vram_that_ends_while_it_is_filled(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else takes it after the plan was made: the error says who holds what."""
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch)

    def progress(stage: str, done: int, total: int) -> None:
        gpu.vram = gpu.bytes_of("cuMemAlloc")

    with pytest.raises(OutOfMemory, match=r"are free; Osmium holds"):
        loader.load(packed.path, "gpu", progress=progress, **options(packed.path))
    assert not gpu.held


@pytest.mark.parametrize("slots", [None, 8])
def test_a_file_that_shrinks_while_it_is_loaded(
    copy: Path, monkeypatch: pytest.MonkeyPatch, slots: int | None
) -> None:
    more: dict[str, Any] = {} if slots is None else {"slots": slots}
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
    more: dict[str, Any] = {} if slots is None else {"slots": slots}
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
    packed: Packed, monkeypatch: pytest.MonkeyPatch, slots: int | None
) -> None:
    gpu = FakeGpu(4 << 30)
    gpu.install(monkeypatch)
    more: dict[str, Any] = {} if slots is None else {"slots": slots}
    plan = loader.plan_for(packed.path, "gpu", **options(packed.path, **more))
    need = sum(plan.ram.values())
    with pytest.raises(ConfigError, match=r"needs [\d.]+ GiB of host memory .*[\d.]+ GiB can be"):
        loader.load(packed.path, "gpu", **options(packed.path, **{**more, "ram": need - 1}))
    assert gpu.asked == 0, "nothing was allocated"
    loader.load(packed.path, "gpu", **options(packed.path, **{**more, "ram": need})).close()
    assert not gpu.held
