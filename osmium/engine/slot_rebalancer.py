"""When expert slots are moved between layers: while the engine is idle, after enough tokens.

ModelRunner.rebalance_slots does the move.
"""

import logging
import time

from osmium.engine.runner import ModelRunner
from osmium.engine.stats import EngineStats
from osmium.experts.usage import FIRST_REBALANCE_TOKENS

__all__ = ["SlotRebalancer"]

LOG = logging.getLogger("osmium.rebalancer")


class SlotRebalancer:
    """The rebalancing schedule of one engine; runs on its thread.

    At first all layers have the same number of slots, and few counts tell little.  Rebalancing is
    due after FIRST_REBALANCE_TOKENS tokens, and then each time their number has doubled.
    """

    def __init__(self, runner: ModelRunner, stats: EngineStats) -> None:
        self._runner, self._stats = runner, stats
        self.due_tokens = FIRST_REBALANCE_TOKENS
        """Prompt and generated tokens at which the next rebalancing is due."""

    def idle(self) -> None:
        """Rebalance if it is due; call it while no request runs or waits.

        Requests that arrive meanwhile wait.  Raises: CudaError, KernelError.
        """
        tokens, expert_runner = sum(self._stats.tokens.values()), self._runner.expert_runner
        if tokens < self.due_tokens or expert_runner.recorder is not None:
            return
        self.due_tokens, start = 2 * tokens, time.perf_counter()
        copied = self._runner.rebalance_slots()
        if copied:
            slots_per_layer = [layer.shape[0] for layer in expert_runner.cache.slots]
            LOG.info(
                "Moved expert slots between layers by usage: %d to %d per layer, "
                "%d experts copied in %.2f s",
                min(slots_per_layer), max(slots_per_layer), copied, time.perf_counter() - start,
            )  # fmt: skip
