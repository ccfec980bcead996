"""Architecture: imports between folders, length of modules, and the walk of one token."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "osmium"

FLOOR = {
    "errors": -2, "distribution": -1, "hf": -1, "config": 0,
    "cuda": 1, "quant": 1,
    "kernels": 2,
    "ops": 3,
    "weights": 4, "experts": 4,
    "models": 5,
    "engine": 6, "text": 6,
    "server": 7, "planning": 7, "loader": 8,
    "bench": 9, "cli": 10, "__init__": 11, "__main__": 11,
}  # fmt: skip

HEAVY = ("torch", "transformers", "jax", "numba")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def folder(path: Path) -> str:
    """The key of FLOOR for a module."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of a module's imports, including those inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_floors_below_and_its_own_folder(path: Path) -> None:
    own_folder = folder(path)
    assert own_folder in FLOOR, (
        f"{own_folder} has no floor: add it to this table and to docs/design.md"
    )
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "osmium" or len(parts) < 2:
            continue
        if not (PACKAGE / parts[1]).exists() and not (PACKAGE / f"{parts[1]}.py").exists():
            continue  # a name of osmium/__init__.py
        other = parts[1]
        if other != own_folder:
            assert FLOOR[other] < FLOOR[own_folder], (
                f"{path.name} ({own_folder}) imports {name}: not below it"
            )


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_are_not_imported_at_run_time(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported(path)}
    if path == PACKAGE / "kernels" / "numba_compiler.py":
        roots.discard("numba")
    assert not roots & set(HEAVY)
    assert "osmium.kernels.numba_compiler" not in imported(path), (
        "it only compiles kernels for the repository"
    )


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_has_at_most_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def test_both_backends_implement_every_operation_with_the_same_parameters() -> None:
    def signatures(path: str, name: str) -> dict[str, list[str]]:
        """The methods of a class, including its base classes in the same folder."""
        tree = ast.parse((PACKAGE / "ops" / path).read_text())
        (body,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
        found: dict[str, list[str]] = {}
        for module in [n for n in tree.body if isinstance(n, ast.ImportFrom)]:
            for base in {b.id for b in body.bases if isinstance(b, ast.Name)}:
                if base in {alias.name for alias in module.names}:
                    if str(module.module).startswith("osmium.ops."):
                        found |= signatures(f"{str(module.module).rpartition('.')[2]}.py", base)
        return found | {
            f.name: [a.arg for a in f.args.args]
            for f in body.body
            if isinstance(f, ast.FunctionDef)
        }

    protocol = signatures("__init__.py", "Ops")
    for path, name in (("reference.py", "ReferenceOps"), ("gpu.py", "GpuOps")):
        methods = signatures(path, name)
        for method, parameters in protocol.items():
            assert methods.get(method) == parameters, f"{name}.{method}"


def test_the_walk_in_architecture_names_existing_functions() -> None:
    """Each line of the walk is `path  name ...`: the file exists and contains the name."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    walk = re.search(r"## One token.*?```\n(.*?)```", text, re.S)
    assert walk, "docs/architecture.md has no walk"
    steps = [line.split() for line in walk.group(1).splitlines() if line.strip()]
    assert len(steps) >= 10
    for path, name, *_ in steps:
        assert (ROOT / path).is_file(), path
        assert re.search(rf"\b{re.escape(name)}\b", (ROOT / path).read_text()), f"{name} in {path}"


@pytest.mark.parametrize("module", ["osmium", "osmium.cuda", "osmium.cli"])
def test_importing_osmium_loads_neither_the_binding_nor_numba(module: str) -> None:
    # Some packages are partly loaded when Python starts, so only new modules count.
    code = f"import sys; old = set(sys.modules); import {module}; print(*set(sys.modules) - old)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in out.stdout.split()}
    assert "osmium" in loaded
    assert not loaded & {"cuda", "numba", "torch", "transformers", "jax"}
