"""The npm packages of seven agents, run with the settings of docs/agents.md.

Each run has a HOME and a working folder of its own, and only the variables named here.
"""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.agents.results import NotRun, Result
from tests.agents.script import ANSWER, QUESTION, task

__all__ = ["CLIENTS", "Client", "Settings", "install_client", "run_client", "settings_of"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "agents.md"

PAGE_URL = "http://127.0.0.1:8012"
"""The server's address on the page."""

TAGS = re.compile(r"</?(think|tool_call|function|parameter)\b")
"""Tags of the model's format, which no client may get."""

INSTALL_S, RUN_S = 600, 120

MIN_NODE = 20


@dataclass(frozen=True)
class Client:
    """An agent's npm package, in a version known to work with Node.js 20."""

    name: str
    """Its name, which is its heading in docs/agents.md."""
    package: str
    version: str
    command: str


CLIENTS = {
    client.command: client
    for client in (
        Client("OpenCode", "opencode-ai", "1.18.33", "opencode"),
        Client("Qwen Code", "@qwen-code/qwen-code", "0.15.10", "qwen"),
        Client("Continue", "@continuedev/cli", "1.5.47", "cn"),
        Client("Cline", "cline", "3.0.65", "cline"),
        Client("pi", "@mariozechner/pi-coding-agent", "0.73.1", "pi"),
        Client("Codex", "@openai/codex", "0.169.0", "codex"),
        Client("Claude Code", "@anthropic-ai/claude-code", "2.1.197", "claude"),
    )
}


# -- installation ----------------------------------------------------------------------------------


def install_client(client: Client, folder: Path) -> None:
    """Install a client below `folder` unless it is there.

    Raises: NotRun.
    """
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise NotRun(f"{program} is not installed")
    node = subprocess.run(["node", "--version"], capture_output=True, text=True).stdout
    found = re.match(r"v(\d+)", node)
    if found is None or int(found[1]) < MIN_NODE:
        raise NotRun(f"Node.js is {node.strip()}; clients need {MIN_NODE} or newer")
    prefix = folder / "npm" / client.command
    command = prefix / "node_modules" / ".bin" / client.command
    if _installed_version(client, prefix) == client.version and command.exists():
        return
    prefix.mkdir(parents=True, exist_ok=True)
    wanted = f"{client.package}@{client.version}"
    npm = ["npm", "install", "--prefix", str(prefix), "--no-audit", "--no-fund", wanted]
    try:
        done = subprocess.run(npm, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        raise NotRun(f"{wanted} was not installed in {INSTALL_S} s") from None
    if done.returncode or not command.exists():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no command"]
        raise NotRun(f"{wanted} cannot be installed: {lines[0][:200]}")


def _installed_version(client: Client, prefix: Path) -> str:
    try:
        package = prefix / "node_modules" / client.package / "package.json"
        return str(json.loads(package.read_text())["version"])
    except (OSError, ValueError, KeyError):
        return ""


# -- the page's settings ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """A client's section of docs/agents.md."""

    files: dict[str, str]
    """By path below HOME: the text."""
    script: str
    """Shell lines; the last one has a prompt in double quotes at its end."""


def settings_of(name: str, page: str | None = None) -> Settings:
    """The settings in the section `name` of the page."""
    page = PAGE.read_text() if page is None else page
    section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    files = dict(re.findall(r"^`~/(\S+)`:\n\n```\w+\n(.*?)^```$", section, re.M | re.S))
    (script,) = re.findall(r"^```sh\n(.*?)^```$", section, re.M | re.S)
    return Settings(files, script)


def _write_settings(settings: Settings, home: Path, url: str) -> tuple[str, str]:
    """Write the files; returns the shell lines before the last one, and that one's start."""
    for path, text in settings.files.items():
        target = home / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.replace(PAGE_URL, url))
    *before, last = settings.script.replace(PAGE_URL, url).strip().splitlines()
    found = re.fullmatch(r'(.*)"[^"]*"', last)
    assert found is not None, f"the last line has no prompt: {last}"
    return "\n".join(before), found[1]


# -- runs ------------------------------------------------------------------------------------------


def run_client(client: Client, folder: Path, url: str) -> Result:
    """A text turn and a tool round of an installed client with the server at `url`.

    The tool round reads a file and writes another one; both are checked on the disk.
    """
    result, start = Result(client.name, client.version), time.monotonic()
    commands = folder / "npm" / client.command / "node_modules" / ".bin"
    with _folders(folder) as (home, work):
        path = f"{commands}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        environment = {"HOME": str(home), "PATH": path, "TERM": "dumb", "LANG": "C.UTF-8"}
        before, command = _write_settings(settings_of(client.name), home, url)

        def run(prompt: str) -> tuple[str, bool]:
            script = f'set -e\n{before}\n{command}"$PROMPT"\n'
            return _run(script, work, {**environment, "PROMPT": prompt})

        output, clean = run(QUESTION)
        result.add("text", clean and ANSWER in output, output)
        word = f"osmium-{secrets.token_hex(6)}"
        source, target = work / "source.txt", work / "target.txt"
        source.write_text(f"{word}\n")
        output, clean = run(task(str(source), str(target)))
        written = target.read_text() if target.exists() else ""
        passed = clean and word in output and written.strip() == word
        result.add("tools", passed, f"{output}\n{target.name} has {written!r}")
    result.seconds = round(time.monotonic() - start, 1)
    return result


@contextmanager
def _folders(folder: Path) -> Iterator[tuple[Path, Path]]:
    """A new HOME and working folder.  At the end, processes with this HOME are stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="run-", ignore_cleanup_errors=True) as made:
        home, work = Path(made) / "home", Path(made) / "work"
        home.mkdir()
        work.mkdir()
        try:
            yield home, work
        finally:
            _stop_daemons(home)


def _stop_daemons(home: Path) -> None:
    """Stop what a client has left running; the HOME, which is new, tells it from others."""
    left = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("HOME") == str(home):
                process.terminate()
                left.append(process)
    _, running = psutil.wait_procs(left, timeout=3)
    for process in running:
        with suppress(psutil.Error):
            process.kill()


def _run(script: str, work: Path, environment: dict[str, str]) -> tuple[str, bool]:
    """The output of a shell script, and whether it is clean: exit status 0, no tag of the model.

    After RUN_S the script's processes are killed.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=work, env=environment, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        note = ""
        try:
            code = process.wait(RUN_S)
            note = f"\n(exit status {code})" if code else ""
        except subprocess.TimeoutExpired:
            note = f"\n(no end in {RUN_S} s)"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        output = log.read().decode(errors="replace")
    return output + note, not note and not TAGS.search(output)
