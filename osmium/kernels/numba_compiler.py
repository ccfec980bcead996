"""Compiles the kernels written in Python to PTX, for the repository: `tools/compile_kernels`.

Needs the `build` extra, which pins Numba and CUDA 12.8's compiler exactly: every driver from 12.8
on loads their PTX 8.7.  The same source and versions give the same bytes in any process.  Numba
compiles Python's bytecode: 3.12.1 gives another text of assign_slots than 3.11 and 3.13.  So PYTHON
is the version of the committed texts.  tests/nogpu/test_compiled_kernels.py compares bytes under it
and elsewhere the hash of the source.

No run-time module imports this one.
"""

import importlib
import importlib.metadata
import re
import sys
import types
from pathlib import Path
from typing import Any

from osmium.distribution import NAME
from osmium.errors import KernelError
from osmium.kernels.numba_kernels import COMPILED, DEVICE_FUNCTIONS, KERNELS, NumbaSource

__all__ = ["PACKAGES", "PYTHON", "compile_all", "compile_kernel", "versions"]

PYTHON = "3.11"

PACKAGES = (
    "numba-cuda", "numba", "llvmlite", "nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvrtc-cu12",
)  # fmt: skip
"""Packages that determine the compiled text: Numba, and the wheels with libnvvm and libnvrtc."""

LATEST_PTX = (8, 7)
"""The newest PTX version that a 12.8 driver loads."""

MODULES = (
    "adjust_logits", "assign_slots", "count_uses", "group_by_expert", "logit_histogram", "sample",
    "top_logprobs",
)  # fmt: skip


def versions() -> str:
    """The packages' versions, for a text's first line.  Raises: KernelError."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            raise KernelError(_missing(f"{package} is not installed")) from None
    return ", ".join([*found, f"Python {sys.version_info[0]}.{sys.version_info[1]}"])


def compile_all(folder: Path = COMPILED) -> list[Path]:
    """Write every kernel's text to `folder`, remove other texts; returns the changed files.

    Raises: KernelError.
    """
    for name in MODULES:
        importlib.import_module(f"osmium.kernels.{name}")
    texts = {f"{name}.ptx": compile_kernel(source) for name, source in sorted(KERNELS.items())}
    folder.mkdir(parents=True, exist_ok=True)
    changed = []
    for path in sorted(folder.glob("*.ptx")):
        if path.name not in texts:
            path.unlink()
            changed.append(path)
    for name, text in texts.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != text.encode():
            path.write_bytes(text.encode())
            changed.append(path)
    return changed


def compile_kernel(source: NumbaSource) -> str:
    """One kernel's text: first line, contract, PTX.  Raises: KernelError."""
    header = source.header()
    return f"{source.first_line}; {versions()}\n{header}{_compile(source)}"


def _compile(source: NumbaSource) -> str:
    """PTX by Numba, with the source's names of entry and parameters."""
    try:
        import numba  # here: a test checks the error without Numba
        import numba.cuda
        from numba.cuda import dispatcher, libdevice
    except ImportError as error:
        raise KernelError(_missing(f"Numba cannot be imported ({error})")) from None
    plain = ("int32", "int64", "uint16", "uint32", "uint64", "float32", "float64")
    known = source.function.__globals__
    found = {**known} | {name: getattr(numba, name) for name in plain}
    found |= {"cuda": numba.cuda, "exp2": libdevice.exp2f, "atomic_add": _atomic_add()}
    found |= {"float_as_int": libdevice.float_as_int, "fetch_add": _fetch_add()}
    for name, called in DEVICE_FUNCTIONS.items():
        if known.get(name) is called:
            found[name] = numba.cuda.jit(device=True, forceinline=True)(
                types.FunctionType(called.__code__, found, name)
            )
    function = types.FunctionType(source.function.__code__, found, source.name)
    original = dispatcher.get_current_device  # Numba reads its compute capability
    dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=(8, 0))
    try:
        text, _ = numba.cuda.compile(
            function, source.signature, cc=(8, 0), device=False, abi="numba", output="ptx"
        )
    except (OSError, RuntimeError, ImportError) as error:  # a toolkit wheel is missing
        cause = " ".join(str(error).split())
        raise KernelError(
            f"{source.name}: {_missing(f'Numba finds no CUDA compiler ({cause})')}"
        ) from error
    finally:
        dispatcher.get_current_device = original
    return _renamed(source, text)


def _renamed(source: NumbaSource, text: str) -> str:
    version = re.search(r"^\.version (\d+)\.(\d+)", text, re.M)
    if not version or (int(version[1]), int(version[2])) > LATEST_PTX:
        wrote = version[0].split()[1] if version else "?"
        raise KernelError(
            _missing(f"Numba's toolkit wrote PTX {wrote}, which a 12.8 driver refuses")
        )
    # Numba declares a variable per function, in random order; no code refers to them.
    text = re.sub(r"^\.common \.global [^\n]*NumbaEnv[^\n]*\n", "", text, flags=re.M)
    if "NumbaEnv" in text:
        raise KernelError(f"Numba compiled {source.name} to code that needs its environment.")
    # Numba numbers shared arrays over all kernels of a process; here from 1 in each kernel.
    arrays = dict.fromkeys(re.findall(r"_cudapy_smem_\d+", text))
    numbers = {name: f"_cudapy_smem_{number}" for number, name in enumerate(arrays, 1)}
    text = re.sub(r"_cudapy_smem_\d+", lambda match: numbers[match[0]], text)
    mangled = re.findall(r"\.visible \.entry (\w+)\(", text)
    if len(mangled) != 1:
        raise KernelError(f"Numba compiled {source.name} to {len(mangled)} entries, not one.")
    for index, (name, _, _) in reversed(list(enumerate(source.parameters()))):
        text = text.replace(f"{mangled[0]}_param_{index}", name)
    text = text.replace(mangled[0], source.name)
    head, body = re.split(rf"(?<=\.entry {source.name}\()", text, maxsplit=1)
    return head + body.replace(")", f")\n.maxntid {source.block}\n.minnctapersm 1", 1)


def _atomic_add() -> Any:
    """Atomic addition through a pointer: Numba's own takes arrays only."""
    from numba import void
    from numba.cuda.extending import intrinsic

    def atomic_add(_: Any, pointer: Any, index: Any, value: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = context.cast(builder, arguments[2], signature.args[2], pointer.dtype)
            builder.atomic_rmw("add", builder.gep(arguments[0], [arguments[1]]), value, "monotonic")
            return context.get_dummy_value()

        return void(pointer, index, value), code

    return intrinsic(atomic_add)


def _fetch_add() -> Any:
    """Atomic addition through a pointer that returns the value before."""
    from numba.cuda.extending import intrinsic

    def fetch_add(_: Any, pointer: Any, index: Any, value: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = context.cast(builder, arguments[2], signature.args[2], pointer.dtype)
            at = builder.gep(arguments[0], [arguments[1]])
            return builder.atomic_rmw("add", at, value, "monotonic")

        return pointer.dtype(pointer, index, value), code

    return intrinsic(fetch_add)


def _missing(what: str) -> str:
    return f"{what}; the versions that compile are pinned: pip install '{NAME}[build]'."


def main() -> int:
    """Write the texts; exit code 2 where this machine cannot compile them."""
    running = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if running != PYTHON:
        print(
            f"compile_kernels: this is Python {running}; committed texts need Python {PYTHON}: "
            f"set PYTHON to its path and remove .venv.",
            file=sys.stderr,
        )
        return 2
    try:
        changed = compile_all()
    except KernelError as error:
        print(f"compile_kernels: {error}", file=sys.stderr)
        return 2
    print(*map(str, changed), sep="\n")
    print(f"{len(changed)} of {len(KERNELS)} compiled texts changed.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
