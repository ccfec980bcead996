"""docs/kernels-on-geforce.md is what tools/kernel_report makes of the kernels."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ptx.sass import find_tool

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(
    None in (find_tool("ptxas"), find_tool("nvdisasm")),
    reason="ptxas or nvdisasm is not installed (dev extra)",
)
def test_the_page_on_geforce_equals_the_current_output() -> None:
    command = [sys.executable, str(ROOT / "tools" / "kernel_report"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
