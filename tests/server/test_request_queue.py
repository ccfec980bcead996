"""Requests that wait for the engine: their limit, and the comments with their place."""

import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

import osmium
from osmium.errors import RequestError
from osmium.server.limits import Limits
from osmium.server.request_queue import RequestQueue
from tests.server.running import run_limited
from tests.server.scripted import PATIENCE_S, ScriptedEngine, client_of

HELLO = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 5},
}


def test_places_are_those_of_the_requests_that_still_wait() -> None:
    queue, waiting = RequestQueue(3), [True, True, True, True]
    first, second, third = (queue.join(partial(waiting.__getitem__, i)) for i in range(3))
    assert [queue.place(one) for one in (first, second, third)] == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(RequestError, match=r"3 requests wait.*--max-queued-requests") as refused:
        queue.join(lambda: True)
    assert (refused.value.status, refused.value.code) == (429, "too_many_requests")
    waiting[1] = False  # the engine has begun it
    assert [queue.place(one) for one in (first, second, third)] == [(1, 2), None, (2, 2)]
    fourth = queue.join(lambda: waiting[3])
    queue.leave(first)
    queue.leave(first)
    assert [queue.place(one) for one in (first, third, fourth)] == [None, (1, 2), (2, 2)]


@pytest.mark.parametrize("path", BODIES)
def test_a_request_above_the_limit_is_refused(path: str) -> None:
    engine = ScriptedEngine("the end")
    engine.begins.clear()
    with (
        client_of(engine, limits=Limits(max_queued_requests=2)) as client,
        ThreadPoolExecutor(2) as threads,
    ):
        waiting = [threads.submit(client.post, path, json=BODIES[path]) for _ in range(2)]
        for _ in waiting:
            engine.wait_for_request()
        refused = client.post(path, json=BODIES[path])
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
        message = refused.json()["error"]["message"]
        assert "2 requests wait" in message and "--max-queued-requests" in message
        assert len(engine.requests) == 2
        engine.begins.set()
        assert [one.result(PATIENCE_S).status_code for one in waiting] == [200, 200]
        assert client.post(path, json=BODIES[path]).status_code == 200


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_that_waits_has_comments_with_its_place(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osmium.server.answer.PING_INTERVAL_S", 0.02)
    engine = ScriptedEngine("the end")
    engine.begins.clear()
    body = {**BODIES[path], "stream": True}
    with client_of(engine) as client, ThreadPoolExecutor(2) as threads:
        first = threads.submit(client.post, path, json=body)
        engine.wait_for_request()
        second = threads.submit(client.post, path, json=body)
        engine.wait_for_request()
        threading.Timer(0.2, engine.begins.set).start()
        texts = [one.result(PATIENCE_S).text for one in (first, second)]
    assert ": queued 1/2" in texts[0] and ": queued 2/2" in texts[1]
    assert all(": queued" not in text[text.rindex("the") :] for text in texts)


def test_a_disconnected_request_leaves_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osmium.server.answer.PING_INTERVAL_S", 0.02)
    engine = ScriptedEngine("the end")
    engine.begins.clear()
    body = json.dumps({"messages": HELLO, "stream": True})
    with run_limited(engine, Limits(max_queued_requests=2)) as running:
        clients = [http.client.HTTPConnection("127.0.0.1", running.port) for _ in range(2)]
        for client in clients:
            headers = {"Content-Type": "application/json"}
            client.request("POST", "/v1/chat/completions", body, headers)
            engine.wait_for_request()
        second = clients[1].getresponse()
        while b": queued 2/2" not in second.readline():
            pass
        clients[0].close()
        while b": queued 1/1" not in second.readline():
            pass
        engine.begins.set()
        assert b"the" in second.read()
        clients[1].close()


def test_requests_move_up_as_others_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo decodes one request at a time; two others wait for it."""
    monkeypatch.setattr("osmium.server.answer.PING_INTERVAL_S", 0.02)
    engine = osmium.load("demo", "cpu", max_num_seqs=1)
    long = {"messages": HELLO, "max_tokens": 150, "ignore_eos": True, "stream": True}
    try:
        with (
            client_of(engine, limits=Limits(max_queued_requests=2)) as client,
            ThreadPoolExecutor(3) as threads,
        ):
            texts = [
                threads.submit(client.post, "/v1/chat/completions", json=long) for _ in range(3)
            ]
            found = [one.result(PATIENCE_S).text for one in texts]
    finally:
        engine.close()
    waited = sorted(": queued" in text for text in found)
    assert waited == [False, True, True]
    assert any(": queued 2/2" in text and ": queued 1/1" in text for text in found)
