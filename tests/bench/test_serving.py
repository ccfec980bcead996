"""The benchmark of the server: its pace, its rates, and what its client processes receive."""

import time
from http.client import HTTPConnection
from typing import Any

import pytest

import osmium
from osmium.bench import serving
from osmium.bench.serving import (
    Pace,
    ServingConfig,
    measure_serving,
    set_pace,
    tokens_per_s,
    window_rate,
)
from osmium.bench.stream_client import StreamResult, read_stream
from osmium.engine.request import SamplingParams
from osmium.errors import ConfigError
from osmium.server.limits import DEFAULT_LIMITS
from tests.server.running import run_limited
from tests.server.scripted import ScriptedEngine

CHAT = "/v1/chat/completions"


class Clock:
    """A clock that advances by sleeping and by being read."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds + 1e-6


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(serving, "time", made)
    return made


def test_fast_steps_end_at_the_pace(clock: Clock) -> None:
    pace = Pace(200)
    pace.wait()
    start = clock.now
    for _ in range(40):
        clock.now += 0.002
        pace.wait()
    assert clock.now - start == pytest.approx(40 / 200, rel=1e-3)


def test_a_step_late_by_less_than_a_period_delays_no_other(clock: Clock) -> None:
    pace = Pace(200)
    pace.wait()
    start = clock.now
    for step in range(4):
        clock.now += 0.008 if step == 1 else 0.001
        pace.wait()
    assert clock.now - start == pytest.approx(4 / 200, rel=1e-3)


def test_a_pause_is_not_followed_by_a_burst(clock: Clock) -> None:
    pace = Pace(200)
    pace.wait()
    clock.now += 1
    pace.wait()
    start = clock.now
    for _ in range(3):
        pace.wait()
    assert clock.now - start == pytest.approx(3 / 200, rel=1e-2)


def test_steps_slower_than_the_pace_are_not_delayed(clock: Clock) -> None:
    pace = Pace(200)
    pace.wait()
    start = clock.now
    for _ in range(10):
        clock.now += 0.007
        pace.wait()
    assert clock.now - start == pytest.approx(0.07, rel=1e-2)


def test_rates_count_tokens_after_the_first_of_the_last_stream() -> None:
    assert tokens_per_s([(11, 2.0), (5, 1.0)]) == 9
    # 4 events after time 2, two tokens in each event of the second stream, until time 4
    assert window_rate([[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0]], [4, 6]) == pytest.approx(
        (2 + 4) / 2
    )
    assert window_rate([[], []], [4, 4]) is None


def read(engine: ScriptedEngine, **fields: Any) -> StreamResult:
    """Stream a chat from a server on a socket."""
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": True, **fields}
    with run_limited(engine, DEFAULT_LIMITS) as running:
        return read_stream(HTTPConnection("127.0.0.1", running.port, timeout=20), CHAT, body)


def test_a_client_records_each_event_and_the_timings() -> None:
    start = time.perf_counter()
    result = read(ScriptedEngine("the end " * 4, context=400, pace_s=0.002), max_tokens=20)
    assert result.error == "" and result.tokens == 20 and len(result.times) == 20
    assert result.times == sorted(result.times) and result.times[0] > start
    assert result.decode_s >= 19 * 0.002


def test_a_client_reports_a_refusal_and_a_failure() -> None:
    refused = read(ScriptedEngine(), top_p=7)
    assert refused.status == 400 and "top_p" in refused.error
    failed = read(ScriptedEngine(fails_after=2))
    assert failed.status == 200 and "the card is gone" in failed.error


def test_a_paced_engine_generates_the_same_tokens_slower() -> None:
    engine = osmium.load("synthetic:tiny", device="cpu", context=128)
    params = SamplingParams(temperature=0, max_tokens=20)
    try:
        free = [token.id for token in engine.generate([1, 2, 3], params)]
        set_pace(engine, 100)
        start = time.perf_counter()
        paced = [token.id for token in engine.generate([1, 2, 3], params)]
        assert paced == free and time.perf_counter() - start >= 17 / 100
    finally:
        engine.close()


def test_streams_that_do_not_fit_are_refused_and_the_engine_is_closed() -> None:
    engine = osmium.load("synthetic:tiny", device="cpu", context=128, max_num_seqs=2)
    with pytest.raises(ConfigError, match=r"3 streams .* do not fit: .* 2 sequences of 128 tokens"):
        measure_serving(engine, ServingConfig((1, 3), tokens=8), lambda streams, number: None)
    assert engine.stopped is not None
    engine = osmium.load("synthetic:tiny", device="cpu", context=128)
    with pytest.raises(ConfigError, match=r"1 streams of .* do not fit"):
        measure_serving(engine, ServingConfig((1,), tokens=128), lambda streams, number: None)
