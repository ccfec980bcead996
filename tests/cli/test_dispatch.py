"""Exit codes, and one-line errors instead of tracebacks, in this process and in a shell."""

import errno
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from osmium.cli import dispatch
from osmium.cli.parser import Usage
from osmium.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    EngineStopped,
    NoDevice,
    OsmiumError,
    OutOfMemory,
    RequestError,
)

QUICK = ["run", "demo", "--device", "cpu", "--no-think", "--temperature", "0", "--max-tokens", "8"]
QUESTION = "What is the capital of France?"


def outcome(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and stderr of a command that raises this."""

    def action() -> int:
        raise error

    code = dispatch.run(action, owns_stdout=False)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no."), 2),
        (Usage("osmium run: no."), 2),
        (CheckpointError("no."), 2),
        (RequestError("no."), 2),
        (NoDevice("no."), 2),
        (DeviceError("no."), 1),
        (OutOfMemory("no."), 1),
        (EngineStopped("no."), 1),
        (OsmiumError("no."), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 1),
        (MemoryError(), 1),
        (RuntimeError("can't start new thread"), 1),
        (ImportError("libx.so: failed to map segment from shared object"), 1),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1),
    ],
)
def test_an_expected_error_is_one_line_and_its_exit_code(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found, text = outcome(error, capsys)
    assert found == code and text.count("\n") == 1
    assert text.startswith(("osmium: ", "osmium run: ")) and "Traceback" not in text


def test_running_out_of_host_memory_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (MemoryError("Unable to allocate 3 GiB"), RuntimeError("can't start new thread")):
        assert "out of memory" in outcome(error, capsys)[1]


def test_an_unwritable_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    text = outcome(PermissionError(errno.EACCES, "Permission denied", "/x/y"), capsys)[1]
    assert text == "osmium: /x/y: Permission denied.\n"


def test_a_bug_shows_its_traceback_and_how_to_report_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, text = outcome(KeyError("x"), capsys)
    assert code == 1 and "Traceback" in text
    assert "bug" in text.splitlines()[-1] and "osmium doctor" in text.splitlines()[-1]


def test_ctrl_c_and_a_closed_pipe_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(KeyboardInterrupt(), capsys) == (130, "")
    assert outcome(BrokenPipeError(), capsys) == (1, "")


def test_a_warning_is_a_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> int:
        logging.getLogger("osmium.engine").warning("%d slots", 3)
        logging.getLogger("other.library").info("not shown")
        return 0

    assert dispatch.run(action, owns_stdout=False) == 0
    assert capsys.readouterr().err == "osmium: warning: 3 slots\n"


# -- in a shell ------------------------------------------------------------------------------------


def shell(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a bash script in which "$@" is `python -m osmium` with these words."""
    command = [sys.executable, "-m", "osmium", *words]
    return subprocess.run(
        ["bash", "-c", script, "bash", *command],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


def test_a_full_disk_for_stdout_is_one_line() -> None:
    done = shell('"$@" > /dev/full', "--help")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "No space left" in done.stderr


def test_a_pipe_closed_early_is_no_error() -> None:
    words = [*QUICK[:-1], "400", "--raw", "The Congress"]
    done = shell('"$@" | head -c 1; exit ${PIPESTATUS[0]}', *words)
    assert done.returncode == 1 and len(done.stdout) == 1 and done.stderr == ""


def test_an_ascii_terminal_gets_ascii_text() -> None:
    script = 'LC_ALL=C PYTHONIOENCODING=ascii "$@"'
    done = shell(script, "serve", "--port", "é")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    done = shell(script, "run", "é", "hi")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    done = shell(f"printf 'na\\xc3\\xafve \\xe2\\x80\\x93' | {script} -", *QUICK, "--raw")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.isascii()


@pytest.mark.parametrize("kib", [200_000, 320_000])
def test_too_little_address_space_is_one_line(kib: int) -> None:
    done = shell(f'ulimit -v {kib}; "$@"', *QUICK, QUESTION)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "out of memory" in done.stderr


@pytest.mark.parametrize("module", ["argparse", "numpy", "tokenizers", "osmium.loader"])
def test_ctrl_c_while_importing_prints_nothing(module: str, tmp_path: Path) -> None:
    """The signal is sent when Python searches for that module."""
    script = tmp_path / "start.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from osmium.cli import main\n"
        "class Press:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Press())\n"
        f"sys.modules.pop({module!r}, None)\n"
        f"sys.argv = ['osmium', *{[*QUICK, QUESTION]!r}]\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_in_a_response_keeps_what_was_printed_and_exits_with_130() -> None:
    words = ["run", "demo", "--device", "cpu", "--raw", "--max-tokens", "4000", "The Congress"]
    command = [sys.executable, "-m", "osmium", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        first = running.stdout.read(1)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and first and err == b""


def test_a_background_job_that_ignores_ctrl_c_continues() -> None:
    done = shell('trap "" INT; "$@" & sleep 0.2; kill -INT $!; wait $!', "--version")
    assert done.returncode == 0 and done.stdout.startswith("osmium ")
