"""Kernels written in Python, compiled to PTX by Numba and launched like any other.

    @python_kernel("void(CPointer(int32), uint32)", block=256, grid="ceil(n / 256)")
    def count(out, n): ...

Parameters are pointers and scalars; there are no warp intrinsics.  Threads exchange values through
shared memory, blocks through `atomic_add` and `fetch_add`.  Kernels share a `device_function`.
The contract follows from the signature and the parameter names.  It stands on top of the compiled
text, in the form of a hand-written kernel's.

Nothing is compiled at run time, and Numba is not needed.  osmium/kernels/compiled has the compiled
texts, in the repository and in every install.  A text's first line has a hash of its source, and a
text with another hash is refused.  `tools/compile_kernels` (osmium.kernels.numba_compiler) compiles
all of them again.
"""

import hashlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from osmium.distribution import REINSTALL
from osmium.errors import KernelError
from osmium.kernels.ptx import Contract, Kernel, parse

__all__ = [
    "COMPILED", "DEVICE_FUNCTIONS", "KERNELS", "NumbaSource", "atomic_add", "cuda",
    "device_function", "exp2", "fetch_add", "float32", "float64", "float_as_int", "int32", "int64",
    "python_kernel", "uint16", "uint32", "uint64",
]  # fmt: skip

cuda: Any = None
int32: Any = None
uint16: Any = None
uint32: Any = None
uint64: Any = None
int64: Any = None
float32: Any = None
float64: Any = None
exp2: Any = None
float_as_int: Any = None
atomic_add: Any = None
fetch_add: Any = None
"""Numba's names for a kernel's source to import, None at run time.  `float_as_int(float32)` is an
int32 with the same bits; `atomic_add(pointer, index, value)` adds in device memory; `fetch_add`
also returns the value before."""

TARGETS = "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120"

COMPILED = Path(__file__).with_name("compiled")
"""Folder of the compiled texts."""

COMMAND = "tools/compile_kernels"

KERNELS: dict[str, "NumbaSource"] = {}
"""Every kernel, by name."""

DEVICE_FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""Device functions, by name."""

_TYPES = {"uint32": "u32", "int32": "u32", "float32": "f32"}
"""PTX types of scalars.  An int32 becomes u32: it is for sizes, which are not negative."""

_POINTS_TO = {
    "int32": "i32", "uint32": "u32", "float32": "f32", "uint16": "u16", "int64": "i64",
    "uint8": "u8", "float64": "f64",
    "uint64": "u64",
}  # fmt: skip


class NumbaSource:
    """A kernel's Python function, and the text compiled from it."""

    def __init__(
        self, function: Callable[..., None], signature: str, block: int, grid: str, regs: int
    ) -> None:
        self.function = function
        self.name = function.__name__
        self.signature = signature
        self.block, self.grid, self.regs = block, grid, regs

    @property
    def key(self) -> str:
        """Hash of the source, signature and constants: the same under any Python version."""
        parts = [inspect.getsource(self.function), self.signature, self.header()]
        for name, value in self.function.__globals__.items():
            if name in DEVICE_FUNCTIONS and DEVICE_FUNCTIONS[name] is value:
                parts.append(inspect.getsource(value))
            elif isinstance(value, int | float):
                parts.append(f"{name} = {value}")
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    @property
    def first_line(self) -> str:
        """Start of the compiled text; the compiler's versions follow."""
        return f"// {self.name}, compiled by {COMMAND} from source {self.key}"

    def contract(self) -> Contract:
        """The contract of the compiled text.  Raises: KernelError."""
        return parse(self.text(), f"{self.name}.ptx (Numba)")

    def text(self) -> str:
        """The compiled text.  Raises: KernelError if it is missing or from another source."""
        path = COMPILED / f"{self.name}.ptx"
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            why = error.strerror
            raise KernelError(f"The kernel {path} cannot be read: {why}. {_way_out()}") from None
        if not text.startswith(f"{self.first_line};"):
            begins = text.partition("\n")[0].partition(";")[0]
            raise KernelError(
                f"The kernel {path} begins with {begins!r}; its source in "
                f"{self.function.__module__} is {self.key}. {_way_out()}"
            )
        return text

    def parameters(self) -> list[tuple[str, str, str]]:
        """(name, PTX type, dtype pointed to or "") per parameter.  Raises: KernelError."""
        kinds = re.findall(r"(CPointer\(\w+\)|\w+)(?=[,)])", self.signature.partition("(")[2])
        names = list(inspect.signature(self.function).parameters)
        if len(kinds) != len(names):
            raise KernelError(
                f"{self.name} has {len(names)} parameters, its signature {len(kinds)}."
            )
        parameters = []
        for name, kind in zip(names, kinds, strict=True):
            pointed = re.match(r"CPointer\((\w+)\)", kind)
            known = _POINTS_TO if pointed else _TYPES
            dtype = known.get(pointed[1] if pointed else kind)
            if dtype is None:
                raise KernelError(f"{self.name}: {name} is {kind}; known are {', '.join(known)}.")
            parameters.append((name, "u64", dtype) if pointed else (name, dtype, ""))
        return parameters

    def header(self) -> str:
        """The contract lines."""
        lines = [f"entry   {self.name}", f"grid    {self.grid}", f"block   {self.block}"]
        lines += [f"regs    {self.regs}", f"target  {TARGETS}"]
        for name, kind, pointed in self.parameters():
            lines.append(f"param   {name}  {kind}" + (f"  inout {pointed}[.]" if pointed else ""))
        return "".join(f"//: {line}\n" for line in lines)


def _way_out() -> str:
    """How to repair compiled texts: compile in a checkout, else reinstall."""
    root = Path(__file__).parents[2]
    if (root / COMMAND).is_file():
        return f"Run {COMMAND}, which compiles all of them."
    return REINSTALL


def device_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function callable from kernels of its module; it is inlined into each."""
    DEVICE_FUNCTIONS[function.__name__] = function
    return function


def python_kernel(
    signature: str, *, block: int, grid: str, regs: int = 255
) -> Callable[[Callable[..., None]], Kernel]:
    """Decorator: a Python function becomes a Kernel.

    signature  Numba's: void(...) of CPointer(type), uint32, int32 or float32
    grid       as in a contract, over the parameters and launcher sizes
    """

    def decorate(function: Callable[..., None]) -> Kernel:
        source = NumbaSource(function, signature, block, grid, regs)
        KERNELS[source.name] = source
        return Kernel(source.name, source.contract)

    return decorate
