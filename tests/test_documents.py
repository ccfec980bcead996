"""LOG.md links every page of docs/experiments; pages have their sections and short sentences."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / "LOG.md"
PAGES = sorted((ROOT / "docs" / "experiments").iterdir())

PARTS = ["Question", "Set-up", "Prediction", "Result", "Decision"]
SETUP = ["Date", "Machine", "Commit", "Command"]
ROW = re.compile(r"\| (\d{4}-\d\d-\d\d) \| .+ \| .+ \| \[.+\]\(docs/experiments/(.+)\) \|")

MAX_LINE = 200
MAX_WORDS = 25

on_each_document = pytest.mark.parametrize("path", [LOG, *PAGES], ids=lambda path: path.name)
on_each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def index_rows() -> list[tuple[str, str]]:
    """(date, file name) of each row of LOG.md's table of experiments, in order."""
    _, found, table = LOG.read_text().partition("\n## Experiments\n")
    assert found, "LOG.md has no section 'Experiments'"
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    rows = [ROW.fullmatch(line) for line in lines]
    wrong = [line for line, row in zip(lines, rows, strict=True) if row is None]
    assert not wrong, f"not '| date | question | answer | [topic](link) |': {wrong[0]}"
    return [(row[1], row[2]) for row in rows if row is not None]


def parts(page: str) -> dict[str, str]:
    """The text of each section of a page, by heading."""
    _, *sections = re.split(r"^## (.+)\n", page, flags=re.M)
    return dict(zip(sections[::2], sections[1::2], strict=True))


def paragraphs(text: str) -> Iterator[str]:
    """Prose without headings, tables and code blocks; a list item counts as a paragraph."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    text = re.sub(r"^(#|\|).*$", "", text, flags=re.M)
    for block in re.split(r"\n\s*\n|\n(?=[-*] |\d+\. )", text):
        if block.strip():
            yield " ".join(block.split())


def sentences(text: str) -> Iterator[str]:
    """Sentences of the prose. A code span counts as one word, a link's target as none."""
    for paragraph in paragraphs(text):
        plain = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", paragraph))
        yield from re.split(r"(?<=[.!?])[*_)\]]*\s+", plain)


def words(sentence: str) -> int:
    return sum(any(c.isalnum() for c in word) for word in sentence.split())


def test_the_index_lists_every_experiment_once() -> None:
    assert sorted(name for _, name in index_rows()) == [page.name for page in PAGES]


def test_the_index_has_the_newest_experiment_first_under_its_own_date() -> None:
    rows = index_rows()
    assert all(name.startswith(f"{date}-") for date, name in rows)
    dates = [date for date, _ in rows]
    assert dates == sorted(dates, reverse=True)


def test_the_current_state_is_at_most_ten_lines() -> None:
    state = LOG.read_text().partition("\n## Current state\n")[2].partition("\n## ")[0]
    assert 1 <= len(state.strip().splitlines()) <= 10


@on_each_page
def test_a_page_is_named_by_date_and_topic(path: Path) -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d(-[a-z0-9]+)+\.md", path.name)


@on_each_page
def test_a_page_has_five_sections_in_order_and_none_is_empty(path: Path) -> None:
    page = path.read_text()
    assert page.startswith("# ")
    found = parts(page)
    assert list(found) == PARTS
    assert all(body.strip() for body in found.values())


@on_each_page
def test_the_set_up_names_date_machine_commit_and_command(path: Path) -> None:
    setup = parts(path.read_text())["Set-up"]
    for key in SETUP:
        assert re.search(rf"^- {key}: \S", setup, re.M), f"no line '- {key}: ...'"
    assert f"- Date: {path.name[:10]}\n" in setup


@on_each_document
def test_linked_files_exist(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert (path.parent / target).is_file(), target


@on_each_document
def test_lines_outside_tables_are_short(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert line.startswith("|") or len(line) <= MAX_LINE, f"line {number} has {len(line)}"


@on_each_document
def test_sentences_outside_tables_and_code_are_short(path: Path) -> None:
    long = [one for one in sentences(path.read_text()) if words(one) > MAX_WORDS]
    assert not long, f"{words(long[0])} words, at most {MAX_WORDS}: {long[0]}"


def test_sentences_span_lines_and_end_at_list_items() -> None:
    text = (
        "# No sentence\n\nOne two\nthree. `a b c` [four](five.md).\n\n- Six.\n- Seven\n  eight .9\n"
    )
    assert [words(one) for one in sentences(text)] == [3, 2, 1, 3]


def test_tables_and_code_have_no_sentences() -> None:
    assert not list(sentences("| a | b |\n| --- | --- |\n\n```\nosmium bench\n```\n"))
