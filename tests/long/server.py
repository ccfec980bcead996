"""A server started from the command line, and streaming clients that disconnect."""

import asyncio
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from typing import Any

import psutil

__all__ = ["Answer", "Server", "run_server", "stream_chat"]

START_S = 60.0

ANSWER_S = 60.0
"""Waiting longer than this for the next bytes means that the server hangs."""


class Server:
    """The server's address and process."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Any) -> None:
        self.process, self.port, self._log = process, port, log
        self.status = psutil.Process(process.pid)

    def log(self) -> str:
        """The server's output so far."""
        self._log.seek(0)
        return str(self._log.read().decode(errors="replace"))

    def get(self, path: str) -> tuple[int, bytes]:
        return self.ask("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """HTTP status and parsed JSON."""
        status, raw = self.ask("POST", path, json.dumps(body).encode())
        return status, json.loads(raw)

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        """Send one request on a new connection. Raises: TimeoutError after ANSWER_S."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def chat(self, text: str, **fields: Any) -> dict[str, Any]:
        """An unstreamed chat response."""
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
        status, answer = self.post("/v1/chat/completions", body)
        assert status == 200, answer
        assert isinstance(answer, dict)
        return answer

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        _, raw = self.get("/metrics")
        (found,) = re.findall(rf"^{name} (\S+)$", raw.decode(), re.M)
        return float(found)

    def wait_until_idle(self) -> None:
        """Wait until no request runs or waits; fails after a timeout."""
        end = time.monotonic() + ANSWER_S
        while self.metric("osmium_num_requests_running") or self.metric(
            "osmium_num_requests_waiting"
        ):
            assert time.monotonic() < end, "requests of disconnected clients still run"
            time.sleep(0.1)

    def assert_healthy(self) -> None:
        """The process runs, and a request gets the right response."""
        assert self.process.poll() is None, self.log()
        status, raw = self.get("/health")
        assert status == 200, raw
        answer = self.chat("What is the capital of France?", max_tokens=20)
        assert "Paris" in answer["choices"][0]["message"]["content"]


@contextmanager
def run_server(*flags: str) -> Iterator[Server]:
    """Serve the bundled model on the CPU; at the end Ctrl-C must stop the server cleanly."""
    with tempfile.TemporaryFile() as log:
        command = ["-m", "osmium", "serve", "--device", "cpu", "--port", "0", *flags]
        process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log)
        try:
            yield _started(process, log)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) in (0, 130)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def _started(process: "subprocess.Popen[bytes]", log: Any) -> Server:
    end = time.monotonic() + START_S
    while True:
        log.seek(0)
        output = log.read().decode(errors="replace")
        assert process.poll() is None, output
        assert time.monotonic() < end, output
        found = re.search(r"http://[\w.]+:([1-9]\d*)", output)
        if found:
            server = Server(process, int(found[1]), log)
            with suppress(OSError):
                if server.get("/health")[0] == 200:
                    return server
        time.sleep(0.1)


# -- streaming clients -----------------------------------------------------------------------------


@dataclass
class Answer:
    """The events that one client received."""

    status: int = 0
    chunks: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False
    """Whether the stream ended with [DONE]."""
    first_s: float = 0.0
    """Seconds to the first chunk with text."""

    @property
    def text(self) -> str:
        choices = [one["choices"][0] for one in self.chunks if one["choices"]]
        return "".join(one["delta"].get("content", "") for one in choices)

    @property
    def reasons(self) -> list[str]:
        choices = [one["choices"][0] for one in self.chunks if one["choices"]]
        return [one["finish_reason"] for one in choices if one["finish_reason"]]

    @property
    def usage(self) -> dict[str, Any]:
        found = self.chunks[-1].get("usage")
        assert isinstance(found, dict), "the last chunk has the usage"
        return found


async def stream_chat(
    port: int, text: str, *, disconnect_after: int | None = None, reset: bool = False, **fields: Any
) -> Answer:
    """Read a streamed response to its end, or disconnect after `leave_after` chunks, with TCP reset
    or not.

    Raises: TimeoutError without new bytes, AssertionError for an invalid stream.
    """
    body = json.dumps(
        {"messages": [{"role": "user", "content": text}], "temperature": 0, "stream": True,
         "stream_options": {"include_usage": True}, **fields}
    ).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    answer, start = Answer(), time.monotonic()
    try:
        writer.write(head.encode() + body)
        await writer.drain()
        status = await asyncio.wait_for(reader.readline(), ANSWER_S)
        answer.status = int(status.split()[1])
        while True:
            line = await asyncio.wait_for(reader.readline(), ANSWER_S)
            if not line:
                return answer
            if not line.startswith(b"data: "):
                continue
            assert not answer.done, "nothing follows [DONE]"
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                answer.done = True
                continue
            answer.chunks.append(json.loads(data))
            if not answer.first_s and answer.text:
                answer.first_s = time.monotonic() - start
            if disconnect_after is not None and len(answer.chunks) >= disconnect_after:
                return answer
    finally:
        if reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
