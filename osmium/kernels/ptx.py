"""A kernel: its PTX text, its contract, and its launch.

The `//:` lines at the top of a file in ptx/ are the kernel's contract.  They are parsed here,
checked against the `.entry` of the text, and used to check and pack the arguments of a launch.
A file may define several kernels (ptx_family.py); then the contract is that of the expanded text.
How to write a kernel: docs/add-a-kernel.md.

    entry    name of the entry, and of the file unless that defines several kernels
    grid     comma-separated axes: expressions of parameters and launcher sizes.  Launcher sizes are
             names that are not parameters; a caller passes them first, in order of appearance
    block    threads, equal to .maxntid
    shared   static shared memory, bytes          dynamic  dynamic shared memory, an expression
    regs     most registers, by ptxas             target   architectures for which that holds
    param    name  type  [direction dtype[shape]]  [align n]  [rule]
    traffic  bytes read and written in memory, an expression
    max_blocks_per_sm  thread blocks of a grid row that an SM may run at once
    determinism  fixed: the same bits in every run; or the reason why not

Text after two spaces is a comment.  Expressions are integer arithmetic: + - * // % comparisons,
min, max and ceil(a / b).
"""

import operator
import os
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from osmium.distribution import REINSTALL
from osmium.errors import KernelError
from osmium.kernels.expression import Expression, split_at_commas
from osmium.kernels.pdl import pdl_text
from osmium.kernels.ptx_family import find_source

__all__ = ["Contract", "Kernel", "Parameter", "kernel", "parse", "pdl_text"]

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": np.uint16,
        "u8": np.uint8, "i8": np.int8, "u16": np.uint16, "i32": np.int32, "u32": np.uint32,
        "i64": np.int64, "u64": np.uint64,
    }.items()
}  # fmt: skip
"""dtypes of arrays; bf16 is stored as u16."""

KEYS = "entry grid block shared dynamic max_blocks_per_sm regs target param traffic determinism"
"""What a contract's lines begin with."""

_CODES = {"u64": "Q", "u32": "I", "s32": "i", "f32": "f"}
"""struct format of a parameter type."""

_FOLDERS = (Path(__file__).parents[1] / "ptx", Path(__file__).parents[2] / "ptx")
"""Folders of the kernels: in an installed package, in a checkout."""


class Stream(Protocol):
    """Runs launches: cuda.Stream, or the tests' PTX interpreter."""

    def launch(self, kernel: "Kernel", grid: tuple[int, ...], values: tuple[Any, ...]) -> None: ...


@dataclass(frozen=True)
class Parameter:
    """One parameter of an entry."""

    name: str
    type: str
    """u64, u32, s32 or f32; u64 is an array."""
    direction: str = ""
    """in, out or inout; empty for a scalar."""
    dtype: str = ""
    shape: tuple[str, ...] = ()
    align: int = 0
    """Required alignment in bytes; 0: none."""
    rule: Expression | None = None
    """Condition on a scalar, over all sizes."""

    @property
    def is_array(self) -> bool:
        return bool(self.direction)


@dataclass(frozen=True)
class Contract:
    """A kernel's parsed `//:` lines."""

    entry: str
    text: str
    """PTX of the whole module."""
    grid: tuple[Expression, ...]
    block: int
    params: tuple[Parameter, ...]
    shared: int = 0
    dynamic: Expression | None = None
    max_blocks_per_sm: int = 0
    """Most thread blocks of a grid row per multiprocessor (SM); 0: no limit."""
    regs: int = 255
    targets: tuple[str, ...] = ()
    traffic_bytes: Expression | None = None
    determinism: str = "fixed"
    where: str = field(default="", compare=False)
    """File name, for errors; of a family also the entry."""

    @cached_property
    def sizes(self) -> tuple[str, ...]:
        """Names of the launcher sizes: a caller passes them before the parameters."""
        mine = {p.name for p in self.params}
        names = dict.fromkeys(name for axis in self.grid for name in axis.names)
        return tuple(name for name in names if name not in mine)

    @cached_property
    def pdl_text(self) -> str:
        """The text with programmatic dependent launch, for sm_90 and up."""
        return pdl_text(self.text)

    @cached_property
    def layout(self) -> struct.Struct:
        """Layout of the parameter buffer: each aligned to its own size (PTX ABI)."""
        return struct.Struct("@" + "".join(_CODES[p.type] for p in self.params))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Byte offset of each parameter."""
        offsets, at = [], 0
        for p in self.params:
            size = struct.calcsize(_CODES[p.type])
            at = -(-at // size) * size
            offsets.append(at)
            at += size
        return tuple(offsets)


# -- reading ---------------------------------------------------------------------------------------


def parse(text: str, where: str, origins: Sequence[int] = ()) -> Contract:
    """Parse a module's contract and check it against its entry.  Raises: KernelError.

    where    file name, for errors
    origins  of an expanded text: the line of the file for each line
    """
    lines = _lines(text, where, origins)
    for key in ("entry", "grid", "block", "param"):
        if key not in lines:
            raise KernelError(f"{where}: the contract has no {key!r} line.")

    def word(key: str, default: str) -> str:
        return re.split(r"\s{2,}", lines[key][0][1])[0] if key in lines else default

    def number(key: str, default: str) -> int:
        if not word(key, default).isdigit():
            at, value = lines[key][0][0], word(key, default)
            raise KernelError(f"{at}: {key} is {value!r}; it must be an integer.")
        return int(word(key, default))

    def formula(key: str) -> Expression | None:
        return Expression(word(key, ""), lines[key][0][0]) if key in lines else None

    contract = Contract(
        entry=word("entry", ""),
        text=text,
        grid=tuple(
            Expression(axis, lines["grid"][0][0]) for axis in split_at_commas(word("grid", ""))
        ),
        block=number("block", ""),
        params=tuple(_parameter(line, at) for at, line in lines["param"]),
        shared=number("shared", "0"),
        dynamic=formula("dynamic"),
        max_blocks_per_sm=number("max_blocks_per_sm", "0"),
        regs=number("regs", "255"),
        targets=tuple(word("target", "").split()),
        traffic_bytes=formula("traffic"),
        determinism=word("determinism", "fixed"),
        where=f"{where} ({word('entry', '')})" if origins else where,
    )
    _check_names(contract)
    _check_entry(contract)
    return contract


def _lines(text: str, where: str, origins: Sequence[int]) -> dict[str, list[tuple[str, str]]]:
    """The contract's lines by key: ("file:line", rest of the line)."""
    known = set(KEYS.split())
    lines: dict[str, list[tuple[str, str]]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("//:"):
            continue
        at = f"{where}:{origins[number - 1] if origins else number}"
        found = re.match(r"//:\s+(\w+)\s+(\S.*)$", line)
        if not found:
            raise KernelError(f"{at}: {line!r} is not a contract line; write '//: key   value'.")
        key = found[1]
        if key not in known:
            raise KernelError(f"{at}: the contract has {key!r}; known keys are {sorted(known)}.")
        if key in lines and key != "param":
            raise KernelError(f"{at}: the contract has {key!r} a second time.")
        lines.setdefault(key, []).append((at, found[2].rstrip()))
    return lines


def _parameter(line: str, where: str) -> Parameter:
    name, kind, *rest = re.split(r"\s+", line, maxsplit=2)
    if kind not in _CODES:
        raise KernelError(f"{where}: param {name} is {kind}; known types are {', '.join(_CODES)}.")
    tail = rest[0] if rest else ""
    align = re.search(r"\balign (\d+)\b", tail)
    array = re.match(r"(inout|in|out)\s+(\w+)\[(.*?)\]", tail)
    if array:
        if kind != "u64" or array[2] not in DTYPES:
            raise KernelError(f"{where}: param {name} is {kind} {array[2]}; arrays are u64 of "
                              f"{', '.join(DTYPES)}.")  # fmt: skip
        shape = tuple(part.strip() for part in split_at_commas(array[3]))
        return Parameter(name, kind, array[1], array[2], shape, int(align[1]) if align else 0)
    rule = None
    for part in re.split(r"\s{2,}", tail):
        if re.search(rf"\b{name}\b", part) and re.search(r"[<>=]=|[<>]", part):
            rule = Expression(part, where)
    return Parameter(name, kind, rule=rule)


def _check_names(contract: Contract) -> None:
    """Check that expressions use integer parameters only; traffic and rules may also use launcher
    sizes."""
    whole = {p.name for p in contract.params if p.type in ("u32", "s32")}
    others = {p.name for p in contract.params} - whole
    formulas = [("grid", axis, set(axis.names) - others) for axis in contract.grid]
    if contract.dynamic is not None:
        formulas.append(("dynamic", contract.dynamic, whole))
    if contract.traffic_bytes is not None:
        formulas.append(("traffic", contract.traffic_bytes, whole | set(contract.sizes)))
    for p in contract.params:
        if p.rule is not None:
            formulas.append((p.name, p.rule, whole | set(contract.sizes)))
    for what, formula, known in formulas:
        unknown = [name for name in formula.names if name not in known]
        if unknown:
            raise KernelError(
                f"{contract.where}: {what} is {formula.text!r}; {unknown[0]} is not an integer "
                "that is known there."
            )


def _check_entry(contract: Contract) -> None:
    """Check the contract against the `.entry` of the text."""
    where, code = contract.where, re.sub(r"//[^\n]*", "", contract.text)
    entries = re.findall(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)", code, re.S)
    if [name for name, _ in entries] != [contract.entry]:
        raise KernelError(
            f"{where}: the contract's entry is {contract.entry}, the text has "
            f"{', '.join(name for name, _ in entries) or 'none'}."
        )
    found = re.findall(r"\.param\s+\.(\w+)\s+(?:\.ptr\s+[^,]*?\s)?(\w+)", entries[0][1])
    wanted = [(p.type, p.name) for p in contract.params]
    if found != wanted:
        different = [f"{a} for {b}" for a, b in zip(found, wanted, strict=False) if a != b]
        raise KernelError(
            f"{where}: .entry has {len(found)} parameters, the contract {len(wanted)}; "
            f"{'; '.join(different[:3]) or 'the shorter one ends first'}."
        )
    threads = re.search(r"\.maxntid\s+(\d+)", code)
    if not threads or int(threads[1]) != contract.block:
        raise KernelError(
            f"{where}: block is {contract.block}, .maxntid {threads[1] if threads else 'absent'}."
        )


# -- launching -------------------------------------------------------------------------------------


class Kernel:
    """A kernel; calling it launches it on a stream."""

    def __init__(self, name: str, load: Callable[[], Contract]) -> None:
        self.name = name
        self._load = load

    @cached_property
    def contract(self) -> Contract:
        """Parsed at first use.  Raises: KernelError."""
        return self._load()

    @cached_property
    def buffer(self) -> bytearray:
        """Parameter buffer, reused by every launch."""
        return bytearray(self.contract.layout.size)

    @cached_property
    def _grid(self) -> Callable[..., tuple[int, ...]]:
        """Function from the passed values to the grid."""
        contract = self.contract
        names = [*contract.sizes, *(p.name for p in contract.params)]
        axes = [f"_index({axis.source})" for axis in contract.grid]
        grid: Callable[..., tuple[int, ...]] = eval(
            f"lambda {', '.join(names)}: ({', '.join(axes)},)", {"_index": operator.index}
        )
        return grid

    def __call__(self, stream: Stream, *values: Any) -> None:
        """Launch with the launcher sizes, then the parameters.  Raises: KernelError."""
        contract = self.contract
        first = len(contract.sizes)
        if len(values) != first + len(contract.params):
            wanted = ", ".join([*contract.sizes, *(p.name for p in contract.params)])
            raise KernelError(f"{self.name} takes ({wanted}); {len(values)} values were given.")
        try:
            grid = self._grid(*values)
        except (TypeError, ZeroDivisionError) as error:
            for size, value in zip(contract.sizes, values, strict=False):
                if not isinstance(value, int | np.integer):
                    raise KernelError(
                        f"{self.name}: {size} is {value!r}; it must be an integer."
                    ) from None
            self._raise_bad_argument([getattr(value, "ptr", value) for value in values[first:]])
            raise KernelError(
                f"{self.name}: the grid of {values} cannot be computed: {error}."
            ) from None
        if min(grid) < 1:
            raise KernelError(f"{self.name}: the grid is {grid}; every axis must be at least 1.")
        if CHECK:
            check(contract, values)
        stream.launch(self, grid, values[first:])

    def pack(self, values: tuple[Any, ...]) -> bytearray:
        """Write the parameters into `buffer`, in the ABI's layout.  Raises: KernelError."""
        layout = self.contract.layout
        plain = [getattr(value, "ptr", value) for value in values]
        try:
            layout.pack_into(self.buffer, 0, *plain)
        except (struct.error, TypeError, OverflowError):
            self._raise_bad_argument(plain)
            raise
        return self.buffer

    def _raise_bad_argument(self, values: list[Any]) -> None:
        for p, value in zip(self.contract.params, values, strict=True):
            try:
                struct.pack(_CODES[p.type], value)
            except (struct.error, TypeError, OverflowError):
                raise KernelError(
                    f"{self.name}: {p.name} is {value!r}; it must be "
                    f"{'an array' if p.is_array else 'a ' + p.type}."
                ) from None

    def bytes_moved(self, values: tuple[Any, ...]) -> int:
        """Bytes of memory traffic of a launch, by the contract.  Raises: KernelError."""
        contract = self.contract
        if contract.traffic_bytes is None:
            raise KernelError(f"{contract.where}: the contract has no traffic line.")
        return contract.traffic_bytes(_known(contract, values))


CHECK = os.environ.get("OSMIUM_CHECK_LAUNCHES") == "1"
"""Whether each launch checks shapes, dtypes, alignment and rules."""


def _known(contract: Contract, values: tuple[Any, ...]) -> dict[str, int]:
    """Sizes by name: launcher sizes and integer parameters."""
    names = [*contract.sizes, *(p.name for p in contract.params)]
    return {
        n: int(v) for n, v in zip(names, values, strict=True) if isinstance(v, int | np.integer)
    }


def check(contract: Contract, values: tuple[Any, ...]) -> None:
    """Check a launch's values against the contract.  Raises: KernelError."""
    sizes, name = _known(contract, values), contract.entry
    for p, value in zip(contract.params, values[len(contract.sizes) :], strict=True):
        if p.rule is not None and not p.rule(sizes):
            raise KernelError(f"{name}: {p.name} is {value}; the rule is {p.rule.text}.")
        if not p.is_array or (isinstance(value, int) and value == 0):  # 0: absent
            continue
        if not hasattr(value, "dtype"):
            raise KernelError(f"{name}: {p.name} is {value!r}; it must be an array.")
        if np.dtype(value.dtype) != DTYPES[p.dtype]:
            raise KernelError(f"{name}: {p.name} is {value.dtype}; it must be {p.dtype}.")
        if p.align and value.ptr % p.align:
            raise KernelError(f"{name}: {p.name} is at {value.ptr:#x}; it needs align {p.align}.")
        need = np.dtype(value.dtype).itemsize
        for axis in p.shape:
            expression = Expression(axis, contract.where) if axis != "." else None
            if expression is None or not set(expression.names) <= set(sizes):
                need = 0  # an axis known to the caller only
                break
            need *= expression(sizes)
        if value.nbytes < need:
            raise KernelError(
                f"{name}: {p.name} has {value.nbytes} bytes; [{', '.join(p.shape)}] is {need}."
            )


def kernel(name: str) -> Kernel:
    """The kernel `name` of ptx/`name`.ptx, or of the family that defines it; read at first use."""

    def load() -> Contract:
        source = find_source(_FOLDERS, name)
        if source is None:
            raise KernelError(
                f"No kernel {name} in {' or '.join(map(str, _FOLDERS))}: neither {name}.ptx nor "
                f"another file defines it. {REINSTALL}"
            )
        contract = parse(source.text, source.where, source.origins)
        if contract.entry != name:
            raise KernelError(f"{source.where}: its entry is {contract.entry}; it must be {name}.")
        return contract

    return Kernel(name, load)
