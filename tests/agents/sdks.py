"""Nine Python packages, installed in an environment of their own, and run by `sdk_rounds.py`."""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.agents.results import NotRun, Result

__all__ = ["SDKS", "install_sdks", "run_sdk"]

ROUNDS = Path(__file__).with_name("sdk_rounds.py")

INSTALL_S, RUN_S = 900, 180

VERSIONS = {
    "openai": "2.54.0",
    "anthropic": "2.14.0",
    "litellm": "1.110.2",
    "langchain-openai": "1.7.4",
    "instructor": "1.17.0",
    "pydantic-ai-slim[openai]": "2.31.1",
    "smolagents": "1.26.0",
    "openai-agents": "0.20.0",
    "llm": "0.32.1",
}
"""Versions that pip can install together."""

SDKS = {
    "openai": "openai",
    "openai responses": "openai",
    "anthropic": "anthropic",
    "anthropic tool runner": "anthropic",
    "litellm": "litellm",
    "langchain-openai": "langchain-openai",
    "instructor": "instructor",
    "pydantic-ai": "pydantic-ai-slim[openai]",
    "smolagents": "smolagents",
    "openai-agents": "openai-agents",
    "openai-agents responses": "openai-agents",
    "llm": "llm",
}
"""By the name of a group of steps: its package."""


def install_sdks(folder: Path) -> Path:
    """Install all packages below `folder` unless they are there; returns their Python.

    Raises: NotRun.
    """
    prefix = folder / "sdks"
    python, stamp = prefix / "bin" / "python", prefix / "osmium-versions.json"
    wanted = json.dumps(VERSIONS)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    packages = [f"{name}=={version}" for name, version in VERSIONS.items()]
    commands = [
        [sys.executable, "-m", "venv", str(prefix)],
        [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q", *packages],
    ]
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotRun(f"the packages cannot be installed: {error}") from None
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if "ERROR" in line] or [done.stderr]
            raise NotRun(f"the packages cannot be installed: {last[-1].strip()[:200]}")
    stamp.write_text(wanted)
    return python


def run_sdk(name: str, python: Path, url: str) -> Result:
    """The steps of a group with the server at `url`."""
    result, start = Result(name, VERSIONS[SDKS[name]]), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="osmium-sdk-") as folder:
        (Path(folder) / "source.txt").write_text(f"osmium-{secrets.token_hex(6)}\n")
        environment = {
            "HOME": folder, "PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True", "DO_NOT_TRACK": "1",
        }  # fmt: skip
        try:
            done = subprocess.run(
                [str(python), "-I", str(ROUNDS), name, url, folder],
                cwd=folder, env=environment, capture_output=True, text=True, timeout=RUN_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            result.add("text", False, f"no end in {RUN_S} s")
        else:
            steps = Path(folder) / "steps.json"
            if not steps.exists():
                result.add("text", False, done.stdout + done.stderr)
            else:
                for step, problem in json.loads(steps.read_text()).items():
                    result.add(step, not problem, problem)
    result.seconds = round(time.monotonic() - start, 1)
    return result
