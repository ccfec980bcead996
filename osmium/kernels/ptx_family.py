"""Families: files in ptx/ that define several kernels, expanded to one text per kernel.

A family's contract has one line per kernel, with the values of the family's constants:

    //: as   int4_gemm_f32   BITS=4 UP=0

    // -- if EXPR, // -- else, // -- end    lines of variants where EXPR is not 0
    // -- each NAME 0 1 2 3, // -- end      lines once for each integer
    // -- each NAME EXPR, // -- end         lines EXPR times, for NAME from 0
    // -- let NAME EXPR                     defines NAME from here on
    {EXPR}, {entry}                         the value in decimal; the kernel's name

EXPR is a contract's expression of constants, loop variables and names of `let`.  Braces stay as
they are if they are empty or have a semicolon, a register or a comma outside of brackets.
"""

import re
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from osmium.errors import KernelError
from osmium.kernels.expression import Expression, split_at_commas

__all__ = ["Source", "Variant", "expand", "find_source", "kernel_files", "variants"]

_DIRECTIVE = re.compile(r"\s*// -- (if|else|end|each|let)\b\s*(.*?)\s*$")
_AS = re.compile(r"//:\s+as\b")
_BRACES = re.compile(r"\{([^{}]*)\}")
"""Of braces within braces, the inner ones: {%a{i}, %a{i + 1}}."""
_NAME = r"[A-Za-z_]\w*"


class Source(NamedTuple):
    """A kernel's PTX text."""

    text: str
    where: str
    """Name of the file that defines it."""
    origins: tuple[int, ...] = ()
    """Of an expanded text: for each line, its line in the file, from 1."""


class Variant(NamedTuple):
    """A kernel that a family defines."""

    entry: str
    constants: dict[str, int]
    line: int
    """Line of the family that names it, from 1."""


def find_source(folders: tuple[Path, ...], name: str) -> Source | None:
    """The text of kernel `name`: of `name`.ptx, or of the family in which it is.  None: there is
    none.  Raises: KernelError for a family that cannot be expanded."""
    for folder in folders:
        path = folder / f"{name}.ptx"
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            if not variants(text, path.name):
                return Source(text, path.name)
        family = kernel_files(folder).get(name)
        if family is not None:
            return expand(family.read_text(encoding="utf-8"), family.name, name)
    return None


@cache
def kernel_files(folder: Path) -> dict[str, Path]:
    """The file that defines each kernel of a folder.  Every file is read, once in a process.
    Raises: KernelError where two files define the same kernel."""
    paths = sorted(folder.glob("*.ptx"))
    families = {path: variants(path.read_text(encoding="utf-8"), path.name) for path in paths}
    found = {path.stem: path for path in paths if not families[path]}
    for path, family in families.items():
        for variant in family.values():
            if variant.entry in found:
                raise KernelError(
                    f"{path.name}:{variant.line}: {found[variant.entry].name} also defines "
                    f"{variant.entry}; a kernel is defined once."
                )
            found[variant.entry] = path
    return found


def variants(text: str, where: str) -> dict[str, Variant]:
    """The kernels that a family's `//: as` lines define; empty for a file of one plain kernel.
    Raises: KernelError."""
    found: dict[str, Variant] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not _AS.match(line):
            continue
        at, rule = f"{where}:{number}: {line!r}", "write '//: as   NAME   CONSTANT=integer ...'."
        entry, *pairs = line.split()[2:] or [""]
        values = [re.fullmatch(rf"({_NAME})=(-?\d+)", pair) for pair in pairs]
        constants = {value[1]: int(value[2]) for value in values if value}
        if not re.fullmatch(_NAME, entry) or len(constants) < len(pairs):
            raise KernelError(f"{at}: {rule}")
        if entry in found:
            raise KernelError(f"{at}: line {found[entry].line} also defines {entry}.")
        found[entry] = Variant(entry, constants, number)
    names = dict.fromkeys(name for variant in found.values() for name in variant.constants)
    for entry, constants, number in found.values():
        lacking = [name for name in names if name not in constants]
        if lacking:
            raise KernelError(
                f"{where}:{number}: {entry} has no {lacking[0]}; every kernel of a file has the "
                "same constants."
            )
    return found


def expand(text: str, where: str, entry: str) -> Source:
    """The text of one kernel of a family.  Raises: KernelError with file, line, text and rule."""
    family = variants(text, where)
    if entry not in family:
        raise KernelError(f"{where} defines {', '.join(family) or 'no variants'}, not {entry}.")
    expander = _Expander(text.splitlines(), where, family[entry])
    expander.run(0, len(expander.lines))
    expanded = "".join(f"{line}\n" for _, line in expander.expanded)
    return Source(expanded, where, tuple(number for number, _ in expander.expanded))


@cache
def _expression(text: str, at: str) -> Expression:
    return Expression(text, at)


@dataclass
class _Expander:
    """Expands the lines of a family for one variant."""

    lines: list[str]
    where: str
    variant: Variant
    expanded: list[tuple[int, str]] = field(default_factory=list)
    """(line in the file, text) of each line."""

    def __post_init__(self) -> None:
        self.names = dict(self.variant.constants)
        self.fixed = {*self.names, "entry", "ceil", "min", "max"}
        """Names that may not be defined: constants and the variables of loops around."""
        self.ends = self._match()

    def error(self, line: int, rule: str) -> KernelError:
        return KernelError(f"{self.where}:{line + 1}: {self.lines[line].strip()!r}: {rule}")

    def _match(self) -> dict[int, tuple[int, int]]:
        """For each `if` and `each`: the lines of its `else`, or else its `end`, and its `end`."""
        ends: dict[int, tuple[int, int]] = {}
        open_lines: list[tuple[int, int | None]] = []
        for i, line in enumerate(self.lines):
            word, rest = directive(line)
            if word in ("else", "end") and rest:
                raise self.error(i, f"'{word}' stands alone; write other comments differently.")
            if word in ("if", "each"):
                open_lines.append((i, None))
            elif word == "else":
                start, other = open_lines.pop() if open_lines else (i, i)
                if other is not None or directive(self.lines[start])[0] != "if":
                    raise self.error(i, "there is no 'if' before it.")
                open_lines.append((start, i))
            elif word == "end":
                if not open_lines:
                    raise self.error(i, "there is no 'if' or 'each' before it.")
                start, other = open_lines.pop()
                ends[start] = (i if other is None else other, i)
        if open_lines:
            raise self.error(open_lines[-1][0], "it has no '// -- end'.")
        return ends

    def run(self, start: int, stop: int) -> None:
        """Expand lines [start, stop)."""
        i = start
        while i < stop:
            word, rest = directive(self.lines[i])
            if word == "let":
                name, expression = self._definition(i, rest, self.fixed)
                self.names[name] = self._value(i, expression)
            elif word == "if":
                other, end = self.ends[i]
                if self._value(i, rest):
                    self.run(i + 1, other)
                else:
                    self.run(other + 1, end)
                i = end
            elif word == "each":
                name, values = self._definition(i, rest, self.fixed | self.names.keys())
                self.fixed.add(name)
                _, end = self.ends[i]
                for value in self._range(i, values):
                    self.names[name] = value
                    self.run(i + 1, end)
                self.fixed.remove(name)
                self.names.pop(name, None)
                i = end
            elif not _AS.match(self.lines[i]):
                line = _BRACES.sub(partial(self._replaced, i), self.lines[i])
                self.expanded.append((i + 1, line))
            i += 1

    def _definition(self, line: int, text: str, taken: set[str]) -> tuple[str, str]:
        """The name that a line defines, and the text after it."""
        name, _, rest = text.partition(" ")
        if not re.fullmatch(_NAME, name) or not rest.strip():
            raise self.error(line, "write a name, then an expression.")
        if name in taken:
            raise self.error(line, f"{name} is defined already; take another name.")
        return name, rest.strip()

    def _range(self, line: int, text: str) -> list[int]:
        if re.fullmatch(r"-?\d+(\s+-?\d+)+", text):
            return [int(word) for word in text.split()]
        return list(range(self._value(line, text)))

    def _value(self, line: int, text: str) -> int:
        if not text:
            raise self.error(line, "an expression must follow.")
        expression = _expression(text, f"{self.where}:{line + 1}")
        for name in expression.names:
            if name not in self.names:
                known = ", ".join(self.names) or "none"
                raise self.error(line, f"{name} is not known there; known names: {known}.")
        try:
            return expression(self.names)
        except (TypeError, ZeroDivisionError) as error:
            raise self.error(line, f"{text!r} has no value: {error}.") from None

    def _replaced(self, line: int, braces: re.Match[str]) -> str:
        content = braces[1].strip()
        if is_ptx(content):
            return braces[0]
        return self.variant.entry if content == "entry" else str(self._value(line, content))


def directive(line: str) -> tuple[str, str]:
    """The word of a directive and the text after it; both empty for every other line."""
    found = _DIRECTIVE.match(line)
    return (found[1], found[2]) if found else ("", "")


def is_ptx(content: str) -> bool:
    """Whether braces around this are PTX: a vector, a scope or nothing, not an expression."""
    is_vector = bool(re.search(r"%[A-Za-z_$]", content)) or len(split_at_commas(content)) > 1
    return not content or ";" in content or is_vector
