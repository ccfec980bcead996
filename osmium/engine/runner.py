"""The model runner: builds a step's inputs from a batch, runs the model, returns logits or tokens.

All inputs of a step are one device array, written by one copy.  In `start_decode` the device
samples and advances by itself: the host replays one captured step per token and reads sampled ids
from the token ring.  See docs/decode-graphs.md.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.engine.control_tables import ControlTables
from osmium.engine.decode_session import MAX_STEPS_IN_FLIGHT, DecodeSession
from osmium.engine.min_tokens import drop_spent_mask
from osmium.engine.prefill import (
    PrefillInputs,
    PrefillPass,
    prefill_input_words,
)
from osmium.engine.scheduler import Batch
from osmium.experts.cache import reset_cache, resize_layers
from osmium.experts.runner import ExpertRunner
from osmium.experts.usage import rebalanced_slots, snapshot_usage, warm_cache
from osmium.models.prefill import short_pass_tokens
from osmium.models.qwen3_5_moe import Qwen3_5MoeModel
from osmium.models.state import ModelState
from osmium.ops import DecodeState, Ops, StepInputs
from osmium.ops.controls import controls_bytes
from osmium.ops.grouped import MAX_QUEUE_DEPTH

__all__ = ["LOGIT_ROWS", "ModelRunner", "runner_bytes"]

LOGIT_ROWS = 16
"""Rows of logits computed at a time: 16 MB at a vocabulary of 248 k."""

NO_LIMIT = 1 << 30


def runner_bytes(
    vocab: int,
    rows: int,
    max_num_seqs: int,
    max_pages_per_seq: int,
    piece_rows: int,
    pass_tokens: int,
) -> int:
    """Bytes of the runner's own arrays; prefill passes have up to `pass_tokens` tokens."""
    decode_state = max_num_seqs * 7 + 16
    scratch = sum(
        math.prod(shape) * np.dtype(dtype).itemsize
        for shape, dtype in DecodeState.scratch(min(max_num_seqs, rows, LOGIT_ROWS), vocab).values()
    )
    controls = controls_bytes(
        min(max_num_seqs, rows, LOGIT_ROWS), max_num_seqs, vocab, MAX_STEPS_IN_FLIGHT
    )
    inputs = _input_words(rows, max_num_seqs, max_pages_per_seq)
    for tokens in (pass_tokens, short_pass_tokens(pass_tokens)):
        inputs += prefill_input_words(tokens, piece_rows, max_num_seqs, max_pages_per_seq)
    return 4 * (inputs + LOGIT_ROWS * vocab + decode_state) + scratch + controls


def _input_words(rows: int, max_num_seqs: int, max_pages_per_seq: int) -> int:
    """32-bit words of a step's inputs: see ModelRunner._views."""
    logit_rows = max(rows, LOGIT_ROWS)
    return 3 * rows + logit_rows + 3 * max_num_seqs + 1 + max_num_seqs * max_pages_per_seq


class ModelRunner:
    """A model, its state, and the inputs of one step."""

    def __init__(
        self,
        ops: Ops,
        model: Qwen3_5MoeModel,
        expert_runner: ExpertRunner,
        state: ModelState,
        max_num_seqs: int,
        max_pages_per_seq: int,
        lookahead_steps: int = 0,
    ) -> None:
        """A step has at most the model's rows and `max_num_seqs` sequences.

        The state has one page more than sequences use: the null page, for rows that have ended.
        While decoding, `lookahead_steps` steps are launched before the host has the previous token.
        Raises: OutOfMemory.
        """
        assert 0 <= lookahead_steps < MAX_STEPS_IN_FLIGHT
        self.ops, self.model, self.expert_runner, self.state = ops, model, expert_runner, state
        rows = model.rows
        self.rows, self.max_num_seqs = rows, max_num_seqs
        self.max_pages_per_seq, self.lookahead_steps = max_pages_per_seq, lookahead_steps
        self.max_pass_tokens = model.pass_tokens
        """Most tokens of a prefill pass."""
        first_rows = (0, self.max_pass_tokens)
        self.prefill_inputs = [
            PrefillInputs(ops, first, tokens, model.piece_rows, max_num_seqs, max_pages_per_seq)
            for first, tokens in zip(
                first_rows,
                (self.max_pass_tokens, short_pass_tokens(self.max_pass_tokens)),
                strict=True,
            )
        ]
        """Of a pass, and of a short one that runs while it waits."""
        words = _input_words(rows, max_num_seqs, max_pages_per_seq)
        self._device_inputs = ops.empty((words,), np.int32)
        self._host_inputs = np.zeros(words, np.int32)
        self._device_views = self._views(self._device_inputs)
        self._host_views = self._views(self._host_inputs)
        self._logits = ops.empty((LOGIT_ROWS, model.config.vocab_size), np.float32)
        self.max_decode_rows = min(max_num_seqs, rows, LOGIT_ROWS)
        """Most sequences of a decode session."""
        self.decode_state = self._make_decode_state(self.max_decode_rows)
        self.control_tables = ControlTables(
            ops, self.max_decode_rows, max_num_seqs, model.config.vocab_size, MAX_STEPS_IN_FLIGHT
        )
        self._graphs: dict[tuple[str, int], Callable[[], None]] = {}
        """Replays of captured steps with one row per sequence, by kind and number of rows."""
        self._launched_once: set[tuple[str, int]] = set()
        self._graphs_captured = False
        self._valid_logit_rows = 0
        """Number of first rows of the last step whose logits are in `_logits`."""
        self._first_prefill_row: int | None = None
        """First row of the last prefill pass, if that was the last step."""

    def _make_decode_state(self, rows: int) -> DecodeState:
        ops, eos = self.ops, self.model.config.eos_token_ids
        return DecodeState(
            ring_size=MAX_STEPS_IN_FLIGHT,
            null_page=self.state.num_pages - 1,
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
        """Capture the decode steps for every number of sequences, before serving.

        Steps with token masks are captured at their second use.  Afterwards the expert cache has no
        counts, but keeps the experts in its slots.
        """
        for rows in range(1, self.decode_state.token.shape[0] + 1):
            views = self._host_views
            for name in ("ids", "positions", "context_lens"):
                views[name][:rows] = 0
            views["logit_rows"][:rows] = views["sequence_ids"][:rows] = np.arange(rows)
            views["query_start_loc"][: rows + 1] = np.arange(rows + 1)
            views["state_slots"][:rows] = -1
            views["pages"][:] = self.decode_state.null_page
            self.ops.copy_h2d(self._device_inputs, self._host_inputs)
            for array in (
                self.decode_state.tokens_left,
                self.decode_state.stop_on_eos,
                self.decode_state.decode_step,
            ):
                self.ops.memset(array, 0)
            self.ops.memset(self.decode_state.sampler_params, 0)
            self.ops.memset(self.control_tables.controls.flags, 0)
            step = self._step_views(rows, rows)
            for controlled in (False, True):
                for _ in range(2):  # the first call launches, the second captures and replays
                    self._decode_replay(rows, step, controlled)()
            self.ops.synchronize()
        cache = self.expert_runner.cache
        for array in (
            cache.short_count,
            cache.long_count,
            cache.last_used,
            cache.step,
            cache.counters,
        ):
            self.ops.memset(array, 0)
        self._graphs_captured = True

    def rebalance_slots(self) -> int:
        """Move expert slots between layers by usage, and refill them with the most used experts.

        Returns the number of experts copied; 0 where the slots stay as they are.  No step may be in
        flight.  Allocates nothing: the same memory is divided again.  Captured graphs hold slot
        addresses, so they are captured again.
        """
        ops, expert_runner = self.ops, self.expert_runner
        if expert_runner.host_experts is None:
            return 0
        usage = snapshot_usage(ops, expert_runner.cache)  # synchronises
        current = [layer.shape[0] for layer in expert_runner.cache.slots]
        slots_per_layer = rebalanced_slots(usage, current, expert_runner.top_k)
        if slots_per_layer is None:
            return 0
        counters = ops.copy_d2h(expert_runner.cache.counters)
        expert_runner.set_cache(resize_layers(expert_runner.cache, slots_per_layer))
        reset_cache(ops, expert_runner.cache)
        self._graphs.clear()
        self._launched_once.clear()
        self._valid_logit_rows = 0
        if self._graphs_captured:
            self.capture_graphs()
        copied = warm_cache(ops, expert_runner.cache, expert_runner.host_experts, usage)
        ops.copy_h2d(expert_runner.cache.counters, counters)
        return copied

    def forward(self, batch: Batch) -> None:
        """Run the model on the batch's scheduled tokens, and update the state.

        More than a token of a sequence are a prefill pass.
        """
        if any(count > 1 for _, count in batch.scheduled):
            running = self.start_prefill(batch, self.prefill_inputs[0])
            while running.advance():
                self.ops.limit_queue(MAX_QUEUE_DEPTH)
            self.finish_prefill(running)
            return
        self._record_prompts(batch)
        step = self._step(batch)
        self._valid_logit_rows, self._first_prefill_row = 0, None
        rows = step.tokens
        if rows <= LOGIT_ROWS:
            self._logits_replay(rows, step)()
            self._valid_logit_rows = rows
        else:
            self.model.forward(step, self.state)
        self.model.prefill_pass.invalidate()

    def start_prefill(self, batch: Batch, inputs: PrefillInputs) -> PrefillPass:
        """Begin a prefill pass of a batch; `PrefillPass.advance` runs it."""
        self._record_prompts(batch)
        self.model.prefill_pass.invalidate()
        admits = any(count == request.num_pending_tokens for request, count in batch.scheduled)
        steps = inputs.fill(batch, self.state.page_size)
        layers = self.model.prefill(steps, self.state, inputs.first_row, admits)
        return PrefillPass(batch, inputs, layers, self.model.config.num_layers)

    def finish_prefill(self, done: PrefillPass) -> None:
        """Make the rows of a pass that has ended the ones of `logits`."""
        self._valid_logit_rows, self._first_prefill_row = 0, done.inputs.first_row

    def _record_prompts(self, batch: Batch) -> None:
        recorder = self.expert_runner.recorder
        if recorder is not None and any(
            request.num_computed_tokens == 0 for request, _ in batch.scheduled
        ):
            recorder.prompt()

    def _captured(self, key: tuple[str, int], run: Callable[[], None]) -> Callable[[], None]:
        """`run` itself for the first call with `key`, then the replay of its captured graph."""
        if self.expert_runner.recorder is not None:
            return run  # routing records synchronise at each layer, so no graph can be captured
        if key in self._launched_once and key not in self._graphs:
            self._graphs[key] = self.ops.capture_graph(run)
        self._launched_once.add(key)
        return self._graphs.get(key, run)

    def start_decode(self, batch: Batch) -> DecodeSession:
        """Start decoding with sampling on the device; each request has one pending token."""
        step, rows = self._step(batch), len(batch.scheduled)
        self._valid_logit_rows, self._first_prefill_row = 0, None
        self.model.prefill_pass.invalidate()
        sampler_params = np.empty((rows, 4), np.float32)
        tokens_left, stop_on_eos = np.empty(rows, np.int32), np.empty(rows, np.int32)
        for row, (request, _) in enumerate(batch.scheduled):
            params = request.params
            drop_spent_mask(request)
            sampler_params[row] = params.temperature, params.top_k, params.top_p, params.min_p
            tokens_left[row] = min(request.tokens_left, NO_LIMIT)
            stop_on_eos[row] = not params.ignore_eos
        decode_state = self.decode_state.first_rows(rows)
        self.ops.copy_h2d(decode_state.sampler_params, sampler_params)
        self.ops.copy_h2d(decode_state.tokens_left, tokens_left)
        self.ops.copy_h2d(decode_state.stop_on_eos, stop_on_eos)
        self.ops.memset(decode_state.decode_step, 0)
        self.ops.host_view(self.decode_state.token_ring)[0] = 0
        requests = [request for request, _ in batch.scheduled]
        controlled = any(request.needs_controls for request in requests)
        if controlled:
            self.control_tables.start(requests)
        tables = self.control_tables if controlled else None
        if all(request.token_mask is None for request in requests):
            replay = self._decode_replay(rows, step, controlled)
            return DecodeSession(self, requests, replay, None, tables)

        def sample() -> None:
            self._captured(("sample", rows), lambda: self._sample_step(rows, step, True))()

        return DecodeSession(
            self, requests, lambda: self._logits_replay(rows, step)(), sample, tables
        )

    def _decode_replay(self, rows: int, step: StepInputs, controlled: bool) -> Callable[[], None]:
        kind = "controlled" if controlled else "decode"
        return self._captured((kind, rows), lambda: self._decode_step(rows, step, controlled))

    def _logits_replay(self, rows: int, step: StepInputs) -> Callable[[], None]:
        return self._captured(("logits", rows), lambda: self._logits_step(rows, step))

    def _decode_step(self, rows: int, step: StepInputs, controlled: bool) -> None:
        self._logits_step(rows, step)
        self._sample_step(rows, step, controlled)

    def _logits_step(self, rows: int, step: StepInputs) -> None:
        self.model.forward(step, self.state)
        self.model.head(self._logits[:rows])

    def _sample_step(self, rows: int, step: StepInputs, controlled: bool) -> None:
        decode_state, logits = self.decode_state.first_rows(rows), self._logits[:rows]
        if controlled:
            controls = self.control_tables.controls.first_rows(rows)
            self.ops.sample_controlled(logits, step, decode_state, controls)
        else:
            self.ops.sample(logits, decode_state)
        self.ops.advance_step(step, decode_state)

    def launch_decode_step(self, rows: int) -> None:
        """Launch one decode step without a graph, for profilers and tests."""
        self._decode_step(rows, self._step_views(rows, rows), controlled=False)

    def set_page(self, row: int, entry: int, page: int) -> None:
        """Set an entry of a row's page table on the device, for steps launched from now on."""
        at = row * self.max_pages_per_seq + entry
        self.ops.copy_h2d(self._device_views["pages"][at : at + 1], np.array([page], np.int32))

    def logits(self, rows: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[np.float32]]:
        """Logits of some rows of the last step, in chunks f32 [<= LOGIT_ROWS, vocab]."""
        for start in range(0, len(rows), LOGIT_ROWS):
            chunk = rows[start : start + LOGIT_ROWS]
            first, count = int(chunk[0]), len(chunk)
            consecutive = np.array_equal(chunk - first, np.arange(count))
            if consecutive and first + count <= self._valid_logit_rows:
                out = self._logits[first : first + count]
            else:
                out, logit_rows = self._logits[:count], self._device_views["logit_rows"][:count]
                self._valid_logit_rows = 0  # head overwrites _logits
                self.ops.copy_h2d(logit_rows, chunk)
                self.model.head(out, logit_rows, self._first_prefill_row)
            yield self.ops.copy_d2h(out).astype(np.float32, copy=False)

    def _step(self, batch: Batch) -> StepInputs:
        counts = [count for _, count in batch.scheduled]
        tokens, sequences = sum(counts), len(counts)
        assert tokens <= self.rows, f"{tokens} tokens in a step of at most {self.rows}"
        assert sequences <= self.max_num_seqs, f"{sequences} sequences, at most {self.max_num_seqs}"
        views = self._host_views
        row = 0
        views["query_start_loc"][0] = 0
        for s, (request, count) in enumerate(batch.scheduled):
            rows, context_len = slice(row, row + count), request.num_computed_tokens
            views["logit_rows"][rows] = np.arange(row, row + count)
            views["ids"][rows] = request.tokens[context_len : context_len + count]
            views["positions"][rows] = np.arange(context_len, context_len + count)
            views["sequence_ids"][rows] = s
            views["query_start_loc"][s + 1] = row + count
            views["context_lens"][s] = context_len
            views["state_slots"][s] = request.state_slot
            table_start = s * self.max_pages_per_seq
            pages = views["pages"][table_start : table_start + self.max_pages_per_seq]
            pages[: len(request.pages)] = request.pages
            row += count
        self.ops.copy_h2d(self._device_inputs, self._host_inputs)
        return self._step_views(tokens, sequences)

    def _step_views(self, tokens: int, sequences: int) -> StepInputs:
        """The StepInputs over the device array."""
        device = self._device_views
        page_table = device["pages"].reshape(self.max_num_seqs, self.max_pages_per_seq)
        return StepInputs(
            tokens=tokens,
            sequences=sequences,
            page_size=self.state.page_size,
            ids=device["ids"][:tokens],
            positions=device["positions"][:tokens],
            sequence_ids=device["sequence_ids"][:tokens],
            query_start_loc=device["query_start_loc"][: sequences + 1],
            context_lens=device["context_lens"][:sequences],
            state_slots=device["state_slots"][:sequences],
            page_table=page_table[:sequences],
        )

    def _views(self, inputs: Any) -> dict[str, Any]:
        """Named parts of an array of step inputs, host or device; all i32."""
        rows, seqs = self.rows, self.max_num_seqs
        start, views = 0, {}
        for name, size in (
            ("ids", rows), ("positions", rows), ("sequence_ids", rows),
            ("logit_rows", max(rows, LOGIT_ROWS)),
            ("query_start_loc", seqs + 1), ("context_lens", seqs), ("state_slots", seqs),
            ("pages", seqs * self.max_pages_per_seq),
        ):  # fmt: skip
            views[name] = inputs[start : start + size]
            start += size
        return views
