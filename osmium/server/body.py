"""Bodies of requests: read with limits, then parsed and tokenized on worker threads.

The event loop only receives bytes.  At most `large_bodies` large bodies are in memory, and one of
them is worked on at a time, beside the small ones.
"""

import asyncio
import codecs
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from osmium.errors import RequestError
from osmium.server.limits import Limits, shown

__all__ = ["BodyReader", "ErrorResponse", "Workers"]

T = TypeVar("T")


class Workers:
    """Daemon threads that run jobs for coroutines: a job that still runs does not delay an exit."""

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self.running = 0
        """Jobs that run now; exact enough with the global lock and a few threads."""

    async def run(self, job: Callable[[], T]) -> T:
        """The result of `job`.  A cancelled coroutine's job is left out if it has not started."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            if result.cancelled():
                return
            self.running += 1
            try:
                self._deliver(loop, result, result.set_result, job())
            except BaseException as error:
                self._deliver(loop, result, result.set_exception, error)
            finally:
                self.running -= 1

        self._start()
        self._jobs.put(work)
        return await result

    @staticmethod
    def _deliver(
        loop: asyncio.AbstractEventLoop,
        result: "asyncio.Future[Any]",
        setter: Callable[[Any], None],
        value: Any,
    ) -> None:
        with suppress(RuntimeError):  # the server has stopped, and its event loop is closed
            loop.call_soon_threadsafe(lambda: None if result.done() else setter(value))

    def close(self) -> None:
        """Let the threads end after the jobs that are queued."""
        for _ in self._threads:
            self._jobs.put(None)
        self._threads = []

    def _start(self) -> None:
        while len(self._threads) < self._count:
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # it holds a body


class BodyReader:
    """Reads the bodies of one server's requests."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._places = asyncio.Semaphore(limits.large_bodies)
        self._small = Workers(limits.workers, "osmium-prepare")
        self._large = Workers(1, "osmium-prepare-large")

    @property
    def busy(self) -> bool:
        """Whether a body is worked on."""
        return bool(self._small.running or self._large.running)

    def close(self) -> None:
        self._small.close()
        self._large.close()

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[tuple[bytearray, Workers]]:
        """A request's body, and the threads on which to work on it inside the `with`.

        A byte order mark is left out.  Raises: RequestError for a body that is empty, compressed,
        too large, too slow, or waits too long for a place.
        """
        limits, loop = self.limits, asyncio.get_running_loop()
        _check_encoding(request)
        declared = _content_length(request)
        if declared > limits.max_body_bytes:
            raise self._too_large(declared)
        body, has_place = bytearray(), False
        try:
            parts = request.stream().__aiter__()
            start = loop.time()
            while True:
                if not has_place and max(declared, len(body)) > limits.large_body_bytes:
                    start += await self._wait_for_place()
                    has_place = True
                end = start + limits.body_timeout_s + len(body) / limits.min_body_rate
                try:
                    async with asyncio.timeout_at(end):
                        part = await anext(parts, None)
                except TimeoutError:
                    raise RequestError(
                        f"{len(body)} bytes of the body arrived in {loop.time() - start:.0f} s; "
                        f"it must arrive in {limits.body_timeout_s:.0f} s, or at "
                        f"{limits.min_body_rate} bytes per second. Send it faster.",
                        code="body_timeout",
                        status=408,
                    ) from None
                if part is None:
                    break
                body += part
                if len(body) > limits.max_body_bytes:
                    raise self._too_large(len(body))
            request.scope[_BODY_READ] = True
            if body.startswith(codecs.BOM_UTF8):
                del body[: len(codecs.BOM_UTF8)]
            if not body.strip():
                raise RequestError("The body is empty; send a JSON object.", code="invalid_json")
            yield body, self._large if has_place else self._small
        finally:
            if has_place:
                self._places.release()

    async def _wait_for_place(self) -> float:
        """Wait until the large body may be read; returns the seconds waited."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            async with asyncio.timeout(self.limits.queue_timeout_s):
                await self._places.acquire()
        except TimeoutError:
            raise RequestError(
                f"{self.limits.large_bodies} other bodies above {self.limits.large_body_bytes} "
                "bytes are read, which is the limit. Try again later.",
                code="too_many_large_bodies",
                status=429,
            ) from None
        return loop.time() - start

    def _too_large(self, size: int) -> RequestError:
        limit = self.limits.max_body_bytes
        return RequestError(
            f"The body has {size} bytes or more; at most {limit} ({limit / (1 << 20):g} MiB) are "
            "read. Shorten it, or start with a larger --max-body-mb.",
            code="body_too_large",
            status=413,
        )


class ErrorResponse(JSONResponse):
    """A response to a request whose body may not have been read.

    The body's rest is received and dropped for `drain_s` seconds after the response: a client that
    still sends when the connection closes may lose the response.
    """

    def __init__(
        self, content: Any, status: int, headers: Mapping[str, str] | None, drain_s: float
    ) -> None:
        super().__init__(content, status, headers)
        self._drain_s = drain_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get(_BODY_READ):
            await super().__call__(scope, receive, send)
            return
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


_BODY_READ = "osmium.body_read"
"""Key of a scope whose body has been read."""


def _check_encoding(request: Request) -> None:
    """Raises: RequestError for a compressed body."""
    for value in request.headers.getlist("content-encoding"):
        if any(one.strip().lower() not in ("", "identity") for one in value.split(",")):
            raise RequestError(
                f"The header Content-Encoding is {shown(value)}; only uncompressed bodies are "
                "read. Send the JSON without compression.",
                code="unsupported_encoding",
                status=415,
            )


def _content_length(request: Request) -> int:
    """The declared size of the body, or 0."""
    text = request.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
