"""What the meter counts: every token and ending once, and who asked for what of the link."""

import threading
from dataclasses import replace
from typing import Any

import pytest

import osmium
from osmium.engine.request import FinishReason, SamplingParams
from osmium.engine.stats import Histogram, IntervalStats
from tests.engine.fakes import GREEDY, PATIENCE_S, Bench, Gate


def test_a_value_is_counted_at_the_first_edge_that_holds_it() -> None:
    found = Histogram((1, 2, 5))
    for value in (0.5, 1, 1.5, 5, 9):
        found.add(value)
    assert found.counts == [2, 1, 1, 1]
    assert found.sum == 17


def test_tokens_and_endings_are_counted_once(bench: Any) -> None:
    one = bench(context=64)
    for prompt, params in (([1] * 20, GREEDY), ([2], GREEDY), ([3] * 60, replace(GREEDY))):
        one.ask(prompt, params).wait()
    one.engine.status()
    meter = one.engine.stats
    assert meter.tokens == {"prompt": 81, "completion": 8 + 8 + 4}
    assert meter.finished[FinishReason.LENGTH] == 3
    assert sum(meter.ttft_s.counts) == 3
    assert sum(meter.itl_s.counts) == 7 + 7 + 3
    assert sum(meter.finished.values()) == 3


def test_a_cancelled_request_is_counted_as_such(bench: Any) -> None:
    gate = Gate()
    one = bench(gate=gate, sequences=1)
    first, second = one.ask([1]), one.ask([2])
    gate.arrival()
    one.engine.cancel(second.request)
    gate.open()
    first.wait()
    second.wait()
    found = one.engine.stats.finished
    assert (found[FinishReason.LENGTH], found[FinishReason.CANCELLED]) == (1, 1)


class Told:
    """What was told, and waiting for so much of it."""

    def __init__(self) -> None:
        self.took: list[IntervalStats] = []
        self._some = threading.Condition()

    def __call__(self, took: IntervalStats) -> None:
        with self._some:
            self.took.append(took)
            self._some.notify_all()

    def wait(self, count: int) -> list[IntervalStats]:
        with self._some:
            assert self._some.wait_for(lambda: len(self.took) >= count, PATIENCE_S)
        return self.took


def test_a_reply_is_told_with_its_stages(bench: Any) -> None:
    told = Told()
    one = bench()
    one.engine.stats.on_request_stats = told
    one.ask([1] * 20).wait()
    (took,) = told.wait(1)
    assert (took.prompt_tokens, took.generated_tokens) == (20, 7)
    assert took.prefill_s > 0 and took.decode_s > 0 and took.queue_s >= 0
    assert took.tokens_per_s == pytest.approx(7 / took.decode_s)
    for word in ("tok/s", "hit 1.000", "MB/token", "prefill", "20 tokens"):
        assert word in took.line()


def test_a_share_of_the_link_comes_with_the_time_that_fetching_takes() -> None:
    took = IntervalStats(0.0, 0.1, 2.0, 10, 200, 0.85, 272.0, 0.5)
    assert "100.0 tok/s, hit 0.850, 272.0 MB/token, link 0.50 (at least 5.0 ms" in took.line()
    assert "link" not in replace(took, link_utilization=0.0).line()


def test_who_cannot_be_told_stops_nobody(bench: Any) -> None:
    def broken(took: IntervalStats) -> None:
        raise BrokenPipeError

    one = bench()
    one.engine.stats.on_request_stats = broken
    for _ in range(2):
        assert one.ask([1]).wait().error is None
    one.engine.status()
    assert one.engine.stats.on_request_stats is None


def test_looks_between_tokens_change_no_reply(bench: Any) -> None:
    """Looking as often as can be, many sequences at once: the same ids."""
    params = SamplingParams(temperature=1, seed=3, ignore_eos=True, max_tokens=30)
    said = []
    for every in (None, 0.0, 0.001):
        told = Told()
        one = bench()
        one.engine.stats.poll_interval_s, one.engine.stats.on_interval_stats = every, told
        replies = [one.ask([n] * n, params) for n in (1, 5, 12)]
        for reply in replies:
            reply.wait()
        said.append([reply.ids for reply in replies])
        one.engine.status()
        assert (len(told.took) > 3) == (every is not None)
        if every == 0.0:
            assert sum(took.generated_tokens for took in told.took) == 90
    assert said[0] == said[1] == said[2]


def test_replies_say_what_they_fetched() -> None:
    """On a real model with few slots: the sums over replies are the counters' own."""
    engine = osmium.load(
        "synthetic:tiny", device="cpu", expert_slots=4, context=256, prefill_chunk=64
    )
    told = Told()
    engine.stats.on_request_stats = told
    for _ in range(2):
        list(engine.generate(list(range(40)), GREEDY))
    took = told.wait(2)
    before = engine.stats.experts
    assert before == engine.stats.update()
    engine.close()
    for one in took:
        assert 0 < one.hit_rate < 1
        assert one.mb_per_token > 0
        assert one.link_utilization == 0, "nobody has measured a link"
    most = before.experts_copied * engine.stats.expert_bytes / 1e6
    assert sum(one.mb_per_token * one.generated_tokens for one in took) < most


def test_counters_that_do_not_add_up_are_logged_once(
    bench: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one: Bench = bench()

    def wrong() -> None:
        raise AssertionError("3 routed, but 1 hit and 1 fetched")

    monkeypatch.setattr(one.engine.runner.expert_runner, "counters", wrong)
    for _ in range(2):
        assert one.ask([1]).wait().error is None
    one.engine.run_on_engine_thread(lambda: None)
    assert caplog.text.count("3 routed") == 1
