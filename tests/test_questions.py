"""Every search in docs/questions.md finds the file that answers its question, among a few."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "questions.md"

MAX_FILES = 12
"""Files that one search may give; the page states it in words."""

MIN_QUESTIONS = 10

ROW = re.compile(
    r"\| (?P<text>[A-Z].+\?) \| `git grep -(?P<flags>nw?) (?P<word>[\w-]+) (?P<folders>[\w/ ]+)` "
    r"\| `(?P<path>[\w./]+)`, `(?P<symbol>\w+)` \| \[.+\]\((?P<page>[\w-]+\.md)\) \|"
)


@dataclass(frozen=True)
class Question:
    """One row of the page."""

    text: str
    flags: str
    """git grep's: n, and w for whole words."""
    word: str
    folders: str
    path: str
    symbol: str
    page: str


def questions() -> list[Question]:
    """The rows of all tables.  A row that is not of the form fails."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    rows = [row for row in rows if not row.startswith(("| question", "| ---"))]
    found = []
    for row in rows:
        match = ROW.fullmatch(row)
        assert match, f"not '| question? | `git grep -nw WORD PATH` | `file`, `symbol` |': {row}"
        found.append(Question(**match.groupdict()))
    return found


@cache
def search(question: Question) -> list[str]:
    """Files with the word, as git grep -l names them: text files of the folders."""
    word = re.escape(question.word)
    pattern = re.compile(rf"(?<!\w){word}(?!\w)" if "w" in question.flags else word)
    found = []
    for folder in question.folders.split():
        for path in sorted((ROOT / folder).rglob("*")):
            if not path.is_file() or "__pycache__" in path.parts:
                continue
            raw = path.read_bytes()
            if b"\0" not in raw[:8000] and pattern.search(raw.decode(errors="replace")):
                found.append(str(path.relative_to(ROOT)))
    return found


def defines(text: str, symbol: str) -> bool:
    """Whether a Python or PTX text defines a function, class, constant or entry of that name."""
    kinds = r"async def|def|class|\.visible \.entry"
    return bool(re.search(rf"^(?:\s*(?:{kinds}) {symbol}\b|{symbol}(?:: .+)? = )", text, re.M))


each_question = pytest.mark.parametrize("question", questions(), ids=lambda one: one.text)


@each_question
def test_a_search_finds_the_file_of_the_answer_among_a_few(question: Question) -> None:
    files = search(question)
    assert question.path in files, f"{question.word} is in {', '.join(files) or 'no file'}"
    assert len(files) <= MAX_FILES, f"{question.word} is in {len(files)} files: {', '.join(files)}"


@each_question
def test_git_grep_gives_the_same_files(question: Question) -> None:
    """But for files that git does not track."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    command = [git, "grep", f"-lI{question.flags}", question.word, "--"]
    done = subprocess.run(
        [*command, *question.folders.split()], cwd=ROOT, capture_output=True, text=True
    )
    files = done.stdout.splitlines()
    assert question.path in files and set(files) <= set(search(question)), done.stderr


@each_question
def test_the_symbol_of_an_answer_is_defined_in_its_file(question: Question) -> None:
    assert defines((ROOT / question.path).read_text(), question.symbol)


@each_question
def test_the_page_of_an_answer_names_its_file_or_symbol(question: Question) -> None:
    page = (ROOT / "docs" / question.page).read_text()
    name = question.path.removeprefix("osmium/")
    assert name in page or re.search(rf"\b{question.symbol}\b", page), question.page


def test_there_are_enough_questions_and_none_is_asked_twice() -> None:
    texts = [question.text for question in questions()]
    assert len(texts) >= MIN_QUESTIONS and len(set(texts)) == len(texts)


def test_a_search_by_whole_words_does_not_find_a_part_of_one() -> None:
    whole = Question("", "nw", "captur", "osmium/cuda", "", "", "")
    part = Question("", "n", "captur", "osmium/cuda", "", "", "")
    assert not search(whole) and "osmium/cuda/stream.py" in search(part)
