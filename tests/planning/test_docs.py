"""docs/plans.md is what `osmium plan` prints."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_docs_plans_equals_the_current_output() -> None:
    command = [sys.executable, str(ROOT / "tools" / "plans"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_every_plan_on_the_page_fits_one_screen() -> None:
    screens = (ROOT / "docs" / "plans.md").read_text().split("```")[1::2]
    assert len(screens) >= 6
    for screen in screens:
        lines = screen.strip().splitlines()
        assert len(lines) <= 42 and max(map(len, lines)) <= 100
