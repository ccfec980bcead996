"""Plain technical English: no word for people where data is meant, and short sentences."""

import re
from pathlib import Path

import pytest

from tests.prose import ROOT, sentences, source_files

FOLDERS = ("osmium", "ptx", "tools", "docs", "README.md", "LOG.md", "CHANGELOG.md")

PEOPLE = re.compile(
    r"\b(who|whom|whoever|whomever|nobody|somebody|anybody|everybody|someone|anyone|everyone)\b",
    re.IGNORECASE,
)

ABOUT_PEOPLE: dict[str, str] = {}
"""path: a line of it that means people and may use such a word."""

MAX_WORDS = 25

LICENCES = {ROOT / "osmium" / "demo" / "NOTICE.md"}
"""Texts of others, quoted as they are."""

FILES = source_files(*FOLDERS)

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def is_about_people(path: Path, line: str) -> bool:
    allowed = ABOUT_PEOPLE.get(str(path.relative_to(ROOT)))
    return allowed is not None and allowed in line


@each_file
def test_no_word_for_people_stands_for_data(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = PEOPLE.search(line)
        assert found is None or is_about_people(path, line), f"line {number}: {found[0]!r}: {line}"


@each_file
def test_sentences_of_docstrings_comments_and_documents_are_short(path: Path) -> None:
    if path in LICENCES:
        pytest.skip("a licence")
    for one in sentences(path, path.read_text()):
        assert one.words <= MAX_WORDS, f"line {one.line}: {one.words} words: {one.text}"


def test_the_checked_files_include_code_kernels_tools_and_documents() -> None:
    names = {str(path.relative_to(ROOT)) for path in FILES}
    wanted = {"osmium/loader.py", "ptx/add_f32.ptx", "tools/serve", "docs/design.md", "README.md"}
    assert wanted <= names
    assert not any("compiled" in name for name in names)


def test_places_about_people_still_exist() -> None:
    for name, line in ABOUT_PEOPLE.items():
        text = (ROOT / name).read_text()
        assert line in text and PEOPLE.search(line), f"{name} has no line {line!r}"


@pytest.mark.parametrize(
    ("name", "text", "counts"),
    [
        ("a.py", '"""One two.  Three\nfour."""\nx = 1  # five six\n', [2, 2, 2]),
        ("a.py", "# one\n# two.\n\n# three\n", [2, 1]),
        ("a.py", '"""One.\n\n    term    what it means is a table\n"""\n', [1]),
        ("a.ptx", "// One two.\n//     a = b + c\n//: grid    blocks\nret; // three\n", [2, 1]),
        (
            "a.ptx",
            "//: as   a  K=1\n//: as   b  K=2\n// -- if K == 1\n// one two\n// -- else\n// {K}.\n"
            "// -- end\n// three\n",
            [3, 1, 1],
        ),
        ("a.md", "# No\n\n- One [two](three.md)\n- `a b`\n\n| a | b |\n", [2, 1]),
        ("a", "#!/usr/bin/env python3\n\n# one two three\n", [2, 3]),
    ],
)
def test_sentences_are_found_in_each_kind_of_file(name: str, text: str, counts: list[int]) -> None:
    found = [one.words for one in sentences(Path(name), text)]
    assert found == counts
