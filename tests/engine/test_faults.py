"""Faults while several requests run; every later request must find a consistent engine.

test_engine.py covers cancellation, full contexts and lost devices one by one.
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
from tests.engine.fakes import GREEDY, PATIENCE_S, EngineHarness, Gate, always, follow, scrambled

LONG = SamplingParams(temperature=0, ignore_eos=True, max_tokens=4000)

GIB = 1 << 30

needs_demo = pytest.mark.skipif(not DEMO.is_file(), reason="the demo model is missing")


def test_cancelling_one_of_several_requests_does_not_change_the_others(
    harness_of: Any,
) -> None:
    """Another request gets its pages and slot immediately, and no response changes."""
    gate = Gate()
    harness: EngineHarness = harness_of(gate=gate, context=64, sequences=2)
    first, second = (
        harness.submit([1] * 3, replace(GREEDY, max_tokens=30)),
        harness.submit([2] * 5, LONG),
    )
    third = harness.submit([3] * 4)
    gate.pass_steps(6)
    gate.arrival()  # both decode; a step of both is launched
    harness.engine.cancel(second.request)
    gate.open()
    assert second.wait().reason is FinishReason.CANCELLED
    assert second.ids == follow(scrambled, [2] * 5, len(second.ids))
    assert first.wait().reason is third.wait().reason is FinishReason.LENGTH
    assert first.ids == follow(scrambled, [1] * 3, 30)
    assert third.ids == follow(scrambled, [3] * 4, 8)


def test_full_contexts_end_with_length_and_free_their_pages(harness_of: Any) -> None:
    """Three requests need a full context each; the pages suffice for one and a half."""
    harness: EngineHarness = harness_of(context=64, page=4, pages=24, sequences=3)
    responses = [harness.submit([n] * (n * 9), LONG) for n in (1, 2, 3)]
    for n, response in zip((1, 2, 3), responses, strict=True):
        finish = response.wait()
        assert finish.reason is FinishReason.LENGTH and finish.error is None
        assert len(response.ids) == 64 - 9 * n == finish.completion_tokens
        assert response.ids == follow(scrambled, [n] * (n * 9), len(response.ids))
    assert harness.submit([9]).wait().error is None


def test_a_watchdog_that_fires_ends_every_request_and_the_thread(harness_of: Any) -> None:
    """One request decodes, one is in prefill, one waits."""
    available, gate = [64 * GIB], Gate()
    harness: EngineHarness = harness_of(always(7), gate=gate, context=256, sequences=2)
    stopped = threading.Event()
    harness.engine.on_stopped = stopped.set
    responses = [
        harness.submit([1], LONG),
        harness.submit([2] * 90, LONG),
        harness.submit([3], LONG),
    ]
    gate.pass_steps(4)
    watchdog = Watchdog(harness.engine.stop, GIB, lambda: available[0], period=0.002)
    available[0] = GIB // 4
    end = time.monotonic() + PATIENCE_S
    while harness.engine._stop_reason is None:
        assert time.monotonic() < end, "the watchdog did not fire"
        time.sleep(0.001)
    gate.open()
    for response in responses:
        finish = response.wait()
        assert finish.reason is FinishReason.ERROR
        assert isinstance(finish.error, EngineStopped)
        assert "0.25 GiB" in str(finish.error) and "--min-free-ram" in str(finish.error)
    assert stopped.wait(PATIENCE_S)
    with pytest.raises(EngineStopped, match=r"0\.25 GiB"):
        harness.submit([1])
    assert harness.engine.failure is not None
    assert harness.engine.stats.finished[FinishReason.ERROR] == 3
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
def test_a_server_short_of_memory_ends_its_streams_with_an_error_and_exits() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert child.stdin is not None and child.stderr is not None
        log_lines: list[str] = []
        while "/v1" not in (log_lines[-1] if log_lines else ""):
            log_lines.append(child.stderr.readline())
            assert log_lines[-1], log_lines
        url = log_lines[-1].split()[-1]
        assert any("in all" in line for line in log_lines), "the memory plan is printed at start"
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
