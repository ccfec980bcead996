"""Engine statistics: every token and finish counts once, and each request its own link traffic."""

import threading
from dataclasses import replace
from typing import Any

import pytest

import osmium
from osmium.engine.request import FinishReason, SamplingParams
from osmium.engine.stats import Histogram, IntervalStats
from tests.engine.fakes import GREEDY, PATIENCE_S, EngineHarness, Gate


def test_a_histogram_counts_a_value_at_its_first_upper_edge() -> None:
    finished = Histogram((1, 2, 5))
    for value in (0.5, 1, 1.5, 5, 9):
        finished.add(value)
    assert finished.counts == [2, 1, 1, 1]
    assert finished.sum == 17


def test_tokens_and_finishes_are_counted_once(harness_of: Any) -> None:
    harness = harness_of(context=64)
    for prompt, params in (([1] * 20, GREEDY), ([2], GREEDY), ([3] * 60, replace(GREEDY))):
        harness.submit(prompt, params).wait()
    harness.engine.status()
    meter = harness.engine.stats
    assert meter.tokens == {"prompt": 81, "completion": 8 + 8 + 4}
    assert meter.finished[FinishReason.LENGTH] == 3
    assert sum(meter.ttft_s.counts) == 3
    assert sum(meter.itl_s.counts) == 7 + 7 + 3
    assert sum(meter.finished.values()) == 3


def test_a_cancelled_request_is_counted_as_cancelled(harness_of: Any) -> None:
    gate = Gate()
    harness = harness_of(gate=gate, sequences=1)
    first, second = harness.submit([1]), harness.submit([2])
    gate.arrival()
    harness.engine.cancel(second.request)
    gate.open()
    first.wait()
    second.wait()
    finished = harness.engine.stats.finished
    assert (finished[FinishReason.LENGTH], finished[FinishReason.CANCELLED]) == (1, 1)


class StatsRecorder:
    """Records interval statistics, and waits for a number of them."""

    def __init__(self) -> None:
        self.intervals: list[IntervalStats] = []
        self._changed = threading.Condition()

    def __call__(self, interval: IntervalStats) -> None:
        with self._changed:
            self.intervals.append(interval)
            self._changed.notify_all()

    def wait(self, count: int) -> list[IntervalStats]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.intervals) >= count, PATIENCE_S)
        return self.intervals


def test_request_stats_have_queue_prefill_and_decode_time(harness_of: Any) -> None:
    recorder = StatsRecorder()
    harness = harness_of()
    harness.engine.stats.on_request_stats = recorder
    harness.submit([1] * 20).wait()
    (interval,) = recorder.wait(1)
    assert (interval.prompt_tokens, interval.generated_tokens) == (20, 7)
    assert interval.prefill_s > 0 and interval.decode_s > 0 and interval.queue_s >= 0
    assert interval.tokens_per_s == pytest.approx(7 / interval.decode_s)
    for word in ("tok/s", "hit 1.000", "MB/token", "prefill", "20 tokens"):
        assert word in interval.line()


def test_link_utilization_is_printed_with_its_fetch_time() -> None:
    interval = IntervalStats(0.0, 0.1, 2.0, 10, 200, 0.85, 272.0, 0.5)
    assert "100.0 tok/s, hit 0.850, 272.0 MB/token, link 0.50 (at least 5.0 ms" in interval.line()
    assert "link" not in replace(interval, link_utilization=0.0).line()


def test_a_stats_callback_that_raises_is_removed(harness_of: Any) -> None:
    def broken(interval: IntervalStats) -> None:
        raise BrokenPipeError

    harness = harness_of()
    harness.engine.stats.on_request_stats = broken
    for _ in range(2):
        assert harness.submit([1]).wait().error is None
    harness.engine.status()
    assert harness.engine.stats.on_request_stats is None


def test_polling_between_tokens_changes_no_response(harness_of: Any) -> None:
    """Polling at every step, with several sequences, gives the same ids."""
    params = SamplingParams(temperature=1, seed=3, ignore_eos=True, max_tokens=30)
    all_ids = []
    for poll_s in (None, 0.0, 0.001):
        recorder = StatsRecorder()
        harness = harness_of()
        harness.engine.stats.poll_interval_s, harness.engine.stats.on_interval_stats = (
            poll_s,
            recorder,
        )
        responses = [harness.submit([n] * n, params) for n in (1, 5, 12)]
        for response in responses:
            response.wait()
        all_ids.append([response.ids for response in responses])
        harness.engine.status()
        assert (len(recorder.intervals) > 3) == (poll_s is not None)
        if poll_s == 0.0:
            assert sum(interval.generated_tokens for interval in recorder.intervals) == 90
    assert all_ids[0] == all_ids[1] == all_ids[2]


def test_per_request_stats_sum_to_the_counters() -> None:
    """On a real model with few slots, the requests' traffic is within the total."""
    engine = osmium.load(
        "synthetic:tiny", device="cpu", expert_slots=4, context=256, prefill_chunk=64
    )
    recorder = StatsRecorder()
    engine.stats.on_request_stats = recorder
    for _ in range(2):
        list(engine.generate(list(range(40)), GREEDY))
    interval = recorder.wait(2)
    before = engine.stats.experts
    assert before == engine.stats.update()
    engine.close()
    for harness in interval:
        assert 0 < harness.hit_rate < 1
        assert harness.mb_per_token > 0
        assert harness.link_utilization == 0, "the link rate is not measured"
    max_mb = before.experts_copied * engine.stats.expert_bytes / 1e6
    assert sum(harness.mb_per_token * harness.generated_tokens for harness in interval) < max_mb


def test_inconsistent_counters_are_logged_once(
    harness_of: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    harness: EngineHarness = harness_of()

    def raise_inconsistent() -> None:
        raise AssertionError("3 routed, but 1 hit and 1 fetched")

    monkeypatch.setattr(harness.engine.runner.expert_runner, "counters", raise_inconsistent)
    for _ in range(2):
        assert harness.submit([1]).wait().error is None
    harness.engine.run_on_engine_thread(lambda: None)
    assert caplog.text.count("3 routed") == 1
