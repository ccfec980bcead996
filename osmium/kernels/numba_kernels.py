"""Kernels written in Python, compiled to PTX by Numba and launched like any other.

    @python_kernel("void(CPointer(int32), uint32)", block=256, grid="ceil(n / 256)")
    def count(out, n): ...

Pointers and scalars only, no warp intrinsics: what a kernel shares across lanes goes through
shared memory, and across blocks by `atomic_add`; what kernels have in common is a `device_function`.
The contract is made from the signature and the function's own parameter names and stands on top of
the compiled text, so a compiled kernel reads like a hand-written one.

Nothing is compiled at run time, and Numba is not needed: the compiled text is in
osmium/kernels/compiled, in the repository and in every install.  Its first line has a hash of the
source.  A text of another source is refused; `tools/compile_kernels` (osmium.kernels.
numba_compiler) writes all of them anew.
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
    "COMPILED",
    "DEVICE_FUNCTIONS",
    "KERNELS",
    "NumbaSource",
    "atomic_add",
    "cuda",
    "device_function",
    "exp2",
    "float32",
    "float64",
    "float_as_int",
    "int32",
    "int64",
    "python_kernel",
    "uint16",
    "uint32",
    "uint64",
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
"""Numba's names, float_as_int(float32), an int32, and atomic_add(pointer, index, value), an atomic sum in
device memory, for a kernel's source to import; they mean something only while compiling."""

TARGETS = "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120"

COMPILED = Path(__file__).with_name("compiled")
"""The folder of the compiled texts."""

COMMAND = "tools/compile_kernels"

KERNELS: dict[str, "NumbaSource"] = {}
"""Every decorated function, by name."""

DEVICE_FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""What kernels call, by name."""

_TYPES = {"uint32": "u32", "int32": "u32", "float32": "f32"}
"""Parameters have no sign in PTX: an int32 is for sizes, which are never below zero."""

_POINTS_TO = {
    "int32": "i32", "uint32": "u32", "float32": "f32", "uint16": "u16", "int64": "i64",
    "uint8": "u8", "float64": "f64",
    "uint64": "u64",
}  # fmt: skip


class NumbaSource:
    """A decorated function, and the text that was compiled from it."""

    def __init__(
        self, function: Callable[..., None], signature: str, block: int, grid: str, regs: int
    ) -> None:
        self.function = function
        self.name = function.__name__
        self.signature = signature
        self.block, self.grid, self.regs = block, grid, regs

    @property
    def key(self) -> str:
        """A hash of the source that the compiled text follows from: the same under any Python."""
        parts = [inspect.getsource(self.function), self.signature, self.header()]
        for name, value in self.function.__globals__.items():
            if name in DEVICE_FUNCTIONS and DEVICE_FUNCTIONS[name] is value:
                parts.append(inspect.getsource(value))
            elif isinstance(value, int | float):
                parts.append(f"{name} = {value}")
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    @property
    def first_line(self) -> str:
        """How the compiled text begins; the compiler's versions follow."""
        return f"// {self.name}, compiled by {COMMAND} from source {self.key}"

    def contract(self) -> Contract:
        """The compiled text's.  Raises: KernelError."""
        return parse(self.text(), f"{self.name}.ptx (Numba)")

    def text(self) -> str:
        """The compiled text.  Raises: KernelError where it is missing, or of another source."""
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
        """(name, type, what it points to or "") of each parameter.  Raises: KernelError."""
        kinds = re.findall(r"(CPointer\(\w+\)|\w+)(?=[,)])", self.signature.partition("(")[2])
        names = list(inspect.signature(self.function).parameters)
        if len(kinds) != len(names):
            raise KernelError(
                f"{self.name} has {len(names)} parameters, its signature {len(kinds)}."
            )
        made = []
        for name, kind in zip(names, kinds, strict=True):
            pointed = re.match(r"CPointer\((\w+)\)", kind)
            known = _POINTS_TO if pointed else _TYPES
            found = known.get(pointed[1] if pointed else kind)
            if found is None:
                raise KernelError(f"{self.name}: {name} is {kind}; known are {', '.join(known)}.")
            made.append((name, "u64", found) if pointed else (name, found, ""))
        return made

    def header(self) -> str:
        """The contract, as a hand-written kernel has it."""
        lines = [f"entry   {self.name}", f"grid    {self.grid}", f"block   {self.block}"]
        lines += [f"regs    {self.regs}", f"target  {TARGETS}"]
        for name, kind, pointed in self.parameters():
            lines.append(f"param   {name}  {kind}" + (f"  inout {pointed}[.]" if pointed else ""))
        return "".join(f"//: {line}\n" for line in lines)


def _way_out() -> str:
    """What makes the compiled texts whole: compiling in a checkout, a new install elsewhere."""
    root = Path(__file__).parents[2]
    if (root / COMMAND).is_file():
        return f"Run {COMMAND}, which compiles all of them."
    return REINSTALL


def device_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let kernels of its module call it; it is compiled into each."""
    DEVICE_FUNCTIONS[function.__name__] = function
    return function


def python_kernel(
    signature: str, *, block: int, grid: str, regs: int = 255
) -> Callable[[Callable[..., None]], Kernel]:
    """Make a Kernel of a function.

    signature  Numba's: void of CPointer(type) and uint32, int32 or float32
    grid       as in a contract, over the parameters and launcher sizes
    """

    def decorate(function: Callable[..., None]) -> Kernel:
        source = NumbaSource(function, signature, block, grid, regs)
        KERNELS[source.name] = source
        return Kernel(source.name, source.contract)

    return decorate
