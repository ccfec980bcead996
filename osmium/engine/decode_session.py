"""A decode session: decoding of one batch with sampling on the device.

See docs/decode-graphs.md.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from osmium.engine.control_tables import ControlTables
from osmium.engine.request import Request
from osmium.engine.sampler import uniform

if TYPE_CHECKING:
    from osmium.engine.runner import ModelRunner

__all__ = ["MAX_STEPS_IN_FLIGHT", "DecodeSession"]

MAX_STEPS_IN_FLIGHT = 8
"""Steps that the token ring holds; fewer than this many may be in flight."""

STALL_SECONDS = 2.0
"""Seconds without a token after which the host synchronises, to get the device's error."""


class DecodeSession:
    """Decoding of one batch with sampling on the device: steps launched and tokens received.

    Each request is one row.  The device ends a row at an end-of-sequence token or at its last
    token.  A step with token masks has two parts: the model, then sampling, which needs the masks.
    The next step's model is launched before this step's token is known.
    """

    def __init__(
        self,
        runner: "ModelRunner",
        requests: list[Request],
        replay: Callable[[], None],
        sample: Callable[[], None] | None = None,
        tables: ControlTables | None = None,
    ) -> None:
        """`replay` launches a step, or only its model if `sample` launches its second part.
        `tables` are those of a step with controls."""
        self.requests = requests
        self.launched = self.received = 0
        self.replay = replay
        """Launches one step; `launch` first writes its uniforms and page table entries."""
        self.lookahead = (
            runner.lookahead_steps if sample is None else min(1, runner.lookahead_steps)
        )
        """Steps to launch before the host has the previous token."""
        self._sample, self._tables = sample, tables
        self._sampled = 0
        """Steps whose second part is launched, in a session with token masks."""
        self._runner = runner
        rows, view = len(requests), runner.ops.host_view
        self._uniforms = (
            view(runner.decode_state.uniforms)
            .reshape(-1)[: MAX_STEPS_IN_FLIGHT * rows]
            .reshape(MAX_STEPS_IN_FLIGHT, rows)
        )
        self._token_ring = view(runner.decode_state.token_ring)
        self._pages_written = [len(request.pages) for request in requests]
        self._typical_wait_s = 0.0

    @property
    def in_flight(self) -> int:
        """Steps launched whose tokens have not been received."""
        return self.launched - self.received

    def launch(self) -> None:
        """Launch one step.  Every request must have a page for it.

        In a session with token masks, every token but the last step's must have been received.
        """
        self._launch_sampling()
        for row, request in enumerate(self.requests):
            for entry in range(self._pages_written[row], len(request.pages)):
                self._runner.set_page(row, entry, request.pages[entry])
            self._pages_written[row] = len(request.pages)
            index = request.completion_tokens + self.in_flight
            self._uniforms[self.launched % MAX_STEPS_IN_FLIGHT, row] = uniform(request, index)
        self.replay()
        self.launched += 1

    def _launch_sampling(self) -> None:
        """Launch the second part of the last step, if it has one that is not launched."""
        if self._sample is None or self._sampled == self.launched:
            return
        assert self._tables is not None and self.received == self._sampled
        self._tables.fill_masks()
        self._sample()
        self._sampled += 1

    def wait_tokens(self) -> list[int]:
        """Wait for the oldest step in flight; returns one token per row.

        -1: the largest logit is not finite.  -2: the row had ended before.
        Raises: CudaError where the device has failed.
        """
        if self._sampled == self.received:
            self._launch_sampling()
        start = time.perf_counter()
        if self._typical_wait_s > 1e-3 and self._token_ring[0] <= self.received:
            time.sleep(0.7 * self._typical_wait_s)
        while self._token_ring[0] <= self.received:
            time.sleep(0)  # let other threads run
            if time.perf_counter() - start > STALL_SECONDS:
                self._runner.ops.synchronize()
                assert self._token_ring[0] > self.received, "the device is idle, but wrote no token"
        waited = time.perf_counter() - start
        self._typical_wait_s = (
            waited if not self.received else min(waited, 0.5 * (self._typical_wait_s + waited))
        )
        rows = len(self.requests)
        at = 1 + self.received % MAX_STEPS_IN_FLIGHT * rows
        self.received += 1
        tokens: list[int] = self._token_ring[at : at + rows].tolist()
        if self._tables is not None:
            for row, token in enumerate(tokens):
                if token != -2:
                    self._tables.count_step(row)
        return tokens

    def logprobs(self, row: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
        """Log-probability of a row's last received token, and the likeliest alternatives."""
        return (None, ()) if self._tables is None else self._tables.logprobs(self.received - 1, row)
