"""Reading a file into memory that stays: several blocks at once, past the page cache, checksummed.

direct    O_DIRECT into the final pages: the disk writes them, and no second copy is kept
bounced   O_DIRECT into a buffer a thread and copied from there: for memory that the disk cannot
          write to (found by trying), and for memory that is slow to read back (write-combined)
cached    through the page cache, which forgets each block behind it: where the file system has no
          direct I/O

Every block is summed by the thread that has read it, while the others wait for the disk, and the
sums are joined: a checksum costs no time as long as the threads together sum faster than the disk
reads.  zlib sums 1 to 4 GB/s a thread, `tools/bench_load` compares.
"""

import concurrent.futures
import contextlib
import errno
import functools
import logging
import mmap
import os
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from osmium.errors import CheckpointError
from osmium.quant.expert_layout import IO_ALIGNMENT

__all__ = ["BLOCK", "THREADS", "Reader", "crc32_combine", "huge_pages"]

LOG = logging.getLogger("osmium.weights")

BLOCK = 4 << 20
"""Bytes of one read: large enough that a disk is at its rate with few of them, small enough that
the last ones of a layer do not leave the others idle for long."""

HUGE = 2 << 20

THREADS = 16
"""Reads at once.  Each waits for the disk, then sums what it gave: 4, 8 and 16 bring 78, 84 and
87 % of a disk's 4.6 GB/s on two cores (`tools/bench_load`, a virtual disk, 2026-11)."""

_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_NOT_INTO = (errno.EFAULT, errno.EINVAL)

Bytes = npt.NDArray[np.uint8]
Way = Literal["direct", "bounced", "cached"]


def huge_pages(nbytes: int) -> Bytes:
    """Memory that is contiguous in large pieces, where the system gives them: a disk writes into
    scattered pages of 4 KiB at down to half of its rate."""
    memory = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    all_of_it = np.frombuffer(memory, np.uint8)
    start = -all_of_it.ctypes.data % HUGE
    return all_of_it[start : start + nbytes]


class Reader:
    """One file, and threads that read it.

    Memory that is being read into must not go before the reader is closed: leave its `with` first.
    """

    def __init__(self, path: Path, write_only: bool = False) -> None:
        """With `write_only` what is read into is slow to read back.  Raises: CheckpointError."""
        self.path, self.write_only = path, write_only
        self.io_mode: Way | None = None
        """Found at the first read."""
        self.nbytes = 0
        """Read so far."""
        try:
            self._plain = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        self._direct: int | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._own = threading.local()
        self._start = time.perf_counter()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what is being read, and give threads and files back.  More than once is
        harmless."""
        if self._plain < 0:
            return
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for file in (self._plain, self._direct):
            if file is not None:
                os.close(file)
        self._plain, self._direct = -1, None
        if self.io_mode is not None:
            took = time.perf_counter() - self._start
            LOG.info(
                "%s: %.2f GB in %.2f s, %.2f GB/s, %s", self.path.name, self.nbytes / 1e9, took,
                self.nbytes / max(took, 1e-9) / 1e9, self.io_mode,
            )  # fmt: skip

    # -- reading -----------------------------------------------------------------------------------

    def begin(self, out: Bytes, offset: int, nbytes: int | None = None) -> Callable[[], int]:
        """Begin to read the bytes of the file from `offset` on into `out`.  What comes back waits
        for them and returns the crc32 of the first `nbytes` of them; it raises CheckpointError
        where the file ends before, or cannot be read.

        out u8 [n]; its length and the offset in whole pages, else the page cache is used.
        """
        nbytes = out.nbytes if nbytes is None else nbytes
        if self.io_mode is None:
            self.io_mode = self._choose(out, offset)
        whole = offset % IO_ALIGNMENT == 0 and out.nbytes % IO_ALIGNMENT == 0
        file = self._direct if self._direct is not None and whole else self._plain
        into = self.io_mode == "direct"
        pieces = [(at, min(at + BLOCK, out.nbytes)) for at in range(0, out.nbytes, BLOCK)]
        futures = [
            self._submit(self._block, file, out[at:end], offset + at, min(end, nbytes) - at, into)
            for at, end in pieces
        ]

        def finish() -> int:
            sums = _results(futures)
            self.nbytes += out.nbytes
            lengths = [min(end, nbytes) - at for at, end in pieces]
            return functools.reduce(
                lambda crc, one: crc32_combine(crc, *one), zip(sums, lengths, strict=True), 0
            )

        return finish

    def checksum(self, offset: int, nbytes: int) -> int:
        """crc32 of a part of the file, left in the page cache.  Raises: CheckpointError."""
        pieces = [(at, min(BLOCK, nbytes - at)) for at in range(0, nbytes, BLOCK)]
        if len(pieces) < 2:
            return self._sum(offset, nbytes)
        futures = [self._submit(self._sum, offset + at, length) for at, length in pieces]
        crc = 0
        for one, (_, length) in zip(_results(futures), pieces, strict=True):
            crc = crc32_combine(crc, one, length)
        return crc

    def _submit(self, job: Callable[..., int], *args: Any) -> "Future[int]":
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="osmium-read")
        return self._pool.submit(job, *args)

    def _choose(self, out: Bytes, offset: int) -> Way:
        """What this file and this memory take, found by reading a page."""
        page = np.frombuffer(mmap.mmap(-1, IO_ALIGNMENT), np.uint8)
        try:
            self._direct = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            os.preadv(self._direct, [page.data], offset - offset % IO_ALIGNMENT)
        except OSError as error:
            if error.errno in _NO_DIRECT:
                if self._direct is not None:
                    os.close(self._direct)
                    self._direct = None
                return "cached"
        if self.write_only:
            return "bounced"
        try:
            if self._direct is not None:
                os.preadv(self._direct, [out[:IO_ALIGNMENT].data], offset - offset % IO_ALIGNMENT)
        except OSError as error:
            if error.errno in _NOT_INTO:
                return "bounced"
        return "direct"  # whatever else was wrong is raised by the read proper

    def _block(self, file: int, out: Bytes, offset: int, nbytes: int, into: bool) -> int:
        """Read one block; the crc32 of its first `nbytes`."""
        if into:
            self._fill(file, out, offset)
            return zlib.crc32(out[:nbytes].data)
        if self.io_mode == "cached" and not self.write_only:
            self._fill(file, out, offset)
            crc = zlib.crc32(out[:nbytes].data)
        else:
            piece = self._buffer(out.nbytes)
            self._fill(file, piece, offset)
            crc = zlib.crc32(piece[:nbytes].data)
            np.copyto(out, piece)
        if file == self._plain:
            with contextlib.suppress(OSError):
                os.posix_fadvise(file, offset, out.nbytes, os.POSIX_FADV_DONTNEED)
        return crc

    def _sum(self, offset: int, nbytes: int) -> int:
        piece = self._buffer(nbytes)
        self._fill(self._plain, piece, offset)
        return zlib.crc32(piece.data)

    def _buffer(self, nbytes: int) -> Bytes:
        """This thread's own pages."""
        if not hasattr(self._own, "pages"):
            self._own.pages = huge_pages(BLOCK)
        pages: Bytes = self._own.pages
        return pages[:nbytes]

    def _fill(self, file: int, out: Bytes, offset: int) -> None:
        """All of `out`.  Raises: CheckpointError."""
        done = 0
        while done < out.nbytes:
            try:
                got = os.preadv(file, [out[done:].data], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path} cannot be read at byte {offset + done}: {error.strerror}."
                ) from None
            done += got
            if not got:
                raise CheckpointError(
                    f"{self.path} ends at byte {offset + done}; {out.nbytes} bytes from byte "
                    f"{offset} on were expected, {done} found. It was cut short while it was "
                    "open; pack it again."
                )
            if got % IO_ALIGNMENT:
                file = self._plain  # direct I/O goes on at whole pages alone


def _results(futures: "list[Future[int]]") -> list[int]:
    """What all of them gave.  Where one fails those behind it that wait are dropped, the others
    are waited for, and the first error in the file's order is raised."""
    done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
    failed = [
        i
        for i, one in enumerate(futures)
        if one in done and not one.cancelled() and one.exception() is not None
    ]
    for future in futures[failed[0] + 1 :] if failed else ():
        future.cancel()
    concurrent.futures.wait(futures)
    return [future.result() for future in futures]


# -- crc32 of two parts ----------------------------------------------------------------------------


def crc32_combine(first: int, second: int, length: int) -> int:
    """crc32 of a + b from those of a and b, b of `length` bytes."""
    return _times(_shift(length), first) ^ second


def _times(a: int, b: int) -> int:
    """a * b modulo crc32's polynomial, bit 31 being x^0."""
    out = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            out ^= b
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return out


@functools.lru_cache(64)
def _shift(length: int) -> int:
    """x^(8 length)."""
    power, out = 1 << 23, 1 << 31  # x^8, x^0
    while length:
        if length & 1:
            out = _times(power, out)
        power = _times(power, power)
        length >>= 1
    return out
