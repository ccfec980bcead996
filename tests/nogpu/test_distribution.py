"""The distribution: its name, install commands, and the other project of the same import name."""

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
"""Files of the OpenStreetMap library next to osmium/."""


def test_the_distribution_name_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == NAME
    assert NAME in project["scripts"], "uvx and pipx run the script named like the distribution"
    assert {gpu_extra(12080), gpu_extra(13000)} <= set(project["optional-dependencies"])


def test_without_an_installation_there_is_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "NAME", "osmium-not-there")
    assert version() is None


def test_no_document_recommends_installing_another_project() -> None:
    """`osmium` on PyPI is the OpenStreetMap library, so every install command names
    osmium-serve."""
    seen = 0
    for pattern in ("*.md", "*.toml", "docs/*.md", "osmium/**/*.py", "tools/*"):
        for path in ROOT.glob(pattern):
            if not path.is_file() or path.name == "LOG.md":  # the log quotes earlier commands
                continue
            for line in path.read_text().splitlines():
                assert not re.search(r"\bosmium\[\w", line), f"{path}: {line}"
                if re.search(r"\b(pip|pipx|uv|uvx)\b.* install .*\bosmium\b(?!-serve|/)", line):
                    assert "uninstall" in line, f"{path}: {line}"
                seen += f"{NAME}[" in line
    assert seen > 3, "several documents name the package"


# -- install commands ------------------------------------------------------------------------------


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
def test_the_command_uses_the_tool_that_installed_osmium(
    prefix: str, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(distribution, "_FOLDER", str(tmp_path / "site-packages" / "osmium"))
    assert how_to_install("cu13", prefix) == command


def test_a_uv_environment_without_pip_uses_uv(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(distribution, "_FOLDER", str(tmp_path / "site-packages" / "osmium"))
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nuv = 0.9.1\n")
    assert how_to_install("cu12", str(tmp_path)) == "uv pip install 'osmium-serve[cu12]'"
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\n")
    assert how_to_install("", str(tmp_path)) == "pip install osmium-serve"


def test_in_a_checkout_the_command_installs_the_checkout() -> None:
    assert how_to_install("cu13", sys.prefix).endswith(f"-m pip install -e '{ROOT}[cu13]'")


# -- the other osmium ------------------------------------------------------------------------------


def test_the_other_project_in_the_same_folder_is_found(tmp_path: Path) -> None:
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
    """Osmium as in site-packages, without the demo."""
    shutil.copytree(
        ROOT / "osmium", tmp_path / "osmium", ignore=shutil.ignore_patterns("demo", "__pycache__")
    )
    return tmp_path


def run(site: Path, code: str) -> str:
    """The stderr of Python with `site` first on its path."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=site, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_importing_next_to_the_other_project_warns(site: Path) -> None:
    code = "import osmium; print(osmium.__file__)"
    assert run(site, code).strip() == str(site / "osmium" / "__init__.py")
    (site / OTHER).mkdir()
    assert "UserWarning: osmium-4.3.2 (the OpenStreetMap library)" in run(site, code)


def test_doctor_names_the_other_project(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [one for one in doctor.run_checks() if one.name == "another osmium"]
    monkeypatch.setattr(doctor, "conflict", lambda: "osmium-4.3.2 is here, too")
    (found,) = (one for one in doctor.run_checks() if one.name == "another osmium")
    assert found.advice == "osmium-4.3.2 is here, too"


def test_the_commands_run_with_the_other_projects_init(site: Path) -> None:
    """The library, installed later, overwrites osmium/__init__.py; Osmium's commands still run."""
    (site / OTHER).mkdir()
    (site / "osmium" / "__init__.py").write_text("SimpleHandler = None\n")
    assert re.match(r"osmium \d", run(site, "from osmium.cli import main; main(['--version'])"))
    said = run(site, "from osmium.cli import main; main(['doctor'])")
    assert "another osmium" in said and "osmium-4.3.2" in said
    assert "import osmium" in said and distribution.REINSTALL in said


def test_the_search_for_the_other_project_is_fast(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"package_{number}").mkdir()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert conflict(str(tmp_path)) is None
        times.append(time.perf_counter() - start)
    assert min(times) < 0.01, "listing a thousand names"
    code = "import sys; import osmium; print('importlib.metadata' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr
