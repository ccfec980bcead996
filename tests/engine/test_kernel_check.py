"""Kernels are checked before the model is opened, so a missing one is refused at once."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from osmium import loader
from osmium.cli import doctor
from osmium.errors import KernelError
from osmium.kernels import numba_kernels, ptx
from osmium.kernels.assign_slots import ASSIGN_SLOTS
from osmium.kernels.ptx import Kernel
from osmium.ops import gpu, gpu_experts
from osmium.ops.gpu import check_kernels
from osmium.weights import DEMO
from tests.engine.fake_gpu import FakeGpu
from tests.ptx.kernels import FOLDER


def _unread(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    """Drop the cached contract, as in a process that has not read it."""
    monkeypatch.delitem(vars(kernel), "contract", raising=False)


def missing_hand_written(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    (folder / "causal_conv1d_silu_f32.ptx").unlink()
    monkeypatch.setattr(ptx, "_FOLDERS", (folder,))
    _unread(monkeypatch, gpu.CAUSAL_CONV1D)


def broken_hand_written(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    path = folder / "causal_conv1d_silu_f32.ptx"
    path.write_text(path.read_text().replace(".maxntid", ".maxnreg"))
    monkeypatch.setattr(ptx, "_FOLDERS", (folder,))
    _unread(monkeypatch, gpu.CAUSAL_CONV1D)


def missing_compiled(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    shutil.copytree(numba_kernels.COMPILED, folder, dirs_exist_ok=True)
    (folder / "assign_slots.ptx").unlink()
    monkeypatch.setattr(numba_kernels, "COMPILED", folder)
    _unread(monkeypatch, ASSIGN_SLOTS)


def stale_compiled(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    shutil.copytree(numba_kernels.COMPILED, folder, dirs_exist_ok=True)
    path = folder / "assign_slots.ptx"
    path.write_text(path.read_text().replace("from source ", "from source 0"))
    monkeypatch.setattr(numba_kernels, "COMPILED", folder)
    _unread(monkeypatch, ASSIGN_SLOTS)


Damage = Callable[[pytest.MonkeyPatch, Path], None]

DAMAGE: dict[str, tuple[Damage, ...]] = {
    "causal_conv1d_silu_f32": (missing_hand_written, broken_hand_written),
    "assign_slots": (missing_compiled, stale_compiled),
}

each_damage = pytest.mark.parametrize(
    ("name", "damage"), [(name, damage) for name, damages in DAMAGE.items() for damage in damages]
)


@each_damage
def test_a_missing_kernel_is_refused_before_weights_are_read(
    name: str, damage: Damage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = FakeGpu()
    fake.install(monkeypatch)
    monkeypatch.setattr(loader, "open_weights", lambda *_: pytest.fail("the model was opened"))
    damage(monkeypatch, tmp_path)
    with pytest.raises(KernelError, match=name):
        loader.load(DEMO, "gpu")
    assert not fake.held, "no memory is allocated after the error"


@each_damage
def test_doctor_names_a_missing_kernel(
    name: str, damage: Damage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (found,) = (finding for finding in doctor.run_checks() if finding.name == "kernels")
    assert found.value == f"{check_kernels()}, all there" and not found.advice
    damage(monkeypatch, tmp_path)
    (found,) = (finding for finding in doctor.run_checks() if finding.name == "kernels")
    assert name in found.advice


def test_checking_all_kernels_takes_less_than_half_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """40 ms on two idle cores (2026-11)."""
    kernels = [kernel for kernel in vars(gpu).values() if isinstance(kernel, Kernel)]
    kernels += [kernel for kernel in vars(gpu_experts).values() if isinstance(kernel, Kernel)]
    times = []
    for _ in range(3):
        for kernel in kernels:
            _unread(monkeypatch, kernel)
        start = time.perf_counter()
        check_kernels()
        times.append(time.perf_counter() - start)
    assert len(kernels) > 20 and min(times) < 0.5
