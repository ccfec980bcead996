"""The command line on a pty, with keys as a user presses them."""

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from osmium.weights import DEMO

pytestmark = pytest.mark.skipif(not DEMO.is_file(), reason="the demo model is missing")

DIM = "\x1b[2m"
START = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # stdin is the controlling terminal, so Ctrl-C is a signal
from osmium.cli import main
sys.exit(main())
"""
READY = r"\x1b\[\?2004h"
"""The editor accepts keys after this sequence."""
GREEDY = ["--device", "cpu", "--temperature", "0"]
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


class Terminal:
    """A process on a pty."""

    def __init__(self, words: list[str], environment: dict[str, str]) -> None:
        self._master, side = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *words],
            stdin=side, stdout=side, stderr=side, start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24",
                 **environment},
        )  # fmt: skip
        os.close(side)
        self.text = ""

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait(self, pattern: str, timeout: float = 60) -> str:
        """Read until `pattern` matches; return the text up to its end and drop it from the
        buffer."""
        deadline = time.monotonic() + timeout
        while (found := re.search(pattern, self.text, re.S)) is None:
            assert time.monotonic() < deadline, f"{pattern!r} did not come: {self.text!r}"
            assert self._read(deadline - time.monotonic()), f"ended before {pattern!r}: {self.text}"
        seen, self.text = self.text[: found.end()], self.text[found.end() :]
        return seen

    def end(self, timeout: float = 60) -> str:
        """The output until the process ends."""
        deadline = time.monotonic() + timeout
        while self._read(deadline - time.monotonic()):
            assert time.monotonic() < deadline, f"does not end: {self.text!r}"
        self.process.wait(timeout)
        return self.text

    def _read(self, timeout: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, timeout))
        try:
            data = os.read(self._master, 1 << 16) if ready else b"?"
        except OSError:  # the other end of the pty is closed
            return False
        self.text += data.decode(errors="replace") if ready else ""
        if "\x1b[6n" in self.text:  # the process requests the cursor position
            self.text = self.text.replace("\x1b[6n", "")
            self.press("\x1b[1;1R")
        return bool(data)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


@contextlib.contextmanager
def terminal(*words: str, **environment: str) -> Iterator[Terminal]:
    made = Terminal(list(words), environment)
    try:
        yield made
    finally:
        made.close()


def plain(text: str) -> str:
    """Without escape sequences."""
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)


def test_reasoning_is_dim_on_a_terminal_and_can_be_hidden() -> None:
    with terminal("run", "demo", *GREEDY, "--think", QUESTION) as shown:
        text = shown.end()
    assert shown.process.returncode == 0
    dim = re.search(r"\x1b\[2m(.*?)\x1b\[0m", text, re.S)
    assert dim is not None and text.index(DIM) < text.rindex("Paris")
    assert "think>" not in text
    with terminal("run", "demo", *GREEDY, "--think", "--hide-thinking", QUESTION) as hidden:
        text = hidden.end()
    assert DIM not in text and "think>" not in text
    assert plain(text).split()[-6:] == ANSWER.split()  # progress may come before it


def test_a_dumb_terminal_gets_plain_text() -> None:
    with terminal("run", "demo", *GREEDY, "--think", QUESTION, TERM="dumb") as dumb:
        text = dumb.end()
    assert "\x1b" not in text
    assert text.split()[-6:] == ANSWER.split()


def test_a_conversation_with_the_line_editor(tmp_path: Path) -> None:
    state = tmp_path / "state"
    words = ["chat", "demo", *GREEDY, "--no-think", "--max-tokens", "30"]
    with terminal(*words, XDG_STATE_HOME=str(state)) as chat:
        assert "demo on cpu, context 4,096 tokens" in chat.wait(READY)
        chat.press(QUESTION + "\r")
        assert "Paris." in plain(chat.wait(READY))
        chat.press("\r")  # an empty line
        chat.wait(READY)
        chat.press("/nwe\r")
        assert "did you mean /new?" in plain(chat.wait(READY)).replace("\r\n", " ")
        chat.press("half a mess")
        chat.press("\x03")  # clears the line
        chat.press("\x1b[200~/help\nis two lines\x1b[201~")  # a paste
        chat.wait("two lines")
        chat.press("\x03")
        for _ in range(5):  # the editor reads the history in a thread, and ignores earlier keys
            chat.press("\x1b[A")
            with contextlib.suppress(AssertionError):
                chat.wait("/nwe", 3)
                break
        chat.press("\r")
        assert "did you mean /new?" in plain(chat.wait(READY)).replace("\r\n", " ")
        chat.press("\x03")
        chat.wait("once more.*" + READY)
        chat.press("\x04")
        chat.end()
    assert chat.process.returncode == 0
    history = state / "osmium" / "chat_history"
    assert QUESTION in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_ctrl_c_stops_a_response_and_the_chat_continues() -> None:
    # a model with random weights: it does not end a response by itself, however slow the machine
    words = ["chat", "synthetic:tiny", *GREEDY, "--no-think", "--plain", "--max-tokens", "20000"]
    with terminal(*words) as chat:
        chat.wait(READY)
        chat.press("Tell me about the Congress and all its powers, at length.\r")
        chat.wait(r"\x1b\[\?2004l.*?[a-z]{3}")  # the editor is off, the first words are shown
        chat.press("xyz")  # not echoed into the response, and discarded by Ctrl-C
        chat.press("\x03")
        seen = plain(chat.wait(READY))
        assert "Stopped" in seen and "xyz" not in seen and "^C" not in seen
        chat.press("/bye\r")
        text = chat.end()
    assert chat.process.returncode == 0 and "Traceback" not in text


def test_ctrl_c_during_imports_prints_nothing() -> None:
    """While NumPy is imported; Python's own start before that cannot handle Ctrl-C."""
    with terminal("chat", "demo", *GREEDY) as chat:
        maps, end = Path(f"/proc/{chat.process.pid}/maps"), time.monotonic() + 30
        while "numpy" not in maps.read_text() and time.monotonic() < end:
            time.sleep(0.001)
        chat.press("\x03")
        with contextlib.suppress(AssertionError):
            chat.wait("once more", 5)
            chat.press("\x03")
        text = chat.end()
    assert chat.process.returncode in (0, 130, -signal.SIGINT)
    assert "Traceback" not in text
