"""Reads a file into memory that stays: several blocks at once, past the page cache, with crc32.

    direct    O_DIRECT into the final pages, without a second copy
    bounced   O_DIRECT into one buffer per thread, then a copy: for memory that the disk cannot
              write to (a trial shows it), and for write-combined memory, slow to read back
    cached    through the page cache, then each block is dropped from it: for file systems without
              direct I/O

The thread that has read a block computes its crc32 while other threads wait for the disk;
crc32_combine joins them.  A checksum is free if all threads together are faster than the disk.
zlib computes 1 to 4 GB/s per thread; `tools/bench_load` compares.
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
"""Bytes of one read.

Large enough that few reads saturate a disk, small enough that threads idle little at a layer's end.
"""

HUGE = 2 << 20

THREADS = 16
"""Reads at once.  Each thread waits for the disk, then computes a crc32.

4, 8 and 16 reach 78, 84 and 87 % of a disk's 4.6 GB/s on two cores (`tools/bench_load`, a virtual
disk, 2026-11)."""

_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_NOT_DIRECTLY_INTO = (errno.EFAULT, errno.EINVAL)

Bytes = npt.NDArray[np.uint8]
IoMode = Literal["direct", "bounced", "cached"]


def huge_pages(nbytes: int) -> Bytes:
    """Memory in huge pages, if the system has them.

    Into scattered pages of 4 KiB a disk writes at down to half of its rate.
    """
    memory = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    mapping = np.frombuffer(memory, np.uint8)
    start = -mapping.ctypes.data % HUGE
    return mapping[start : start + nbytes]


class Reader:
    """One file, and threads that read it.

    Close the reader (leave its `with`) before the memory that it reads into is freed.
    """

    def __init__(self, path: Path, write_only: bool = False) -> None:
        """Open the file.

        `write_only` declares that the destination is slow to read back.  Raises: CheckpointError.
        """
        self.path, self.write_only = path, write_only
        self.io_mode: IoMode | None = None
        """Chosen at the first read."""
        self.nbytes = 0
        """Bytes read so far."""
        try:
            self._cached_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        self._direct_fd: int | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._thread_local = threading.local()
        self._start = time.perf_counter()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the reads in progress, and close threads and files.

        A second call does nothing.
        """
        if self._cached_fd < 0:
            return
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for file in (self._cached_fd, self._direct_fd):
            if file is not None:
                os.close(file)
        self._cached_fd, self._direct_fd = -1, None
        if self.io_mode is not None:
            seconds = time.perf_counter() - self._start
            LOG.info(
                "%s: %.2f GB in %.2f s, %.2f GB/s, %s", self.path.name, self.nbytes / 1e9,
                seconds, self.nbytes / max(seconds, 1e-9) / 1e9, self.io_mode,
            )  # fmt: skip

    # -- reading -----------------------------------------------------------------------------------

    def begin(self, out: Bytes, offset: int, nbytes: int | None = None) -> Callable[[], int]:
        """Start to read the file from `offset` on into `out`.

        Returns a function that waits for the bytes and returns the crc32 of the first `nbytes`.  It
        raises CheckpointError if the file is too short or cannot be read.

        out u8 [n]; unless n and `offset` are multiples of IO_ALIGNMENT, the page cache is used
        """
        nbytes = out.nbytes if nbytes is None else nbytes
        if self.io_mode is None:
            self.io_mode = self._choose_io_mode(out, offset)
        aligned = offset % IO_ALIGNMENT == 0 and out.nbytes % IO_ALIGNMENT == 0
        file = self._direct_fd if self._direct_fd is not None and aligned else self._cached_fd
        direct = self.io_mode == "direct"
        pieces = [(at, min(at + BLOCK, out.nbytes)) for at in range(0, out.nbytes, BLOCK)]
        futures = [
            self._submit(
                self._read_block, file, out[at:end], offset + at, min(end, nbytes) - at, direct
            )
            for at, end in pieces
        ]

        def finish() -> int:
            crcs = _results(futures)
            self.nbytes += out.nbytes
            lengths = [min(end, nbytes) - at for at, end in pieces]
            return functools.reduce(
                lambda crc, block: crc32_combine(crc, *block), zip(crcs, lengths, strict=True), 0
            )

        return finish

    def read(self, out: Bytes, offset: int) -> int:
        """Fill `out` from `offset` on through the page cache, which keeps it; returns the crc32.

        Raises: CheckpointError.
        """
        if self._cached_fd < 0:
            raise CheckpointError(f"{self.path} is closed.")
        blocks = [out[at : at + BLOCK] for at in range(0, out.nbytes, BLOCK)]
        if len(blocks) < 2:
            self._fill(self._cached_fd, out, offset)
            return zlib.crc32(out.data)
        futures = [
            self._submit(self._read_cached, block, offset + i * BLOCK)
            for i, block in enumerate(blocks)
        ]
        crc = 0
        for block_crc, block in zip(_results(futures), blocks, strict=True):
            crc = crc32_combine(crc, block_crc, block.nbytes)
        return crc

    def _read_cached(self, out: Bytes, offset: int) -> int:
        self._fill(self._cached_fd, out, offset)
        return zlib.crc32(out.data)

    def checksum(self, offset: int, nbytes: int) -> int:
        """crc32 of a part of the file, which stays in the page cache.  Raises: CheckpointError."""
        pieces = [(at, min(BLOCK, nbytes - at)) for at in range(0, nbytes, BLOCK)]
        if len(pieces) < 2:
            return self._crc32(offset, nbytes)
        futures = [self._submit(self._crc32, offset + at, length) for at, length in pieces]
        crc = 0
        for block_crc, (_, length) in zip(_results(futures), pieces, strict=True):
            crc = crc32_combine(crc, block_crc, length)
        return crc

    def _submit(self, job: Callable[..., int], *args: Any) -> "Future[int]":
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="osmium-read")
        return self._pool.submit(job, *args)

    def _choose_io_mode(self, out: Bytes, offset: int) -> IoMode:
        """The mode that this file and this memory support, found by reading a page."""
        page = np.frombuffer(mmap.mmap(-1, IO_ALIGNMENT), np.uint8)
        try:
            self._direct_fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            os.preadv(self._direct_fd, [page.data], offset - offset % IO_ALIGNMENT)
        except OSError as error:
            if error.errno in _NO_DIRECT:
                if self._direct_fd is not None:
                    os.close(self._direct_fd)
                    self._direct_fd = None
                return "cached"
        if self.write_only:
            return "bounced"
        try:
            if self._direct_fd is not None:
                os.preadv(
                    self._direct_fd, [out[:IO_ALIGNMENT].data], offset - offset % IO_ALIGNMENT
                )
        except OSError as error:
            if error.errno in _NOT_DIRECTLY_INTO:
                return "bounced"
        return "direct"  # the full read raises any other error

    def _read_block(self, file: int, out: Bytes, offset: int, nbytes: int, direct: bool) -> int:
        """Read one block into `out`; returns the crc32 of its first `nbytes`."""
        if direct:
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
        if file == self._cached_fd:
            with contextlib.suppress(OSError):
                os.posix_fadvise(file, offset, out.nbytes, os.POSIX_FADV_DONTNEED)
        return crc

    def _crc32(self, offset: int, nbytes: int) -> int:
        piece = self._buffer(nbytes)
        self._fill(self._cached_fd, piece, offset)
        return zlib.crc32(piece.data)

    def _buffer(self, nbytes: int) -> Bytes:
        """The first `nbytes` of this thread's buffer of BLOCK bytes."""
        if not hasattr(self._thread_local, "pages"):
            self._thread_local.pages = huge_pages(BLOCK)
        pages: Bytes = self._thread_local.pages
        return pages[:nbytes]

    def _fill(self, file: int, out: Bytes, offset: int) -> None:
        """Read until `out` is full.  Raises: CheckpointError."""
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
                    f"{offset} on were expected, {done} found. It was truncated after it was "
                    "opened; pack it again."
                )
            if got % IO_ALIGNMENT:
                file = self._cached_fd  # direct I/O needs aligned offsets


def _results(futures: "list[Future[int]]") -> list[int]:
    """The results of all futures.

    If one fails, later ones that have not started are cancelled, and running ones are awaited.
    Then the first error in the file's order is raised.
    """
    done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
    failed = [
        i
        for i, future in enumerate(futures)
        if future in done and not future.cancelled() and future.exception() is not None
    ]
    for future in futures[failed[0] + 1 :] if failed else ():
        future.cancel()
    concurrent.futures.wait(futures)
    return [future.result() for future in futures]


# -- crc32 of two parts ----------------------------------------------------------------------------


def crc32_combine(first: int, second: int, length: int) -> int:
    """crc32 of a + b from those of a and b, b of `length` bytes."""
    return _multiply(_shift(length), first) ^ second


def _multiply(a: int, b: int) -> int:
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
            out = _multiply(power, out)
        power = _multiply(power, power)
        length >>= 1
    return out
