"""Progress of a prompt that is read in one pass: streams, pings and metrics of the real engine."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from osmium.engine.engine import Engine
from tests.agents.script import answer_prompt
from tests.agents.scripted_model import scripted_engine
from tests.server.scripted import PATIENCE_S, chunks, client_of

LAYER_S = 0.04

LAYERS = 8
"""Layers of the scripted model, which are the bundled one's."""

ASKED = [{"role": "user", "content": "a prompt of some words " * 20}]


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine whose prompts take LAYER_S in each layer."""
    engine = scripted_engine(answer_prompt, context=2048)
    on_layers(engine, lambda layer: time.sleep(LAYER_S))
    yield engine
    engine.close()


def on_layers(engine: Engine, before: Callable[[int], None]) -> None:
    engine.runner.model.before_layer = before  # type: ignore[attr-defined]


def assert_grows_in_the_pass(counts: list[int], total: int) -> None:
    assert all(a <= b for a, b in pairwise(counts)), counts
    between = {count for count in counts if 0 < count < total}
    assert len(between) >= 3, f"few of {LAYERS} layers are seen: {counts}"
    assert between <= {total * layer // LAYERS for layer in range(LAYERS)}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": ASKED}),
        ("/v1/completions", {"prompt": ASKED[0]["content"]}),
    ],
)
def test_the_progress_of_a_stream_grows_within_a_pass(
    engine: Engine, path: str, body: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osmium.server.answer.PROGRESS_INTERVAL_S", 0.01)
    with client_of(engine) as client:
        asked = {**body, "max_tokens": 2, "stream": True, "return_progress": True}
        found = chunks(client.post(path, json=asked).text)
    progress = [one["prompt_progress"] for one in found if "prompt_progress" in one]
    (total,) = {one["total"] for one in progress}
    counts = [one["processed"] for one in progress]
    assert_grows_in_the_pass(counts, total)
    assert counts[-1] == total
    times = [one["time_ms"] for one in progress]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("path", "ping"), [("/v1/messages", "\nevent: ping\n"), ("/v1/chat/completions", "")]
)
def test_the_comments_of_a_stream_show_progress_within_a_pass(
    engine: Engine, path: str, ping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osmium.server.answer.PING_INTERVAL_S", 0.02)
    with client_of(engine) as client:
        asked = {"messages": ASKED, "max_tokens": 2, "stream": True}
        text = client.post(path, json=asked).text
    found = [(int(a), int(b)) for a, b in re.findall(r": prefill (\d+)/(\d+)" + ping, text)]
    (total,) = {total for _, total in found}
    assert_grows_in_the_pass([done for done, _ in found], total)


def test_metrics_count_the_tokens_of_a_pass_when_it_ends(engine: Engine) -> None:
    arrived, go = threading.Event(), threading.Event()

    def wait_before_the_last(layer: int) -> None:
        if layer == LAYERS - 1:
            arrived.set()
            assert go.wait(PATIENCE_S)

    on_layers(engine, wait_before_the_last)
    with client_of(engine) as client:

        def value(name: str) -> float:
            (found,) = re.findall(rf"^{name} (\S+)$", client.get("/metrics").text, re.M)
            return float(found)

        asked = {"messages": ASKED, "max_tokens": 2}
        usage: list[int] = []
        thread = threading.Thread(
            target=lambda: usage.append(
                client.post("/v1/chat/completions", json=asked).json()["usage"]["prompt_tokens"]
            )
        )
        thread.start()
        assert arrived.wait(PATIENCE_S)
        assert value("osmium_num_requests_running") == 1
        assert value("osmium_prompt_tokens_total") == 0, "no token is computed in all layers"
        assert value("osmium_prefill_tokens_per_second") == 0
        time.sleep(0.1)
        go.set()
        thread.join(PATIENCE_S)
        assert value("osmium_prompt_tokens_total") == usage[0] > 50
        assert 0 < value("osmium_prefill_tokens_per_second") < usage[0] / 0.1
