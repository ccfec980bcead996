"""What ptxas and the disassembler show of a kernel: registers, spills, instructions of its loop."""

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

__all__ = ["CLASSES", "Assembled", "assemble", "find_tool", "inner_loop", "instruction_class",
           "parse_sass", "tool_version"]  # fmt: skip

WHEELS = {"ptxas": "nvidia-cuda-nvcc-cu12", "nvdisasm": "nvidia-cuda-nvdisasm"}
"""The wheel of the dev extra that has a tool."""

CLASSES = ("mma", "integer", "float", "shared", "global", "barrier", "control")
"""Classes of instructions, by what executes them."""

PREFIXES = {
    "mma": ("IMMA", "HMMA", "QMMA"),
    "float": ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSET", "FSETP", "FCHK", "MUFU", "HADD2",
              "HMUL2", "HFMA2", "I2F", "F2I", "F2F", "FRND", "UFADD", "UFMUL", "UFFMA",
              "UI2F", "UF2I"),
    "shared": ("LDS", "LDSM", "STS", "ATOMS", "SHFL", "MATCH", "REDUX", "VOTE"),
    "global": ("LDG", "STG", "ATOMG", "RED", "REDG", "ATOM", "LDGSTS", "LDL", "STL", "LDC",
               "LD", "ST", "CCTL"),
    "barrier": ("BAR", "DEPBAR", "LDGDEPBAR", "MEMBAR", "WARPSYNC", "ERRBAR", "SYNCS"),
    "control": ("BRA", "BRX", "EXIT", "BSSY", "BSYNC", "BREAK", "CALL", "RET", "NOP", "JMP"),
}  # fmt: skip
"""Opcodes of each class, up to the first dot; all others are integer or logic.  Conversions are
float, warp exchange is shared, LDGSTS (cp.async) is global."""

_CLASS_OF = {opcode: kind for kind, opcodes in PREFIXES.items() for opcode in opcodes}

_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"(\.L\w+):")


@dataclass(frozen=True)
class Assembled:
    """A kernel for one target."""

    registers: int
    static_shared: int
    """Bytes of static shared memory."""
    spilled: int
    """Bytes of spill stores and loads."""
    loop: Counter[str]
    """Instructions of the inner loop by class; empty without a disassembler."""
    mma: int
    """mma instructions of the whole kernel."""


def find_tool(name: str) -> str | None:
    """ptxas or nvdisasm: of the pinned wheel, so that results are the same anywhere, or PATH."""
    try:
        for file in files(WHEELS[name]) or []:
            if file.name == name:
                return str(file.locate())
    except PackageNotFoundError:
        pass
    return shutil.which(name)


def tool_version(path: str) -> str:
    """The version that a tool prints, as "12.8.93"."""
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    return found[1] if found else "unknown"


def instruction_class(opcode: str) -> str:
    """The class of an opcode with its modifiers, as "IMMA.16832.S8.S8"."""
    return _CLASS_OF.get(opcode.split(".")[0], "integer")


def parse_sass(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Opcodes of a disassembled kernel, and its loops: [first, last] of each backward branch."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif found := _INSTRUCTION.match(line):
            opcodes.append(found[1])
            target = re.search(r"\((\.L\w+)\)", found[2]) if found[1].startswith("BRA") else None
            if target and labels.get(target[1], len(opcodes)) < len(opcodes) - 1:
                loops.append((labels[target[1]], len(opcodes) - 1))
    return opcodes, loops


def inner_loop(opcodes: list[str], loops: list[tuple[int, int]]) -> list[str]:
    """The shortest loop that has the most mma of all loops; without mma, the longest loop that has
    no other inside; all instructions where nothing is repeated."""

    def mma(loop: tuple[int, int]) -> int:
        return sum(instruction_class(op) == "mma" for op in opcodes[loop[0] : loop[1] + 1])

    if not loops:
        return opcodes
    most = max(map(mma, loops))
    if most:
        first, last = min((loop for loop in loops if mma(loop) == most), key=lambda x: x[1] - x[0])
    else:
        inner = [
            a for a in loops
            if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)
        ]  # fmt: skip
        first, last = max(inner, key=lambda x: x[1] - x[0])
    return opcodes[first : last + 1]


def assemble(text: str, target: str, ptxas: str, disassembler: str | None) -> Assembled:
    """Assemble a PTX module with one entry.  Raises: ValueError with the tool's errors."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(text)
        done = subprocess.run(
            [ptxas, "-v", f"-arch={target}", str(source), "-o", str(cubin)],
            capture_output=True,
            text=True,
        )
        registers = re.search(r"Used (\d+) registers", done.stderr)
        if done.returncode or not registers:
            raise ValueError(f"ptxas -arch={target}: {done.stderr.strip()}")
        shared = re.search(r"(\d+) bytes smem", done.stderr)
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))
        opcodes: list[str] = []
        loops: list[tuple[int, int]] = []
        if disassembler is not None:
            shown = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True)
            if shown.returncode:
                raise ValueError(f"{disassembler}: {shown.stderr.strip()}")
            opcodes, loops = parse_sass(shown.stdout)
    classes = [instruction_class(opcode) for opcode in opcodes]
    return Assembled(
        registers=int(registers[1]),
        static_shared=int(shared[1]) if shared else 0,
        spilled=spilled,
        loop=Counter(map(instruction_class, inner_loop(opcodes, loops))),
        mma=classes.count("mma"),
    )
