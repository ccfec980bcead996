"""From a batch to logits: builds the step, runs the model, brings wanted rows back.

Owns the arrays that a step is described in; they are one block on the device, written by one copy.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.engine.scheduler import Batch
from osmium.experts.store import Store
from osmium.models.qwen3_5_moe import Model
from osmium.models.state import State
from osmium.ops import Ops, Step

__all__ = ["LOGIT_ROWS", "Runner", "runner_bytes"]

LOGIT_ROWS = 16
"""Rows of logits computed at a time: 16 MB at a vocabulary of 248 k."""


def runner_bytes(vocab: int, rows: int, sequences: int, table: int) -> int:
    """Bytes of the runner's own arrays."""
    return 4 * (_integers(rows, sequences, table) + LOGIT_ROWS * vocab)


def _integers(rows: int, sequences: int, table: int) -> int:
    return 4 * rows + 3 * sequences + 1 + sequences * table


class Runner:
    """A model, its state, and the description of one step."""

    def __init__(
        self,
        ops: Ops,
        model: Model,
        store: Store,
        state: State,
        sequences: int,
        table: int,
        recording: bool = False,
    ) -> None:
        """Steps have at most the model's rows, of `sequences` sequences of `table` pages each.

        With `recording` a decoded token becomes one graph; off until it has run on a GPU.
        Raises: OutOfMemory.
        """
        self.recording = recording
        self.ops, self.model, self.store, self.state = ops, model, store, state
        rows = model.rows
        self.rows, self.sequences, self.table = rows, sequences, table
        self._block = ops.empty((_integers(rows, sequences, table),), np.int32)
        self._host = np.zeros(_integers(rows, sequences, table), np.int32)
        self._there, self._here = self._views(self._block), self._views(self._host)
        self._logits = ops.empty((LOGIT_ROWS, model.config.vocab), np.float32)
        self._replays: dict[int, Callable[[], None]] = {}
        """Steps of one row a sequence, by how many: they differ in nothing but the block."""
        self._warm: set[int] = set()
        self._ready = 0
        """Rows, from the first, whose logits are in `_logits`."""

    def forward(self, batch: Batch) -> None:
        """Compute the batch's pending tokens; their states are kept."""
        step = self._step(batch)
        self._ready = 0
        recorder = self.store.recorder
        if recorder is not None and any(request.computed == 0 for request, _ in batch.parts):
            recorder.prompt()
        if step.tokens == step.sequences <= LOGIT_ROWS:
            self._decode(step)
        else:
            self.model.forward(step, self.state)

    def _decode(self, step: Step) -> None:
        """One row a sequence, logits included: launched once, then recorded, then replayed."""
        rows = step.tokens
        out, wanted = self._logits[:rows], self._there["wanted"][:rows]

        def run() -> None:
            self.model.forward(step, self.state)
            self.model.head(out, wanted)

        recordable = self.recording and self.store.recorder is None  # that one waits at each layer
        if recordable and rows in self._warm and rows not in self._replays:
            self._replays[rows] = self.ops.record(run)
        (self._replays.get(rows, run) if recordable else run)()
        self._warm.add(rows)
        self._ready = rows

    def logits(self, rows: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[np.float32]]:
        """The logits of some rows of the last step, in pieces f32 [<= LOGIT_ROWS, vocab]."""
        for start in range(0, len(rows), LOGIT_ROWS):
            piece = rows[start : start + LOGIT_ROWS]
            first, count = int(piece[0]), len(piece)
            if first + count <= self._ready and np.array_equal(piece - first, np.arange(count)):
                out = self._logits[first : first + count]
            else:
                out, wanted = self._logits[:count], self._there["wanted"][:count]
                self._ready = 0  # what was there is written over
                self.ops.copy_in(wanted, piece)
                self.model.head(out, wanted)
            yield self.ops.copy_out(out).astype(np.float32, copy=False)

    def _step(self, batch: Batch) -> Step:
        counts = [count for _, count in batch.parts]
        tokens, sequences = sum(counts), len(counts)
        assert tokens <= self.rows, f"{tokens} tokens in a step of at most {self.rows}"
        assert sequences <= self.sequences, f"{sequences} sequences, room for {self.sequences}"
        views, device = self._here, self._there
        row = 0
        views["starts"][0] = 0
        for s, (request, count) in enumerate(batch.parts):
            part, past = slice(row, row + count), request.computed
            views["wanted"][part] = np.arange(row, row + count)
            views["ids"][part] = request.tokens[past : past + count]
            views["positions"][part] = np.arange(past, past + count)
            views["sequence"][part] = s
            views["starts"][s + 1] = row + count
            views["past"][s] = past
            views["slots"][s] = request.slot
            pages = views["pages"][s * self.table : (s + 1) * self.table]
            pages[: len(request.pages)] = request.pages
            row += count
        self.ops.copy_in(self._block, self._host)
        table = device["pages"].reshape(self.sequences, self.table)
        return Step(
            tokens=tokens,
            sequences=sequences,
            page=self.state.page,
            ids=device["ids"][:tokens],
            positions=device["positions"][:tokens],
            sequence=device["sequence"][:tokens],
            starts=device["starts"][: sequences + 1],
            past=device["past"][:sequences],
            slots=device["slots"][:sequences],
            pages=table[:sequences],
        )

    def _views(self, block: Any) -> dict[str, Any]:
        """The parts of the block; rows of logits wanted are the fourth of `rows` integers."""
        n, s = self.rows, self.sequences
        at, views = 0, {}
        for name, size in (
            ("ids", n), ("positions", n), ("sequence", n), ("wanted", n),
            ("starts", s + 1), ("past", s), ("slots", s), ("pages", s * self.table),
        ):  # fmt: skip
            views[name] = block[at : at + size]
            at += size
        return views
