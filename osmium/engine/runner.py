"""From a batch to logits, or to replies: builds the step, runs the model, brings back what counts.

Owns the arrays that a step is described in; they are one block on the device, written by one copy.
While nothing but replies is wanted the device goes from token to token by itself (`begin`), and the
host only launches one recorded step a token and reads the mail.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.engine.request import Request
from osmium.engine.sampler import chance
from osmium.engine.scheduler import Batch
from osmium.experts.cache import cut, empty
from osmium.experts.heat import heat_of, new_quotas, restore
from osmium.experts.store import Store
from osmium.models.qwen3_5_moe import Model
from osmium.models.state import State
from osmium.ops import Ops, Replies, Step

__all__ = ["LOGIT_ROWS", "Reply", "Runner", "runner_bytes"]

LOGIT_ROWS = 16
"""Rows of logits computed at a time: 16 MB at a vocabulary of 248 k."""

RING = 8
"""Steps of a reply that may be on their way at once, and one more."""

NO_LIMIT = 1 << 30

PATIENCE = 2.0
"""Seconds without mail after which the host asks whether the device still works."""


def runner_bytes(vocab: int, rows: int, sequences: int, table: int) -> int:
    """Bytes of the runner's own arrays."""
    replies = sequences * 7 + 16
    scratch = sum(
        math.prod(shape) * np.dtype(dtype).itemsize
        for shape, dtype in Replies.scratch(min(sequences, rows, LOGIT_ROWS), vocab).values()
    )
    return 4 * (_integers(rows, sequences, table) + LOGIT_ROWS * vocab + replies) + scratch


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
        ahead: int = 0,
    ) -> None:
        """Steps have at most the model's rows, of `sequences` sequences of `table` pages each.

        The state has a slot and a page more than sequences may use, for rows that have ended.
        `ahead` steps of a reply are launched before their predecessor's token is seen.
        Raises: OutOfMemory.
        """
        assert 0 <= ahead < RING
        self.ops, self.model, self.store, self.state = ops, model, store, state
        rows = model.rows
        self.rows, self.sequences, self.table, self.ahead = rows, sequences, table, ahead
        self._block = ops.empty((_integers(rows, sequences, table),), np.int32)
        self._host = np.zeros(_integers(rows, sequences, table), np.int32)
        self._there, self._here = self._views(self._block), self._views(self._host)
        self._logits = ops.empty((LOGIT_ROWS, model.config.vocab_size), np.float32)
        self.replies = self._make_replies(min(sequences, rows, LOGIT_ROWS))
        self._replays: dict[tuple[str, int], Callable[[], None]] = {}
        """Steps of one row a sequence, by what they do and how many rows: they differ in nothing
        but the block."""
        self._warm: set[tuple[str, int]] = set()
        self._prepared = False
        self._ready = 0
        """Rows, from the first, whose logits are in `_logits`."""

    def _make_replies(self, rows: int) -> Replies:
        ops, eos = self.ops, self.model.config.eos_token_ids
        return Replies(
            ring=RING,
            nobody=self.state.slots - 1,
            nowhere=self.state.pages - 1,
            settings=ops.empty((rows, 4), np.float32),
            chance=ops.mailbox((RING, rows), np.float64),
            token=ops.empty((rows,), np.int32),
            left=ops.empty((rows,), np.int32),
            heed=ops.empty((rows,), np.int32),
            eos=ops.put(np.array(eos or (-9,), np.int32)),  # -9: no token
            turn=ops.empty((1,), np.int32),
            mail=ops.mailbox((1 + RING * rows,), np.int32),
            **{
                name: ops.empty(shape, dtype)
                for name, (shape, dtype) in Replies.scratch(
                    rows, self.model.config.vocab_size
                ).items()
            },
        )

    def prepare(self) -> None:
        """Record a token of a reply for every number of sequences, before anyone is served.  The
        expert cache is left as if nobody had used it, but for what is in its slots."""
        for rows in range(1, self.replies.token.shape[0] + 1):
            views = self._here
            for name in ("ids", "positions", "past"):
                views[name][:rows] = 0
            views["wanted"][:rows] = views["sequence"][:rows] = np.arange(rows)
            views["starts"][: rows + 1] = np.arange(rows + 1)
            views["slots"][:rows] = self.replies.nobody
            views["pages"][:] = self.replies.nowhere
            self.ops.copy_in(self._block, self._host)
            for array in (self.replies.left, self.replies.heed, self.replies.turn):
                self.ops.fill(array, 0)
            self.ops.fill(self.replies.settings, 0)
            for _ in range(2):  # launched, then recorded and replayed
                self._reply(rows, self._cut(rows, rows))()
            self.ops.synchronize()
        cache = self.store.cache
        for array in (cache.heat, cache.long_heat, cache.stamp, cache.step, cache.counters):
            self.ops.fill(array, 0)
        self._prepared = True

    def share(self) -> int:
        """Share expert slots out among layers by the heat so far (heat.quotas), and fill them with
        the hottest; how many experts were copied.  0, and nothing is changed, where the slots are
        to stay as they are.  No reply may be on its way.

        Nothing is allocated: the same memory is cut anew.  But recorded steps have the addresses of
        slots in them, so that they are recorded again where they were beforehand.
        """
        ops, store = self.ops, self.store
        if store.arena is None:
            return 0
        heat = heat_of(ops, store.cache)  # and all is done that was launched
        each = new_quotas(heat, [layer.shape[0] for layer in store.cache.slots], store.top_k)
        if each is None:
            return 0
        counters = ops.copy_out(store.cache.counters)
        store.take(cut(store.cache, each))
        empty(ops, store.cache)
        self._replays.clear()
        self._warm.clear()
        self._ready = 0
        if self._prepared:
            self.prepare()
        count = restore(ops, store.cache, store.arena, heat)
        ops.copy_in(store.cache.counters, counters)
        return count

    def forward(self, batch: Batch) -> None:
        """Compute the batch's pending tokens; their states are kept."""
        step = self._step(batch)
        self._ready = 0
        recorder = self.store.recorder
        if recorder is not None and any(request.computed == 0 for request, _ in batch.parts):
            recorder.prompt()
        rows = step.tokens
        if rows == step.sequences <= LOGIT_ROWS:
            out = self._logits[:rows]

            def run() -> None:
                self.model.forward(step, self.state)
                self.model.head(out)

            self._recorded(("logits", rows), run)()
            self._ready = rows
        else:
            self.model.forward(step, self.state)

    def _recorded(self, key: tuple[str, int], run: Callable[[], None]) -> Callable[[], None]:
        """`run`, launched the first time and recorded the second."""
        if self.store.recorder is not None:
            return run  # it waits at each layer
        if key in self._warm and key not in self._replays:
            self._replays[key] = self.ops.record(run)
        self._warm.add(key)
        return self._replays.get(key, run)

    def begin(self, batch: Batch) -> "Reply":
        """Decode from here on without the host: one pending token a sequence.  See Reply."""
        step, rows = self._step(batch), len(batch.parts)
        self._ready = 0
        settings = np.empty((rows, 4), np.float32)
        left, heed = np.empty(rows, np.int32), np.empty(rows, np.int32)
        for row, (request, _) in enumerate(batch.parts):
            params = request.params
            settings[row] = params.temperature, params.top_k, params.top_p, params.min_p
            left[row], heed[row] = min(request.left, NO_LIMIT), not params.ignore_eos
        replies = self.replies.first(rows)
        self.ops.copy_in(replies.settings, settings)
        self.ops.copy_in(replies.left, left)
        self.ops.copy_in(replies.heed, heed)
        self.ops.fill(replies.turn, 0)
        self.ops.host_view(self.replies.mail)[0] = 0
        return Reply(self, [request for request, _ in batch.parts], self._reply(rows, step))

    def _reply(self, rows: int, step: Step) -> Callable[[], None]:
        return self._recorded(("reply", rows), lambda: self._token(rows, step))

    def _token(self, rows: int, step: Step) -> None:
        replies = self.replies.first(rows)
        out = self._logits[:rows]
        self.model.forward(step, self.state)
        self.model.head(out)
        self.ops.sample(out, replies)
        self.ops.advance(step, replies)

    def one_token(self, rows: int) -> None:
        """Launch what `begin` records, for who looks at the launches."""
        self._token(rows, self._cut(rows, rows))

    def set_page(self, row: int, entry: int, page: int) -> None:
        """Entry `entry` of a row's page table, for the steps launched from now on."""
        at = row * self.table + entry
        self.ops.copy_in(self._there["pages"][at : at + 1], np.array([page], np.int32))

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
        views = self._here
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
        return self._cut(tokens, sequences)

    def _cut(self, tokens: int, sequences: int) -> Step:
        """The step that the block describes."""
        device = self._there
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


class Reply:
    """Replies on their way: steps launched, tokens taken.

    Rows are the requests of one batch.  Steps follow each other on the device, which ends a row by
    itself at an end token or at its last.
    """

    def __init__(self, runner: Runner, requests: list[Request], replay: Callable[[], None]) -> None:
        self.requests = requests
        self.launched = self.taken = 0
        self.replay = replay
        """Computes one more step on the device; `launch` sees to what it needs."""
        self._runner = runner
        rows, view = len(requests), runner.ops.host_view
        self._chance = view(runner.replies.chance).reshape(-1)[: RING * rows].reshape(RING, rows)
        self._mail = view(runner.replies.mail)
        self._pages = [len(request.pages) for request in requests]
        self._usual = 0.0

    @property
    def outstanding(self) -> int:
        """Steps whose tokens have not been taken."""
        return self.launched - self.taken

    def launch(self) -> None:
        """One more step.  Every row must have a page for it."""
        for row, request in enumerate(self.requests):
            for entry in range(self._pages[row], len(request.pages)):
                self._runner.set_page(row, entry, request.pages[entry])
            self._pages[row] = len(request.pages)
            index = request.completion_tokens + self.outstanding
            self._chance[self.launched % RING, row] = chance(request, index)
        self.replay()
        self.launched += 1

    def take(self) -> list[int]:
        """Wait for the oldest step: a token a row, -1 where none could be drawn, -2 where the row
        had ended before.  Raises: CudaError where the device has failed."""
        start = time.perf_counter()
        if self._usual > 1e-3 and self._mail[0] <= self.taken:
            time.sleep(0.7 * self._usual)
        while self._mail[0] <= self.taken:
            time.sleep(0)  # others may run
            if time.perf_counter() - start > PATIENCE:
                self._runner.ops.synchronize()
                assert self._mail[0] > self.taken, "the device is done, but no mail has come"
        waited = time.perf_counter() - start
        self._usual = waited if not self.taken else min(waited, 0.5 * (self._usual + waited))
        rows = len(self.requests)
        at = 1 + self.taken % RING * rows
        self.taken += 1
        return [int(one) for one in self._mail[at : at + rows]]
