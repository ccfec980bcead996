"""Prose of source files: docstrings, comments and documents, as sentences with their lines."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from osmium.kernels.ptx_family import Source, expand, variants

ROOT = Path(__file__).resolve().parents[1]


class Sentence(NamedTuple):
    line: int
    """First line of the paragraph or comment block that the sentence is in, from 1."""
    text: str

    @property
    def words(self) -> int:
        return sum(any(c.isalnum() for c in word) for word in self.text.split())


def source_files(*folders: str) -> list[Path]:
    """Text files below folders of the checkout; compiled kernels and binary files are left out."""
    paths = []
    for folder in folders:
        top = ROOT / folder
        paths += [top] if top.is_file() else [p for p in top.rglob("*") if p.is_file()]
    skipped = {"__pycache__", "compiled"}
    kinds = {".py", ".ptx", ".md", ".sh", ""}
    return sorted(p for p in paths if p.suffix in kinds and not skipped & set(p.parts))


def sentences(path: Path, text: str) -> Iterator[Sentence]:
    """Sentences of a Python file's docstrings and comments, of PTX comments, or of Markdown."""
    first_line = text.partition("\n")[0]
    if path.suffix == ".py" or ("python" in first_line and first_line.startswith("#!")):
        blocks = python_prose(text)
    elif path.suffix == ".ptx":
        blocks = ptx_prose_of_kernels(path.name, text)
    elif path.suffix == ".md":
        blocks = iter([(1, markdown_prose(text))])
    else:
        blocks = iter(())
    for line, block in blocks:
        for part in split_sentences(block):
            yield Sentence(line, part)


def split_sentences(text: str) -> Iterator[str]:
    """Sentences of prose.  A paragraph or list item ends one; a code span is one word."""
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*] |\d+\. ))", text):
        plain = " ".join(re.sub(r"`[^`]*`", "code", paragraph).split())
        yield from filter(None, re.split(r"(?<=[.!?:;])[*_)\]]*\s+", plain))


def is_table_row(line: str) -> bool:
    """Whether columns are separated by runs of spaces: a table of terms is not prose."""
    return bool(re.search(r"\S {2,}\S", re.sub(r"(?<=[.:]) {2}", " ", line.strip())))


def python_prose(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each docstring and each block of comments."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                lines = node.value.value.splitlines()
                yield node.lineno, "\n".join("" if is_table_row(line) else line for line in lines)
    block: list[str] = []
    start = last = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        if block and token.start[0] != last + 1:
            yield start, "\n".join(block)
            block = []
        start = start if block else token.start[0]
        block.append(token.string.lstrip("#: "))
        last = token.start[0]
    if block:
        yield start, "\n".join(block)


def ptx_prose_of_kernels(where: str, text: str) -> Iterator[tuple[int, str]]:
    """The prose of each kernel that a file defines, by the file's lines; equal blocks once."""
    expanded = [expand(text, where, entry) for entry in variants(text, where)]
    found: dict[tuple[int, str], None] = {}
    for source in expanded or [Source(text, where)]:
        for number, block in ptx_prose(source.text):
            found[source.origins[number - 1] if source.origins else number, block] = None
    yield from found


def ptx_prose(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each block of comments; contract lines, formulas and tables are left out."""
    block: list[str] = []
    start = 0
    for number, line in enumerate([*text.splitlines(), ""], 1):
        comment = re.match(r"\s*//(?!:)(.*)", line)
        if comment:
            start = start if block else number
            indented = line.startswith("//    ")  # a formula
            block.append("" if indented or is_table_row(comment[1]) else comment[1].strip(" -"))
            continue
        if block:
            yield start, "\n".join(block)
            block = []
        if "//" in line and not line.startswith("//:"):
            yield number, line.split("//", 1)[1]


def markdown_prose(text: str) -> str:
    """A document without code blocks, headings, tables and link targets."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    text = re.sub(r"^(#|\|).*$", "", text, flags=re.M)
    return re.sub(r"\]\([^)]*\)", "]", text)
