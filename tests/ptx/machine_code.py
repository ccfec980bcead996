"""Machine code of kernels, by ptxas: what a change of names or comments must leave equal.

`tools/compare_machine_code COMMIT` assembles every kernel of a commit and of the working tree.
Each is assembled for every target of its contract, from sm_90 on also with PDL.
"""

import hashlib
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.ptx.test_contracts import find_ptxas

ROOT = Path(__file__).resolve().parents[2]

PDL_TARGETS = ("sm_90", "sm_90a", "sm_100", "sm_120")
"""Targets on which the engine launches the text with programmatic dependent launch."""

READ_TEXTS = """
import json, sys
from pathlib import Path
from osmium.kernels.ptx import pdl_text
root = Path(sys.argv[1])
paths = [*(root / "ptx").glob("*.ptx"), *(root / "osmium/kernels/compiled").glob("*.ptx")]
texts = {path.stem: path.read_text() for path in paths}
try:
    from osmium.kernels.ptx_family import find_source, kernel_files
except ImportError:
    pass
else:
    folder = root / "ptx"
    texts = {path.stem: path.read_text() for path in paths if path.parent != folder}
    texts |= {name: find_source((folder,), name).text for name in kernel_files(folder)}
print(json.dumps({name: [text, pdl_text(text)] for name, text in texts.items()}))
"""
"""Prints the texts of a checkout's kernels, by its own code; older commits have no families."""


@dataclass(frozen=True)
class MachineCode:
    """What ptxas makes of one entry: a hash of its instructions, and what a launch allocates."""

    code: str
    """SHA-256 of section .text.ENTRY."""
    registers: int
    shared_bytes: int
    """Static shared memory: size of section .nv.shared.ENTRY."""
    param_bytes: int
    """Size of section .nv.constant0.ENTRY, which ends with the parameters."""


class Section(NamedTuple):
    """A section of an ELF file; the content of sections without bytes in the file is empty."""

    name: str
    size: int
    info: int
    content: bytes


def sections(cubin: bytes) -> Iterator[Section]:
    """The sections of an ELF64 file.  Source: the ELF-64 object file format."""
    offset = struct.unpack_from("<Q", cubin, 0x28)[0]
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQII", cubin, offset + i * size) for i in range(count)]
    table = headers[names][4]
    for name, kind, _, _, at, length, _, info in headers:
        end = cubin.index(b"\0", table + name)
        content = b"" if kind == 8 else cubin[at : at + length]
        yield Section(cubin[table + name : end].decode(), length, info, content)


def machine_code(text: str, target: str) -> MachineCode:
    """Assemble a PTX module with one entry.  Raises: ValueError with ptxas' errors."""
    ptxas = find_ptxas()
    if ptxas is None:
        raise ValueError("ptxas is not installed; the dev extra has it (nvidia-cuda-nvcc-cu12)")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(text)
        done = subprocess.run(
            [ptxas, f"-arch={target}", str(source), "-o", str(cubin)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ValueError(f"ptxas -arch={target}: {done.stderr.strip()}")
        found = {section.name: section for section in sections(cubin.read_bytes())}
    entry = re.search(r"\.entry\s+(\w+)", text)
    assert entry is not None, "a module has an entry"
    code, shared = found[f".text.{entry[1]}"], found.get(f".nv.shared.{entry[1]}")
    return MachineCode(
        code=hashlib.sha256(code.content).hexdigest(),
        registers=code.info >> 24,
        shared_bytes=0 if shared is None else shared.size,
        param_bytes=found[f".nv.constant0.{entry[1]}"].size,
    )


def variants(text: str, pdl_text: str) -> list[tuple[str, str, str]]:
    """(key, target, text) of everything that the engine may load of a kernel."""
    contract = re.search(r"^//: target\s+(sm_\w+(?: sm_\w+)*)", text, re.M)
    assert contract is not None, "a contract names its targets"
    targets = contract[1].split()
    plain = [(target, target, text) for target in targets]
    return plain + [(f"{t} PDL", t, pdl_text) for t in targets if t in PDL_TARGETS]


def read_texts(root: Path) -> dict[str, tuple[str, str]]:
    """The text of every kernel of a checkout and its text with PDL, by the checkout's own code."""
    done = subprocess.run(
        [sys.executable, "-c", READ_TEXTS, str(root)],
        cwd=root,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
        raise ValueError(f"The kernels of this commit cannot be read: {reason}")
    return {name: (text, with_pdl) for name, (text, with_pdl) in json.loads(done.stdout).items()}


def all_code(root: Path) -> dict[str, dict[str, MachineCode]]:
    """Machine code of every kernel below `root`, a checkout: by kernel, then by target."""
    work = [
        (name, key, target, text)
        for name, texts in sorted(read_texts(root).items())
        for key, target, text in variants(*texts)
    ]
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda one: machine_code(one[3], one[2]), work)
        found: dict[str, dict[str, MachineCode]] = {}
        for (name, key, _, _), code in zip(work, made, strict=True):
            found.setdefault(name, {})[key] = code
    return found


def compare(
    before: dict[str, dict[str, MachineCode]], after: dict[str, dict[str, MachineCode]]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Kernels with equal code, old name to new; and the differences of the others, by new name.

    A kernel that is in one of both alone equals the one of the other with the same code on all
    targets.  A removed kernel is listed under its old name.
    """
    equal: dict[str, str] = {}
    different: dict[str, list[str]] = {}
    for name in before.keys() & after.keys():
        wrong = [
            f"{key}: {before[name].get(key)} -> {after[name].get(key)}"
            for key in sorted(before[name].keys() | after[name].keys())
            if before[name].get(key) != after[name].get(key)
        ]
        if wrong:
            different[name] = wrong
        else:
            equal[name] = name
    removed = sorted(before.keys() - after.keys())
    for name in sorted(after.keys() - before.keys()):
        twin = next((old for old in removed if before[old] == after[name]), None)
        if twin is None:
            different[name] = ["added: no kernel of the commit has this code"]
        else:
            removed.remove(twin)
            equal[twin] = name
    for name in removed:
        different[name] = ["removed: no kernel has this code"]
    return equal, different
