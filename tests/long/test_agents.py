"""Real coding agents and Python packages: `tools/agents`, one after the other."""

import json
from pathlib import Path

import pytest

from tests.agents.clients import CLIENTS
from tests.agents.sdks import SDKS
from tests.long.conftest import run_python


@pytest.mark.parametrize("name", [*CLIENTS, *SDKS])
def test_a_client_has_a_text_turn_and_a_round_of_tools(name: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = run_python("tools/agents", "--only", name, "--json", str(report), timeout=900)
    if not report.exists():
        pytest.fail(done.stderr or done.stdout)
    (row,) = json.loads(report.read_text())["clients"]
    if "not_run" in row:
        pytest.skip(f"{row['name']}: {row['not_run']}")
    assert row["passed"] and all(row["passed"].values()), done.stdout
    assert done.returncode == 0
