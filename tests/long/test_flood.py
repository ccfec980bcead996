"""Four bodies that are costly to parse or to tokenize, at once, beside /health and a stream."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import pytest

from tests.long.server import ANSWER_S, Server
from tests.server.floods import bodies

PAUSE_S = 0.2
"""The longest that /health may take, and that a stream may lose, on two idle cores."""

MEMORY_BYTES = 400 << 20

ATTEMPTS = 5
"""The best attempt counts: other processes on this machine delay the server, too."""


async def ask(port: int, method: str, path: str, body: bytes = b"") -> bytes:
    """The raw response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        async with asyncio.timeout(ANSWER_S):  # wait_for of Python 3.11 may swallow a cancellation
            return await reader.read()
    finally:
        writer.transport.abort()


@dataclass
class Seen:
    """What clients saw, before the flood or from its moment on."""

    health_s: list[float] = field(default_factory=list)
    chunk_times: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def restart(self) -> tuple[float, float]:
        """Forget what was seen; returns the medians of /health and of the stream's gaps, s."""
        gaps = [b - a for a, b in pairwise(self.chunk_times)]
        usual = median(self.health_s), median(gaps)
        self.health_s.clear()
        self.memory.clear()
        del self.chunk_times[:-1]
        return usual

    @property
    def longest_gap_s(self) -> float:
        """The longest time between two chunks of the stream."""
        return max((b - a for a, b in pairwise(self.chunk_times)), default=ANSWER_S)


@asynccontextmanager
async def watching(server: Server) -> AsyncIterator[Seen]:
    """Read /health, a running stream and the process's memory."""
    seen = Seen()

    async def health() -> None:
        while True:
            start = time.perf_counter()
            assert b"200 OK" in await ask(server.port, "GET", "/health")
            seen.health_s.append(time.perf_counter() - start)
            await asyncio.sleep(0.01)

    async def stream() -> None:
        fields = {"stream": True, "ignore_eos": True, "max_tokens": 3000}
        message = {"role": "user", "content": "Hello"}
        body = json.dumps({"messages": [message], **fields}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        )
        writer.write(head % len(body) + body)
        try:
            while line := await reader.readline():
                if line.startswith(b"data: "):
                    seen.chunk_times.append(time.perf_counter())
        finally:
            writer.transport.abort()

    async def memory() -> None:
        while True:
            seen.memory.append(server.status.memory_info().rss)
            await asyncio.sleep(0.02)

    tasks = [asyncio.create_task(one()) for one in (health, stream, memory)]
    try:
        yield seen
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in results), results


async def flood(server: Server, size: int) -> tuple[Seen, tuple[float, float], list[bytes]]:
    """Send the bodies at once while a stream runs.

    Returns what was seen, the usual /health and gap before it, and the responses.
    """
    requests = list(bodies(size))
    async with watching(server) as seen:
        await asyncio.sleep(1.5)
        before = seen.restart()
        answers = await asyncio.gather(*(ask(server.port, "POST", *one) for one in requests))
        await asyncio.sleep(0.5)
    return seen, before, list(answers)


@pytest.mark.parametrize("mib", [4, 15])
def test_costly_bodies_do_not_delay_health_or_a_running_stream(demo: Server, mib: int) -> None:
    before, found = demo.status.memory_info().rss, []
    for _ in range(ATTEMPTS):
        seen, quiet, answers = asyncio.run(flood(demo, mib << 20))
        for raw in answers:
            assert raw.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 ")), raw[:300]
            error = json.loads(raw.partition(b"\r\n\r\n")[2])["error"]
            assert error["type"] == "invalid_request_error"
        assert max(seen.memory) - before < MEMORY_BYTES
        found.append((max(seen.health_s), seen.longest_gap_s, *quiet))
        demo.wait_until_idle()
    print(f"{mib} MiB each: (/health, longest gap of the stream, usual ones) in s: {found}")
    assert min(health for health, _, _, _ in found) < PAUSE_S, found
    assert min(gap - usual for _, gap, _, usual in found) < PAUSE_S, found
    demo.assert_healthy()
