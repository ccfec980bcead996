"""Packing that is killed, runs out of disk space, or runs in two processes."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osmium.config import EngineConfig
from osmium.errors import ConfigError
from osmium.weights import local, open_model
from osmium.weights.checkpoint import Checkpoint, TensorSpec
from osmium.weights.local import mark_used
from tests.models.build import hf_tensors
from tests.weights.files import CASE, write

ROOT = Path(__file__).resolve().parents[2]
FOREVER = 1 << 40


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "tests.weights.interrupted_packing", *map(str, args)]


def interrupted(*args: object) -> subprocess.CompletedProcess[str]:
    run = [*command(*args)]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def only(cache: Path) -> Path:
    """The only packed file in `cache`."""
    (found,) = cache.glob("*.osmium")
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("packing") / "model", shards=2)


@pytest.fixture(scope="module")
def complete_file(model: Path) -> bytes:
    """The file of an uninterrupted packing."""
    packed = open_model(model, EngineConfig(cache_dir=str(model.parent / "whole")))
    packed.verify()
    return packed.path.read_bytes()


@pytest.fixture(scope="module")
def num_writes(model: Path, complete_file: bytes) -> int:
    """Number of disk writes of an uninterrupted packing."""
    done = interrupted(model, model.parent / "counted", "kill", FOREVER)
    assert done.returncode == 0, done.stderr
    assert only(model.parent / "counted").read_bytes() == complete_file
    return int(done.stdout)


def test_after_a_kill_at_any_write_the_next_start_gives_the_same_bytes(
    model: Path, complete_file: bytes, num_writes: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    points = {
        1,
        2,
        3,
        num_writes - 2,
        num_writes - 1,
        num_writes,
        *rng.integers(4, num_writes - 2, 8).tolist(),
    }
    for point in sorted(points):
        cache = tmp_path / str(point)
        killed = interrupted(model, cache, "kill", point)
        assert killed.returncode == -9, (point, killed)
        assert point == num_writes or not list(cache.glob("*.osmium")), (
            "the file is renamed only when complete"
        )
        packed = open_model(model, EngineConfig(cache_dir=str(cache)))
        packed.verify()
        assert packed.path.read_bytes() == complete_file, f"killed at write {point} of {num_writes}"
        assert not list(cache.glob("*.partial")), point


def test_repeated_kills_do_not_prevent_completion(
    model: Path, complete_file: bytes, num_writes: int, tmp_path: Path
) -> None:
    starts = 1
    while interrupted(model, tmp_path, "kill", num_writes // 5).returncode == -9:
        starts += 1
        assert starts < 40, "packing makes no progress"
    assert 4 <= starts <= 10, "later runs keep what earlier ones finished"
    assert only(tmp_path).read_bytes() == complete_file


def test_a_partial_file_of_another_model_is_not_resumed(
    model: Path, complete_file: bytes, num_writes: int, tmp_path: Path
) -> None:
    cache, other = tmp_path / "cache", tmp_path / "other"
    assert interrupted(model, cache, "kill", num_writes - 3).returncode == -9
    ((partial,), (journal,)) = cache.glob("*.partial"), cache.glob("*.journal")
    tensors = hf_tensors(CASE)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][::-1].copy()
    write(other, tensors)
    alone = open_model(other, EngineConfig(cache_dir=str(tmp_path / "alone")))
    target = cache / alone.path.name
    partial.rename(cache / f"{target.name}.partial")
    journal.rename(cache / f"{target.name}.journal")
    mixed = open_model(other, EngineConfig(cache_dir=str(cache)))
    assert mixed.path == target
    assert mixed.path.read_bytes() == alone.path.read_bytes() != complete_file


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_truncated_journal_is_resumed(
    cut: int, model: Path, complete_file: bytes, num_writes: int, tmp_path: Path
) -> None:
    assert interrupted(model, tmp_path, "kill", num_writes // 2).returncode == -9
    (journal,) = tmp_path.glob("*.journal")
    journal.write_bytes(journal.read_bytes()[:-cut])
    # appends to the truncated line
    assert interrupted(model, tmp_path, "kill", num_writes // 4).returncode == -9
    assert (
        open_model(model, EngineConfig(cache_dir=str(tmp_path))).path.read_bytes() == complete_file
    )


# -- what an interrupted run left is not trusted ---------------------------------------------------


def emptied(partial: Path, journal: Path) -> None:
    partial.write_bytes(b"")


def cut(partial: Path, journal: Path) -> None:
    os.truncate(partial, partial.stat().st_size // 2)


def zeroed(partial: Path, journal: Path) -> None:
    partial.write_bytes(bytes(partial.stat().st_size))


def one_bit(partial: Path, journal: Path) -> None:
    raw = bytearray(partial.read_bytes())
    at = next(i for i in range(8192, len(raw)) if raw[i])
    raw[at] ^= 16
    partial.write_bytes(raw)


def longer(partial: Path, journal: Path) -> None:
    with open(partial, "ab") as file:
        file.write(b"x" * 5000)


def all_finished(partial: Path, journal: Path) -> None:
    key, *_ = journal.read_bytes().splitlines(keepends=True)
    nbytes = json.loads(key)["nbytes"]
    journal.write_bytes(key + json.dumps(dict.fromkeys(nbytes, 0)).encode() + b"\n")


def odd_lines(partial: Path, journal: Path) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    odd = [b"[1]\n", b"7\n", b"null\n", b'{"ghost": 5}\n', b'{"norm.data": "x"}\n', b"[" * 99_999]
    journal.write_bytes(b"".join([*lines, *odd]) + b"\n")


def odd_first_line(partial: Path, journal: Path) -> None:
    journal.write_bytes(b"[]\n7\n")


def not_text(partial: Path, journal: Path) -> None:
    journal.write_bytes(b"\xff\xfe\n" * 9)


@pytest.mark.parametrize(
    "damage",
    [emptied, cut, zeroed, one_bit, longer, all_finished, odd_lines, odd_first_line, not_text],
)
def test_a_damaged_partial_file_or_journal_never_gives_a_damaged_model(
    damage: Callable[[Path, Path], None],
    model: Path,
    complete_file: bytes,
    num_writes: int,
    tmp_path: Path,
) -> None:
    assert interrupted(model, tmp_path, "kill", num_writes - 3).returncode == -9
    ((partial,), (journal,)) = tmp_path.glob("*.partial"), tmp_path.glob("*.journal")
    damage(partial, journal)
    packed = open_model(model, EngineConfig(cache_dir=str(tmp_path)))
    assert packed.path.read_bytes() == complete_file
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.journal"))


def test_parts_that_are_as_they_were_written_are_not_packed_again(
    model: Path, num_writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert interrupted(model, tmp_path, "kill", num_writes - 3).returncode == -9
    (partial,) = tmp_path.glob("*.partial")
    one_bit(partial, partial)
    made: list[str] = []
    arrays = Checkpoint.arrays

    def counted(self: Checkpoint, part: TensorSpec) -> dict[str, Any]:
        made.append(part.name)
        return arrays(self, part)

    monkeypatch.setattr(Checkpoint, "arrays", counted)
    stages: list[str] = []
    config = EngineConfig(cache_dir=str(tmp_path))
    open_model(model, config, lambda stage, done, total: stages.append(stage)).verify()
    assert len(made) <= 1, "only the part with the changed bit"
    assert stages[0] == "checking"


# -- links and other things in the cache folder ----------------------------------------------------

OWN_FILES = (".lock", ".partial", ".journal")


@pytest.mark.parametrize("suffix", OWN_FILES)
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_a_link_or_a_pipe_in_the_place_of_an_own_file_is_refused_and_untouched(
    kind: str, suffix: str, model: Path, complete_file: bytes, num_writes: int, tmp_path: Path
) -> None:
    cache, target = tmp_path / "cache", tmp_path / "precious"
    path = open_model(model, EngineConfig(cache_dir=str(cache))).path
    path.unlink()
    own = path.with_name(path.name + suffix)
    own.unlink(missing_ok=True)
    if kind == "link":
        target.write_text("precious")
        own.symlink_to(target)
    elif kind == "dangling link":
        own.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(own)
    else:
        own.mkdir()
    try:
        packed = open_model(model, EngineConfig(cache_dir=str(cache)))
    except ConfigError as error:
        assert own.name in str(error)
    else:
        assert packed.path.read_bytes() == complete_file and not own.is_symlink()
    assert target.exists() == (kind == "link")
    assert kind != "link" or target.read_text() == "precious"


@pytest.mark.parametrize("suffix", [".lock", ".used"])
@pytest.mark.timeout(20)
def test_listing_and_loading_do_not_follow_links_or_wait_for_pipes(
    suffix: str, model: Path, tmp_path: Path
) -> None:
    path = open_model(model, EngineConfig(cache_dir=str(tmp_path))).path
    own, target = path.with_name(path.name + suffix), tmp_path / "target"
    for kind in ("link", "pipe"):
        own.unlink(missing_ok=True)
        if kind == "link":
            own.symlink_to(target)
        else:
            os.mkfifo(own)
        mark_used(path, tmp_path)
        assert not local._is_locked(path)
        assert not target.exists()


# -- a full disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize("report", [1, 5, 20])
def test_a_full_disk_is_an_error_with_advice_and_keeps_finished_bytes(
    report: int, model: Path, complete_file: bytes, tmp_path: Path
) -> None:
    full = interrupted(model, tmp_path, "full", report)
    assert full.returncode == 2, full.stderr
    assert full.stdout.startswith("ConfigError") and "--cache-dir" in full.stdout
    assert not list(tmp_path.glob("*.osmium"))
    (journal,) = tmp_path.glob("*.journal")
    assert len(journal.read_bytes().splitlines()) >= report - 1
    packed = open_model(model, EngineConfig(cache_dir=str(tmp_path)))
    assert packed.path.read_bytes() == complete_file


def small_disk(cache: Path, size: str, then: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command with `cache` on a disk of `size`; skips where no such disk can be created."""
    mount = f'mount -t tmpfs -o size={size} none "$0" || exit 99; exec "$@"'
    try:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", mount, str(cache), *then],
            cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    return done


def test_a_too_small_disk_is_refused_with_both_sizes_before_writing(
    model: Path, tmp_path: Path
) -> None:
    # Killed at the second write; the first writes the process id into the lock.
    done = small_disk(tmp_path, "64k", command(model, tmp_path, "kill", 2))
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout.startswith("ConfigError") and "--cache-dir" in done.stdout
    assert "free" in done.stdout


# -- two processes, and unusable folders -----------------------------------------------------------


def test_a_second_process_waits_for_the_first_and_uses_its_file(
    model: Path, complete_file: bytes, tmp_path: Path
) -> None:
    first = subprocess.Popen(
        command(model, tmp_path, "hold"),
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert first.stdin and first.stdout
    waiting, stages = threading.Event(), []

    def report(stage: str, done: int, total: int) -> None:
        stages.append(stage)
        waiting.set()

    results = []

    def second() -> None:
        results.append(open_model(model, EngineConfig(cache_dir=str(tmp_path)), report))

    try:
        assert first.stdout.readline() == "holding\n"
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(60)
        assert not results
        first.stdin.write("\n")
        first.stdin.close()
        thread.join(60)
        assert first.wait(60) == 0
    finally:
        first.kill()
        first.stdout.close()
    assert stages == [f"waiting for process {first.pid}"], "nothing is packed twice"
    assert results[0].path.read_bytes() == complete_file


def test_progress_grows_to_the_total(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    config = EngineConfig(cache_dir=str(tmp_path))
    packed = open_model(model, config, lambda *report: seen.append(report))
    packed.verify()
    done = [at for stage, at, _ in seen if stage == "packing"]
    assert done == sorted(done) and len(done) > 20
    assert done[0] == 0 and seen[-1][1] == seen[-1][2] <= packed.path.stat().st_size


def test_a_cache_folder_that_is_a_file_is_refused_with_advice(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="--cache-dir"):
            open_model(model, EngineConfig(cache_dir=str(cache)))


def test_an_unwritable_cache_folder_is_refused_with_advice(model: Path) -> None:
    # /proc accepts no new files, not even from root.
    if not os.path.isdir("/proc/self"):
        pytest.skip("there is no /proc")
    for cache in ("/proc", "/proc/osmium"):
        with pytest.raises(ConfigError, match="--cache-dir"):
            open_model(model, EngineConfig(cache_dir=cache))
