"""Families: the expanded text of each variant, and errors with the family's line."""

from pathlib import Path

import pytest

from osmium.errors import KernelError
from osmium.kernels import ptx
from osmium.kernels.ptx_family import expand, find_source, kernel_files, variants

HEADER = "//: as   four  BITS=4 UP=1\n//: as   eight  BITS=8 UP=0\n"

FAMILY = """// out = x + {BITS}, for the tests.
//: as      four    BITS=4 UP=1
//: as      eight   BITS=8 UP=0
//: entry   {entry}
//: grid    rows
//: block   {BITS * 8}
// -- if UP
//: param   out    u64  out f32[rows, n]    align 16
// -- end
//: param   n      u32  values a row        n % {BITS} == 0
.version 7.8
.target sm_80
.visible .entry {entry}(
// -- if UP
    .param .u64 out,
// -- end
    .param .u32 n)
.maxntid {BITS * 8}
{
    ret;
}
"""


def expanded(body: str, entry: str = "four") -> list[str]:
    """Lines of a variant, without the header."""
    return expand(HEADER + body, "family.ptx", entry).text.splitlines()


def folder_with(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / f"{name}.ptx").write_text(text)
    return folder


def test_if_else_and_end_choose_lines_by_the_constants() -> None:
    inner = "// -- if BITS == 4\nnested\n// -- end\n"
    body = f"a\n// -- if UP\nup\n{inner}  // -- else\ndown\n// -- end\nb"
    assert expanded(body) == ["a", "up", "nested", "b"]
    assert expanded(body, "eight") == ["a", "down", "b"]


def test_each_repeats_lines_for_integers_or_for_a_count() -> None:
    assert expanded("// -- each i 3 0 2\n{i}\n// -- end") == ["3", "0", "2"]
    assert expanded("// -- each i BITS\n{i}\n// -- end") == ["0", "1", "2", "3"]
    assert expanded("// -- each i UP - 1\n{i}\n// -- end") == []


def test_each_may_depend_on_an_outer_loop_variable() -> None:
    body = "// -- each i 3\n// -- each j i\n{i}.{j}\n// -- end\n// -- end"
    assert expanded(body) == ["1.0", "2.0", "2.1"]


def test_let_defines_a_name_for_the_lines_that_follow() -> None:
    body = "// -- if UP\n// -- let n 2\n// -- else\n// -- let n BITS + 1\n// -- end\n{n}"
    assert expanded(body) == ["2"] and expanded(body, "eight") == ["9"]
    assert expanded("// -- let sum 0\n// -- each i 4\n// -- let sum sum + i\n// -- end\n{sum}") == [
        "6"
    ]


def test_braces_with_an_expression_are_replaced_on_every_kind_of_line() -> None:
    assert expanded("//: grid    ceil(n / {BITS * 8})") == ["//: grid    ceil(n / 32)"]
    assert expanded("// {entry} of {BITS} bits") == ["// four of 4 bits"]
    assert expanded("mov %a{BITS // 2 }, 0x{min(BITS, 7)}{BITS % 3};") == ["mov %a2, 0x41;"]


@pytest.mark.parametrize(
    "line",
    ["{%a, %b}", "{%a}", "{}", "{ }", "{", "}", "{0, 0}", "{ bar.sync 0; }", "{ .reg .pred %p; }"],
)
def test_braces_of_ptx_stay_as_they_are(line: str) -> None:
    assert expanded(line) == [line]


def test_a_vector_may_have_expressions_in_its_register_names() -> None:
    body = "// -- each i 0 2\nld.v2 {%x{i}, %x{i + 1}}, [%p+{8 * i}];\n// -- end"
    assert expanded(body) == ["ld.v2 {%x0, %x1}, [%p+0];", "ld.v2 {%x2, %x3}, [%p+16];"]


def test_directives_and_variants_are_not_in_the_text_but_other_comments_are() -> None:
    assert expanded("// -- pdl wait\n// -- let n 1\n    // -- tile by tile\nret;") == [
        "// -- pdl wait", "    // -- tile by tile", "ret;",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "line", "rule"),
    [
        ("a\n{i}", 4, r"'{i}': i is not known there; known names: BITS, UP"),
        ("// -- each i 2\n// -- end\n{i}", 5, "i is not known"),
        ("// -- if K", 3, "no '// -- end'"),
        ("// -- if K\n// -- end", 3, "K is not known"),
        ("// -- if", 3, "no '// -- end'"),
        ("// -- if\n// -- end", 3, "an expression must follow"),
        ("// -- each i 2\n// -- if UP\n// -- end", 3, "no '// -- end'"),
        ("// -- end", 3, "no 'if' or 'each' before"),
        ("// -- else\n// -- end", 3, "no 'if' before"),
        ("// -- each i 2\n// -- else\n// -- end", 4, "no 'if' before"),
        ("// -- if UP\n// -- else\n// -- else\n// -- end", 5, "no 'if' before"),
        ("// -- if UP\n// -- end of the loop", 4, "stands alone"),
        ("// -- each thread\n// -- end", 3, "a name, then an expression"),
        ("// -- each thread stores a row\n// -- end", 3, "is not an expression"),
        ("// -- let\n", 3, "a name, then an expression"),
        ("// -- let 2 UP", 3, "a name, then an expression"),
        ("// -- let BITS 2", 3, "BITS is defined already"),
        ("// -- let entry 2", 3, "entry is defined already"),
        ("// -- each i 2\n// -- let i 2\n// -- end", 4, "i is defined already"),
        ("// -- let i 2\n// -- each i 2\n// -- end", 4, "i is defined already"),
        ("{1.5}", 3, r"1\.5 is not an integer"),
        ("{'a'}", 3, "'a' is not an integer"),
        ("{BITS UP}", 3, "'BITS UP' is not an expression"),
        ("{BITS / (UP - 1)}", 3, "has no value: .*zero"),
        ("{min(BITS)}", 3, "has no value"),
        ("{entry + 1}", 3, "entry is not known"),
    ],
)
def test_an_error_names_file_line_text_and_rule(body: str, line: int, rule: str) -> None:
    with pytest.raises(KernelError, match=rf"^family\.ptx:{line}: .*{rule}"):
        expanded(body)


@pytest.mark.parametrize(
    ("header", "line", "rule"),
    [
        ("//: as   a   K=1\n//: as   b", 2, "b has no K"),
        ("//: as   a   K=1\n//: as   b   K=1 L=2", 1, "a has no L"),
        ("//: as   a   K=1\n//: as   a   K=2", 2, "line 1 also defines a"),
        ("//: as   a   K=1 K=2", 1, "write '//: as"),
        ("//: as   a   K=x", 1, "write '//: as"),
        ("//: as   a   K=1  for people", 1, "write '//: as"),
        ("//: as   a-b   K=1", 1, "write '//: as"),
        ("//: as", 1, "write '//: as"),
    ],
)
def test_a_wrong_variant_is_refused_with_its_line(header: str, line: int, rule: str) -> None:
    with pytest.raises(KernelError, match=rf"^family\.ptx:{line}: .*{rule}"):
        variants(header, "family.ptx")


def test_an_entry_that_a_family_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(KernelError, match=r"family\.ptx defines four, eight, not six"):
        expanded("", "six")


def test_each_line_of_the_text_has_its_line_of_the_family() -> None:
    source = expand(HEADER + "a\n// -- each i 2\nb\n// -- end\nc\n", "family.ptx", "four")
    assert source.text == "a\nb\nb\nc\n" and source.origins == (3, 5, 5, 7)


def test_a_kernel_is_found_in_its_family_and_launched_by_its_expanded_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ptx, "_FOLDERS", (tmp_path, folder_with(tmp_path / ".", family=FAMILY)))
    four, eight = ptx.kernel("four").contract, ptx.kernel("eight").contract
    assert (four.entry, four.block, [p.name for p in four.params]) == ("four", 32, ["out", "n"])
    assert (eight.entry, eight.block, [p.name for p in eight.params]) == ("eight", 64, ["n"])
    assert eight.where == "family.ptx (eight)"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("//: block   {BITS * 8}", "//: block   many", r"^family\.ptx:6: block is 'many'"),
        ("n % {BITS} == 0", "n % {BITS} == ", r"^family\.ptx:10: 'n % 8 ==' is not an expression"),
        (".maxntid {BITS * 8}", ".maxntid 1", r"^family\.ptx \(eight\): block is 64, .maxntid 1"),
        ("{entry}(", "other(", r"^family\.ptx \(eight\): .* eight, the text has other"),
        ("entry   {entry}", "entry   four", r"^family\.ptx \(four\): .* four, the text has eight"),
    ],
)
def test_a_broken_contract_names_the_familys_line_or_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, named: str
) -> None:
    assert old in FAMILY
    folder_with(tmp_path, family=FAMILY.replace(old, new))
    monkeypatch.setattr(ptx, "_FOLDERS", (tmp_path,))
    with pytest.raises(KernelError, match=named):
        ptx.kernel("eight").contract  # noqa: B018


def test_a_plain_kernel_is_found_by_its_name_without_reading_other_files(tmp_path: Path) -> None:
    folder_with(tmp_path, plain="// {no expression} here\n", broken="//: as   a   K\n")
    source = find_source((tmp_path,), "plain")
    assert source == ("// {no expression} here\n", "plain.ptx", ())
    with pytest.raises(KernelError, match=r"broken\.ptx:1"):
        find_source((tmp_path,), "other")


def test_a_family_may_define_a_kernel_of_the_files_name(tmp_path: Path) -> None:
    folder_with(tmp_path, one="//: as one\n//: as two\n{entry}\n")
    assert [find_source((tmp_path,), name) for name in ("one", "two", "three")] == [
        ("one\n", "one.ptx", (3,)), ("two\n", "one.ptx", (3,)), None,
    ]  # fmt: skip


@pytest.mark.parametrize("other", ["four", "other"])
def test_a_kernel_that_two_files_define_is_refused(tmp_path: Path, other: str) -> None:
    text = "// plain\n" if other == "four" else "//: as   four   K=1\n"
    folder_with(tmp_path, family=FAMILY, **{other: text})
    with pytest.raises(KernelError, match=r"\.ptx:\d: \w+\.ptx also defines four; .*once"):
        kernel_files(tmp_path)


def test_files_are_read_once_for_all_kernels_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_with(tmp_path, family=FAMILY, plain="// plain\n")
    assert {name: path.name for name, path in kernel_files(tmp_path).items()} == {
        "plain": "plain.ptx", "four": "family.ptx", "eight": "family.ptx",
    }  # fmt: skip
    monkeypatch.setattr(Path, "glob", lambda *_: pytest.fail("the folder is listed again"))
    assert find_source((tmp_path,), "eight") is not None
