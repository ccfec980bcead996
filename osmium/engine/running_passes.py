"""The prefill passes that have begun, and when decode steps run between their parts."""

import time
from collections.abc import Callable

from osmium.engine.prefill import PrefillPass
from osmium.engine.request import Request
from osmium.engine.runner import ModelRunner
from osmium.engine.scheduler import Batch
from osmium.models.prefill import short_pass_tokens
from osmium.ops.grouped import MAX_QUEUE_DEPTH

__all__ = ["RunningPasses"]

LONG_PART_S = 0.004
"""Parts that take longer are queued two at a time, so that a decode step does not wait for more."""

START_GAP = 0.5
"""Fraction of the longest gap after which a decode step runs while no part has been timed."""


class RunningPasses:
    """One prefill pass, and a short one that runs while it waits between two layers."""

    def __init__(self, runner: ModelRunner, decode_gap_s: float) -> None:
        """`decode_gap_s`: the longest time between two tokens of a running response."""
        self._runner, self._decode_gap_s = runner, decode_gap_s
        self._passes: list[PrefillPass] = []
        """The last one runs."""
        self._part_s = 0.0
        """Time of a part, a running mean."""
        self._decode_s = 0.0
        """Time of the last decode step between two parts."""
        self.last_decode = 0.0
        """time.perf_counter at the last decode step's token."""
        self._parts_since_decode = 0
        self._waited_s = self._ran_s = 0.0
        """How long the longer pass waited for the last short one, and ran since then."""

    def __bool__(self) -> bool:
        return bool(self._passes)

    @property
    def requests(self) -> list[Request]:
        """The requests of all passes."""
        return [request for one in self._passes for request, _ in one.batch.scheduled]

    @property
    def short_tokens(self) -> int:
        """Most tokens of a pass that may begin now beside a running one; 0: none may.

        The longer pass runs at least as long as short ones have kept it waiting.
        """
        most = short_pass_tokens(self._runner.max_pass_tokens)
        if len(self._passes) != 1 or self._passes[0].tokens <= most:
            return 0
        may_wait = self._passes[0].is_between_layers and self._ran_s >= self._waited_s
        return most if may_wait else 0

    def decode_is_due(self) -> bool:
        """Whether a decode step must run now for its token to come within the longest gap.

        At least one part of a pass runs between two of them.
        """
        if not self._parts_since_decode:
            return False
        since = time.perf_counter() - self.last_decode
        if not self._part_s:
            return since >= START_GAP * self._decode_gap_s
        queued_s = (self._depth + 1) * self._part_s
        return since >= max(0.25 * self._decode_gap_s, 0.9 * self._decode_gap_s - queued_s
                            - 1.5 * self._decode_s)  # fmt: skip

    def decoded(self, seconds: float) -> None:
        """Note a decode step that ran between two parts."""
        self._decode_s, self.last_decode = seconds, time.perf_counter()
        self._parts_since_decode = 0

    def start(self, batch: Batch) -> None:
        """Begin a pass; it runs before one that has begun earlier."""
        runner = self._runner
        if self._passes:
            self._waited_s = self._ran_s = 0.0
        inputs = runner.prefill_inputs[len(self._passes)]
        self._passes.append(runner.start_prefill(batch, inputs))

    def advance(self) -> PrefillPass | None:
        """Run the next part of the pass that began last; returns it if that was all.

        Raises: the errors of the part.  `fail` then ends the pass.
        """
        start, running = time.perf_counter(), self._passes[-1]
        self._parts_since_decode += 1
        goes_on = running.advance()
        self._runner.ops.limit_queue(self._depth)
        seconds = time.perf_counter() - start
        self._part_s += 0.1 * (seconds - self._part_s) if self._part_s else seconds
        if len(self._passes) > 1:
            self._waited_s += seconds
        else:
            self._ran_s += seconds
        if goes_on:
            return None
        self._passes.pop()
        self._runner.finish_prefill(running)
        if self._passes:  # its experts have changed the cache
            self._runner.model.prefill_pass.invalidate()
        return running

    def fail(self) -> Batch:
        """End the pass that began last; returns its batch."""
        failed = self._passes.pop()
        failed.close()
        return failed.batch

    def end(self, runs: Callable[[Request], bool]) -> None:
        """End the passes of which no request runs any more, from the one that began last."""
        for one in reversed(self._passes.copy()):
            if not all(runs(request) for request, _ in one.batch.scheduled):
                self._passes.remove(one)
                one.close()

    @property
    def _depth(self) -> int:
        """Parts whose launches may be queued."""
        return 2 if self._part_s > LONG_PART_S else MAX_QUEUE_DEPTH
