"""When layers get other numbers of expert slots: while nobody asks, after so many tokens.

Knows when; by what heat, and how, is ModelRunner.rebalance_slots's.
"""

import logging
import time

from osmium.engine.runner import ModelRunner
from osmium.engine.stats import EngineStats
from osmium.experts.usage import FIRST_REBALANCE_TOKENS

__all__ = ["SlotRebalancer"]

LOG = logging.getLogger("osmium.sharing")


class SlotRebalancer:
    """Of one engine, on its thread.

    Layers are alike at a model's first start, and their heat says little at first: it is asked
    after FIRST tokens, and then whenever there are twice as many as the last time.
    """

    def __init__(self, runner: ModelRunner, meter: EngineStats) -> None:
        self._runner, self._meter = runner, meter
        self.due = FIRST_REBALANCE_TOKENS
        """Tokens, of prompts and replies, that are waited for."""

    def idle(self) -> None:
        """Nobody runs, waits or asks.  Somebody who asks now waits until this is done.
        Raises: CudaError, KernelError."""
        tokens, store = sum(self._meter.tokens.values()), self._runner.store
        if tokens < self.due or store.recorder is not None:
            return
        self.due, start = 2 * tokens, time.perf_counter()
        count = self._runner.rebalance_slots()
        if count:
            each = [layer.shape[0] for layer in store.cache.slots]
            LOG.info(
                "Moved expert slots between layers by usage: %d to %d per layer, "
                "%d experts copied in %.2f s",
                min(each), max(each), count, time.perf_counter() - start,
            )  # fmt: skip
