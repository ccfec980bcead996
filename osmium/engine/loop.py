"""The loop of the engine's thread: schedule, compute, sample, deliver; and its end."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable

import numpy as np

from osmium.config import ModelConfig
from osmium.engine.decode_session import DecodeSession
from osmium.engine.kv_cache_manager import KVCacheManager
from osmium.engine.min_tokens import has_spent_mask
from osmium.engine.request import Finish, FinishReason, Request, Token, delivery_error, step_error
from osmium.engine.runner import ModelRunner
from osmium.engine.running_passes import RunningPasses
from osmium.engine.sampler import Sampled, sample_or_error, sampling_error
from osmium.engine.scheduler import Batch, Scheduler
from osmium.engine.stats import EngineStats
from osmium.errors import CudaError, EngineStopped, OsmiumError

__all__ = ["EngineLoop"]

IDLE_SECONDS = 1.0
"""Idle seconds before `on_idle` runs: most follow-up requests arrive sooner (not measured)."""


class EngineLoop:
    """The engine's thread.  `Engine` adds the calls from other threads."""

    def __init__(
        self,
        runner: ModelRunner,
        kv_cache: KVCacheManager,
        link_gb_s: float,
        decode_gap_s: float,
        on_thread: Callable[[], None] | None,
        on_close: Callable[[], None] | None,
    ) -> None:
        """Start the thread: the caller has set all other attributes.

        `link_gb_s`: the measured rate of the link, or 0    the others: as for Engine
        """
        self.config: ModelConfig = runner.model.config
        self._runner, self._kv_cache = runner, kv_cache
        self._scheduler = Scheduler(kv_cache, runner.max_pass_tokens, runner.rows)
        self._passes = RunningPasses(runner, decode_gap_s)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        """Calls from other threads; the engine's thread runs them between two steps."""
        self._on_thread, self._on_close = on_thread, on_close
        self._stopped: EngineStopped | None = None
        self._closing = False
        self._stop_reason: str | None = None
        self.failure: EngineStopped | None = None
        """Why the engine stopped; None while it runs and after `close`."""
        self.on_stopped: Callable[[], None] | None = None
        """Called last on the engine's thread, after the engine has stopped."""
        self.on_idle: Callable[[], None] | None = None
        """Called on the engine's thread after IDLE_SECONDS without a request or a command."""
        self._lock = threading.Lock()
        self.stats = EngineStats(self._scheduler, runner.expert_runner, link_gb_s)
        self._thread = threading.Thread(target=self._run, name="osmium-engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        reason = EngineStopped("The engine is closed.")
        try:
            if self._on_thread is not None:
                self._on_thread()
            while not self._closing:
                self._run_commands()
                self._end_requests()
                self._work()
                self.stats.poll()
        except Exception as error:  # clients hang unless every pending request gets this error
            reason = self.failure = EngineStopped(f"The engine has stopped: {error}")
            reason.__cause__ = error
        with contextlib.suppress(Exception):  # the context may be lost
            self._passes.end(lambda _: False)
        if self._stop_reason is not None:
            reason = self.failure = EngineStopped(self._stop_reason)
        with self._lock:
            self._stopped = reason
        for request in self._scheduler.all_requests():
            self._finish(request, FinishReason.ERROR, reason)
        while not self._commands.empty():  # requests submitted after the last step
            self._commands.get()()
        for request in self._scheduler.all_requests():
            self._finish(request, FinishReason.ERROR, reason)
        if self._on_close is not None:
            self._on_close()
        if self.on_stopped is not None:
            self.on_stopped()

    def _run_commands(self) -> None:
        idle = not self._scheduler.running and not self._scheduler.waiting
        if idle and not self._closing:
            self._wait()()
        while not self._commands.empty():
            self._commands.get()()

    def _wait(self) -> Callable[[], None]:
        """Wait for the next command while no request runs or waits."""
        if self.on_idle is not None:
            with contextlib.suppress(queue.Empty):
                return self._commands.get(timeout=IDLE_SECONDS)
            self.on_idle()
        return self._commands.get()

    def _end_requests(self) -> None:
        """End requests that are cancelled, and those with max_tokens 0 whose prompt is computed."""
        for request in self._scheduler.all_requests():
            if request.cancelled.is_set():
                self._finish(request, FinishReason.CANCELLED)
            elif request.is_complete:
                self._finish(request, FinishReason.LENGTH)

    def _work(self) -> None:
        """Run a part of a prefill pass, or decode steps until the batch has to change."""
        passes, scheduler = self._passes, self._scheduler
        passes.end(scheduler.running.__contains__)
        if self._decode_is_due():
            batch = scheduler.schedule_decode()  # None: all that decoded are preempted
        elif not passes:
            batch = scheduler.schedule()
        elif (most := passes.short_tokens) and (
            short := scheduler.schedule_short(most, passes.requests)
        ):
            batch = short
        else:
            self._advance_pass()
            return
        if batch is None:
            return
        if batch.scheduled[0][0].needs_prefill:
            self._start_pass(batch)
        else:
            start = time.perf_counter()
            steps = self._step(batch)
            passes.decoded(time.perf_counter() - start, steps)

    def _decode_is_due(self) -> bool:
        """Whether a decode step must run before more of a prompt is computed."""
        last_tokens, any_prefill = [], False
        for request in self._scheduler.running:
            if request.needs_prefill:
                any_prefill = True
            else:
                last_tokens.append(request.times.last_token)
        return any_prefill and bool(last_tokens) and self._passes.decode_is_due(min(last_tokens))

    def _start_pass(self, batch: Batch) -> None:
        self.stats.begin(batch)
        try:
            self._passes.start(batch)
        except Exception as error:
            self._fail(batch, error)

    def _advance_pass(self) -> None:
        """Run the next part of a pass, or all of them while routing is recorded.

        A record has the layers of one step after another.
        """
        try:
            done = self._passes.advance()
            while done is None and self._runner.expert_runner.recorder is not None:
                done = self._passes.advance()
        except Exception as error:
            self._fail(self._passes.fail(), error)
            return
        if done is not None:
            self._finish_step(done.batch)

    def _preempt_all(self) -> None:
        """End all passes, and preempt all requests, which start again."""
        for request in reversed(self._scheduler.running.copy()):
            self._scheduler.preempt(request)
        self._passes.end(self._scheduler.running.__contains__)

    def _fail(self, batch: Batch, error: Exception) -> None:
        """End the requests of a failed step, and no others.  Raises: CudaError if all is lost."""
        if isinstance(error, CudaError) and error.context_lost:
            raise error
        request_error = step_error(error)
        for request, _ in batch.scheduled:
            self._finish(request, FinishReason.ERROR, request_error)

    def _step(self, batch: Batch) -> int:
        """Run decode steps, until the batch has to change; returns their number."""
        self.stats.begin(batch)
        try:
            if (
                self._runner.expert_runner.recorder is None
                and len(batch.scheduled) <= self._runner.max_decode_rows
            ):
                return self._decode_on_device(batch)
            self._runner.forward(batch)
        except Exception as error:
            self._fail(batch, error)
            return 0
        self._finish_step(batch)
        return 1

    def _finish_step(self, batch: Batch) -> None:
        """Sample from the logits of a step or pass, and deliver the tokens."""
        try:
            rows, ready, row = [], [], 0
            for request, count in batch.scheduled:
                row += count
                if request.num_pending_tokens == count and request.tokens_left > 0:
                    rows.append(row - 1)
                    ready.append(request)
            sampled: list[Sampled | OsmiumError] = []
            for chunk in self._runner.logits(np.array(rows, np.int32)):
                start = len(sampled)
                for logits, request in zip(chunk, ready[start:], strict=False):
                    sampled.append(sample_or_error(logits, request))
        except Exception as error:
            self._fail(batch, error)
            return
        for request, count in batch.scheduled:
            self._add_computed(request, count)
        for request, result in zip(ready, sampled, strict=True):
            if isinstance(result, OsmiumError):
                self._finish(request, FinishReason.ERROR, result)
            else:
                self._deliver_token(request, result)

    def _decode_on_device(self, batch: Batch) -> int:
        """Decode with sampling on the device until the batch has to change; returns the steps."""
        session = self._runner.start_decode(batch)
        session.launch()
        while session.in_flight:
            while session.in_flight <= session.lookahead and self._can_continue_decode(session):
                session.launch()
            for row, token in enumerate(session.wait_tokens()):
                request = session.requests[row]
                if request.done or token == -2:
                    continue
                self._add_computed(request, 1)
                if token == -1 or request.mask_error is not None:
                    self._finish(request, FinishReason.ERROR, sampling_error(request))
                else:
                    self._deliver_token(request, (token, *session.logprobs(row)))
            if not session.in_flight and self._can_continue_decode(session):
                session.launch()
        return session.received

    def _can_continue_decode(self, session: DecodeSession) -> bool:
        """Whether the same requests need another step and have KV pages for it."""
        steps, requests = session.in_flight + 1, session.requests
        return (
            not self._closing
            and not self.stats.due
            and self._commands.empty()
            and not (self._scheduler.waiting and self._kv_cache.free_slots)
            and len(self._scheduler.running) == len(requests)
            and not any(r.done or r.cancelled.is_set() or has_spent_mask(r) for r in requests)
            and all(r.tokens_left >= steps for r in requests)
            and all(
                self._kv_cache.allocate_pages(r, r.num_computed_tokens + steps) for r in requests
            )
        )

    def _add_computed(self, request: Request, count: int) -> None:
        """Count `count` more tokens of a request as computed."""
        self.stats.add_computed(request, count)
        request.num_computed_tokens += count
        request.tokens_read = request.num_computed_tokens

    def _deliver_token(self, request: Request, sampled: Sampled) -> None:
        try:
            self._append_token(request, sampled)
        except Exception as error:  # of the decoder or `on_event`; other requests continue
            self._finish(request, FinishReason.ERROR, delivery_error(error))

    def _append_token(self, request: Request, sampled: Sampled) -> None:
        """Append and emit a token; finish the request if it is the last one."""
        token, logprob, top = sampled
        self.stats.token(request)
        request.tokens.append(token)
        if request.token_mask is not None:
            request.token_mask.push(token)
        stops = request.stop_matcher
        is_eos = token in self.config.eos_token_ids and not request.params.ignore_eos
        if is_eos or token in request.stop_token_ids or stops.stops_at(token):
            at = stops.length
            end = None if logprob is None else Token(token, "", logprob, top, at, at)
            self._finish(request, FinishReason.STOP, end=end)
            return
        start, text = stops.length, stops.push(token)
        request.emit(Token(token, text, logprob, top, start, stops.length))
        if stops.matched:
            self._finish(request, FinishReason.STOP)
        elif request.tokens_left <= 0:
            self._finish(request, FinishReason.LENGTH)

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        error: OsmiumError | None = None,
        end: Token | None = None,
    ) -> None:
        self._scheduler.remove(request)
        if request.done:
            return
        request.done = True
        self.stats.finish(request, reason)
        text = ""
        if error is None:
            try:
                if reason is FinishReason.LENGTH and request.token_mask is not None:
                    text = "".join(map(request.stop_matcher.push, request.token_mask.completion()))
                text += request.stop_matcher.flush()
            except Exception as problem:  # of the decoder; the Finish below reports it
                reason, error = FinishReason.ERROR, delivery_error(problem)
        if request.stop_matcher.matched and reason is FinishReason.LENGTH:
            reason = FinishReason.STOP  # the decoder's last held-back text completed a stop text
        counts = request.prompt_tokens, request.completion_tokens
        try:
            stop = request.stop_matcher.found
            request.emit(Finish(reason, text, *counts, error, stop, end))
        except Exception as problem:  # of `on_event`; only the log can report it
            delivery_error(problem)
