"""Real coding agents against the server."""

import shutil

import pytest

AGENTS = {"opencode": "OpenCode", "qwen": "Qwen Code", "cline": "Cline"}


@pytest.mark.parametrize("command", AGENTS)
def test_an_agent_edits_a_file_through_the_server(command: str) -> None:
    if shutil.which(command) is None:
        pytest.skip(f"{AGENTS[command]} is not installed")
    pytest.skip(f"{AGENTS[command]} is installed, but no test drives it yet")
