"""What a wheel carries, and what an editable install does without."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.ptx.kernels import NAMES

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("hatchling", reason="hatchling is in the dev extra")


def hook() -> Any:
    """The build hook, as hatchling makes it."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CompileKernels(str(ROOT), {}, None, None, "", "wheel")


def test_a_wheel_carries_every_kernel_as_text(tmp_path: Path) -> None:
    pytest.importorskip("numba.cuda", reason="Numba is in the build extra")
    code = f"import hatchling.build; hatchling.build.build_wheel({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        assert {f"osmium/ptx/{name}.ptx" for name in NAMES} <= names
        assert "osmium/demo/demo.osmium" in names
        text = wheel.read("osmium/kernels/compiled/place.ptx").decode()
    assert ".visible .entry place(" in text
    assert not [name for name in names if name.startswith(("tests/", "tools/"))]


def test_only_an_editable_install_compiles_nothing() -> None:
    pytest.importorskip("numba.cuda", reason="Numba is in the build extra")
    build_data: dict[str, dict[str, str]] = {"force_include": {}}
    hook().initialize("editable", build_data)
    assert build_data == {"force_include": {}}
    hook().initialize("standard", build_data)
    assert "osmium/kernels/compiled/place.ptx" in build_data["force_include"].values()
    assert all(Path(path).is_file() for path in build_data["force_include"])
