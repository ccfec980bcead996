"""The distribution: where it is named, its install commands, and what shares its folder."""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from osmium import distribution
from osmium.cli import doctor
from osmium.distribution import NAME, conflict, gpu_extra, how_to_install, version

ROOT = Path(__file__).resolve().parents[2]

OTHER = "osmium-4.3.2.dist-info"
"""What the OpenStreetMap library leaves beside osmium/."""


def test_the_name_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == NAME
    assert NAME in project["scripts"], "uvx and pipx run the script of the distribution's name"
    assert {gpu_extra(12080), gpu_extra(13000)} <= set(project["optional-dependencies"])


def test_what_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "NAME", "osmium-not-there")
    assert version() is None


def test_nothing_tells_people_to_install_another_project() -> None:
    """`osmium` on PyPI is the OpenStreetMap library: every install line names osmium-serve."""
    seen = 0
    for pattern in ("*.md", "*.toml", "docs/*.md", "osmium/**/*.py", "tools/*"):
        for path in ROOT.glob(pattern):
            if not path.is_file() or path.name == "LOG.md":  # what was is history
                continue
            for line in path.read_text().splitlines():
                assert not re.search(r"\bosmium\[\w", line), f"{path}: {line}"
                if re.search(r"\b(pip|pipx|uv|uvx)\b.* install .*\bosmium\b(?!-serve|/)", line):
                    assert "uninstall" in line, f"{path}: {line}"
                seen += f"{NAME}[" in line
    assert seen > 3, "README names it, and so do others"


# -- how it was installed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "command"),
    [
        ("/home/me/venv", "pip install 'osmium-serve[cu13]'"),
        (
            "/home/me/.cache/uv/archive-v0/aBc_d-1",
            "uvx --from 'osmium-serve[cu13]' osmium-serve",
        ),
        (
            "/home/me/.local/share/uv/tools/osmium-serve",
            "uv tool install 'osmium-serve[cu13]'",
        ),
        (
            "/home/me/.local/share/pipx/venvs/osmium-serve",
            "pipx install --force 'osmium-serve[cu13]'",
        ),
        (
            "/home/me/.cache/pipx/a8e6f4b2c1d0e9f",
            "pipx run --spec 'osmium-serve[cu13]' osmium-serve",
        ),
    ],
)
def test_the_command_is_that_of_the_tool_that_installed_it(
    prefix: str, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(distribution, "_FOLDER", str(tmp_path / "site-packages" / "osmium"))
    assert how_to_install("cu13", prefix) == command


def test_an_environment_of_uv_has_no_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(distribution, "_FOLDER", str(tmp_path / "site-packages" / "osmium"))
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nuv = 0.9.1\n")
    assert how_to_install("cu12", str(tmp_path)) == "uv pip install 'osmium-serve[cu12]'"
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\n")
    assert how_to_install("", str(tmp_path)) == "pip install osmium-serve"


def test_in_a_checkout_the_checkout_is_installed() -> None:
    assert how_to_install("cu13", sys.prefix).endswith(f"-m pip install -e '{ROOT}[cu13]'")


# -- the other osmium ------------------------------------------------------------------------------


def test_the_other_project_beside_ours_is_found(tmp_path: Path) -> None:
    (tmp_path / "osmium").mkdir()
    for name in ("osmium_serve-1.0.dist-info", "osmium.libs", "numpy-2.5.0.dist-info"):
        (tmp_path / name).mkdir()
    assert conflict(str(tmp_path)) is None
    (tmp_path / OTHER).mkdir()
    found = conflict(str(tmp_path))
    assert found and "osmium-4.3.2" in found and str(tmp_path) in found
    assert "virtual environment" in found and "pip uninstall" in found
    assert conflict(str(tmp_path / "nowhere")) is None


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Our package as it is in site-packages, without the demo."""
    shutil.copytree(
        ROOT / "osmium", tmp_path / "osmium", ignore=shutil.ignore_patterns("demo", "__pycache__")
    )
    return tmp_path


def run(site: Path, code: str) -> str:
    """Python with our package of `site` first on its path; its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=site, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_importing_beside_the_other_project_warns(site: Path) -> None:
    code = "import osmium; print(osmium.__file__)"
    assert run(site, code).strip() == str(site / "osmium" / "__init__.py")
    (site / OTHER).mkdir()
    assert "UserWarning: osmium-4.3.2 (the OpenStreetMap library)" in run(site, code)


def test_doctor_names_the_other_project(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [one for one in doctor.run_checks() if one.name == "another osmium"]
    monkeypatch.setattr(doctor, "conflict", lambda: "osmium-4.3.2 is here, too")
    (found,) = (one for one in doctor.run_checks() if one.name == "another osmium")
    assert found.advice == "osmium-4.3.2 is here, too"


def test_the_commands_run_where_the_others_init_has_won(site: Path) -> None:
    """Installed after ours, the library overwrites osmium/__init__.py; the commands go on."""
    (site / OTHER).mkdir()
    (site / "osmium" / "__init__.py").write_text("SimpleHandler = None\n")
    assert re.match(r"osmium \d", run(site, "from osmium.cli import main; main(['--version'])"))
    said = run(site, "from osmium.cli import main; main(['doctor'])")
    assert "another osmium" in said and "osmium-4.3.2" in said
    assert "import osmium" in said and distribution.REINSTALL in said


def test_looking_for_it_does_not_make_importing_slow(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"package_{number}").mkdir()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert conflict(str(tmp_path)) is None
        times.append(time.perf_counter() - start)
    assert min(times) < 0.01, "a listing of a thousand names"
    code = "import sys; import osmium; print('importlib.metadata' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr
