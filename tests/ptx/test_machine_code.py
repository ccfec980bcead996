"""The comparison of machine code: blind to names and comments, not to instructions."""

import re
import shutil
from pathlib import Path

import pytest

from osmium.kernels.numba_kernels import KERNELS
from osmium.kernels.ptx import kernel
from tests.ptx.kernels import NAMES, kernel_text
from tests.ptx.machine_code import (
    ROOT,
    MachineCode,
    compare,
    machine_code,
    read_texts,
    variants,
)
from tests.ptx.test_contracts import find_ptxas

needs_ptxas = pytest.mark.skipif(find_ptxas() is None, reason="ptxas is not installed")

CODE = MachineCode("a", 32, 0, 16)
OTHER = MachineCode("b", 32, 0, 16)


@needs_ptxas
def test_renamed_entries_parameters_and_registers_leave_the_code_equal() -> None:
    text = kernel("add_f32").contract.text
    renamed = re.sub(r"\badd_f32\b", "sum_of_two", text)
    renamed = re.sub(r"\bcount\b", "length", renamed)
    renamed = re.sub(r"%(\w+)\b(?!\.)", r"%\1_renamed", renamed)
    renamed = re.sub(r"%(ctaid|ntid|nctaid|tid)_renamed", r"%\1", renamed)
    assert renamed != text
    assert machine_code(renamed, "sm_90") == machine_code(text, "sm_90")


@needs_ptxas
def test_another_instruction_or_more_shared_memory_is_a_difference() -> None:
    text = kernel("add_f32").contract.text
    code = machine_code(text, "sm_80")
    subtracting = text.replace("add.f32", "sub.f32")
    assert subtracting != text
    assert machine_code(subtracting, "sm_80").code != code.code
    declared = text.replace(
        "{\n", "{\n    .shared .align 4 .b8 unused[64];\n    st.shared.u32 [unused], 0;\n", 1
    )
    assert machine_code(declared, "sm_80").shared_bytes == code.shared_bytes + 64


@needs_ptxas
def test_a_text_that_does_not_assemble_names_target_and_error() -> None:
    text = kernel("add_f32").contract.text.replace("add.f32", "add.f99")
    with pytest.raises(ValueError, match=r"sm_80.*f99"):
        machine_code(text, "sm_80")


def test_a_kernel_is_assembled_for_each_target_and_with_pdl_from_sm_90_on() -> None:
    text = "//: target  sm_89 sm_90   on which it holds\n"
    assert variants(text, "pdl") == [
        ("sm_89", "sm_89", text), ("sm_90", "sm_90", text), ("sm_90 PDL", "sm_90", "pdl"),
    ]  # fmt: skip


def test_the_texts_of_a_checkout_are_those_of_every_kernel_expanded() -> None:
    texts = read_texts(ROOT)
    assert texts.keys() == {*NAMES, *KERNELS}
    for name in NAMES:
        contract = kernel(name).contract
        assert texts[name] == (contract.text, contract.pdl_text)


def test_the_texts_of_a_checkout_without_families_are_its_files(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "osmium", tmp_path / "osmium", ignore=shutil.ignore_patterns("demo"))
    (tmp_path / "osmium" / "kernels" / "ptx_family.py").unlink()
    source = tmp_path / "osmium" / "kernels" / "ptx.py"
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join(line for line in lines if "ptx_family import" not in line))
    (tmp_path / "ptx").mkdir()
    (tmp_path / "ptx" / "add_f32.ptx").write_text(kernel_text("add_f32"))
    assert read_texts(tmp_path).keys() == {"add_f32", *KERNELS}


def test_equal_code_under_another_name_is_a_renamed_kernel() -> None:
    before = {"old": {"sm_80": CODE}, "same": {"sm_80": OTHER}}
    after = {"new": {"sm_80": CODE}, "same": {"sm_80": OTHER}}
    assert compare(before, after) == ({"old": "new", "same": "same"}, {})


def test_changed_added_and_removed_kernels_are_differences() -> None:
    before = {"gone": {"sm_80": CODE}, "same": {"sm_80": CODE, "sm_90": CODE}}
    after = {"added": {"sm_80": OTHER}, "same": {"sm_80": CODE, "sm_90": OTHER}}
    equal, different = compare(before, after)
    assert not equal
    assert different.keys() == {"gone", "added", "same"}
    assert different["same"][0].startswith("sm_90: ")
