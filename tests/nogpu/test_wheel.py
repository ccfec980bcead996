"""Contents of wheel and sdist: everything that runs, without a custom build step."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from osmium.distribution import NAME
from osmium.kernels.numba_kernels import KERNELS
from osmium.ops.gpu import check_kernels
from tests.ptx.kernels import KERNEL_FILES, NAMES

ROOT = Path(__file__).resolve().parents[2]


def built(what: str, folder: Path) -> Path:
    """Build a wheel or an sdist with hatchling."""
    pytest.importorskip("hatchling", reason="hatchling is in the dev extra")
    code = f"import hatchling.build; hatchling.build.build_{what}({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.iterdir()
    return path


def test_a_wheel_contains_the_text_of_every_kernel(tmp_path: Path) -> None:
    path = built("wheel", tmp_path)
    assert path.name.startswith("osmium_serve-") and path.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        assert {f"osmium/ptx/{path.name}" for path in KERNEL_FILES.values()} <= names
        assert {f"osmium/kernels/compiled/{name}.ptx" for name in KERNELS} <= names
        assert "osmium/demo/demo.osmium" in names
        scripts = next(wheel.read(name) for name in names if name.endswith("entry_points.txt"))
    assert b"osmium-serve = osmium.cli:serve" in scripts and b"osmium = osmium.cli:main" in scripts
    assert not [name for name in names if name.startswith(("tests/", "tools/"))]
    assert len(KERNELS) + len(NAMES) == check_kernels()


def test_an_sdist_contains_the_sources_of_a_wheel(tmp_path: Path) -> None:
    with tarfile.open(built("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kernels = {f"ptx/{path.name}" for path in KERNEL_FILES.values()}
    kernels |= {f"osmium/kernels/compiled/{name}.ptx" for name in KERNELS}
    more = {"osmium/demo/demo.osmium", "osmium/demo/NOTICE.md", "tools/serve", "tests/conftest.py"}
    assert kernels | more <= names


def test_the_build_requires_only_hatchling() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["name"] == NAME
    assert [one.partition(">")[0] for one in project["build-system"]["requires"]] == ["hatchling"]
    assert "hooks" not in project["tool"]["hatch"]["build"]["targets"]["wheel"]
