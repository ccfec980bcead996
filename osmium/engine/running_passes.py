"""The prefill passes that have begun, and when decode steps run between their parts.

docs/architecture.md explains parts, lanes and the longest gap.
"""

import math
import time
from collections.abc import Callable

from osmium.engine.prefill import PrefillPass
from osmium.engine.request import Request
from osmium.engine.runner import ModelRunner
from osmium.engine.scheduler import Batch
from osmium.engine.teacher_forcing import score_prompts
from osmium.models.prefill import short_pass_tokens
from osmium.ops.grouped import MAX_QUEUE_DEPTH

__all__ = ["RunningPasses"]

QUEUED_S = 0.004
"""Time of the parts that are queued, though always two or more: a decode step waits for them."""

GAP_MARGIN = 0.85
"""Fraction of the longest gap within which the next token is planned."""

START_GAP = 0.5
"""Fraction of the longest gap after which a decode step runs while no part has been timed."""

PART_DECAY = 0.98
"""Factor per timed part of the remembered time of a part, which is a decaying maximum."""

MAX_PART_GROWTH = 4.0
"""Most that one part raises the remembered time, so that one delay of the host counts little."""


class RunningPasses:
    """One prefill pass, and a short one that runs while it waits between two layers."""

    def __init__(self, runner: ModelRunner, decode_gap_s: float) -> None:
        """`decode_gap_s`: the longest time between two tokens of a running response."""
        self._runner, self.decode_gap_s = runner, decode_gap_s
        self._passes: list[PrefillPass] = []
        """The last one runs."""
        self._part_s: dict[tuple[int, int], float] = {}
        """Time of a part, for each size of passes."""
        self._last_part_s = 0.0
        """Time of the part that was timed last."""
        self._decode_s: float | None = None
        """Time of a decode step."""
        self._parts_since_decode = 0
        self._queued = 0
        """Most parts whose launches may not have ended."""
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

    # -- decode steps ------------------------------------------------------------------------------

    def decode_is_due(self, last_token: float) -> bool:
        """Whether a decode step must run now, as its token would come too late after another part.

        At least one part runs between two decode steps.

        last_token: time.perf_counter at the oldest last token of the running responses
        """
        if not self._parts_since_decode:
            return False
        since = time.perf_counter() - last_token
        if not self._part_time:
            return since >= START_GAP * self.decode_gap_s
        after_part_s = (self._queued + 1) * self._part_time + (self._decode_s or 0.0)
        return since + after_part_s > GAP_MARGIN * self.decode_gap_s

    def decoded(self, seconds: float, steps: int) -> None:
        """Note `steps` decode steps that took `seconds`, with the parts queued before them."""
        queued, self._queued = self._queued, 0
        self._parts_since_decode = 0
        if not steps:
            return
        if not queued:
            self._decode_s = seconds / steps
            return
        if self._passes:
            self._note_part((seconds - (self._decode_s or 0.0)) / queued)
        if self._decode_s is not None:  # it may have been long once, as a graph was captured
            self._decode_s = min(self._decode_s, seconds)

    # -- passes ------------------------------------------------------------------------------------

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
        depth = self._depth
        is_layer = running.advance()
        goes_on = is_layer or self._score(running)
        self._parts_since_decode += goes_on
        self._runner.ops.limit_queue(depth)
        seconds = time.perf_counter() - start
        if self._queued == (depth if is_layer else 0):  # the host has waited for one part
            self._note_part(seconds)
        if is_layer or not goes_on:
            self._queued = min(self._queued + is_layer, depth)
        else:  # logits are on the host
            self._queued = 0
        if len(self._passes) > 1:
            self._waited_s += seconds
        else:
            self._ran_s += seconds
        if goes_on:
            return None
        self._passes.pop()
        self._runner.finish_prefill(running)
        self.invalidate()  # a pass that waits: this one's experts have changed the cache
        return running

    def fail(self) -> Batch:
        """End the pass that began last; returns its batch."""
        failed = self._passes.pop()
        failed.close()
        return failed.batch

    def end(self, runs: Callable[[Request], bool]) -> None:
        """End the passes of which no request runs any more, from the one that began last.

        Requests of other passes that have ended must be preempted: their state is between tokens.
        """
        for one in reversed(self._passes.copy()):
            if not all(runs(request) for request, _ in one.batch.scheduled):
                self._passes.remove(one)
                one.close()

    def invalidate(self) -> None:
        """Note that something else may have changed the expert cache between two parts."""
        if self._passes:
            self._runner.model.prefill_pass.invalidate()

    def _score(self, running: PrefillPass) -> bool:
        """Score some tokens of prompts whose log-probabilities are requested; False: all are.

        The logits of a long prompt take long, so decode steps run between these parts too.
        """
        if running.scoring is None:
            running.scoring = score_prompts(self._runner, running.batch)
        self._runner.finish_prefill(running)  # another pass may have ended since the last part
        return next(running.scoring, None) is not None

    # -- times -------------------------------------------------------------------------------------

    @property
    def _part_time(self) -> float:
        """Seconds of a part of the pass that runs, or of the last one; 0: none was timed."""
        return self._part_s.get(self._passes[-1].size, 0.0) if self._passes else self._last_part_s

    def _note_part(self, seconds: float) -> None:
        size, known = self._passes[-1].size, self._part_time
        if known:
            seconds = max(min(seconds, MAX_PART_GROWTH * known), PART_DECAY * known)
        self._part_s[size] = self._last_part_s = max(0.0, seconds)

    @property
    def _depth(self) -> int:
        """Parts whose launches may be queued."""
        part_s = self._part_time
        if not part_s:
            return 1  # until a part is timed
        return max(2, min(MAX_QUEUE_DEPTH, 1 + math.ceil(QUEUED_S / part_s)))
