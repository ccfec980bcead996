"""The memory watchdog: it fires once with the numbers, and ends every request."""

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

needs_demo = pytest.mark.skipif(not DEMO.is_file(), reason="the demo model is missing")


def test_the_watchdog_fires_once_when_memory_falls_below_the_floor() -> None:
    available = iter([4 * GIB, 2 * GIB, GIB, GIB // 2])
    reasons: list[str] = []
    fired = threading.Event()

    def stop(reason: str) -> None:
        reasons.append(reason)
        fired.set()

    watchdog = Watchdog(stop, GIB, lambda: next(available), period=0.001)
    assert fired.wait(5)
    watchdog.close()
    (reason,) = reasons
    assert "0.50 GiB" in reason and "1.00 GiB" in reason and "--min-free-ram" in reason


def test_the_watchdog_does_not_fire_above_the_floor_or_after_close() -> None:
    reasons: list[str] = []
    available = [2 * GIB]
    watchdog = Watchdog(reasons.append, GIB, lambda: available[0], period=0.001)
    time.sleep(0.03)
    watchdog.close()
    available[0] = 0
    time.sleep(0.03)
    assert reasons == []


def test_the_floor_is_half_a_percent_and_at_least_half_a_gib() -> None:
    assert default_min_free_ram(8 * GIB) == GIB // 2
    assert default_min_free_ram(400 * GIB) == 2 * GIB


@needs_demo
def test_running_and_later_requests_raise_its_reason() -> None:
    engine = osmium.load(DEMO, "cpu")
    available = [64 * GIB]
    watchdog = Watchdog(engine.stop, GIB, lambda: available[0], period=0.005)
    tokens = engine.generate([5, 6, 7], SamplingParams(temperature=0, ignore_eos=True))
    with pytest.raises(EngineStopped, match=r"0\.25 GiB"):
        for i, _ in enumerate(tokens):
            if i == 3:
                available[0] = GIB // 4
    with pytest.raises(EngineStopped, match=r"0\.25 GiB"):
        engine.generate([5], SamplingParams())
    assert engine.failure is not None
    watchdog.close()
    engine.close()


@needs_demo
def test_closing_an_engine_is_not_a_failure() -> None:
    engine = osmium.load(DEMO, "cpu")
    engine.close()
    assert engine.failure is None and engine.stopped is not None


@needs_demo
def test_the_server_exits_with_the_reason() -> None:
    command = [sys.executable, "-m", "osmium", "serve", "--device", "cpu", "--port", "0"]
    done = subprocess.run(
        [*command, "--min-free-ram", "900T"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "Available host memory is" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_value_that_cannot_be_read_is_read_again() -> None:
    """Without file descriptors /proc/meminfo cannot be opened."""
    values: list[int | OSError] = [OSError(24, "Too many open files"), 2 * GIB, OSError(24, ""), 1]
    reasons: list[str] = []

    def available() -> int:
        value = values.pop(0)
        if isinstance(value, OSError):
            raise value
        return value

    watchdog = Watchdog(reasons.append, GIB, available, period=0.001)
    watchdog._thread.join(10)
    watchdog.close()
    assert len(reasons) == 1 and not values
