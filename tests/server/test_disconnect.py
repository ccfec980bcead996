"""Who goes away is cancelled: at any moment, in a stream or not.  The app is driven by hand."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import pytest
from starlette.applications import Starlette

from osmium.engine.request import FinishReason
from osmium.server.app import create_app
from tests.server.scripted import PATIENCE_S, Scripted, host_of

Message = MutableMapping[str, Any]

LONG = "the end " * 2000
"""An answer that nobody waits for: it takes a minute at the pace below."""

PACE_S = 0.005


class Visit:
    """One HTTP request by hand: `leave` is the client's connection breaking."""

    def __init__(
        self, app: Starlette, path: str, body: dict[str, Any], *, reads: bool = True
    ) -> None:
        """A client that does not read takes nothing, not even an answer's head."""
        self.reads = reads
        self.gone = asyncio.Event()
        self.sent: list[Message] = []
        self.some = asyncio.Condition()
        self._body: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode()}]
        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": [], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        if self._body:
            return self._body.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if not self.reads:
            await asyncio.Event().wait()
        async with self.some:
            self.sent.append(message)
            self.some.notify_all()

    async def wait_for_messages(self, count: int) -> None:
        async with self.some, asyncio.timeout(PATIENCE_S):
            await self.some.wait_for(lambda: len(self.sent) >= count)

    async def leave(self) -> None:
        """The connection breaks; the server must come to an end by itself."""
        self.gone.set()
        await asyncio.wait_for(self.task, PATIENCE_S)


def visiting(
    engine: Scripted,
    path: str,
    body: dict[str, Any],
    act: Callable[[Visit], Awaitable[None]],
    *,
    reads: bool = True,
) -> None:
    """Visit, and do something while the request runs."""

    async def run() -> None:
        host = host_of(engine)
        app = create_app(host)
        async with app.router.lifespan_context(app):
            while host.engine is None:
                await asyncio.sleep(0.001)
            visit = Visit(app, path, body, reads=reads)
            await act(visit)

    asyncio.run(run())


ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
    ("/v1/completions", {"prompt": "Hello"}),
]


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_leaving_during_prefill_cancels(path: str, body: dict[str, Any], stream: bool) -> None:
    engine = Scripted(LONG)
    engine.prefill.clear()

    async def act(visit: Visit) -> None:
        await asyncio.to_thread(engine.wait_for_request)
        await visit.leave()

    visiting(engine, path, {**body, "stream": stream}, act)
    finish = engine.asked[0].wait()
    assert finish.reason is FinishReason.CANCELLED
    assert finish.completion_tokens == 0


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_leaving_a_stream_cancels(path: str, body: dict[str, Any]) -> None:
    engine = Scripted(LONG, context=10**6, pace_s=PACE_S)

    async def act(visit: Visit) -> None:
        await visit.wait_for_messages(5)
        await visit.leave()

    visiting(engine, path, {**body, "stream": True}, act)
    assert engine.asked[0].wait().reason is FinishReason.CANCELLED


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_leaving_a_whole_answer_cancels_though_its_tokens_keep_coming(
    path: str, body: dict[str, Any]
) -> None:
    engine = Scripted(LONG, context=10**6, pace_s=PACE_S)

    async def act(visit: Visit) -> None:
        await asyncio.to_thread(engine.wait_for_request)
        await asyncio.sleep(20 * PACE_S)
        await visit.leave()

    visiting(engine, path, body, act)
    finish = engine.asked[0].wait()
    assert finish.reason is FinishReason.CANCELLED
    assert finish.completion_tokens > 0, "it was decoding when the client left"


def test_leaving_before_a_stream_has_begun_cancels() -> None:
    """Its head was never taken, so nothing of the stream itself has run."""
    engine = Scripted(LONG, context=10**6, pace_s=PACE_S)

    async def act(visit: Visit) -> None:
        await asyncio.to_thread(engine.wait_for_request)
        await visit.leave()

    path, body = ROUTES[0]
    visiting(engine, path, {**body, "stream": True}, act, reads=False)
    assert engine.asked[0].wait().reason is FinishReason.CANCELLED


def test_a_task_that_is_ended_by_the_server_cancels() -> None:
    """As uvicorn does when its patience with a graceful end is over."""
    engine = Scripted(LONG, context=10**6, pace_s=PACE_S)

    async def act(visit: Visit) -> None:
        await asyncio.to_thread(engine.wait_for_request)
        visit.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await visit.task

    visiting(engine, *ROUTES[0], act)
    assert engine.asked[0].wait().reason is FinishReason.CANCELLED


def test_an_answer_that_came_to_its_end_was_not_cut_short() -> None:
    engine = Scripted("the end")

    async def act(visit: Visit) -> None:
        await asyncio.wait_for(visit.task, PATIENCE_S)
        body = b"".join(one.get("body", b"") for one in visit.sent)
        assert json.loads(body)["choices"][0]["message"]["content"] == "the end"

    visiting(engine, *ROUTES[0], act)
    assert engine.asked[0].wait().reason is FinishReason.STOP
