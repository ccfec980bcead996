"""A client process that sends requests and records when the events of their streams arrive.

usage: python -I osmium/bench/stream_client.py HOST PORT

Each line of stdin is a request, as JSON of {"path", "body"}.  Each gets one line of JSON on stdout:
the fields of a StreamResult.  The process ends with its stdin.
"""

import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Any

__all__ = ["StreamResult", "read_stream"]

TIMEOUT_S = 600.0
"""Seconds without a byte after which a request fails."""


@dataclass(frozen=True)
class StreamResult:
    """What a client received of one streamed response."""

    times: list[float] = field(default_factory=list)
    """When each event with text arrived: seconds of time.perf_counter, which on Linux is the same
    clock in every process."""
    tokens: int = 0
    """Generated tokens, by the response's `timings`."""
    decode_s: float = 0.0
    """Seconds from the first token to the last, by the response's `timings`."""
    status: int = 200
    """The HTTP status."""
    error: str = ""
    """The server's message, if the request failed."""


def read_stream(connection: HTTPConnection, path: str, body: dict[str, Any]) -> StreamResult:
    """Send a request with `"stream": true`, read its response, and close the connection.

    Raises: OSError, HTTPException.
    """
    headers = {"Content-Type": "application/json"}
    try:
        connection.request("POST", path, json.dumps(body).encode(), headers)
        response = connection.getresponse()
        if response.status != 200:
            error = json.loads(response.read())["error"]["message"]
            return StreamResult(status=response.status, error=error)
        parts: list[tuple[float, bytes]] = []
        while part := response.read1(1 << 16):
            parts.append((time.perf_counter(), part))
    finally:
        connection.close()  # the server closes idle ones; the next request opens another
    return _result(parts)


def _result(parts: list[tuple[float, bytes]]) -> StreamResult:
    """The result from the received bytes and their times; parsed only after the last byte."""
    times: list[float] = []
    timings: dict[str, Any] = {}
    rest = b""
    for at, part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                return StreamResult(error=event["error"]["message"])
            timings = event.get("timings", timings)
            times += [at] * any(_has_text(choice) for choice in event["choices"])
    if not timings:
        return StreamResult(error="the stream ended without timings")
    return StreamResult(times, timings["predicted_n"], timings["predicted_ms"] / 1e3)


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta", {})
    return bool(choice.get("text") or delta.get("content") or delta.get("reasoning_content"))


def main() -> None:
    host, port = sys.argv[1:]
    connection = HTTPConnection(host, int(port), timeout=TIMEOUT_S)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            result = read_stream(connection, request["path"], request["body"])
        except (OSError, HTTPException) as error:
            result = StreamResult(status=0, error=f"{type(error).__name__}: {error}")
        print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):  # Ctrl-C reaches the parent process, too
        main()
