"""`osmium plan` from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from osmium.cli import main
from tests.weights.published import PUBLISHED, published
from tests.weights.stand_in_hub import StandInHub

LARGE, SMALL = "synthetic:qwen3.5-122b-a10b", "synthetic:qwen3.5-35b-a3b"


def test_a_plan_that_fits_is_printed_with_exit_code_zero(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", SMALL, "--gpu", "rtx 4090", "--ram", "64G"]) == 0
    error = capsys.readouterr()
    assert error.out.startswith(f"{SMALL} on RTX 4090, 64.0 GiB of host memory")
    assert "tok/s" in error.out and error.err == ""


def test_a_plan_that_does_not_fit_is_printed_with_exit_code_two(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", LARGE, "--gpu", "3060 12GB", "--ram", "64G"]) == 2
    error = capsys.readouterr()
    assert "--attention-quant int8" in error.out and "runs       no" in error.out
    (line,) = error.err.splitlines()
    assert line.startswith("osmium: ") and LARGE in line and "RTX 3060 12GB" in line


@pytest.mark.parametrize(("card", "runs"), [("5090", True), ("3060 12GB", False)])
def test_json_is_one_line_whether_it_fits_or_not(
    card: str, runs: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", LARGE, "--gpu", card, "--ram", "64G", "--json"]) == (0 if runs else 2)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["runs"] is runs


def test_every_vram_size_has_its_own_table(capsys: pytest.CaptureFixture[str]) -> None:
    tables = set()
    for size in ("12G", "24G", "32G"):
        assert (
            main(["plan", LARGE, "--vram", size, "--ram", "64G", "--attention-quant", "int4"]) == 0
        )
        tables.add(capsys.readouterr().out)
    assert len(tables) == 3


def test_a_hub_model_is_planned_from_one_megabyte_of_it(tmp_path: Path) -> None:
    """In a separate process, with only the hub's address replaced."""
    name = next(iter(PUBLISHED))
    with StandInHub({name: published(name)}) as hub:
        run = subprocess.run(
            [sys.executable, "-m", "osmium", "plan", name, "--gpu", "5090", "--ram", "64G",
             "--cache-dir", str(tmp_path / "packed")],
            capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
            env={"HOME": str(tmp_path), "PATH": os.environ["PATH"],
                 **hub.environment(tmp_path / "hf")},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert "download   71.9 GB to ~/hf/hub" in run.stdout
        assert hub.tensor_bytes == 0 and hub.total < 1 << 20
    assert not (tmp_path / "packed").exists()
    stored = [f for f in (tmp_path / "hf").rglob("*") if f.is_file() and not f.is_symlink()]
    assert sum(file.stat().st_size for file in stored) < 1 << 20
