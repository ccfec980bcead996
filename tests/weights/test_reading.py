"""Reading into existing memory: the same bytes in every mode, or an error with the offset."""

import errno
import mmap
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.errors import CheckpointError
from osmium.weights import reading
from osmium.weights.reading import Reader, crc32_combine

PAGE, BLOCK = 4096, 16 * 4096
PAGES = 100


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK", BLOCK)


@pytest.fixture
def data(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    return rng.integers(0, 256, PAGES * PAGE, np.uint8)


@pytest.fixture
def path(tmp_path: Path, data: npt.NDArray[np.uint8]) -> Path:
    made = tmp_path / "data"
    made.write_bytes(data.tobytes())
    return made


def memory(nbytes: int, shift: int = 0) -> npt.NDArray[np.uint8]:
    """Page-aligned memory, from `shift` bytes on."""
    return np.frombuffer(mmap.mmap(-1, nbytes + PAGE), np.uint8)[shift : shift + nbytes]


Preadv = Callable[[int, Sequence[Any], int], int]
REAL: Preadv = os.preadv


def direct(file: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)


def no_direct(file: int, buffers: Sequence[Any], offset: int) -> int:
    """A file system that accepts O_DIRECT and then refuses reads."""
    if direct(file):
        raise OSError(errno.EINVAL, "Invalid argument")
    return REAL(file, buffers, offset)


def unreachable_memory(*owners: npt.NDArray[np.uint8]) -> Preadv:
    """Memory that direct I/O cannot write to."""

    def preadv(file: int, buffers: Sequence[Any], offset: int) -> int:
        at = np.frombuffer(buffers[0], np.uint8)
        if direct(file) and any(np.shares_memory(at, owner) for owner in owners):
            raise OSError(errno.EFAULT, "Bad address")
        return REAL(file, buffers, offset)

    return preadv


def short(file: int, buffers: Sequence[Any], offset: int) -> int:
    """A file system with short reads."""
    length = min(len(buffers[0]), 1 + offset * 7 % 9000)
    if direct(file):
        length = min(len(buffers[0]), max(512, length // 512 * 512))
        if offset % 512:
            raise OSError(errno.EINVAL, "Invalid argument")
    return REAL(file, [buffers[0][:length]], offset)


def check_reads(path: Path, data: npt.NDArray[np.uint8], **options: Any) -> str | None:
    """Read parts of the file into unaligned and aligned memory; returns the I/O mode."""
    with Reader(path, **options) as reader:
        for first, count in ((0, PAGES), (3, 1), (7, 16), (20, 33)):
            out = memory(count * PAGE)
            part = data[first * PAGE : (first + count) * PAGE]
            nbytes = part.nbytes - 100 * (count % 2)
            crc = reader.begin(out, first * PAGE, nbytes)()
            assert np.array_equal(out, part)
            assert crc == zlib.crc32(part[:nbytes].data)
            assert reader.checksum(first * PAGE + 5, nbytes - 5) == zlib.crc32(part[5:nbytes].data)
        return reader.io_mode


def test_this_machines_file_system_is_read(path: Path, data: npt.NDArray[np.uint8]) -> None:
    assert check_reads(path, data) in ("direct", "cached")


def test_write_only_memory_is_filled_through_a_buffer(
    path: Path, data: npt.NDArray[np.uint8]
) -> None:
    assert check_reads(path, data, write_only=True) in ("bounced", "cached")


def test_without_direct_io_the_page_cache_is_used(
    path: Path, data: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", no_direct)
    assert check_reads(path, data) == "cached"
    assert check_reads(path, data, write_only=True) == "cached"


def test_a_file_system_without_o_direct_is_read_through_the_page_cache(
    path: Path, data: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(name: Any, flags: int, *more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    assert check_reads(path, data) == "cached"


def test_memory_that_direct_io_cannot_reach_is_filled_through_a_buffer(
    path: Path, data: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = memory(data.nbytes)
    monkeypatch.setattr(os, "preadv", unreachable_memory(out))
    with Reader(path) as reader:
        crc = reader.begin(out, 0)()
        assert reader.io_mode in ("bounced", "cached")
    assert np.array_equal(out, data) and crc == zlib.crc32(data.data)


def test_memory_at_any_address_is_filled(path: Path, data: npt.NDArray[np.uint8]) -> None:
    for shift in (1, 16, 512):
        out = memory(data.nbytes, shift)
        with Reader(path) as reader:
            reader.begin(out, 0)()
        assert np.array_equal(out, data)


def test_short_reads_are_continued(
    path: Path, data: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", short)
    check_reads(path, data)
    check_reads(path, data, write_only=True)


@pytest.mark.parametrize("write_only", [False, True])
@pytest.mark.parametrize("remaining", [0, 10, 4096, 30 * 4096, 30 * 4096 + 17])
def test_a_file_that_shrinks_is_refused_with_both_sizes(
    path: Path, remaining: int, write_only: bool
) -> None:
    out = memory(PAGES * PAGE)
    with Reader(path, write_only) as reader:
        os.truncate(path, remaining)
        with pytest.raises(
            CheckpointError, match=rf"data ends at byte {remaining}; .*expected"
        ) as one:
            reader.begin(out, 0)()
        assert f"{remaining % BLOCK} found" in str(one.value)
        with pytest.raises(CheckpointError, match=f"data ends at byte {remaining};"):
            reader.checksum(0, PAGES * PAGE)


def test_a_read_error_names_the_offset(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = 2 * BLOCK

    def broken(file: int, buffers: Sequence[Any], offset: int) -> int:
        if offset <= at < offset + len(buffers[0]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return REAL(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", broken)
    with Reader(path) as reader:
        wait = reader.begin(memory(PAGES * PAGE), 0)
        for _ in range(2):  # a second wait raises the same error
            with pytest.raises(CheckpointError, match=rf"data .* byte {at}: Input/output error"):
                wait()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        Reader(tmp_path / "nowhere")


def test_closing_a_reader_closes_files_and_threads(path: Path) -> None:
    import threading

    files, names = len(os.listdir("/proc/self/fd")), threading.active_count()
    with Reader(path) as reader:
        reader.begin(memory(PAGES * PAGE), 0)
    assert len(os.listdir("/proc/self/fd")) == files
    assert threading.active_count() == names


def test_combined_checksums_equal_the_checksum_of_the_whole(rng: np.random.Generator) -> None:
    for _ in range(50):
        a, b = (rng.bytes(int(rng.integers(0, 5000))) for _ in range(2))
        assert crc32_combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)
