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
from osmium.engine.sampler import uniform
from osmium.engine.scheduler import Batch
from osmium.experts.cache import reset_cache, resize_layers
from osmium.experts.runner import ExpertRunner
from osmium.experts.usage import rebalanced_slots, snapshot_usage, warm_cache
from osmium.models.qwen3_5_moe import Model
from osmium.models.state import ModelState
from osmium.ops import DecodeState, Ops, StepInputs

__all__ = ["LOGIT_ROWS", "DecodeSession", "ModelRunner", "runner_bytes"]

LOGIT_ROWS = 16
"""Rows of logits computed at a time: 16 MB at a vocabulary of 248 k."""

MAX_STEPS_IN_FLIGHT = 8
"""Steps of a reply that may be on their way at once, and one more."""

NO_LIMIT = 1 << 30

STALL_SECONDS = 2.0
"""Seconds without mail after which the host asks whether the device still works."""


def runner_bytes(vocab: int, rows: int, sequences: int, max_pages_per_seq: int) -> int:
    """Bytes of the runner's own arrays."""
    replies = sequences * 7 + 16
    scratch = sum(
        math.prod(shape) * np.dtype(dtype).itemsize
        for shape, dtype in DecodeState.scratch(min(sequences, rows, LOGIT_ROWS), vocab).values()
    )
    return (
        4 * (_integers(rows, sequences, max_pages_per_seq) + LOGIT_ROWS * vocab + replies) + scratch
    )


def _integers(rows: int, sequences: int, max_pages_per_seq: int) -> int:
    return 4 * rows + 3 * sequences + 1 + sequences * max_pages_per_seq


class ModelRunner:
    """A model, its state, and the description of one step."""

    def __init__(
        self,
        ops: Ops,
        model: Model,
        store: ExpertRunner,
        state: ModelState,
        sequences: int,
        max_pages_per_seq: int,
        lookahead_steps: int = 0,
    ) -> None:
        """Steps have at most the model's rows, of `sequences` sequences of `table` pages each.

        The state has a slot and a page more than sequences may use, for rows that have ended.
        `ahead` steps of a reply are launched before their predecessor's token is seen.
        Raises: OutOfMemory.
        """
        assert 0 <= lookahead_steps < MAX_STEPS_IN_FLIGHT
        self.ops, self.model, self.store, self.state = ops, model, store, state
        rows = model.rows
        self.rows, self.sequences, self.max_pages_per_seq, self.lookahead_steps = (
            rows,
            sequences,
            max_pages_per_seq,
            lookahead_steps,
        )
        self._block = ops.empty((_integers(rows, sequences, max_pages_per_seq),), np.int32)
        self._host = np.zeros(_integers(rows, sequences, max_pages_per_seq), np.int32)
        self._device_views, self._host_views = self._views(self._block), self._views(self._host)
        self._logits = ops.empty((LOGIT_ROWS, model.config.vocab_size), np.float32)
        self.replies = self._make_replies(min(sequences, rows, LOGIT_ROWS))
        self._replays: dict[tuple[str, int], Callable[[], None]] = {}
        """Steps of one row a sequence, by what they do and how many rows: they differ in nothing
        but the block."""
        self._warm: set[tuple[str, int]] = set()
        self._prepared = False
        self._ready = 0
        """Rows, from the first, whose logits are in `_logits`."""

    def _make_replies(self, rows: int) -> DecodeState:
        ops, eos = self.ops, self.model.config.eos_token_ids
        return DecodeState(
            ring_size=MAX_STEPS_IN_FLIGHT,
            null_slot=self.state.slots - 1,
            null_page=self.state.pages - 1,
            sampler_params=ops.empty((rows, 4), np.float32),
            uniforms=ops.zeros_mapped((MAX_STEPS_IN_FLIGHT, rows), np.float64),
            token=ops.empty((rows,), np.int32),
            tokens_left=ops.empty((rows,), np.int32),
            stop_on_eos=ops.empty((rows,), np.int32),
            eos=ops.to_device(np.array(eos or (-9,), np.int32)),  # -9: no token
            decode_step=ops.empty((1,), np.int32),
            token_ring=ops.zeros_mapped((1 + MAX_STEPS_IN_FLIGHT * rows,), np.int32),
            **{
                name: ops.empty(shape, dtype)
                for name, (shape, dtype) in DecodeState.scratch(
                    rows, self.model.config.vocab_size
                ).items()
            },
        )

    def capture_graphs(self) -> None:
        """Record a token of a reply for every number of sequences, before anyone is served.  The
        expert cache is left as if nobody had used it, but for what is in its slots."""
        for rows in range(1, self.replies.token.shape[0] + 1):
            views = self._host_views
            for name in ("ids", "positions", "past"):
                views[name][:rows] = 0
            views["wanted"][:rows] = views["sequence"][:rows] = np.arange(rows)
            views["starts"][: rows + 1] = np.arange(rows + 1)
            views["slots"][:rows] = self.replies.null_slot
            views["pages"][:] = self.replies.null_page
            self.ops.copy_h2d(self._block, self._host)
            for array in (
                self.replies.tokens_left,
                self.replies.stop_on_eos,
                self.replies.decode_step,
            ):
                self.ops.memset(array, 0)
            self.ops.memset(self.replies.sampler_params, 0)
            for _ in range(2):  # launched, then recorded and replayed
                self._reply(rows, self._step_views(rows, rows))()
            self.ops.synchronize()
        cache = self.store.cache
        for array in (
            cache.short_count,
            cache.long_count,
            cache.last_used,
            cache.step,
            cache.counters,
        ):
            self.ops.memset(array, 0)
        self._prepared = True

    def rebalance_slots(self) -> int:
        """Move expert slots between layers by usage (usage.slots_per_layer), and fill them with
        the most used experts.  Returns the number of experts copied; 0, and nothing changes, where
        the slots stay as they are.  No decode step may be in flight.

        Nothing is allocated: the same memory is divided anew.  Captured graphs hold the addresses
        of slots, so they are captured again where they existed.
        """
        ops, store = self.ops, self.store
        if store.host_experts is None:
            return 0
        heat = snapshot_usage(ops, store.cache)  # and all is done that was launched
        each = rebalanced_slots(heat, [layer.shape[0] for layer in store.cache.slots], store.top_k)
        if each is None:
            return 0
        counters = ops.copy_d2h(store.cache.counters)
        store.set_cache(resize_layers(store.cache, each))
        reset_cache(ops, store.cache)
        self._replays.clear()
        self._warm.clear()
        self._ready = 0
        if self._prepared:
            self.capture_graphs()
        count = warm_cache(ops, store.cache, store.host_experts, heat)
        ops.copy_h2d(store.cache.counters, counters)
        return count

    def forward(self, batch: Batch) -> None:
        """Compute the batch's pending tokens; their states are kept."""
        step = self._step(batch)
        self._ready = 0
        recorder = self.store.recorder
        if recorder is not None and any(
            request.num_computed_tokens == 0 for request, _ in batch.scheduled
        ):
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
            self._replays[key] = self.ops.capture_graph(run)
        self._warm.add(key)
        return self._replays.get(key, run)

    def start_decode(self, batch: Batch) -> "DecodeSession":
        """Decode from here on without the host: one pending token a sequence.  See Reply."""
        step, rows = self._step(batch), len(batch.scheduled)
        self._ready = 0
        settings = np.empty((rows, 4), np.float32)
        left, heed = np.empty(rows, np.int32), np.empty(rows, np.int32)
        for row, (request, _) in enumerate(batch.scheduled):
            params = request.params
            settings[row] = params.temperature, params.top_k, params.top_p, params.min_p
            left[row], heed[row] = min(request.tokens_left, NO_LIMIT), not params.ignore_eos
        replies = self.replies.first_rows(rows)
        self.ops.copy_h2d(replies.sampler_params, settings)
        self.ops.copy_h2d(replies.tokens_left, left)
        self.ops.copy_h2d(replies.stop_on_eos, heed)
        self.ops.memset(replies.decode_step, 0)
        self.ops.host_view(self.replies.token_ring)[0] = 0
        return DecodeSession(
            self, [request for request, _ in batch.scheduled], self._reply(rows, step)
        )

    def _reply(self, rows: int, step: StepInputs) -> Callable[[], None]:
        return self._recorded(("reply", rows), lambda: self._token(rows, step))

    def _token(self, rows: int, step: StepInputs) -> None:
        replies = self.replies.first_rows(rows)
        out = self._logits[:rows]
        self.model.forward(step, self.state)
        self.model.head(out)
        self.ops.sample(out, replies)
        self.ops.advance_step(step, replies)

    def launch_decode_step(self, rows: int) -> None:
        """Launch what `begin` records, for who looks at the launches."""
        self._token(rows, self._step_views(rows, rows))

    def set_page(self, row: int, entry: int, page: int) -> None:
        """Entry `entry` of a row's page table, for the steps launched from now on."""
        at = row * self.max_pages_per_seq + entry
        self.ops.copy_h2d(self._device_views["pages"][at : at + 1], np.array([page], np.int32))

    def logits(self, rows: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[np.float32]]:
        """The logits of some rows of the last step, in pieces f32 [<= LOGIT_ROWS, vocab]."""
        for start in range(0, len(rows), LOGIT_ROWS):
            piece = rows[start : start + LOGIT_ROWS]
            first, count = int(piece[0]), len(piece)
            if first + count <= self._ready and np.array_equal(piece - first, np.arange(count)):
                out = self._logits[first : first + count]
            else:
                out, wanted = self._logits[:count], self._device_views["wanted"][:count]
                self._ready = 0  # what was there is written over
                self.ops.copy_h2d(wanted, piece)
                self.model.head(out, wanted)
            yield self.ops.copy_d2h(out).astype(np.float32, copy=False)

    def _step(self, batch: Batch) -> StepInputs:
        counts = [count for _, count in batch.scheduled]
        tokens, sequences = sum(counts), len(counts)
        assert tokens <= self.rows, f"{tokens} tokens in a step of at most {self.rows}"
        assert sequences <= self.sequences, f"{sequences} sequences, room for {self.sequences}"
        views = self._host_views
        row = 0
        views["starts"][0] = 0
        for s, (request, count) in enumerate(batch.scheduled):
            part, past = slice(row, row + count), request.num_computed_tokens
            views["wanted"][part] = np.arange(row, row + count)
            views["ids"][part] = request.tokens[past : past + count]
            views["positions"][part] = np.arange(past, past + count)
            views["sequence"][part] = s
            views["starts"][s + 1] = row + count
            views["past"][s] = past
            views["slots"][s] = request.state_slot
            pages = views["pages"][s * self.max_pages_per_seq : (s + 1) * self.max_pages_per_seq]
            pages[: len(request.pages)] = request.pages
            row += count
        self.ops.copy_h2d(self._block, self._host)
        return self._step_views(tokens, sequences)

    def _step_views(self, tokens: int, sequences: int) -> StepInputs:
        """The step that the block describes."""
        device = self._device_views
        table = device["pages"].reshape(self.sequences, self.max_pages_per_seq)
        return StepInputs(
            tokens=tokens,
            sequences=sequences,
            page_size=self.state.page,
            ids=device["ids"][:tokens],
            positions=device["positions"][:tokens],
            sequence_ids=device["sequence"][:tokens],
            query_start_loc=device["starts"][: sequences + 1],
            context_lens=device["past"][:sequences],
            state_slots=device["slots"][:sequences],
            page_table=table[:sequences],
        )

    def _views(self, block: Any) -> dict[str, Any]:
        """The parts of the block; rows of logits wanted are the fourth of `rows` integers."""
        n, s = self.rows, self.sequences
        at, views = 0, {}
        for name, size in (
            ("ids", n), ("positions", n), ("sequence", n), ("wanted", n),
            ("starts", s + 1), ("past", s), ("slots", s), ("pages", s * self.max_pages_per_seq),
        ):  # fmt: skip
            views[name] = block[at : at + size]
            at += size
        return views


class DecodeSession:
    """DecodeState on their way: steps launched, tokens taken.

    Rows are the requests of one batch.  Steps follow each other on the device, which ends a row by
    itself at an end token or at its last.
    """

    def __init__(
        self, runner: ModelRunner, requests: list[Request], replay: Callable[[], None]
    ) -> None:
        self.requests = requests
        self.launched = self.taken = 0
        self.replay = replay
        """Computes one more step on the device; `launch` sees to what it needs."""
        self._runner = runner
        rows, view = len(requests), runner.ops.host_view
        self._chance = (
            view(runner.replies.uniforms)
            .reshape(-1)[: MAX_STEPS_IN_FLIGHT * rows]
            .reshape(MAX_STEPS_IN_FLIGHT, rows)
        )
        self._mail = view(runner.replies.token_ring)
        self._pages = [len(request.pages) for request in requests]
        self._usual = 0.0

    @property
    def in_flight(self) -> int:
        """Steps whose tokens have not been taken."""
        return self.launched - self.taken

    def launch(self) -> None:
        """One more step.  Every row must have a page for it."""
        for row, request in enumerate(self.requests):
            for entry in range(self._pages[row], len(request.pages)):
                self._runner.set_page(row, entry, request.pages[entry])
            self._pages[row] = len(request.pages)
            index = request.completion_tokens + self.in_flight
            self._chance[self.launched % MAX_STEPS_IN_FLIGHT, row] = uniform(request, index)
        self.replay()
        self.launched += 1

    def wait_tokens(self) -> list[int]:
        """Wait for the oldest step: a token a row, -1 where none could be drawn, -2 where the row
        had ended before.  Raises: CudaError where the device has failed."""
        start = time.perf_counter()
        if self._usual > 1e-3 and self._mail[0] <= self.taken:
            time.sleep(0.7 * self._usual)
        while self._mail[0] <= self.taken:
            time.sleep(0)  # others may run
            if time.perf_counter() - start > STALL_SECONDS:
                self._runner.ops.synchronize()
                assert self._mail[0] > self.taken, "the device is done, but no mail has come"
        waited = time.perf_counter() - start
        self._usual = waited if not self.taken else min(waited, 0.5 * (self._usual + waited))
        rows = len(self.requests)
        at = 1 + self.taken % MAX_STEPS_IN_FLIGHT * rows
        self.taken += 1
        return [int(one) for one in self._mail[at : at + rows]]
