"""A server started by the command line, and clients that the tests can break."""

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

__all__ = ["Answer", "Server", "serving", "stream_chat"]

START_S = 60.0

ANSWER_S = 60.0
"""A client that waits longer for the next bytes has found a hang."""


class Server:
    """Where it is, and its process."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Any) -> None:
        self.process, self.port, self._log = process, port, log
        self.status = psutil.Process(process.pid)

    def log(self) -> str:
        """What it has said so far."""
        self._log.seek(0)
        return str(self._log.read().decode(errors="replace"))

    def get(self, path: str) -> tuple[int, bytes]:
        return self.ask("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON."""
        status, raw = self.ask("POST", path, json.dumps(body).encode())
        return status, json.loads(raw)

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        """One request on a connection of its own.  Raises: TimeoutError where it hangs."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def chat(self, text: str, **fields: Any) -> dict[str, Any]:
        """One whole answer."""
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
        status, answer = self.post("/v1/chat/completions", body)
        assert status == 200, answer
        assert isinstance(answer, dict)
        return answer

    def metric(self, name: str) -> float:
        """A metric without labels."""
        _, raw = self.get("/metrics")
        (found,) = re.findall(rf"^{name} (\S+)$", raw.decode(), re.M)
        return float(found)

    def settled(self) -> None:
        """Wait until nothing runs or waits.  Fails where that does not come."""
        end = time.monotonic() + ANSWER_S
        while self.metric("osmium_requests_running") or self.metric("osmium_requests_waiting"):
            assert time.monotonic() < end, "requests of clients that have left still run"
            time.sleep(0.1)

    def healthy(self) -> None:
        """It lives, serves, and answers what it should."""
        assert self.process.poll() is None, self.log()
        status, raw = self.get("/health")
        assert status == 200, raw
        answer = self.chat("What is the capital of France?", max_tokens=20)
        assert "Paris" in answer["choices"][0]["message"]["content"]


@contextmanager
def serving(*flags: str) -> Iterator[Server]:
    """The bundled model on a CPU.  At the end Ctrl-C must end it in order."""
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
        said = log.read().decode(errors="replace")
        assert process.poll() is None, said
        assert time.monotonic() < end, said
        found = re.search(r"http://[\w.]+:([1-9]\d*)", said)
        if found:
            server = Server(process, int(found[1]), log)
            with suppress(OSError):
                if server.get("/health")[0] == 200:
                    return server
        time.sleep(0.1)


# -- streaming clients -----------------------------------------------------------------------------


@dataclass
class Answer:
    """What one client has read of a stream."""

    status: int = 0
    chunks: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False
    """Whether [DONE] came last."""
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
    port: int, text: str, *, leave_after: int | None = None, reset: bool = False, **fields: Any
) -> Answer:
    """Read a streamed answer to its end; or leave after so many chunks, with a reset or without.

    Raises: TimeoutError where nothing comes, AssertionError for what is no stream.
    """
    body = json.dumps(
        {"messages": [{"role": "user", "content": text}], "temperature": 0, "stream": True,
         "stream_options": {"include_usage": True}, **fields}
    ).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
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
            if leave_after is not None and len(answer.chunks) >= leave_after:
                return answer
    finally:
        if reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
