"""Decode steps between the parts of a prefill pass, on a simulated GPU with a clock."""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from osmium.engine import running_passes
from osmium.engine.prefill import PrefillPass
from osmium.engine.request import Request, SamplingParams
from osmium.engine.running_passes import RunningPasses
from osmium.engine.scheduler import Batch

GAP_S, DECODE_S, LAUNCH_S = 0.1, 0.008, 0.0002
"""The longest gap, a decode step on the GPU, and the launches of a part on the host."""

LAYERS = 40

Parts = Sequence[float]
"""Seconds on the GPU of each part of a layer."""


class SimulatedGpu:
    """Runs parts one after another behind the host, like a stream; times are simulated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gap_s: float = GAP_S) -> None:
        self.now = self.idle_s = 0.0
        self.ends: list[float] = []
        """When the launches before each call of limit_queue end."""
        self.free_at = 0.0
        self.max_pass_tokens = 8192
        self.prefill_inputs = [None, None]
        self.ops = self
        self.model = SimpleNamespace(prefill_pass=SimpleNamespace(invalidate=lambda: None))
        self.layers: Callable[[int], Parts] = lambda layer: [0.001]
        self.passes = RunningPasses(cast(Any, self), gap_s)
        self.gaps: list[float] = []
        self.parts: list[int] = []
        """Parts between two decode steps."""
        monkeypatch.setattr(running_passes, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def limit_queue(self, depth: int) -> None:
        if len(self.ends) >= depth:
            self.now = max(self.now, self.ends[-depth])
        self.ends.append(self.free_at)

    def start_prefill(self, batch: Batch, inputs: None) -> PrefillPass:
        return PrefillPass(batch, cast(Any, inputs), self._run(self.layers), LAYERS)

    def finish_prefill(self, done: PrefillPass) -> None:
        pass

    def _run(self, parts_of: Callable[[int], Parts]) -> Iterator[int]:
        for layer in range(LAYERS):
            parts = parts_of(layer)
            for number, seconds in enumerate(parts, 1):
                self.now += LAUNCH_S
                self.idle_s += max(0.0, self.now - self.free_at) if self.free_at else 0.0
                self.free_at = max(self.now, self.free_at) + seconds
                yield layer + (number == len(parts))

    def start(self, tokens: int = 8192, computed: int = 0) -> None:
        request = Request([1] * (computed + tokens), SamplingParams(), lambda event: None, None, 0)
        request.num_computed_tokens = computed
        self.passes.start(Batch([(request, tokens)]))

    def read(self, decodes: bool = True, decode_s: float = DECODE_S) -> None:
        """Run all passes to their end beside a response, if it `decodes`."""
        last_token, parts = self.now, 0
        while self.passes:
            if decodes and self.passes.decode_is_due(last_token):
                start = self.now
                self.now = self.free_at = max(self.now, self.free_at) + decode_s
                self.passes.decoded(self.now - start, 1)
                self.gaps.append(self.now - last_token)
                self.parts.append(parts)
                last_token, parts = self.now, 0
            else:
                self.passes.advance()
                parts += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    return SimulatedGpu(monkeypatch)


@pytest.mark.parametrize("part_ms", [0.1, 0.5, 1, 3, 5, 10, 20, 25])
def test_no_gap_is_longer_than_the_limit_and_gaps_are_used(
    gpu: SimulatedGpu, part_ms: float
) -> None:
    gpu.passes.decoded(DECODE_S, 1)
    gpu.layers = lambda layer: [part_ms / 1e3] * max(20, int(25 / part_ms))
    for _ in range(2):
        gpu.start()
        gpu.read()
    assert max(gpu.gaps) <= GAP_S
    later = gpu.gaps[3:]
    assert sum(later) / len(later) >= 0.6 * GAP_S, "decode steps take the prompt's time"


def test_parts_of_several_kinds_are_planned_by_the_longest(gpu: SimulatedGpu) -> None:
    gpu.layers = lambda layer: [0.001] * 20 + [0.012] * 4
    for _ in range(3):
        gpu.start()
        gpu.read()
    assert max(gpu.gaps) <= GAP_S


def test_parts_that_become_three_times_longer_do_not_exceed_the_limit(gpu: SimulatedGpu) -> None:
    gpu.layers = lambda layer: [0.002 if layer < 20 else 0.006] * 20
    gpu.start()
    gpu.read()
    assert max(gpu.gaps) <= GAP_S


def test_a_longer_pass_after_short_ones_is_timed_anew(gpu: SimulatedGpu) -> None:
    gpu.layers = lambda layer: [0.0003] * 10
    gpu.start(tokens=64)
    gpu.read()
    gpu.layers = lambda layer: [0.03] * 10
    gpu.start()
    gpu.read()
    assert max(gpu.gaps) <= GAP_S


def test_a_later_pass_of_a_long_context_is_timed_anew(gpu: SimulatedGpu) -> None:
    gpu.layers = lambda layer: [0.001] * 10
    gpu.start()
    gpu.read()
    gpu.layers = lambda layer: [0.02] * 10
    gpu.start(computed=60_000)
    gpu.read()
    assert max(gpu.gaps) <= GAP_S


def test_parts_longer_than_the_limit_alternate_with_decode_steps(gpu: SimulatedGpu) -> None:
    gpu.layers = lambda layer: [0.3]
    gpu.start()
    gpu.read()
    assert gpu.parts[1:-1] == [1] * (len(gpu.parts) - 2) and gpu.parts[0] <= 2
    assert max(gpu.gaps[1:]) == pytest.approx(0.3 + DECODE_S, abs=0.001)


def test_slow_decode_steps_leave_a_part_between_two_of_them(gpu: SimulatedGpu) -> None:
    gpu.layers = lambda layer: [0.005] * 4
    gpu.start()
    gpu.read(decode_s=0.5)
    assert min(gpu.parts) == 1


def test_one_delay_of_the_host_does_not_slow_the_rest_of_a_prompt(gpu: SimulatedGpu) -> None:
    delays = iter([0.0] * 30 + [5.0] + [0.0] * 10_000)

    def layers(layer: int) -> Parts:
        gpu.now += next(delays)
        return [0.002] * 20

    gpu.layers = layers
    gpu.start()
    gpu.read()
    assert len(gpu.gaps) < 2 * LAYERS * 20 * 0.002 / GAP_S


def test_a_first_slow_decode_step_is_not_remembered(gpu: SimulatedGpu) -> None:
    gpu.passes.decoded(5.0, 1)  # a captured graph
    gpu.layers = lambda layer: [0.002] * 20
    for _ in range(2):
        gpu.start()
        gpu.read()
    assert max(gpu.gaps) <= GAP_S and min(gpu.parts[len(gpu.parts) // 2 :]) > 10


@pytest.mark.parametrize("decodes", [False, True])
@pytest.mark.parametrize("part_ms", [0.5, 2, 20])
def test_the_gpu_is_never_idle_between_parts(
    gpu: SimulatedGpu, part_ms: float, decodes: bool
) -> None:
    gpu.layers = lambda layer: [part_ms / 1e3] * 20
    gpu.start()
    gpu.read(decodes)
    allowed = 2 * LAUNCH_S * (1 + len(gpu.gaps))  # at the start and after each decode step
    assert gpu.idle_s <= allowed


def test_the_time_of_a_long_pass_between_two_short_ones_is_that_of_a_short_one(
    gpu: SimulatedGpu,
) -> None:
    gpu.layers = lambda layer: [0.001] * 20
    gpu.start()
    gpu.passes.advance()
    shorts, waits, ran = 0, 0.0, 0.0
    began = gpu.now
    while gpu.passes:
        before, short = gpu.now, len(gpu.passes.requests) > 1
        if gpu.passes.short_tokens:
            gpu.layers = lambda layer: [0.0005]
            gpu.start(tokens=64)
            gpu.layers = lambda layer: [0.001] * 20
            shorts += 1
        gpu.passes.advance()
        if short:
            waits += gpu.now - before
        else:
            ran += gpu.now - before
    assert shorts >= 3, "short prompts are read before the long one ends"
    assert waits <= ran + 0.05
    assert gpu.now - began <= 2.2 * LAYERS * 20 * 0.001


def test_no_short_pass_begins_beside_a_short_pass_or_two_others(gpu: SimulatedGpu) -> None:
    gpu.start(tokens=1024)
    assert gpu.passes.short_tokens == 0, "the running pass is short"
    while gpu.passes:
        gpu.passes.advance()
    gpu.start(tokens=1025)
    gpu.passes.advance()
    assert gpu.passes.short_tokens == 1024
    gpu.start(tokens=64)
    assert gpu.passes.short_tokens == 0, "two passes run"


def test_a_short_pass_begins_only_between_two_layers(gpu: SimulatedGpu) -> None:
    gpu.layers = lambda layer: [0.001] * 3
    gpu.start()
    seen = []
    for _ in range(6):
        gpu.passes.advance()
        seen.append(gpu.passes.short_tokens > 0)
    assert seen == [False, False, True] * 2
