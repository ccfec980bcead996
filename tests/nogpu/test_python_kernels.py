"""Kernels written in Python: compiled to PTX for a 12.8 driver, kept, and made anew if stale."""

import re
import sys
from pathlib import Path

import pytest

from osmium.errors import KernelError
from osmium.kernels import python
from osmium.kernels.ptx import parse
from osmium.kernels.python import KERNELS, Source, cuda, python_kernel

pytest.importorskip("numba.cuda", reason="Numba is in the build extra")


def double(out, n):  # type: ignore[no-untyped-def]
    """What is compiled here."""
    i = cuda.grid(1)
    if i < n:
        out[i] *= 2


def source(regs: int = 32, grid: str = "ceil(n / 128)") -> Source:
    return Source(double, "void(CPointer(float32), uint32)", 128, grid, regs)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Compiled text goes to a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(python, "__file__", str(tmp_path / "package" / "python.py"))
    return tmp_path


def test_a_compiled_kernel_reads_like_a_hand_written_one() -> None:
    contract = source().contract()
    assert contract.entry == "double" and contract.block == 128
    assert [(p.name, p.type) for p in contract.params] == [("out", "u64"), ("n", "u32")]
    version = re.search(r"\.version (\d+)\.(\d+)", contract.text)
    assert version and (int(version[1]), int(version[2])) <= (8, 7)
    assert ".target sm_80" in contract.text and ".maxntid 128" in contract.text


def test_compiled_text_is_kept_and_a_stale_one_is_made_anew(elsewhere: Path) -> None:
    first = source().text()
    (kept,) = elsewhere.rglob("double.ptx")
    kept.write_text(first + "// seen\n")
    assert source().text().endswith("// seen\n"), "it is read, not compiled"
    assert not source(grid="n").text().endswith("// seen\n"), "another contract, another text"


def test_a_newer_toolkit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python, "LATEST_PTX", (6, 0))
    with pytest.raises(KernelError, match=r"8\."):
        source().text()


def test_a_signature_must_fit_its_function() -> None:
    wrong = Source(double, "void(CPointer(float32))", 128, "1", 32)
    with pytest.raises(KernelError, match="2"):
        wrong.text()


def test_a_type_that_no_contract_has_is_refused_by_name() -> None:
    for signature, named in (
        ("void(CPointer(complex64), uint32)", r"out is CPointer\(complex64\)"),
        ("void(CPointer(float32), float64)", "n is float64"),
    ):
        with pytest.raises(KernelError, match=named):
            Source(double, signature, 128, "1", 32).text()


def test_the_packages_kernels_are_written_where_a_wheel_takes_them(elsewhere: Path) -> None:
    (elsewhere / "compiled").mkdir()
    (elsewhere / "compiled" / "place.ptx").write_text("stale")
    paths = python.compile_all(elsewhere / "compiled")
    assert [path.stem for path in paths] == ["advance", "draw", "peaks", "place", "weigh"]
    path = elsewhere / "compiled" / "place.ptx"
    contract = parse(path.read_text(), path.name)
    assert contract.entry == "place" and contract.block == 256
    assert path.read_text().startswith(f"// place, compiled from Python {KERNELS['place'].key}\n")


def test_without_numba_a_compiled_kernel_is_read_and_another_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = source().text()
    monkeypatch.setitem(sys.modules, "numba", None)
    assert source().text() == text
    with pytest.raises(KernelError, match=r"osmium\[build\]"):
        source(grid="n").text()


def test_the_decorator_registers_and_waits() -> None:
    before = dict(KERNELS)
    try:
        made = python_kernel("void(CPointer(float32), uint32)", block=64, grid="1")(double)
        assert KERNELS["double"].block == 64 and made.name == "double"
    finally:
        KERNELS.clear()
        KERNELS.update(before)
