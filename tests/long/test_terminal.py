"""The chat in a real terminal: tmux shows the screen and keeps scrolled-off lines."""

import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from osmium.weights import DEMO

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed"),
    pytest.mark.skipif(not DEMO.is_file(), reason="the demo model is missing"),
]

QUESTION = "What is the capital of France?"
CHAT = ["-m", "osmium", "run", "demo", "--device", "cpu"]


class Tmux:
    """A terminal of 80 by 24."""

    def __init__(self, folder: Path, name: str = "tmux") -> None:
        self._folder = folder
        self._socket = folder / name

    def start(self, *words: str) -> None:
        """Run Python with these arguments."""
        state = f"XDG_STATE_HOME={self._folder / 'state'}"
        python = ["env", "LANG=C.UTF-8", state, sys.executable, *words]
        script = f'{shlex.join(python)}; echo "exit code $?"; sleep 1000'
        self._run("-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", script)

    def type(self, text: str) -> None:
        self._run("send-keys", "-l", text)

    def press(self, *keys: str) -> None:
        self._run("send-keys", *keys)

    def paste(self, text: str) -> None:
        """Paste like a terminal does: with bracketed-paste markers if the program requested
        them."""
        file = self._folder / "pasted"
        file.write_text(text)
        self._run("load-buffer", str(file))
        self._run("paste-buffer", "-p")

    def screen(self, *, scrolled: bool = False, styles: bool = False) -> str:
        more = ["-S", "-"] if scrolled else []
        return self._run("capture-pane", "-p", *more, *(["-e"] if styles else []))

    def wait(self, *texts: str, end: str = "\n>", timeout: float = 60) -> str:
        """The screen once it shows these texts and ends with an empty prompt, or with `end`."""
        deadline = time.monotonic() + timeout
        while True:
            shown = self.screen().rstrip()
            if shown.endswith(end) and all(text in shown for text in texts):
                return shown
            assert time.monotonic() < deadline, f"{texts} and {end!r} are not in:\n{shown}"
            time.sleep(0.1)

    def wait_for_exit(self, code: int = 0) -> None:
        self.wait(end=f"exit code {code}")

    def close(self) -> None:
        subprocess.run(["tmux", "-S", self._socket, "kill-server"], capture_output=True)

    def _run(self, *words: str) -> str:
        command = ["tmux", "-S", str(self._socket), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Tmux]:
    made = Tmux(tmp_path)
    yield made
    made.close()


def test_a_conversation_is_shown_with_reasoning_and_answers(tmux: Tmux) -> None:
    tmux.start(*CHAT, "--temperature", "0", "--think")
    tmux.wait("demo on cpu, context 4,096 tokens")
    tmux.type(QUESTION)
    tmux.press("Enter")
    shown = tmux.wait(f"> {QUESTION}", "Paris.\n\nThe capital of France is Paris.")
    assert shown.count("The capital of France is Paris.") == 2, (
        "once in the reasoning, once in the answer"
    )
    assert "think>" not in shown
    assert "\x1b[2mThe capital" in tmux.screen(styles=True)
    tmux.press("Enter")  # an empty line
    tmux.type("/regnerate")
    tmux.press("Enter")
    tmux.wait("did you mean /regenerate?")
    tmux.type("/exit")
    tmux.press("Enter")
    tmux.wait_for_exit()


def test_pasted_lines_are_one_message(tmux: Tmux) -> None:
    tmux.start(*CHAT, "--temperature", "0", "--no-think", "--max-tokens", "8")
    tmux.wait()
    tmux.paste("What is\nthe capital\nof France?")
    tmux.wait("> What is", end="of France?")
    tmux.press("Enter")
    assert tmux.wait("> What is", "of France?").count("\n>") == 2


def test_ctrl_c_stops_a_response_and_the_chat_continues(tmux: Tmux) -> None:
    endless = ["synthetic:tiny", "--context", "16k", "--max-tokens", "16000", "--plain"]
    tmux.start("-m", "osmium", "chat", "--device", "cpu", *endless)
    tmux.wait()
    tmux.type("Tell me a long story.")
    tmux.press("Enter")
    while len(tmux.screen(scrolled=True)) < 400:
        time.sleep(0.1)
    tmux.press("C-c")
    tmux.wait("Stopped; the response so far is part of the conversation.")
    tmux.press("C-c")
    tmux.wait("Ctrl-C once more")
    tmux.press("C-d")
    tmux.wait_for_exit()


def test_the_next_chat_has_the_input_history(tmux: Tmux, tmp_path: Path) -> None:
    tmux.start(*CHAT)
    tmux.wait()
    tmux.type("/system Be brief.")
    tmux.press("Enter")
    tmux.wait("The system message is set")
    tmux.press("C-d")
    tmux.wait_for_exit()
    later = Tmux(tmp_path, "later")
    try:
        later.start(*CHAT)
        later.wait()
        later.press("Up")
        later.wait(end="> /system Be brief.")
    finally:
        later.close()


def test_markdown_longer_than_the_screen_is_printed_once(tmux: Tmux, tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text(
        textwrap.dedent(
            """
            import time
            from rich.console import Console
            from osmium.cli.render import TerminalDisplay
            text = "# Title\\n\\n" + "".join(f"{i}. item number {i}\\n" for i in range(1, 61))
            text += "\\n```python\\n" + "".join(f"def f{i}(): return {i}\\n" for i in range(60))
            display = TerminalDisplay(Console(highlight=False), markdown=True, thinking=True)
            for start in range(0, len(text), 9):
                display.answer(text[start : start + 9])
                time.sleep(0.003)
            display.end()
            print("done")
            """
        )
    )
    tmux.start(str(script))
    tmux.wait_for_exit()
    lines = [line.strip() for line in tmux.screen(scrolled=True).splitlines()]
    for number in range(1, 61):
        assert lines.count(f"{number} item number {number}") == 1
        assert lines.count(f"def f{number - 1}(): return {number - 1}") == 1
