"""The watchdog: it barks once, says how much is left, and everybody is told."""

import subprocess
import sys
import threading
import time

import pytest

import osmium
from osmium.engine.request import SamplingParams
from osmium.engine.watchdog import Watchdog, default_min_free_ram
from osmium.errors import EngineStopped
from osmium.weights import DEMO

GIB = 1 << 30

needs_demo = pytest.mark.skipif(not DEMO.is_file(), reason="the demo model is not here")


def test_it_stops_once_when_memory_falls_below_the_floor() -> None:
    left = iter([4 * GIB, 2 * GIB, GIB, GIB // 2])
    heard: list[str] = []
    barked = threading.Event()

    def stop(why: str) -> None:
        heard.append(why)
        barked.set()

    watchdog = Watchdog(stop, GIB, lambda: next(left), period=0.001)
    assert barked.wait(5)
    watchdog.close()
    (why,) = heard
    assert "0.50 GiB" in why and "1.00 GiB" in why and "--min-free-ram" in why


def test_it_says_nothing_while_there_is_enough_and_after_it_is_closed() -> None:
    heard: list[str] = []
    left = [2 * GIB]
    watchdog = Watchdog(heard.append, GIB, lambda: left[0], period=0.001)
    time.sleep(0.03)
    watchdog.close()
    left[0] = 0
    time.sleep(0.03)
    assert heard == []


def test_the_floor_is_half_a_percent_and_at_least_half_a_gib() -> None:
    assert default_min_free_ram(8 * GIB) == GIB // 2
    assert default_min_free_ram(400 * GIB) == 2 * GIB


@needs_demo
def test_running_and_later_requests_are_told_why() -> None:
    engine = osmium.load(DEMO, "cpu")
    left = [64 * GIB]
    watchdog = Watchdog(engine.stop, GIB, lambda: left[0], period=0.005)
    tokens = engine.generate([5, 6, 7], SamplingParams(temperature=0, ignore_eos=True))
    with pytest.raises(EngineStopped, match=r"0\.25 GiB"):
        for i, _ in enumerate(tokens):
            if i == 3:
                left[0] = GIB // 4
    with pytest.raises(EngineStopped, match=r"0\.25 GiB"):
        engine.generate([5], SamplingParams())
    assert engine.failure is not None
    watchdog.close()
    engine.close()


@needs_demo
def test_closing_is_no_failure() -> None:
    engine = osmium.load(DEMO, "cpu")
    engine.close()
    assert engine.failure is None and engine.stopped is not None


@needs_demo
def test_the_server_leaves_in_order_and_says_why() -> None:
    command = [sys.executable, "-m", "osmium", "serve", "--device", "cpu", "--port", "0"]
    done = subprocess.run(
        [*command, "--min-free-ram", "900T"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "Available host memory is" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
