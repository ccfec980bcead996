"""Every kernel's header against its entry and against ptxas, on every architecture."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest

from osmium.kernels.adjust_logits import ADJUST_LOGITS
from osmium.kernels.assign_slots import ASSIGN_SLOTS
from osmium.kernels.group_by_expert import EXPERT_HISTOGRAM, GROUP_BY_EXPERT
from osmium.kernels.logit_histogram import LOGIT_HISTOGRAM, SLICE_MAX
from osmium.kernels.ptx import Contract, kernel
from osmium.kernels.sample import ADVANCE_STEP, SAMPLE_TOKEN
from osmium.kernels.top_logprobs import TOP_LOGPROBS
from tests.ptx.kernels import NAMES, kernel_text

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

NEWEST = (8, 7)
"""The PTX version of the oldest supported driver, CUDA 12.8's."""


def find_ptxas() -> str | None:
    """From PATH, or from NVIDIA's wheel."""
    found = shutil.which("ptxas")
    if found:
        return found
    try:
        for file in files("nvidia-cuda-nvcc-cu12") or []:
            if file.name == "ptxas":
                return str(file.locate())
    except PackageNotFoundError:
        pass
    return None


def assemble(path: Path, target: str) -> tuple[int, int, int]:
    """Registers, bytes spilled and bytes of static shared memory, by ptxas."""
    ptxas = find_ptxas()
    if ptxas is None:
        pytest.skip("ptxas is not installed; it is of the dev extra (nvidia-cuda-nvcc-cu12)")
    done = subprocess.run(
        [ptxas, "-v", f"-arch={target}", str(path), "-o", "/dev/null"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{path.name} on {target}:\n{done.stderr}"
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spilled = re.findall(r"(\d+) bytes spill", done.stderr)
    shared = re.search(r"(\d+) bytes smem", done.stderr)
    assert registers, done.stderr
    return int(registers[1]), sum(map(int, spilled)), int(shared[1]) if shared else 0


def check(contract: Contract, path: Path, target: str) -> None:
    registers, spilled, shared = assemble(path, target)
    assert spilled == 0, f"{contract.entry} spills {spilled} bytes on {target}"
    assert registers <= contract.regs, (
        f"{registers} registers on {target}, {contract.regs} promised"
    )
    assert shared == contract.shared, f"{shared} bytes of shared memory, {contract.shared} promised"


@pytest.mark.parametrize("name", NAMES)
def test_a_contract_equals_the_report_of_ptxas(name: str, tmp_path: Path) -> None:
    contract = kernel(name).contract
    assert contract.entry == name
    written = re.search(r"^\.version (\d+)\.(\d+)\n\.target (\w+)$", contract.text, re.M)
    assert written and (int(written[1]), int(written[2])) <= NEWEST
    # a target with an "a" is of one architecture alone
    only = written[3].endswith("a")
    assert contract.targets == ((written[3],) if only else TARGETS[TARGETS.index(written[3]) :])
    with ThreadPoolExecutor(2) as pool:
        path = tmp_path / f"{name}.ptx"
        path.write_text(contract.text)
        list(pool.map(lambda target: check(contract, path, target), contract.targets))


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_with_pdl_waits_before_it_writes(name: str, tmp_path: Path) -> None:
    contract = kernel(name).contract
    path = tmp_path / f"{name}.ptx"
    path.write_text(contract.pdl_text)
    code = re.sub(r"//[^\n]*", "", contract.pdl_text)
    before, wait, _ = code.partition("griddepcontrol.wait")
    assert wait and ".target sm_90" in before
    assert not re.search(r"\bst\.global|\bred\.|\batom\.|\bret\b", before)
    assert not re.search(r"ld\.global(?!\.nc|\.cg)", before), (
        "a load of an earlier kernel's results"
    )
    assert "launch_dependents" not in before, (
        "the next kernel would start before the previous one has ended"
    )
    for target in {"sm_90", "sm_90a", "sm_120"} & {*contract.targets}:
        _, spilled, _ = assemble(path, target)
        assert spilled == 0, f"{name} spills on {target}"


@pytest.mark.parametrize("name", NAMES)
def test_a_kernels_text_follows_the_style_guide(name: str) -> None:
    """One entry, words for registers, a thread bound, and a reason at every barrier."""
    text = kernel_text(name)
    code = re.sub(r"//[^\n]*", "", text)
    assert len(re.findall(r"\.entry", code)) == 1
    assert not re.search(r"%(tid|ctaid|ntid|nctaid|laneid)\s*[,;]", _declared(code)), (
        "a special one"
    )
    assert not re.search(r"%(f|rd|fd)\d+\b[^>]*;", _declared(code)), "registers are words"
    for line in text.splitlines():
        if "bar.sync" in line.split("//")[0]:
            assert "//" in line, f"a barrier without its reason: {line.strip()}"


def _declared(code: str) -> str:
    return "\n".join(re.findall(r"\.reg[^;]*;", code))


def test_a_compiled_numba_kernel_assembles_for_every_target(tmp_path: Path) -> None:
    kernels = (
        ADJUST_LOGITS, ASSIGN_SLOTS, ADVANCE_STEP, SAMPLE_TOKEN, SLICE_MAX, LOGIT_HISTOGRAM,
        TOP_LOGPROBS, EXPERT_HISTOGRAM, GROUP_BY_EXPERT,
    )  # fmt: skip
    for made in kernels:
        path = tmp_path / f"{made.name}.ptx"
        for target in TARGETS:
            contract = made.contract
            path.write_text(contract.pdl_text if target >= "sm_90" else contract.text)
            registers, spilled, _ = assemble(path, target)
            assert spilled == 0 and registers <= contract.regs, made.name
