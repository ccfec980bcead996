"""A server on a real socket, in a thread of the test's process, with chosen limits."""

import json
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from osmium.engine.engine import Engine
from osmium.server.app import create_app
from osmium.server.connections import HttpConfig
from osmium.server.limits import Limits
from osmium.server.shutdown import Server, Shutdown
from tests.server.scripted import PATIENCE_S, ScriptedEngine, host_of

__all__ = ["RunningServer", "address_of", "connect", "process", "read_all", "run_limited"]

ROOT = Path(__file__).resolve().parents[2]


class RunningServer:
    """The server's port, and its parts."""

    def __init__(self, port: int, server: Server, shutdown: Shutdown) -> None:
        self.port, self.server, self.shutdown = port, server, shutdown


@contextmanager
def run_limited(
    engine: ScriptedEngine | Engine,
    limits: Limits,
    tls: ssl.SSLContext | None = None,
    **options: Any,
) -> Iterator[RunningServer]:
    """Serve on a free port with these limits; `options` are create_app's."""
    host, shutdown, ready = host_of(engine), Shutdown(), threading.Event()
    host.on_done = ready.set
    app = create_app(host, limits=limits, shutdown=shutdown, **options)
    config = HttpConfig(
        app, limits, tls, log_level="warning", access_log=False, lifespan="on", backlog=64,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = Server(config, shutdown)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert ready.wait(PATIENCE_S)
            yield RunningServer(port, server, shutdown)
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "the server does not stop"


def connect(port: int, head: str = "", body: bytes = b"", **headers: str) -> socket.socket:
    """Connect, and send the head of a request, if any, and bytes of its body."""
    connection = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
    if head:
        lines = [f"{head} HTTP/1.1", "Host: localhost"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return connection


def read_all(connection: socket.socket) -> tuple[int, dict[str, Any], float]:
    """The status, the JSON and the seconds of a response, until the connection is closed.

    0 and {} if it is closed without a response.
    """
    start, raw = time.monotonic(), b""
    with connection:
        try:
            while part := connection.recv(65536):
                raw += part
        except ConnectionResetError:
            pass
    seconds = time.monotonic() - start
    if not raw:
        return 0, {}, seconds
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body), seconds


@contextmanager
def process(kind: str, port: int = 0) -> Iterator[subprocess.Popen[str]]:
    """serve() in a separate process, killed at the end of a test that left it running."""
    command = [sys.executable, "-m", "tests.server.server_process", kind, str(port)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def address_of(child: subprocess.Popen[str]) -> str:
    """The address that the server prints."""
    assert child.stderr is not None
    line = child.stderr.readline()
    found = re.search(r"scripted is served on (https?://127\.0\.0\.1:\d+)/v1", line)
    assert found, line + child.stderr.read()
    return found[1]
