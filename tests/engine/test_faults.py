"""Faults while replies run: who is told what, and that the next request finds everything in order.

Cancelling, full contexts and lost devices one by one are in test_engine.py; here they meet.
"""

import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from typing import Any

import pytest

from osmium.engine.request import FinishReason, SamplingParams
from osmium.engine.watchdog import Watchdog
from osmium.errors import EngineStopped
from osmium.weights import DEMO
from tests.engine.fakes import GREEDY, PATIENCE_S, Bench, Gate, always, follow, scrambled

LONG = SamplingParams(temperature=0, ignore_eos=True, max_tokens=4000)

GIB = 1 << 30

needs_demo = pytest.mark.skipif(not DEMO.is_file(), reason="the demo model is not here")


def test_one_of_several_is_cancelled_between_tokens_and_the_others_do_not_notice(
    bench: Any,
) -> None:
    """Its pages and its slot are another's at once, and nobody's reply changes."""
    gate = Gate()
    one: Bench = bench(gate=gate, context=64, sequences=2)
    first, second = one.ask([1] * 3, replace(GREEDY, max_tokens=30)), one.ask([2] * 5, LONG)
    third = one.ask([3] * 4)
    gate.let(6)
    gate.arrival()  # both are speaking, a step of both is on its way
    one.engine.cancel(second.request)
    gate.open()
    assert second.wait().reason is FinishReason.CANCELLED
    assert second.ids == follow(scrambled, [2] * 5, len(second.ids))
    assert first.wait().reason is third.wait().reason is FinishReason.LENGTH
    assert first.ids == follow(scrambled, [1] * 3, 30)
    assert third.ids == follow(scrambled, [3] * 4, 8)


def test_contexts_that_fill_up_side_by_side_end_with_length_and_make_room(bench: Any) -> None:
    """Three want the whole context each, and there are pages for one and a half."""
    one: Bench = bench(context=64, page=4, pages=24, sequences=3)
    replies = [one.ask([n] * (n * 9), LONG) for n in (1, 2, 3)]
    for n, reply in zip((1, 2, 3), replies, strict=True):
        finish = reply.wait()
        assert finish.reason is FinishReason.LENGTH and finish.error is None
        assert len(reply.ids) == 64 - 9 * n == finish.completion_tokens
        assert reply.ids == follow(scrambled, [n] * (n * 9), len(reply.ids))
    assert one.ask([9]).wait().error is None


def test_a_watchdog_that_fires_tells_everybody_and_the_thread_ends(bench: Any) -> None:
    """One is speaking, one is being read, one waits."""
    left, gate = [64 * GIB], Gate()
    one: Bench = bench(always(7), gate=gate, context=256, sequences=2)
    stopped = threading.Event()
    one.engine.on_stopped = stopped.set
    replies = [one.ask([1], LONG), one.ask([2] * 90, LONG), one.ask([3], LONG)]
    gate.let(4)
    watchdog = Watchdog(one.engine.stop, GIB, lambda: left[0], period=0.002)
    left[0] = GIB // 4
    end = time.monotonic() + PATIENCE_S
    while one.engine._stop_reason is None:
        assert time.monotonic() < end, "nobody barked"
        time.sleep(0.001)
    gate.open()
    for reply in replies:
        finish = reply.wait()
        assert finish.reason is FinishReason.ERROR
        assert isinstance(finish.error, EngineStopped)
        assert "0.25 GiB" in str(finish.error) and "--min-free-ram" in str(finish.error)
    assert stopped.wait(PATIENCE_S)
    with pytest.raises(EngineStopped, match=r"0\.25 GiB"):
        one.ask([1])
    assert one.engine.failure is not None
    assert one.engine.stats.finished[FinishReason.ERROR] == 3
    watchdog.close()


SERVER = """
import sys, threading
from osmium import loader
from osmium.cli import main

real, fired = loader.Watchdog, threading.Event()

def watchdog(stop, floor, available):
    return real(stop, 1 << 30, lambda: 1 << 28 if fired.is_set() else 1 << 40, period=0.01)

loader.Watchdog = watchdog
threading.Thread(target=lambda: (sys.stdin.readline(), fired.set()), daemon=True).start()
sys.exit(main(["serve", "--device", "cpu", "--port", "0", "--timing"]))
"""


@needs_demo
def test_a_server_short_of_memory_ends_its_streams_with_an_error_and_leaves() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert child.stdin is not None and child.stderr is not None
        told: list[str] = []
        while "/v1" not in (told[-1] if told else ""):
            told.append(child.stderr.readline())
            assert told[-1], told
        url = told[-1].split()[-1]
        assert any("in all" in line for line in told), "the memory plan is printed at start"
        body = b'{"prompt": "The", "max_tokens": 3000, "stream": true, "ignore_eos": true}'
        request = urllib.request.Request(
            f"{url}/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            lines = [answer.readline() for _ in range(6)]
            assert all(b"error" not in line for line in lines)
            child.stdin.write("\n")
            child.stdin.flush()
            rest = answer.read()
        assert b'"error"' in rest and b"Available host memory is 0.25 GiB" in rest
        assert b"[DONE]" not in rest
        assert child.wait(PATIENCE_S) == 1
        last = child.stderr.read().splitlines()[-1]
        assert last.startswith("osmium: ") and "0.25 GiB" in last
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stderr):
            if pipe is not None:
                pipe.close()
