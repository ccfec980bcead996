"""The engine: one thread schedules batches, computes, samples and delivers tokens."""

import contextlib
import queue
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from osmium.config import ModelConfig
from osmium.engine.decode_session import DecodeSession
from osmium.engine.kv_cache_manager import KVCacheManager
from osmium.engine.min_tokens import end_mask, has_spent_mask
from osmium.engine.request import (
    Decoder,
    Event,
    Finish,
    FinishReason,
    Request,
    SamplingParams,
    Token,
    TokenMask,
    check_ids,
    check_params,
    check_prompt,
    delivery_error,
    step_error,
)
from osmium.engine.runner import ModelRunner
from osmium.engine.running_passes import RunningPasses
from osmium.engine.sampler import Sampled, sample_or_error, sampling_error
from osmium.engine.scheduler import Batch, Scheduler
from osmium.engine.stats import EngineStats
from osmium.engine.stops import StopMatcher
from osmium.engine.teacher_forcing import score_prompts, teacher_forced_logits
from osmium.errors import CudaError, EngineStopped, OsmiumError, RequestError
from osmium.experts.routing import RoutingRecorder

__all__ = ["Engine"]

T = TypeVar("T")

IDLE_SECONDS = 1.0
"""Idle seconds before `on_idle` runs: most follow-up requests arrive sooner (not measured)."""


class Engine:
    """Serves one model.  Callers may use any thread; the engine's own thread computes."""

    def __init__(
        self,
        runner: ModelRunner,
        kv_cache: KVCacheManager,
        *,
        name: str,
        context: int,
        device: str = "cpu",
        tokenizer: Any = None,
        template: Any = None,
        defaults: dict[str, Any] | None = None,
        on_thread: Callable[[], None] | None = None,
        on_close: Callable[[], None] | None = None,
        plan: Any = None,
        host_memory: str = "pageable",
        decode_gap_s: float = 0.1,
    ) -> None:
        """The engine's thread calls `on_thread` first, and `on_close` when all requests ended.

        `decode_gap_s`: the longest time between two tokens of a running response, while prompts are
        read.
        """
        self.config: ModelConfig = runner.model.config
        self.name, self.context, self.device, self.plan = name, context, device, plan
        self.host_memory = host_memory
        """The kind of host memory that holds the experts."""
        self.max_step_tokens, self.max_num_seqs = runner.max_pass_tokens, kv_cache.num_slots
        """Most tokens of a prefill pass, and most sequences at once."""
        self.tokenizer, self.template = tokenizer, template
        self.defaults = defaults or {}
        """Sampling parameters recommended by the model's authors (generation_config.json)."""
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
        self.stats = EngineStats(
            self._scheduler, runner.expert_runner, getattr(plan, "link_gb_s", 0.0)
        )
        self._thread = threading.Thread(target=self._run, name="osmium-engine", daemon=True)
        self._thread.start()

    # -- calls from any thread ---------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        on_event: Callable[[Event], None],
        computed_tokens: int = 0,
        token_mask: TokenMask | None = None,
    ) -> Request:
        """Queue a request; `token_mask` says which tokens may come next.

        The engine's thread calls `on_event` with each Token and, at the end, with one Finish.  It
        must return at once; if it raises, the request is cancelled.  The prompt's first
        `computed_tokens` count as computed, whatever its pages and slot hold (benchmarks).
        Raises: RequestError for a prompt that is empty, too long or has unknown ids, EngineStopped.
        """
        ids = [int(token) for token in prompt]
        check_prompt(ids, params, self.config.vocab_size, self.context)
        check_params(params, self.config.vocab_size)
        decoder: Decoder | None = self.tokenizer.decoder() if self.tokenizer else None
        special_ids = {self.tokenizer.special_id(s): s for s in params.stop if self.tokenizer}
        stop_ids = {token: s for token, s in special_ids.items() if token is not None}
        stops = StopMatcher(decoder, params.stop, params.stop_after, stop_ids, params.min_tokens)
        eos, vocab = self.config.eos_token_ids, self.config.vocab_size
        mask = end_mask(params, token_mask, eos, stop_ids, vocab)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        request = Request(ids, params, on_event, stops, seed, self.context, computed_tokens, mask)
        self._send(lambda: self._scheduler.add(request))
        return request

    def cancel(self, request: Request) -> None:
        """Cancel a waiting or running request; does nothing to a finished one."""
        request.cancelled.set()
        if self._stopped is None:
            self._commands.put(lambda: None)  # wake the engine's thread

    def generate(
        self, prompt: Sequence[int], params: SamplingParams | None = None
    ) -> Generator[Token, None, None]:
        """Yield the tokens of a response; closing the iterator early cancels the request.  The last
        token includes the text still held back at the end.  Raises: RequestError, EngineStopped."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = self.submit(prompt, params or SamplingParams(), events.put)
        tokens = self._tokens_of(request, events)
        # An iterator dropped before its first token never runs the `finally` that cancels.
        weakref.finalize(tokens, self.cancel, request).atexit = False
        return tokens

    def _tokens_of(
        self, request: Request, events: "queue.SimpleQueue[Event]"
    ) -> Generator[Token, None, None]:
        last: Token | None = None  # the final text belongs to it if a Finish is next
        try:
            while True:
                event = events.get()
                if isinstance(event, Token):
                    if last is not None:
                        yield last
                    last = event
                    continue
                if last is not None:
                    yield replace(last, text=last.text + event.text)
                if event.error is not None:
                    raise event.error
                return
        finally:
            self.cancel(request)

    def logits(self, prompt: Sequence[int]) -> npt.NDArray[np.float32]:
        """Teacher-forced logits of every position, f32 [T, vocab], computed in chunks.
        Raises: RequestError, EngineStopped."""
        ids = [int(token) for token in prompt]
        self._check_sequences([ids])  # before np.empty: an overlong prompt would allocate too much
        out = np.empty((len(ids), self.config.vocab_size), np.float32)

        def store(position: int, sequence: int, logits: npt.NDArray[np.float32]) -> None:
            out[position : position + len(logits)] = logits

        self.stream_prompt_logits([ids], self.max_step_tokens, store)
        return out

    def prompt_logits(
        self, sequences: list[list[int]], max_step_tokens: int
    ) -> list[tuple[tuple[int, int], npt.NDArray[np.float32]]]:
        """Teacher-forced logits of whole sequences, `max_step_tokens` tokens of each per step.

        Returns ((position, sequence), f32 [n, vocab]) for n positions from `position` on.  No other
        request runs meanwhile.  Raises: RequestError, EngineStopped.
        """
        self._check_sequences(sequences)
        forced = self._forced_logits
        return self.run_on_engine_thread(lambda: list(forced(sequences, max_step_tokens)))

    def stream_prompt_logits(
        self,
        sequences: list[list[int]],
        max_step_tokens: int,
        on_logits: Callable[[int, int, npt.NDArray[np.float32]], None],
    ) -> None:
        """`prompt_logits` with a callback: on_logits(position, sequence, f32 [n, vocab])."""
        self._check_sequences(sequences)

        def job() -> None:
            for (position, sequence), logits in self._forced_logits(sequences, max_step_tokens):
                on_logits(position, sequence, logits)

        self.run_on_engine_thread(job)

    def _forced_logits(
        self, sequences: list[list[int]], max_step_tokens: int
    ) -> Iterator[tuple[tuple[int, int], npt.NDArray[np.float32]]]:
        self._passes.end(lambda _: False)  # their requests are preempted
        return teacher_forced_logits(self._runner, self._scheduler, sequences, max_step_tokens)

    def run_on_engine_thread(self, job: Callable[[], T]) -> T:
        """Run a job on the engine's thread, between two steps, and wait for it.
        Raises: EngineStopped, and the errors of the job."""
        outcome: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

        def run() -> None:
            if self._stopped is not None:
                outcome.put((False, EngineStopped(str(self._stopped))))
                return
            try:
                outcome.put((True, job()))
            except BaseException as error:
                outcome.put((False, error))
                if isinstance(error, CudaError) and error.context_lost:
                    raise

        self._send(run)
        succeeded, value = outcome.get()  # a stopping engine still runs every queued command
        if not succeeded:
            raise value
        result: T = value
        return result

    def record_routing(self) -> RoutingRecorder:
        """Record the experts of each token from now on; steps become slower.  Read or save the
        recorder while no request runs.  Each new sequence begins a prompt of the trace."""

        def start() -> RoutingRecorder:
            expert_runner = self._runner.expert_runner
            expert_runner.recorder = RoutingRecorder(self.config.num_layers)
            return expert_runner.recorder

        return self.run_on_engine_thread(start)

    def status(self) -> dict[str, Any]:
        """Counts of requests, KV pages, tokens and experts, as a dict."""

        def read() -> dict[str, Any]:
            return {
                "running": len(self._scheduler.running),
                "waiting": len(self._scheduler.waiting),
                "free_pages": self._kv_cache.free_pages,
                "pages": self._kv_cache.num_pages,
                "tokens": dict(self.stats.tokens),
                "experts": vars(self._runner.expert_runner.counters()),
            }

        return self.run_on_engine_thread(read)

    @property
    def runner(self) -> ModelRunner:
        """The model runner, for benchmarks; use it only within `run_on_engine_thread`."""
        return self._runner

    @property
    def stopped(self) -> EngineStopped | None:
        """Why the engine has stopped, or None while it runs."""
        return self._stopped

    def stop(self, reason: str) -> None:
        """Stop without waiting; every request gets EngineStopped with `reason`."""
        with self._lock:
            if not self._closing:
                self._stop_reason = reason
            self._closing = True
        self._commands.put(lambda: None)

    def close(self) -> None:
        """Stop and wait; running and waiting requests get EngineStopped.  May be called again."""
        with self._lock:
            self._closing = True
        self._commands.put(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_sequences(self, sequences: list[list[int]]) -> None:
        for ids in sequences:
            check_ids(ids, self.config.vocab_size)
            if len(ids) > self.context:
                raise RequestError(
                    f"{len(ids)} ids do not fit the context of {self.context}.",
                    param="ids",
                    code="context_length_exceeded",
                )

    def _send(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self._stopped is not None:
                raise EngineStopped(str(self._stopped))
            if self._closing:
                raise EngineStopped("The engine is closed.")
            self._commands.put(command)

    # -- the loop of the engine's thread -----------------------------------------------------------

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
        if not passes:
            if passes.decode_is_due() and self._decode_between_passes():
                return
            batch = scheduler.schedule()
            if batch is None:
                return
            if batch.scheduled[0][0].needs_prefill:
                self._start_pass(batch)
            else:
                self._step(batch)
                passes.last_decode = time.perf_counter()
        elif passes.decode_is_due() and self._decode_between_passes():
            return
        elif (most := passes.short_tokens) and (
            short := scheduler.schedule_short(most, passes.requests)
        ):
            self._start_pass(short)
        else:
            self._advance_pass()

    def _decode_between_passes(self) -> bool:
        """One decode step between two parts of a pass; False if no request decodes."""
        if not any(request.needs_prefill for request in self._scheduler.running):
            return False
        batch, start = self._scheduler.schedule_decode(), time.perf_counter()
        if batch is None:
            return False
        self._step(batch)
        self._passes.decoded(time.perf_counter() - start)
        return True

    def _start_pass(self, batch: Batch) -> None:
        self.stats.begin(batch)
        try:
            self._passes.start(batch)
        except Exception as error:
            self._fail(batch, error)

    def _advance_pass(self) -> None:
        try:
            done = self._passes.advance()
        except Exception as error:
            self._fail(self._passes.fail(), error)
            return
        if done is not None:
            self._finish_step(done.batch)
            self._passes.last_decode = time.perf_counter()

    def _fail(self, batch: Batch, error: Exception) -> None:
        """End the requests of a failed step, and no others.  Raises: CudaError if all is lost."""
        if isinstance(error, CudaError) and error.context_lost:
            raise error
        request_error = step_error(error)
        for request, _ in batch.scheduled:
            self._finish(request, FinishReason.ERROR, request_error)

    def _step(self, batch: Batch) -> None:
        """Run decode steps, until the batch has to change."""
        self.stats.begin(batch)
        try:
            if (
                self._runner.expert_runner.recorder is None
                and len(batch.scheduled) <= self._runner.max_decode_rows
            ):
                self._decode_on_device(batch)
                return
            self._runner.forward(batch)
        except Exception as error:
            self._fail(batch, error)
            return
        self._finish_step(batch)

    def _finish_step(self, batch: Batch) -> None:
        """Sample from the logits of a step or pass, and deliver the tokens."""
        try:
            score_prompts(self._runner, batch)
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

    def _decode_on_device(self, batch: Batch) -> None:
        """Decode with sampling on the device until the batch has to change."""
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
        request.pass_tokens = 0

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
