"""Every kernel is launched from osmium/, and twins for several formats share a file."""

import ast
import importlib
import re
from collections import defaultdict
from pathlib import Path

from osmium.kernels.numba_kernels import KERNELS
from osmium.kernels.ptx import Kernel
from osmium.ops import Ops
from tests.ptx.kernels import KERNEL_FILES, NAMES

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "osmium").rglob("*.py"))

FORMATS = re.compile(r"(?:^|_)(?:bf16|int8|int4|fp8)(?=_|$)")

SEPARATE_TWINS = {
    "_linear_f32", "_matvec_f32", "_moe_down_generic_f32", "_moe_up_generic_f32", "_quantize",
    "gqa_attention", "gqa_decode_split_kv",
    "_gemm_f32", "_moe_gemm_down_f32", "_moe_gemm_up_f32",
}  # fmt: skip
"""Names, without formats, of kernels whose files share few lines: older twins, and the matrices of
many tokens, whose digits and bf16 halves take different mma."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def names_of_calls(tree: ast.AST) -> set[str]:
    """Names that a module calls, or passes to a call; of NAME[...] the NAME."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for part in (node.func, *node.args):
                while isinstance(part, ast.Subscript):
                    part = part.value
                if isinstance(part, ast.Name):
                    found.add(part.id)
    return found


def launched_kernels(sources: dict[str, str]) -> set[str]:
    """Kernels whose global name, or that of their dict, a module launches.  By module: its text."""
    found: set[str] = set()
    for name, text in sources.items():
        if "kernel" not in text:
            continue
        calls, module = names_of_calls(ast.parse(text)), importlib.import_module(name)
        for variable in calls & vars(module).keys():
            value = vars(module)[variable]
            values = value.values() if isinstance(value, dict) else [value]
            found |= {one.name for one in values if isinstance(one, Kernel)}
    return found


def sources() -> dict[str, str]:
    return {
        module_name(p): p.read_text()
        for p in MODULES
        if p.stem not in ("__main__", "numba_compiler")
    }


def test_every_kernel_is_launched() -> None:
    unused = {*NAMES, *KERNELS} - launched_kernels(sources())
    assert not unused, f"nothing in osmium/ launches {sorted(unused)}: delete them and their cases"


def test_a_kernel_without_a_launch_is_found() -> None:
    texts = sources()
    text = texts["osmium.ops.gpu_grouped"]
    texts["osmium.ops.gpu_grouped"] = text.replace("        GATHER_ADD(", "        print(")
    assert texts["osmium.ops.gpu_grouped"] != text
    assert launched_kernels(sources()) - launched_kernels(texts) == {"gather_add_f32"}


def operations_called() -> set[str]:
    """Methods that the package calls on `self` or on operations."""
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                if name in ("self", "ops", "gpu"):
                    found.add(node.func.attr)
    return found


def test_every_operation_is_called() -> None:
    operations = {name for name in dir(Ops) if not name.startswith("_")}
    unused = operations - operations_called()
    assert not unused, f"nothing in osmium/ calls {sorted(unused)} of Ops"


def test_kernels_that_differ_by_format_share_a_file() -> None:
    files = defaultdict(set)
    for name in NAMES:
        files[FORMATS.sub("", name)].add(KERNEL_FILES[name])
    separate = {stem for stem, paths in files.items() if len(paths) > 1}
    assert separate == SEPARATE_TWINS, "new twins are a family: docs/add-a-kernel.md#families"
