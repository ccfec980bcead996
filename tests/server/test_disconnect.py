"""A client that disconnects cancels its request, at any time. The ASGI app is called directly."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import pytest
from starlette.applications import Starlette

from osmium.engine.request import FinishReason
from osmium.server.app import create_app
from osmium.server.limits import MAX_RUNNING_CHOICES
from tests.server.scripted import PATIENCE_S, ScriptedEngine, host_of

Message = MutableMapping[str, Any]

LONG = "the end " * 2000
"""A response that takes a minute at the pace below."""

PACE_S = 0.005


class AsgiRequest:
    """One HTTP request without a server; `disconnect` breaks the connection."""

    def __init__(
        self, app: Starlette, path: str, body: dict[str, Any], *, reads: bool = True
    ) -> None:
        """With `reads` false the client accepts nothing, not even response headers."""
        self.reads = reads
        self.disconnected = asyncio.Event()
        self.sent: list[Message] = []
        self.changed = asyncio.Condition()
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
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if not self.reads:
            await asyncio.Event().wait()
        async with self.changed:
            self.sent.append(message)
            self.changed.notify_all()

    async def wait_for_messages(self, count: int) -> None:
        async with self.changed, asyncio.timeout(PATIENCE_S):
            await self.changed.wait_for(lambda: len(self.sent) >= count)

    async def disconnect(self) -> None:
        """Break the connection; the app must end by itself."""
        self.disconnected.set()
        await asyncio.wait_for(self.task, PATIENCE_S)


def run_request(
    engine: ScriptedEngine,
    path: str,
    body: dict[str, Any],
    act: Callable[[AsgiRequest], Awaitable[None]],
    *,
    reads: bool = True,
) -> None:
    """Send a request, and run `act` while it is served."""

    async def run() -> None:
        host = host_of(engine)
        app = create_app(host)
        async with app.router.lifespan_context(app):
            while host.engine is None:
                await asyncio.sleep(0.001)
            request = AsgiRequest(app, path, body, reads=reads)
            await act(request)

    asyncio.run(run())


ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
    ("/v1/completions", {"prompt": "Hello"}),
]


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_cancels_all_prompts_and_submits_no_further_one(stream: bool) -> None:
    engine = ScriptedEngine(LONG, context=10**6, pace_s=PACE_S)

    async def act(request: AsgiRequest) -> None:
        await asyncio.to_thread(engine.wait_for_request)
        while len(engine.requests) < MAX_RUNNING_CHOICES:
            await asyncio.sleep(0.001)
        await request.disconnect()

    body = {"prompt": ["Hello"] * 40, "n": 2, "stream": stream}
    run_request(engine, "/v1/completions", body, act)
    reasons = [one.wait().reason for one in engine.requests]
    assert reasons == [FinishReason.CANCELLED] * MAX_RUNNING_CHOICES


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_during_prefill_cancels_the_request(
    path: str, body: dict[str, Any], stream: bool
) -> None:
    engine = ScriptedEngine(LONG)
    engine.prefill.clear()

    async def act(request: AsgiRequest) -> None:
        await asyncio.to_thread(engine.wait_for_request)
        await request.disconnect()

    run_request(engine, path, {**body, "stream": stream}, act)
    finish = engine.requests[0].wait()
    assert finish.reason is FinishReason.CANCELLED
    assert finish.completion_tokens == 0


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_disconnect_during_a_stream_cancels_the_request(path: str, body: dict[str, Any]) -> None:
    engine = ScriptedEngine(LONG, context=10**6, pace_s=PACE_S)

    async def act(request: AsgiRequest) -> None:
        await request.wait_for_messages(5)
        await request.disconnect()

    run_request(engine, path, {**body, "stream": True}, act)
    assert engine.requests[0].wait().reason is FinishReason.CANCELLED


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_disconnect_during_an_unstreamed_response_cancels_the_request(
    path: str, body: dict[str, Any]
) -> None:
    engine = ScriptedEngine(LONG, context=10**6, pace_s=PACE_S)

    async def act(request: AsgiRequest) -> None:
        await asyncio.to_thread(engine.wait_for_request)
        await asyncio.sleep(20 * PACE_S)
        await request.disconnect()

    run_request(engine, path, body, act)
    finish = engine.requests[0].wait()
    assert finish.reason is FinishReason.CANCELLED
    assert finish.completion_tokens > 0, "it was decoding at the disconnect"


def test_a_disconnect_before_the_stream_begins_cancels_the_request() -> None:
    """The client accepts no headers, so the stream has not started."""
    engine = ScriptedEngine(LONG, context=10**6, pace_s=PACE_S)

    async def act(request: AsgiRequest) -> None:
        await asyncio.to_thread(engine.wait_for_request)
        await request.disconnect()

    path, body = ROUTES[0]
    run_request(engine, path, {**body, "stream": True}, act, reads=False)
    assert engine.requests[0].wait().reason is FinishReason.CANCELLED


def test_cancelling_the_servers_task_cancels_the_request() -> None:
    """uvicorn cancels tasks after the timeout of a graceful shutdown."""
    engine = ScriptedEngine(LONG, context=10**6, pace_s=PACE_S)

    async def act(request: AsgiRequest) -> None:
        await asyncio.to_thread(engine.wait_for_request)
        request.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request.task

    run_request(engine, *ROUTES[0], act)
    assert engine.requests[0].wait().reason is FinishReason.CANCELLED


def test_a_complete_response_is_not_cancelled() -> None:
    engine = ScriptedEngine("the end")

    async def act(request: AsgiRequest) -> None:
        await asyncio.wait_for(request.task, PATIENCE_S)
        body = b"".join(one.get("body", b"") for one in request.sent)
        assert json.loads(body)["choices"][0]["message"]["content"] == "the end"

    run_request(engine, *ROUTES[0], act)
    assert engine.requests[0].wait().reason is FinishReason.STOP
