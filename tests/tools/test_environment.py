"""tools/environment.sh: choice of Python, installed packages, and reuse."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

WORKS = """#!/bin/bash
case $1 in
    -c) exit 0 ;;
    --version) echo "Python of ${0##*/}" ;;
    -m)
        if [ "$2" = venv ]; then
            mkdir -p "$3/bin"
            cp "$0" "$3/bin/python"
            echo "venv by ${0##*/}" >> log
        else
            echo "${*: -2}" >> log
        fi
        ;;
esac
"""
"""A Python whose venv copies itself, and whose pip logs its arguments."""

BROKEN = "#!/bin/sh\nexit 127\n"
"""A Python shim whose version is not installed."""

NO_VENV = WORKS.replace('mkdir -p "$3/bin"', 'mkdir -p "$3/bin"; touch "$3/bin/python"; exit 1')


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    root = tmp_path / "clone"
    (root / "tools").mkdir(parents=True)
    shutil.copy(TOOLS / "environment.sh", root / "tools")
    (root / "pyproject.toml").write_text("one")
    return root


def path(tmp_path: Path, **programs: str) -> str:
    """A PATH with these programs and the few system programs that the script needs."""
    folder = tmp_path / "bin"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for program in ("bash", "dirname", "cksum", "cat", "mkdir", "cp", "rm", "touch", "sh"):
        found = shutil.which(program)
        assert found
        (folder / program).symlink_to(found)
    for program, text in programs.items():
        file = folder / program.replace("_", ".").replace("nvidia.", "nvidia-")
        file.write_text(text)
        file.chmod(0o755)
    return str(folder)


def run(clone: Path, search: str, command: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash
    env = {"PATH": search} | {k: v for k, v in os.environ.items() if k == "HOME"}
    return subprocess.run(
        [bash, "-c", f". tools/environment.sh; {command}"],
        cwd=clone, env=env, capture_output=True, text=True,
    )  # fmt: skip


def log(clone: Path) -> list[str]:
    return (clone / "log").read_text().splitlines()


def test_the_newest_working_python_is_used(clone: Path, tmp_path: Path) -> None:
    search = path(tmp_path, python3_13=BROKEN, python3_12=WORKS, python3_11=WORKS)
    done = run(clone, search, 'environment ""; command -v python')
    assert log(clone) == ["venv by python3.12", "-e ."]
    assert done.stdout.strip() == str(clone / ".venv" / "bin" / "python"), (
        "the environment is first on PATH"
    )


def test_the_dev_environment_uses_the_python_that_compiles_kernels(
    clone: Path, tmp_path: Path
) -> None:
    search = path(tmp_path, python3_13=WORKS, python3_11=WORKS)
    assert run(clone, search, "environment dev").returncode == 0
    assert log(clone) == ["venv by python3.11", "-e .[dev]"]
    shutil.rmtree(clone / ".venv")
    assert run(clone, search, "PYTHON=python3.13 environment dev").returncode == 0
    assert log(clone)[2:] == ["venv by python3.13", "-e .[dev]"]


def test_the_environment_is_created_once_and_updated_when_the_project_changes(
    clone: Path, tmp_path: Path
) -> None:
    search = path(tmp_path, python3_12=WORKS)
    for _ in range(2):
        run(clone, search, "environment cu13")
    assert log(clone) == ["venv by python3.12", "-e .[cu13]"]
    run(clone, search, 'environment ""')
    assert log(clone)[2:] == ["-e ."], "the other extra is installed into the same environment"
    (clone / "pyproject.toml").write_text("two")
    run(clone, search, "environment cu13")
    assert log(clone)[3:] == ["-e .[cu13]"]
    run(clone, search, "environment build .venv-build")
    assert log(clone)[4:] == ["venv by python3.12", "-e .[build]"]


def test_without_python_or_venv_the_error_says_what_to_install(clone: Path, tmp_path: Path) -> None:
    done = run(clone, path(tmp_path, python3=BROKEN), 'environment ""')
    assert done.returncode == 1 and "Python 3.11 or newer" in done.stderr
    done = run(clone, path(tmp_path, python3_12=NO_VENV), 'environment ""')
    assert done.returncode == 1 and "apt install python3-venv" in done.stderr
    assert not (clone / ".venv").exists(), (
        "an incomplete environment would be taken for a complete one"
    )


@pytest.mark.parametrize(
    ("driver", "extra"), [("580.65.06", "cu13"), ("570.133.20", "cu12"), (None, "")]
)
def test_the_installed_extra_matches_the_driver(
    clone: Path, tmp_path: Path, driver: str | None, extra: str
) -> None:
    text = f"#!/bin/sh\necho {driver}\n" if driver else BROKEN
    assert run(clone, path(tmp_path, nvidia_smi=text), "gpu_extra").stdout.strip() == extra
