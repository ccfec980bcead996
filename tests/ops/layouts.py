"""Layouts as docstrings state them: read from the source, and compared with arrays.

A field's docstring starts with `dtype [shape]`, or `[shape]`; names after a colon are the entries
of the last axis.  A method's docstring has `name, name dtype [shape]` anywhere.  A shape is a list
of sizes: numbers, letters, and sums, products and exact quotients of them.
"""

import ast
import dataclasses
import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.kernels.group_by_expert import MAX_BLOCKS
from osmium.ops import Ops, controls, grouped, types
from osmium.ops.tiling import SPLIT_KV_MAX_SEQS
from osmium.ops.types import LinearWeight, MatmulInput
from osmium.quant.expert_layout import ExpertLayout

DTYPES: dict[str, Any] = {
    "bf16": np.uint16, "e4m3": np.uint8, "u8": np.uint8, "i8": np.int8, "u16": np.uint16,
    "f16": np.float16, "i32": np.int32, "u32": np.uint32, "f32": np.float32, "i64": np.int64,
    "u64": np.uint64, "f64": np.float64,
}  # fmt: skip

CONSTANTS = {
    "FETCH_BLOCKS": types.FETCH_BLOCKS, "FETCH_WARPS": types.FETCH_WARPS,
    "MAX_BLOCKS": MAX_BLOCKS, "SPLIT_KV_MAX_SEQS": SPLIT_KV_MAX_SEQS,
}  # fmt: skip

SHARED = {
    "A", "C", "D", "E", "G", "H", "I", "Is", "L", "R", "S", "T", "U", "V", "d", "dk", "dv",
    "page_size", "vocab",
}  # fmt: skip
"""Letters that mean one size in all arguments of a call; others are an object's own."""

LAYOUT = re.compile(rf"(?:({'|'.join(DTYPES)}) )?\[([^\]]+)\](?::((?: [a-z_]+,)* [a-z_]+)\.?$)?")
ARGUMENTS = re.compile(rf"((?:\w+, )*\w+) (?:({'|'.join(DTYPES)}) )?\[([^\]]+)\]")


@dataclass(frozen=True)
class Layout:
    """What a docstring says of one array."""

    dtype: str
    """"" where it says none."""
    shape: tuple[str, ...]
    entries: tuple[str, ...] = ()
    """Names of the last axis."""


Sizes = dict[str, int]


def parse(text: str) -> Layout | None:
    """The layout at the start of a docstring's first line."""
    found = LAYOUT.match(text.split("\n")[0])
    if found is None:
        return None
    dtype, shape, entries = found.groups(default="")
    names = tuple(name.strip() for name in entries.split(",")) if entries else ()
    return Layout(dtype, _sizes(shape), names)


def _sizes(shape: str) -> tuple[str, ...]:
    return tuple(size.strip() for size in shape.split(","))


@functools.cache
def fields_of(kind: type) -> dict[str, str]:
    """The docstring of each field of a dataclass."""
    tree = ast.parse(Path(inspect.getfile(kind)).read_text())
    (node,) = (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == kind.__name__)
    docs: dict[str, str] = {}
    for field, doc in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                docs[field.target.id] = str(doc.value.value)
    return docs


def layouts_of(kind: type) -> dict[str, Layout]:
    """The layout of each field that has one."""
    found = {name: parse(doc) for name, doc in fields_of(kind).items()}
    return {name: layout for name, layout in found.items() if layout is not None}


@functools.cache
def arguments_of(method: str) -> dict[str, Layout]:
    """The layouts of the arguments that a method of Ops documents."""
    function = getattr(Ops, method)
    known = set(inspect.signature(function).parameters)
    found: dict[str, Layout] = {}
    for names, dtype, shape in ARGUMENTS.findall(inspect.getdoc(function) or ""):
        for name in names.split(", "):
            if name in known:
                found[name] = Layout(dtype, _sizes(shape))
    return found


def value(size: str, sizes: Sizes) -> int:
    """A size in numbers.  Raises: KeyError for a letter that is not known."""
    text = re.sub(r"(\d)(?=[A-Za-z(])|([\w)]) (?=[A-Za-z(])", r"\1\2 * ", size)  # 2H, V dv

    def of(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            assert isinstance(node.value, int), size
            return Fraction(node.value)
        if isinstance(node, ast.Name):
            return Fraction(CONSTANTS.get(node.id) or sizes[node.id])
        assert isinstance(node, ast.BinOp), size
        left, right = of(node.left), of(node.right)
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Add):
            return left + right
        assert isinstance(node.op, ast.Div), size
        return left / right

    result = of(ast.parse(text, mode="eval").body)
    assert result.denominator == 1, f"{size} is {result} for {sizes}"
    return int(result)


@dataclass
class Comparison:
    """Arrays to compare with layouts, and the sizes that letters have in them."""

    sizes: Sizes
    pending: list[tuple[str, str, int, Sizes]] = dataclasses.field(default_factory=list)
    compared: set[str] = dataclasses.field(default_factory=set)

    def add(self, name: str, layout: Layout, shape: Any, dtype: Any, own: Sizes) -> None:
        """Compare dtype and number of axes; `finish` compares sizes, once all letters are known."""
        self.compared.add(name)
        if layout.dtype:
            wanted = np.dtype(DTYPES[layout.dtype])
            assert dtype == wanted, f"{name} is {dtype}, documented as {layout.dtype}"
        shape = tuple(int(n) for n in shape)
        assert len(shape) == len(layout.shape), f"{name} is {shape}, documented as {layout.shape}"
        if layout.entries:
            assert shape[-1] == len(layout.entries), f"{name} is {shape}: {layout.entries}"
        for size, n in zip(layout.shape, shape, strict=True):
            if size.isidentifier() and size not in CONSTANTS:
                self.bind(size, n, own)
            else:
                self.pending.append((name, size, n, own))

    def fields(self, thing: Any, name: str) -> None:
        """All documented fields of a dataclass that are arrays, or dataclasses of arrays."""
        kind: Any = type(thing)
        docs, own = fields_of(kind), Sizes()
        layers: dict[int, Sizes] = {}
        for field in dataclasses.fields(thing):
            held, doc = getattr(thing, field.name), docs.get(field.name, "")
            layout = parse(doc)
            if type(held) is int:
                self.bind(field.name, held, own)
                if re.fullmatch(r"[A-Z]\w*", doc.rstrip(".")):
                    self.bind(doc.rstrip("."), held, own)
            elif isinstance(held, ExpertLayout):
                own["nbytes"] = held.nbytes
            elif layout is not None and held is not None:
                if str(field.type).find("Sequence") >= 0:  # one array per layer
                    for i in range(len(held) if isinstance(held, Sequence) else held.shape[0]):
                        of_layer = layers.setdefault(i, dict(own))
                        if held[i] is not None:
                            self.any(held[i], f"{name}.{field.name}", layout, of_layer)
                else:
                    self.any(held, f"{name}.{field.name}", layout, own)

    def bind(self, letter: str, n: int, own: Sizes) -> None:
        """Give a letter its size, or compare it with the one that it has."""
        table = self.sizes if letter in SHARED else own
        assert table.setdefault(letter, n) == n, f"{letter} is {n} and {table[letter]}"

    def any(self, thing: Any, name: str, layout: Layout, own: Sizes) -> None:
        """An array, the input of a matrix, or a matrix."""
        if isinstance(thing, MatmulInput):
            self.add(name, layout, thing.f32.shape, None, own)
            inner = Comparison({"T": thing.f32.shape[0]})
            inner.fields(thing, "MatmulInput")
            inner.finish()
            self.compared |= inner.compared
        elif isinstance(thing, LinearWeight):
            self.add(name, layout, (thing.out_features, thing.in_features), None, own)
            self.compared |= compare_matrix(thing)
        else:
            self.add(name, layout, thing.shape, thing.dtype, own)

    def finish(self) -> None:
        """Compare the sizes that are not a single letter.  A letter that no array has alone, as
        `rotary` in `rotary / 2`, gets the size that makes the first of them right."""
        for name, size, n, own in self.pending:
            at_least, size = size.startswith(">= "), size.removeprefix(">= ")
            letters = set(re.findall(r"[A-Za-z_]\w*", size)) - set(CONSTANTS)
            unknown = letters - set(self.sizes | own)
            if unknown:
                (letter,) = unknown
                fits = [u for u in range(1, 2 * n + 1) if _is(size, n, self.sizes | own, letter, u)]
                assert fits, f"{name}: no {letter} makes {size} equal to {n}"
                self.bind(letter, fits[0], own)
            wanted = value(size, self.sizes | own)
            right = n >= wanted if at_least else n == wanted
            assert right, f"{name}: {size} is {wanted}, not {n}"


def _is(size: str, n: int, sizes: Sizes, letter: str, u: int) -> bool:
    try:
        return value(size, sizes | {letter: u}) == n
    except AssertionError:  # no whole number
        return False


@functools.cache
def formats() -> dict[str, dict[str, Layout]]:
    """The arrays of each format, of LinearWeight's docstring."""
    found = {}
    for line in (inspect.getdoc(LinearWeight) or "").splitlines():
        if line.split(" ")[0] in ("bf16", "int8", "int4"):
            name, rest = line.split("  ", 1)
            found[name] = {
                array: Layout(dtype, _sizes(shape))
                for array, dtype, shape in ARGUMENTS.findall(rest)
            }
    return found


def compare_matrix(w: LinearWeight) -> set[str]:
    """A matrix with the layouts of its format; what was compared."""
    arrays = formats()[w.format]
    sizes = {"N": w.out_features, "K": w.in_features, "group": w.group}
    comparison = Comparison(sizes)
    for name, layout in arrays.items():
        array = getattr(w, name)
        comparison.add(f"LinearWeight.{w.format}.{name}", layout, array.shape, array.dtype, sizes)
    comparison.finish()
    assert ("scale" in arrays) == (w.scale is not None)
    return comparison.compared


class Compared:
    """Mixed into a backend: each call of an operation compares its arguments with docstrings."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.compared: set[str] = set()
        super().__init__(*args, **options)

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name.startswith("_") or not callable(method) or not hasattr(Ops, name):
            return method
        documented = arguments_of(name)
        signature = inspect.signature(getattr(Ops, name))

        def call(*args: Any, **options: Any) -> Any:
            bound = signature.bind(self, *args, **options).arguments
            comparison = Comparison({})
            own: Sizes = {k: v for k, v in bound.items() if type(v) is int}
            if "num_experts" in bound:
                comparison.sizes["E"] = bound["num_experts"]
            for argument, given in bound.items():
                if argument in documented and given is not None:
                    comparison.any(given, f"{name}.{argument}", documented[argument], own)
                elif type(given).__module__ in (
                    types.__name__,
                    controls.__name__,
                    grouped.__name__,
                ):
                    comparison.fields(given, type(given).__name__)
            comparison.finish()
            self.compared |= comparison.compared
            return method(*args, **options)

        return call


def documented(kinds: list[type]) -> Iterator[str]:
    """The name of every documented field of these dataclasses."""
    for kind in kinds:
        for field in layouts_of(kind):
            yield f"{kind.__name__}.{field}"


# -- prose that holds an index ---------------------------------------------------------------------


def documented_index(doc: str | None, pattern: str) -> tuple[str, ...]:
    """What a docstring says in the places of a pattern's groups, its lines joined."""
    found = re.search(pattern, re.sub(r"\s+", " ", doc or ""))
    assert found is not None, f"{pattern} is not in {doc}"
    return found.groups()


class Table:
    """An array that is indexed as in prose, [s, i]."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array

    def __getitem__(self, at: tuple[int, ...]) -> int:
        return int(self.array[at])


def evaluate(expression: str, **names: Any) -> Any:
    """A documented index, which is Python's own notation."""
    return eval(expression, {"__builtins__": {}}, names)
