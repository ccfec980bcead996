"""Parts of a routing trace: each prompt of a benchmark replays tokens that none before it replayed.

Routing is replayed by position, modulo the trace's length.  So before each prompt the trace is
rotated in the device's memory.  Its address stays, and captured graphs stay valid.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.engine.engine import Engine

__all__ = ["TraceParts"]


class TraceParts:
    """The trace that an engine replays, if there is one."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._hosts: list[tuple[Any, npt.NDArray[np.uint16]]] = engine.run_on_engine_thread(
            self._read
        )
        self.tokens = len(self._hosts[0][1]) if self._hosts else 0
        """Tokens of the trace; 0 without one."""
        self.taken = 0
        """Tokens of all calls of `take`."""

    def _read(self) -> list[tuple[Any, npt.NDArray[np.uint16]]]:
        """Device and host arrays u16 [N, L, A] of ids and, if there are any, predictions."""
        runner = self._engine.runner
        traces = runner.expert_runner.trace, runner.expert_runner.predicted
        # Of the CPU backend the device array is itself in host memory.
        return [(one, np.array(runner.ops.copy_d2h(one))) for one in traces if one is not None]

    def take(self, position: int, tokens: int) -> int:
        """Let positions from `position` on replay the next `tokens` tokens of the trace.

        Returns how many of them no earlier call took; behind the end the trace starts anew.
        """
        if not self.tokens:
            return 0
        start, self.taken = self.taken, self.taken + tokens
        self._rotate(start - position)
        return max(0, min(tokens, self.tokens - start))

    def reset(self) -> None:
        """Let position p replay token p again, as before the first `take`."""
        if self.tokens:
            self._rotate(0)

    def _rotate(self, shift: int) -> None:
        ops = self._engine.runner.ops

        def copy() -> None:
            for device, host in self._hosts:
                ops.copy_h2d(device, np.roll(host, -shift, axis=0))
            ops.synchronize()

        self._engine.run_on_engine_thread(copy)
