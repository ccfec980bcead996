"""Packing killed repeatedly at random times: each start resumes, and the file is the same."""

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.models.build import Case, write_checkpoint

MODEL = Case("packed", 91, 512, "ddda" * 3, (8, 2, 64), 0.25, (4, 8, 64, 64), (48, 4, 256), 256,
             False, 10, vocab=1024)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose packing takes some seconds."""
    made = tmp_path_factory.mktemp("killed") / "model"
    write_checkpoint(MODEL, made)
    return made


def command(folder: Path, cache: Path) -> list[str]:
    return [sys.executable, "-m", "osmium", "pack", "--device", "cpu", "--cache-dir", str(cache),
            "--model-path", str(folder)]  # fmt: skip


def heed_interrupts() -> None:
    """Let SIGINT interrupt the process: a shell lets its background jobs ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pack(folder: Path, cache: Path, log: Path) -> "subprocess.Popen[bytes]":
    with open(log, "wb") as file:
        return subprocess.Popen(
            command(folder, cache),
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=heed_interrupts,
        )


@pytest.fixture(scope="module")
def complete_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, float]:
    """The file of an uninterrupted packing, and its seconds."""
    cache, start = tmp_path_factory.mktemp("whole"), time.monotonic()
    subprocess.run(command(folder, cache), check=True, capture_output=True)
    (path,) = cache.glob("*.osmium")
    return path.read_bytes(), time.monotonic() - start


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_packing_resumes_after_every_kill(
    folder: Path,
    complete_file: tuple[bytes, float],
    tmp_path: Path,
    seed: int,
    signal_number: signal.Signals,
) -> None:
    rng, cache = random.Random(seed), tmp_path / "cache"
    wanted, seconds = complete_file
    resumed_at: list[int] = []
    wait_s, kills = 0.3 * seconds, 0
    for attempt in range(30):
        log = tmp_path / f"{attempt}.log"
        process = pack(folder, cache, log)
        if attempt < 12:
            begins = attempt == 0 or rng.random() < 0.7
            while begins and "%" not in log.read_text() and process.poll() is None:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, wait_s))
            process.send_signal(signal_number)
        code = process.wait(120)
        if code == 0 and not kills:  # faster than the packing that was timed
            shutil.rmtree(cache)
            wait_s /= 2
            continue
        kills += code != 0
        output = log.read_text()
        shown = [int(one) for one in re.findall(r"(\d+) ?%", output)]
        resumed_at += shown[:1]
        if code == 0:
            break
        assert code in (-signal_number, 128 + signal_number), f"{code}: {output}"
        assert "Traceback" not in output
    else:
        pytest.fail("packing never completes")
    print(f"killed {attempt} times of {seconds:.1f} s, begun at {resumed_at} %")
    assert kills, "at least one start was killed"
    assert resumed_at == sorted(resumed_at), (
        f"each start resumes after the one before: {resumed_at}"
    )
    (path,) = cache.glob("*.osmium")
    assert path.read_bytes() == wanted
    assert not list(cache.glob("*.partial")) and not list(cache.glob("*.journal"))
