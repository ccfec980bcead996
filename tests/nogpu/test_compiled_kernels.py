"""Compiled kernels in the repository: present, up to date, and equal to what Numba compiles."""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from osmium.errors import KernelError
from osmium.kernels import numba_compiler, numba_kernels
from osmium.kernels.numba_compiler import PACKAGES, PYTHON, compile_all, compile_kernel
from osmium.kernels.numba_kernels import COMPILED, KERNELS, NumbaSource, cuda, python_kernel
from osmium.kernels.ptx import Kernel, parse
from osmium.ops.gpu import check_kernels
from tests import needs
from tests.ptx.kernels import NAMES

ROOT = Path(__file__).resolve().parents[2]

OURS = (
    "adjust_logits", "advance_step", "assign_slots", "count_step", "count_uses", "expert_histogram",
    "group_by_expert", "logit_histogram", "sample_token", "slice_max", "top_logprobs",
)  # fmt: skip


def double(out, n):  # type: ignore[no-untyped-def]
    """The function that these tests compile."""
    i = cuda.grid(1)
    if i < n:
        out[i] *= 2


def source(regs: int = 32, grid: str = "ceil(n / 128)") -> NumbaSource:
    return NumbaSource(double, "void(CPointer(float32), uint32)", 128, grid, regs)


def pinned() -> dict[str, str]:
    """The versions that pyproject.toml's build extra pins, by package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["optional-dependencies"]["build"]
    return dict(line.split("==") for line in lines if "==" in line)


@pytest.fixture
def compiled_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Compiled texts go to an empty temporary folder."""
    monkeypatch.setattr(numba_kernels, "COMPILED", tmp_path / "compiled")
    (tmp_path / "compiled").mkdir()
    return tmp_path / "compiled"


# -- committed texts -------------------------------------------------------------------------------


def test_every_compiled_kernel_is_committed_and_up_to_date() -> None:
    assert tuple(KERNELS) and {path.stem for path in COMPILED.iterdir()} == set(OURS)
    for name in OURS:
        contract = KERNELS[name].contract()
        assert contract.entry == name
        version = re.search(r"^\.version (\d+)\.(\d+)$", contract.text, re.M)
        assert version and (int(version[1]), int(version[2])) <= (8, 7)
        assert re.search(r"^\.target sm_80$", contract.text, re.M)


def test_committed_texts_name_the_pinned_versions() -> None:
    wanted = ", ".join(f"{package} {pinned()[package]}" for package in PACKAGES)
    for name in OURS:
        first = (COMPILED / f"{name}.ptx").read_text().partition("\n")[0]
        assert first == f"{KERNELS[name].first_line}; {wanted}, Python {PYTHON}"


def test_committed_texts_equal_numbas_output() -> None:
    """Byte for byte, in the pinned environment; takes five seconds."""
    needs.numba_compiler()
    if sys.version_info[:2] != tuple(map(int, PYTHON.split("."))):
        pytest.skip(f"the committed texts are of Python {PYTHON}, whose bytecode is another")
    for name in OURS:
        compiled = compile_kernel(KERNELS[name])
        assert compiled == (COMPILED / f"{name}.ptx").read_text(), (
            f"{name} compiles to another text: run tools/compile_kernels, and commit what changes"
        )


def test_every_kernel_is_registered_for_the_startup_check() -> None:
    assert check_kernels() == len(NAMES) + len(OURS)


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkout", [True, False])
def test_a_missing_or_stale_text_names_the_command_to_run(
    compiled_folder: Path, monkeypatch: pytest.MonkeyPatch, checkout: bool
) -> None:
    if not checkout:
        monkeypatch.setattr(
            numba_kernels,
            "__file__",
            str(compiled_folder / "osmium" / "kernels" / "numba_kernels.py"),
        )
    advice = "tools/compile_kernels" if checkout else "Install osmium-serve again"
    with pytest.raises(KernelError, match=rf"double\.ptx cannot be read.*{advice}"):
        source().text()
    text = f"{source().first_line}; numba-cuda 0\nrest"
    (compiled_folder / "double.ptx").write_text(text)
    assert source().text() == text
    with pytest.raises(KernelError, match=rf"its source .*{source(grid='n').key}.*{advice}"):
        source(grid="n").text()


def test_the_source_hash_covers_called_functions_and_module_constants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weigh = KERNELS["logit_histogram"]
    known, before = weigh.function.__globals__, weigh.key
    assert before == weigh.key
    monkeypatch.setitem(known, "WINDOW", known["WINDOW"] + 1)
    assert weigh.key != before
    monkeypatch.undo()
    monkeypatch.setitem(known, "running", double)
    monkeypatch.setitem(numba_kernels.DEVICE_FUNCTIONS, "block_inclusive_scan", double)
    assert weigh.key != before


def test_a_signature_must_fit_its_function() -> None:
    wrong = NumbaSource(double, "void(CPointer(float32))", 128, "1", 32)
    with pytest.raises(KernelError, match="2"):
        wrong.header()


def test_an_unsupported_type_is_refused_by_name() -> None:
    for signature, named in (
        ("void(CPointer(complex64), uint32)", r"out is CPointer\(complex64\)"),
        ("void(CPointer(float32), float64)", "n is float64"),
    ):
        with pytest.raises(KernelError, match=named):
            NumbaSource(double, signature, 128, "1", 32).header()


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(KERNELS)
    yield
    KERNELS.clear()
    KERNELS.update(before)


def test_the_decorator_registers_without_reading_files(registry: None) -> None:
    compiled = python_kernel("void(CPointer(float32), uint32)", block=64, grid="1")(double)
    assert isinstance(compiled, Kernel)
    assert KERNELS["double"].block == 64 and compiled.name == "double"


# -- compiling -------------------------------------------------------------------------------------


def test_a_compiled_kernel_has_a_contract_like_a_hand_written_one() -> None:
    needs.numba_compiler()
    contract = parse(compile_kernel(source()), "double.ptx")
    assert contract.entry == "double" and contract.block == 128
    assert [(p.name, p.type) for p in contract.params] == [("out", "u64"), ("n", "u32")]
    assert ".target sm_80" in contract.text and ".maxntid 128" in contract.text
    assert "NumbaEnv" not in contract.text, "their order differs between processes"


def test_compiling_writes_every_kernel_and_deletes_other_files(
    compiled_folder: Path, registry: None
) -> None:
    needs.numba_compiler()
    KERNELS.clear()
    KERNELS["double"] = source()
    (compiled_folder / "double.ptx").write_text("stale")
    (compiled_folder / "gone.ptx").write_text("of a kernel that is no more")
    assert [path.name for path in compile_all(compiled_folder)] == ["gone.ptx", "double.ptx"]
    assert source().contract().entry == "double"
    assert [path.name for path in compiled_folder.iterdir()] == ["double.ptx"]
    assert compile_all(compiled_folder) == []


def test_a_kernels_text_does_not_depend_on_the_kernels_compiled_before_it() -> None:
    """Numba numbers shared arrays over all kernels of a process."""
    needs.numba_compiler()
    first = compile_kernel(KERNELS["slice_max"])
    compile_kernel(KERNELS["top_logprobs"])
    assert compile_kernel(KERNELS["slice_max"]) == first


def test_a_newer_toolkit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    needs.numba_compiler()
    monkeypatch.setattr(numba_compiler, "LATEST_PTX", (6, 0))
    with pytest.raises(KernelError, match=r"8\.\d.*osmium-serve\[build\]"):
        compile_kernel(source())


def test_without_numba_compiling_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(numba_compiler, "versions", lambda: "none")
    with pytest.raises(KernelError, match=r"osmium-serve\[build\]"):
        compile_kernel(source())
    monkeypatch.undo()
    monkeypatch.setattr(numba_compiler, "PACKAGES", ("osmium-not-there",))
    with pytest.raises(KernelError, match=r"osmium-not-there.*osmium-serve\[build\]"):
        compile_kernel(source())


def test_another_python_version_refuses_to_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(numba_compiler, "PYTHON", "3.0")
    monkeypatch.setattr(numba_compiler, "compile_all", lambda: pytest.fail("it compiles"))
    assert numba_compiler.main() == 2
    assert "3.0" in capsys.readouterr().err
