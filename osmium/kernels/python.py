"""Kernels written in Python, compiled to PTX by Numba and launched like any other.

    @python_kernel("void(CPointer(int32), uint32)", block=256, grid="ceil(n / 256)")
    def count(out, n): ...

Pointers and scalars only, no warp intrinsics: what a kernel shares across lanes goes through
shared memory, and across blocks by `add_to`; what they have in common is a `device_function`.  The
contract is made from the signature and the function's own parameter names and written on top of the
compiled text, so a compiled kernel reads like a hand-written one.

Numba is needed to compile and for nothing else.  The text comes from osmium/kernels/compiled, where
a wheel ships it; in a checkout it is compiled at first use and kept there, or in the user's cache
folder where that cannot be written.  Its first line carries a hash of the source: a stale text is
made anew.  CUDA 12.8's compiler makes PTX 8.7, which every driver from 12.8 on takes.

    python -m osmium.kernels.python FOLDER      write all of them there, as a wheel ships them
"""

import hashlib
import importlib
import inspect
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from osmium.config import user_cache
from osmium.errors import KernelError
from osmium.kernels.ptx import Contract, Kernel, parse

__all__ = [
    "FUNCTIONS", "KERNELS", "add_to", "bits_of", "cuda", "device_function", "exp2", "float32",
    "float64", "int32", "int64", "python_kernel", "uint16", "uint32", "uint64",
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
bits_of: Any = None
add_to: Any = None
"""Numba's names, bits_of(float32), an int32, and add_to(pointer, index, value), an atomic sum in
device memory, for a kernel's source to import; they mean something only while compiling."""

LATEST_PTX = (8, 7)
"""What a 12.8 driver takes."""

TARGETS = "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120"

KERNELS: dict[str, "Source"] = {}
"""Every decorated function, by name."""

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""What kernels call, by name."""

_TYPES = {"uint32": "u32", "int32": "u32", "float32": "f32"}
"""Parameters have no sign in PTX: an int32 is for sizes, which are never below zero."""

_POINTS_TO = {
    "int32": "i32", "uint32": "u32", "float32": "f32", "uint16": "u16", "int64": "i64",
    "uint8": "u8", "float64": "f64",
    "uint64": "u64",
}  # fmt: skip


class Source:
    """A decorated function: what it takes to compile it."""

    def __init__(
        self, function: Callable[..., None], signature: str, block: int, grid: str, regs: int
    ) -> None:
        self.function = function
        self.name = function.__name__
        self.signature = signature
        self.block, self.grid, self.regs = block, grid, regs

    @property
    def key(self) -> str:
        """A hash of everything the compiled text follows from."""
        made = inspect.getsource(Source._renamed)
        known = self.function.__globals__
        parts = [inspect.getsource(self.function), self.signature, self._header(), made]
        for name, value in known.items():
            if name in FUNCTIONS and FUNCTIONS[name] is value:
                parts.append(inspect.getsource(value))
            elif isinstance(value, int | float):
                parts.append(f"{name} = {value}")
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def contract(self) -> Contract:
        """The compiled text's.  Raises: KernelError."""
        return parse(self.text(), f"{self.name} (Numba)")

    def text(self) -> str:
        """Compiled before, or now.  Raises: KernelError where it is neither there nor makeable."""
        first = f"// {self.name}, compiled from Python {self.key}"
        folders = [Path(__file__).with_name("compiled"), user_cache() / "kernels"]
        for folder in folders:
            path = folder / f"{self.name}.ptx"
            if path.is_file():
                text = path.read_text(encoding="utf-8")
                if text.startswith(first + "\n"):
                    return text
        text = first + "\n" + self._header() + self._compile()
        for folder in folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                part = folder / f".{self.name}.{os.getpid()}"
                part.write_text(text, encoding="utf-8")
                part.replace(folder / f"{self.name}.ptx")
                break
            except OSError:
                continue  # a read-only folder: the next one, or compile again another time
        return text

    def _parameters(self) -> list[tuple[str, str, str]]:
        """(name, type, what it points to or "") of each parameter."""
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

    def _header(self) -> str:
        """The contract, as a hand-written kernel has it."""
        lines = [f"entry   {self.name}", f"grid    {self.grid}", f"block   {self.block}"]
        lines += [f"regs    {self.regs}", f"target  {TARGETS}"]
        for name, kind, pointed in self._parameters():
            lines.append(f"param   {name}  {kind}" + (f"  inout {pointed}[.]" if pointed else ""))
        return "".join(f"//: {line}\n" for line in lines)

    def _compile(self) -> str:
        """PTX by Numba, with our names for entry and parameters."""
        try:
            import numba  # here: only compiling needs it
            import numba.cuda
            from numba.cuda import dispatcher, libdevice
        except ImportError:
            raise KernelError(
                f"The kernel {self.name} is not compiled and Numba is not installed; "
                "pip install 'osmium[build]', or install a wheel, which ships it compiled."
            ) from None
        plain = ("int32", "int64", "uint16", "uint32", "uint64", "float32", "float64")
        found = {**self.function.__globals__} | {name: getattr(numba, name) for name in plain}
        found |= {"cuda": numba.cuda, "exp2": libdevice.exp2f, "add_to": _add_to()}
        found["bits_of"] = libdevice.float_as_int
        for name, called in FUNCTIONS.items():
            if self.function.__globals__.get(name) is called:
                found[name] = numba.cuda.jit(device=True, forceinline=True)(
                    types.FunctionType(called.__code__, found, name)
                )
        function = types.FunctionType(self.function.__code__, found, self.name)
        asked = dispatcher.get_current_device  # for what it calls, Numba asks a device's age
        dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=(8, 0))
        try:
            text, _ = numba.cuda.compile(
                function, self.signature, cc=(8, 0), device=False, abi="numba", output="ptx"
            )
        except (OSError, RuntimeError, ImportError) as error:  # a toolkit wheel is missing
            raise KernelError(
                f"{self.name}: Numba finds no CUDA compiler ({' '.join(str(error).split())}); "
                "pip install 'osmium[build]'."
            ) from error
        finally:
            dispatcher.get_current_device = asked
        return self._renamed(text)

    def _renamed(self, text: str) -> str:
        version = re.search(r"^\.version (\d+)\.(\d+)", text, re.M)
        if not version or (int(version[1]), int(version[2])) > LATEST_PTX:
            raise KernelError(
                f"Numba's toolkit wrote PTX {version[0].split()[1] if version else '?'}, which a "
                "12.8 driver refuses; pip install 'osmium[build]' pins CUDA 12.8's."
            )
        mangled = re.findall(r"\.visible \.entry (\w+)\(", text)
        if len(mangled) != 1:
            raise KernelError(f"Numba compiled {self.name} to {len(mangled)} entries, not one.")
        for index, (name, _, _) in reversed(list(enumerate(self._parameters()))):
            text = text.replace(f"{mangled[0]}_param_{index}", name)
        text = text.replace(mangled[0], self.name)
        head, body = re.split(rf"(?<=\.entry {self.name}\()", text, maxsplit=1)
        return head + body.replace(")", f")\n.maxntid {self.block}\n.minnctapersm 1", 1)


def _add_to() -> Any:
    """Numba's own atomics take arrays, and kernels have pointers."""
    from numba import void
    from numba.cuda.extending import intrinsic

    def add_to(_: Any, pointer: Any, index: Any, value: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = context.cast(builder, arguments[2], signature.args[2], pointer.dtype)
            builder.atomic_rmw("add", builder.gep(arguments[0], [arguments[1]]), value, "monotonic")
            return context.get_dummy_value()

        return void(pointer, index, value), code

    return intrinsic(add_to)


def device_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let kernels of its module call it; it is compiled into each."""
    FUNCTIONS[function.__name__] = function
    return function


def python_kernel(
    signature: str, *, block: int, grid: str, regs: int = 255
) -> Callable[[Callable[..., None]], Kernel]:
    """Make a Kernel of a function.

    signature  Numba's: void of CPointer(type) and uint32, int32 or float32
    grid       as in a contract, over the parameters and launcher sizes
    """

    def decorate(function: Callable[..., None]) -> Kernel:
        source = Source(function, signature, block, grid, regs)
        KERNELS[source.name] = source
        return Kernel(source.name, source.contract)

    return decorate


def compile_all(folder: Path) -> list[Path]:
    """Write every Numba kernel of the package to `folder`; the files."""
    for name in ("place", "sample", "weigh"):
        importlib.import_module(f"osmium.kernels.{name}")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, source in sorted(KERNELS.items()):
        made.append(folder / f"{name}.ptx")
        text = source.contract().text
        if not made[-1].is_file() or made[-1].read_text(encoding="utf-8") != text:
            made[-1].write_text(text, encoding="utf-8")
    return made


if __name__ == "__main__":
    # `python -m` runs this file a second time under another name; the registry is in the first.
    ours = importlib.import_module("osmium.kernels.python")
    print(*ours.compile_all(Path(sys.argv[1])), sep="\n")
