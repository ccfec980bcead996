"""Packing that is killed, again and again, by signals at any moment: the next start goes on from
what was finished, and the file is the one that an undisturbed start writes."""

import random
import re
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
    """A checkpoint that takes some seconds to pack."""
    made = tmp_path_factory.mktemp("killed") / "model"
    write_checkpoint(MODEL, made)
    return made


def command(folder: Path, cache: Path) -> list[str]:
    return [sys.executable, "-m", "osmium", "pack", "--device", "cpu", "--cache-dir", str(cache),
            "--model-path", str(folder)]  # fmt: skip


def pack(folder: Path, cache: Path, log: Path) -> "subprocess.Popen[bytes]":
    with open(log, "wb") as file:
        return subprocess.Popen(command(folder, cache), stdout=file, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, float]:
    """The file of an undisturbed start, and its seconds."""
    cache, start = tmp_path_factory.mktemp("whole"), time.monotonic()
    subprocess.run(command(folder, cache), check=True, capture_output=True)
    (path,) = cache.glob("*.osmium")
    return path.read_bytes(), time.monotonic() - start


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_whoever_is_killed_while_packing_goes_on(
    folder: Path, whole: tuple[bytes, float], tmp_path: Path, seed: int, how: signal.Signals
) -> None:
    rng, cache = random.Random(seed), tmp_path / "cache"
    wanted, seconds = whole
    begun: list[int] = []
    for turn in range(30):
        log = tmp_path / f"{turn}.log"
        process = pack(folder, cache, log)
        if turn < 12:
            begins = turn == 0 or rng.random() < 0.7
            while begins and "%" not in log.read_text() and process.poll() is None:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.3 * seconds))
            process.send_signal(how)
        code = process.wait(120)
        said = log.read_text()
        shown = [int(one) for one in re.findall(r"(\d+) ?%", said)]
        begun += shown[:1]
        if code == 0:
            break
        assert code in (-how, 128 + how), f"{code}: {said}"
        assert "Traceback" not in said
    else:
        pytest.fail("it never gets there")
    print(f"killed {turn} times of {seconds:.1f} s, begun at {begun} %")
    assert turn > 0, "it was killed at least once"
    assert begun == sorted(begun), f"each start goes on from the one before: {begun}"
    (path,) = cache.glob("*.osmium")
    assert path.read_bytes() == wanted
    assert not list(cache.glob("*.partial")) and not list(cache.glob("*.journal"))
