"""Documents: form of the log and its pages, short sentences, and links and names that exist."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.ptx.kernels import NAMES, kernel_text
from tests.test_floors import FLOOR

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / "LOG.md"
PAGES = sorted((ROOT / "docs" / "experiments").iterdir())

PARTS = ["Question", "Set-up", "Prediction", "Result", "Decision"]
SETUP = ["Date", "Machine", "Commit", "Command"]
ROW = re.compile(r"\| (\d{4}-\d\d-\d\d) \| .+ \| .+ \| \[.+\]\(docs/experiments/(.+)\) \|")

DOCS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "tests" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
GENERATED = ROOT / "docs" / "plans.md"
"""Made by tools/plans, from what a command prints."""

SOURCES = ("osmium", "ptx", "tools", "tests")
"""Folders that have the paths and names of the documents."""

PLACEHOLDER = re.compile(r"\b(NAME|MODEL_TYPE|FINGERPRINT)\b")
"""What stands for a part of a path or name in a document."""

ENVIRONMENT = ("NO_COLOR",)
"""Variables that packages read for Osmium."""

MAX_LINE = 200
MAX_WORDS = 25

on_each_document = pytest.mark.parametrize(
    "path", [LOG, *PAGES, *DOCS], ids=lambda path: str(path.relative_to(ROOT))
)
on_each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
on_each_present_page = pytest.mark.parametrize(
    "path", [path for path in DOCS if path != GENERATED], ids=lambda path: path.name
)
"""What speaks of the code as it is; experiments have the names of their commits."""


def index_rows() -> list[tuple[str, str]]:
    """(date, file name) of each row of LOG.md's table of experiments, in its order."""
    _, found, table = LOG.read_text().partition("\n## Experiments\n")
    assert found, "LOG.md has no section 'Experiments'"
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    rows = [ROW.fullmatch(line) for line in lines]
    wrong = [line for line, row in zip(lines, rows, strict=True) if row is None]
    assert not wrong, f"not '| date | question | answer | [topic](link) |': {wrong[0]}"
    return [(row[1], row[2]) for row in rows if row is not None]


def parts(page: str) -> dict[str, str]:
    """The text of each part of a page, by its heading."""
    _, *sections = re.split(r"^## (.+)\n", page, flags=re.M)
    return dict(zip(sections[::2], sections[1::2], strict=True))


def paragraphs(text: str) -> Iterator[str]:
    """Prose without headings, tables and code blocks; a list item is a paragraph."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    text = re.sub(r"^(#|\|).*$", "", text, flags=re.M)
    for block in re.split(r"\n\s*\n|\n(?=[-*] |\d+\. )", text):
        if block.strip():
            yield " ".join(block.split())


def sentences(text: str) -> Iterator[str]:
    """Sentences of the prose.  A code span and a link's target count as one word and as none."""
    for paragraph in paragraphs(text):
        plain = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", paragraph))
        yield from re.split(r"(?<=[.!?])[*_)\]]*\s+", plain)


def words(sentence: str) -> int:
    return sum(any(c.isalnum() for c in word) for word in sentence.split())


def links(text: str) -> list[tuple[str, str, str]]:
    """(file, "#" or "", heading) of each link that is no address."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target.partition("#") for target in targets if "://" not in target]


def anchors(text: str) -> set[str]:
    """Headings as links name them: small letters, spaces as hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_spans(text: str) -> list[str]:
    """Code spans outside of code blocks, in order, each once."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return list(dict.fromkeys(re.findall(r"`([^`\n]+)`", text)))


def is_path(span: str) -> bool:
    """Whether a span is a file or folder of the repository: of a folder that it has, or with the
    ending of a source file."""
    if not re.fullmatch(r"\.?[\w./-]+", span) or PLACEHOLDER.search(span):
        return False
    return span.startswith(tuple(f"{folder}/" for folder in (*SOURCES, "docs"))) or bool(
        re.search(r"\w\.(py|ptx|md|toml)$", span)
    )


def find_path(span: str, page: Path) -> bool:
    """A path from the root, from osmium/, or from the page; or a file's name, anywhere."""
    if any((folder / span).exists() for folder in (ROOT, ROOT / "osmium", page.parent)):
        return True
    return "/" not in span and any(
        path.name == span for folder in SOURCES for path in (ROOT / folder).rglob("*")
    )


def is_name(span: str) -> bool:
    """Whether a span is a name of the code: with an underscore, a capital inside of it, or a dot.
    Files, flags and variables of other programs are none."""
    if is_path(span) or PLACEHOLDER.search(span) or span in ENVIRONMENT:
        return False
    if not re.fullmatch(r"[A-Za-z_][\w/]*(\.[A-Za-z_]\w*)*", span):
        return False
    if re.search(r"\.(json|jinja|npz|osmium|usage|lock|partial|journal|sh|txt)$", span):
        return False
    last = span.rpartition(".")[2]
    return "." in span or "_" in last.strip("_") or bool(re.search(r"[a-z][A-Z]", last))


@cache
def sources() -> dict[Path, str]:
    """Texts of the code: every file of SOURCES that is text, and pyproject.toml."""
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.is_file()]
    found = {}
    for path in [*files, ROOT / "pyproject.toml"]:
        raw = b"\0" if "__pycache__" in path.parts else path.read_bytes()
        if b"\0" not in raw and path.resolve() not in (Path(__file__).resolve(),):
            found[path] = raw.decode(errors="replace")
    return found


@cache
def find_name(span: str) -> bool:
    """`module.name`, with dots or slashes below osmium/: the module's text has the name.  For
    `Class.name`: a file that defines the class has it.  Else: any file of the code has it, with its
    dots, as an instruction of PTX."""
    *front, last = re.split(r"[./]", span)
    word = re.compile(rf"\b{re.escape(last)}\b")
    if not front:
        return any(word.search(text) for text in sources().values())
    module = ROOT.joinpath("osmium", *front)
    for file in (module.with_suffix(".py"), module / "__init__.py"):
        if file.is_file():
            return bool(word.search(file.read_text()))
    owner = re.compile(rf"^\s*class {re.escape(front[-1])}\b", re.M)
    return any(
        span in text or (owner.search(text) and word.search(text)) for text in sources().values()
    )


@cache
def find_flag(flag: str) -> bool:
    """A flag of a command or of a tool; --no-X is one where --X is."""
    names = {flag, flag.replace("--no-", "--", 1)}
    return any(
        re.search(rf"(?<![\w-]){name}(?![\w-])", text)
        for path, text in sources().items()
        for name in names
        if "tests" not in path.relative_to(ROOT).parts
    )


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
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for target, _, heading in links(path.read_text()):
        file = path.parent / target if target else path
        assert file.is_file(), target
        assert not heading or heading in anchors(file.read_text()), f"{target}#{heading}"


def test_every_page_is_in_the_index_and_readme_links_to_it() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    linked = {target for target, _, _ in links(index)}
    assert linked >= {path.name for path in DOCS if path.parent.name == "docs"} - {"README.md"}
    assert "docs/README.md" in {target for target, _, _ in links((ROOT / "README.md").read_text())}


def test_pages_that_the_code_names_exist() -> None:
    named = {
        page for text in sources().values() for page in re.findall(r"\bdocs/[\w/-]+\.md\b", text)
    }
    assert named and not [page for page in named if not (ROOT / page).is_file()]


@on_each_present_page
def test_paths_in_code_spans_exist(path: Path) -> None:
    missing = [
        span for span in code_spans(path.read_text()) if is_path(span) and not find_path(span, path)
    ]
    assert not missing, f"no file: {', '.join(missing)}"


@on_each_present_page
def test_names_in_code_spans_are_in_the_code(path: Path) -> None:
    missing = [
        span for span in code_spans(path.read_text()) if is_name(span) and not find_name(span)
    ]
    assert not missing, f"not in the code: {', '.join(missing)}"


@on_each_present_page
def test_flags_in_code_spans_are_in_the_code(path: Path) -> None:
    flags = re.findall(r"(?<![\w-])--[a-z][a-z-]+", " ".join(code_spans(path.read_text())))
    missing = {flag for flag in flags if not find_flag(flag)}
    assert not missing, f"no flag: {', '.join(sorted(missing))}"


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


def test_the_table_of_folders_in_design_has_every_module_and_its_floor() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `([\w/]+)/` \| ([\w, ]+) \|", text, re.M)
    listed = {(folder, name) for _, folder, names in rows for name in names.split(", ")}
    package = ROOT / "osmium"
    assert listed == {
        (str(path.parent.relative_to(package)).replace(".", "osmium"), path.stem)
        for path in package.rglob("*.py")
        if not path.stem.startswith("__")
    }
    for floor, folder, names in rows:
        for name in names.split(", ") if folder == "osmium" else [folder.partition("/")[0]]:
            assert int(floor) == max(0, FLOOR[name]), name


def test_the_page_of_kernels_has_every_kernel_once() -> None:
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs" / "kernels.md").read_text(), re.M)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    compiled = ROOT / "osmium" / "kernels" / "compiled"
    assert sorted(listed) == sorted([*NAMES, *(path.stem for path in compiled.glob("*.ptx"))])


def test_the_example_of_a_contract_is_a_kernels() -> None:
    def contract(text: str) -> list[list[str]]:
        """Key, name and type of each line; not what stands there for people."""
        return [line.split()[1:4] for line in text.splitlines() if line.startswith("//: param")]

    page = (ROOT / "docs" / "add-a-kernel.md").read_text()
    (example,) = re.findall(r"^```\n(//.*?)^```$", page, re.M | re.S)
    (entry,) = re.findall(r"^//: entry +(\w+)$", example, re.M)
    text = kernel_text(entry)
    assert contract(example) == contract(text)
    keys = {line.split()[1] for line in text.splitlines() if line.startswith("//:")}
    assert {line.split()[1] for line in example.splitlines() if line.startswith("//:")} == keys


def test_code_spans_are_told_apart_as_paths_and_names() -> None:
    spans = code_spans("`osmium/cli`, `sampler.py` and `free`\n```\n`not_this`\n```\n`a_name`")
    assert spans == ["osmium/cli", "sampler.py", "free", "a_name"]
    assert [span for span in spans if is_path(span)] == ["osmium/cli", "sampler.py"]
    assert [span for span in spans if is_name(span)] == ["a_name"]
    assert not is_path("osmium/models/MODEL_TYPE.py") and not is_name("config.json")


def test_missing_paths_names_and_flags_are_found() -> None:
    page = ROOT / "README.md"
    assert find_path("osmium/cli", page) and find_path("sampler.py", page)
    assert not find_path("osmium/nothing.py", page) and not find_path("nothing.py", page)
    assert find_name("KVCacheManager.free") and find_name("engine.plan.make_plan")
    assert not find_name("KVCacheManager.make_plan") and not find_name("engine.plan.nothing_here")
    assert find_flag("--no-prefetch") and not find_flag("--nothing-like-it")


def test_an_anchor_is_made_of_its_heading() -> None:
    assert anchors("# One\n\n## Rows that have ended, now\n") == {"one", "rows-that-have-ended-now"}
