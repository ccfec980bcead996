"""The engine: one thread that serves many callers.

schedule a batch -> compute its tokens -> sample -> deliver
"""

import contextlib
import logging
import queue
import secrets
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from osmium.config import ModelConfig
from osmium.engine.kv_cache_manager import KVCacheManager
from osmium.engine.request import (
    Decoder,
    Event,
    Finish,
    FinishReason,
    Request,
    SamplingParams,
    Token,
    check_ids,
    step_error,
)
from osmium.engine.runner import DecodeSession, ModelRunner
from osmium.engine.sampler import can_sample_on_device, non_finite_error, sample
from osmium.engine.scheduler import Batch, Scheduler
from osmium.engine.stats import EngineStats
from osmium.engine.stops import StopMatcher
from osmium.engine.teacher_forcing import teacher_forced_logits
from osmium.errors import CudaError, EngineStopped, OsmiumError, RequestError
from osmium.experts.routing import RoutingRecorder

__all__ = ["Engine"]

T = TypeVar("T")

LOG = logging.getLogger("osmium.engine")

IDLE_SECONDS = 1.0
"""Seconds in which most who have read a reply and go on have asked again (not measured)."""


class Engine:
    """One model, serving."""

    def __init__(
        self,
        runner: ModelRunner,
        seats: KVCacheManager,
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
    ) -> None:
        """`on_thread` runs first on the engine's thread, `on_close` last of all."""
        self.config: ModelConfig = runner.model.config
        self.name, self.context, self.device, self.plan = name, context, device, plan
        self.host_memory = host_memory
        """The kind of host memory that experts are read from."""
        self.max_step_tokens = runner.rows
        """Most tokens of a step."""
        self.tokenizer, self.template = tokenizer, template
        self.defaults = defaults or {}
        """Sampling parameters that the model's makers recommend."""
        self._runner, self._seats = runner, seats
        self._scheduler = Scheduler(seats, runner.rows)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._on_thread, self._on_close = on_thread, on_close
        self._stopped: EngineStopped | None = None
        self._closing = False
        self._why: str | None = None
        self.failure: EngineStopped | None = None
        """Why the engine stopped, if nobody had closed it."""
        self.on_stopped: Callable[[], None] | None = None
        """Called on the engine's thread once it serves no more."""
        self.on_idle: Callable[[], None] | None = None
        """Called there whenever nobody has run, waited or asked for QUIET seconds."""
        self._lock = threading.Lock()
        self.meter = EngineStats(self._scheduler, runner.store, getattr(plan, "link_gb_s", 0.0))
        self._thread = threading.Thread(target=self._run, name="osmium-engine", daemon=True)
        self._thread.start()

    # -- what callers do, on any thread ------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        on_event: Callable[[Event], None],
        skip_prefill: bool = False,
    ) -> Request:
        """Queue a request.  `on_event` is called on the engine's thread with each Token and with
        one Finish at the end; it must return at once.  If it raises, the request is cancelled.
        `skip_prefill`: the contents of the pages and slots count as the prompt's state.

        Raises: RequestError for a prompt that is empty, too long or has unknown ids, EngineStopped.
        """
        ids = [int(one) for one in prompt]
        check_ids(ids, self.config.vocab_size)
        if len(ids) >= self.context:
            raise RequestError(
                f"This model's maximum context length is {self.context} tokens. However, your "
                f"prompt has {len(ids)} tokens. Shorten it, or start with a larger --context.",
                param="messages",
                code="context_length_exceeded",
            )
        for token in params.logit_bias:
            if token >= self.config.vocab_size:
                raise RequestError(
                    f"logit_bias names token {token}; the vocabulary has {self.config.vocab_size}.",
                    param="logit_bias",
                    code="invalid_value",
                )
        decoder: Decoder | None = self.tokenizer.decoder() if self.tokenizer else None
        seed = secrets.randbits(63) if params.seed is None else params.seed
        request = Request(
            ids, params, on_event, StopMatcher(decoder, params.stop), seed, self.context,
            skip_prefill,
        )  # fmt: skip
        self._send(lambda: self._scheduler.add(request))
        return request

    def cancel(self, request: Request) -> None:
        """End a request, wherever it is; its Finish says cancelled.  Afterwards is harmless."""
        request.cancelled.set()
        if self._stopped is None:
            self._inbox.put(lambda: None)  # wake the crank

    def generate(
        self, prompt: Sequence[int], params: SamplingParams | None = None
    ) -> Generator[Token, None, None]:
        """The tokens of a reply as they come; leaving the loop early cancels the rest.

        The text still held back at the end comes with the last token.
        Raises: RequestError, EngineStopped.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = self.submit(prompt, params or SamplingParams(), events.put)
        tokens = self._tokens_of(request, events)
        # An iterator that is dropped before its first token never enters the loop that cancels.
        weakref.finalize(tokens, self.cancel, request).atexit = False
        return tokens

    def _tokens_of(
        self, request: Request, events: "queue.SimpleQueue[Event]"
    ) -> Generator[Token, None, None]:
        last: Token | None = None  # kept until it is known whether text follows it
        try:
            while True:
                event = events.get()
                if isinstance(event, Token):
                    if last is not None:
                        yield last
                    last = event
                    continue
                if last is not None:
                    yield Token(last.id, last.text + event.text, last.logprob, last.top)
                if event.error is not None:
                    raise event.error
                return
        finally:
            self.cancel(request)

    def logits(self, prompt: Sequence[int]) -> npt.NDArray[np.float32]:
        """Teacher-forced logits of every position, f32 [T, vocab], read in chunks.

        Raises: RequestError, EngineStopped.
        """
        ids = [int(one) for one in prompt]
        self._check_forced([ids])  # before the array, which a wrong length would make huge
        out = np.empty((len(ids), self.config.vocab_size), np.float32)

        def keep(position: int, sequence: int, piece: npt.NDArray[np.float32]) -> None:
            out[position : position + len(piece)] = piece

        self.stream_prompt_logits([ids], self._runner.rows, keep)
        return out

    def prompt_logits(
        self, sequences: list[list[int]], chunk: int
    ) -> list[tuple[tuple[int, int], npt.NDArray[np.float32]]]:
        """Logits of whole sequences, `chunk` tokens at a time, several sequences in one step.

        ((position, sequence), f32 [n, vocab]) for pieces of rows from that position on.  Nothing
        else runs meanwhile.  Raises: RequestError, EngineStopped.
        """
        self._check_forced(sequences)
        return self.run_on_engine_thread(lambda: list(self._forced(sequences, chunk)))

    def stream_prompt_logits(
        self,
        sequences: list[list[int]],
        chunk: int,
        use: Callable[[int, int, npt.NDArray[np.float32]], None],
    ) -> None:
        """The same, without keeping the logits: use(position, sequence, f32 [n, vocab])."""
        self._check_forced(sequences)

        def job() -> None:
            for (position, sequence), piece in self._forced(sequences, chunk):
                use(position, sequence, piece)

        self.run_on_engine_thread(job)

    def _forced(
        self, sequences: list[list[int]], chunk: int
    ) -> Iterator[tuple[tuple[int, int], npt.NDArray[np.float32]]]:
        return teacher_forced_logits(self._runner, self._scheduler, sequences, chunk)

    def run_on_engine_thread(self, job: Callable[[], T]) -> T:
        """Run a job on the engine's thread, between two steps, and wait for it.
        Raises: EngineStopped, and whatever the job raises."""
        answer: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

        def run() -> None:
            if self._stopped is not None:
                answer.put((False, EngineStopped(str(self._stopped))))
                return
            try:
                answer.put((True, job()))
            except BaseException as error:
                answer.put((False, error))
                if isinstance(error, CudaError) and error.context_lost:
                    raise

        self._send(run)
        fine, value = answer.get()  # whoever is in the inbox is answered, also at the end
        if not fine:
            raise value
        result: T = value
        return result

    def record_routing(self) -> RoutingRecorder:
        """From now on collect which experts each token is given, which is slower: look into it, or
        save it, when nothing runs.  A sequence that starts begins a prompt of the record."""

        def start() -> RoutingRecorder:
            store = self._runner.store
            store.recorder = RoutingRecorder(self.config.num_layers)
            return store.recorder

        return self.run_on_engine_thread(start)

    def status(self) -> dict[str, Any]:
        """What is going on: requests, tokens so far, pages, experts by where they were."""

        def look() -> dict[str, Any]:
            return {
                "running": len(self._scheduler.running),
                "waiting": len(self._scheduler.waiting),
                "free_pages": self._seats.free_pages,
                "pages": self._seats.pages,
                "tokens": dict(self.meter.tokens),
                "experts": vars(self._runner.store.counters()),
            }

        return self.run_on_engine_thread(look)

    @property
    def runner(self) -> ModelRunner:
        """What computes, for who measures it; to be used within `call`."""
        return self._runner

    @property
    def stopped(self) -> EngineStopped | None:
        """Why the engine serves no more, or None."""
        return self._stopped

    def stop(self, why: str) -> None:
        """Stop as `close` does, with a reason that everybody is told; does not wait."""
        with self._lock:
            if not self._closing:
                self._why = why
            self._closing = True
        self._inbox.put(lambda: None)

    def close(self) -> None:
        """Stop: whoever is running or waiting gets EngineStopped.  More than once is harmless."""
        with self._lock:
            self._closing = True
        self._inbox.put(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_forced(self, sequences: list[list[int]]) -> None:
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
            self._inbox.put(command)

    # -- the crank, on the engine's thread ---------------------------------------------------------

    def _run(self) -> None:
        reason = EngineStopped("The engine is closed.")
        try:
            if self._on_thread is not None:
                self._on_thread()
            while not self._closing:
                self._read_inbox()
                self._drop_cancelled()
                batch = self._scheduler.schedule()
                if batch is not None:
                    self._step(batch)
                self.meter.poll()
        except Exception as error:  # the door: whatever it was, nobody may wait for ever
            reason = self.failure = EngineStopped(f"The engine has stopped: {error}")
            reason.__cause__ = error
        if self._why is not None:
            reason = self.failure = EngineStopped(self._why)
        with self._lock:
            self._stopped = reason
        for request in self._scheduler.all_requests():
            self._finish(request, FinishReason.ERROR, reason)
        while not self._inbox.empty():  # submitted too late to be seen
            self._inbox.get()()
        for request in self._scheduler.all_requests():
            self._finish(request, FinishReason.ERROR, reason)
        if self._on_close is not None:
            self._on_close()
        if self.on_stopped is not None:
            self.on_stopped()

    def _read_inbox(self) -> None:
        idle = not self._scheduler.running and not self._scheduler.waiting
        if idle and not self._closing:
            self._wait()()
        while not self._inbox.empty():
            self._inbox.get()()

    def _wait(self) -> Callable[[], None]:
        """The next command, while there is nothing else to do."""
        if self.on_idle is not None:
            with contextlib.suppress(queue.Empty):
                return self._inbox.get(timeout=IDLE_SECONDS)
            self.on_idle()
        return self._inbox.get()

    def _drop_cancelled(self) -> None:
        for request in self._scheduler.all_requests():
            if request.cancelled.is_set():
                self._finish(request, FinishReason.CANCELLED)

    def _step(self, batch: Batch) -> None:
        self.meter.begin(batch)
        try:
            if self._runner.store.recorder is None and all(
                request.num_pending_tokens == 1 and can_sample_on_device(request)
                for request, _ in batch.scheduled
            ):
                self._decode_on_device(batch)
                return
            self._runner.forward(batch)
            rows, ready, row = [], [], 0
            for request, count in batch.scheduled:
                row += count
                if request.num_pending_tokens == count:
                    rows.append(row - 1)
                    ready.append(request)
            chosen: list[tuple[int, float | None, tuple[tuple[int, float], ...]]] = []
            for piece in self._runner.logits(np.array(rows, np.int32)):
                start = len(chosen)
                for logits, request in zip(piece, ready[start:], strict=False):
                    chosen.append(sample(logits, request))
        except Exception as error:  # whatever a step met, it fails its own requests and no others
            if isinstance(error, CudaError) and error.context_lost:
                raise
            failed = step_error(error)
            for request, _ in batch.scheduled:
                self._finish(request, FinishReason.ERROR, failed)
            return
        for request, count in batch.scheduled:
            self._computed(request, count)
        for request, (token, logprob, top) in zip(ready, chosen, strict=True):
            self._deliver_token(request, token, logprob, top)

    def _decode_on_device(self, batch: Batch) -> None:
        """Let the device go from token to token, until something else is to be done."""
        reply, lookahead = self._runner.start_decode(batch), self._runner.lookahead_steps
        reply.launch()
        while reply.in_flight:
            while reply.in_flight <= lookahead and self._can_continue_decode(reply):
                reply.launch()
            for request, token in zip(reply.requests, reply.wait_tokens(), strict=True):
                if request.done or token == -2:
                    continue
                self._computed(request, 1)
                if token == -1:
                    self._finish(request, FinishReason.ERROR, non_finite_error())
                else:
                    self._deliver_token(request, token, None, ())
            if not reply.in_flight and self._can_continue_decode(reply):
                reply.launch()

    def _can_continue_decode(self, reply: DecodeSession) -> bool:
        """Whether another step of the same rows is wanted, and has pages to write to."""
        more = reply.in_flight + 1
        return (
            not self._closing
            and not self.meter.due
            and self._inbox.empty()
            and not (self._scheduler.waiting and self._seats.free_slots)
            and len(self._scheduler.running) == len(reply.requests)
            and not any(one.done or one.cancelled.is_set() for one in reply.requests)
            and all(one.tokens_left >= more for one in reply.requests)
            and all(
                self._seats.allocate_pages(one, one.num_computed_tokens + more)
                for one in reply.requests
            )
        )

    def _computed(self, request: Request, count: int) -> None:
        """So many more of its tokens are in the model's state."""
        self.meter.add_computed(request, count)
        request.num_computed_tokens += count

    def _deliver_token(
        self,
        request: Request,
        token: int,
        logprob: float | None,
        top: tuple[tuple[int, float], ...],
    ) -> None:
        try:
            self._append_token(request, token, logprob, top)
        except Exception as error:  # a decoder or `on_event`: nobody else may suffer from it
            self._finish(request, FinishReason.ERROR, _not_given_out(error))

    def _append_token(
        self,
        request: Request,
        token: int,
        logprob: float | None,
        top: tuple[tuple[int, float], ...],
    ) -> None:
        """A request has its next token."""
        self.meter.token(request)
        request.tokens.append(token)
        params = request.params
        if token in self.config.eos_token_ids and not params.ignore_eos:
            self._finish(request, FinishReason.STOP)
            return
        text = request.stop_matcher.push(token)
        request.emit(Token(token, text, logprob, top))
        if request.stop_matcher.matched:
            self._finish(request, FinishReason.STOP)
        elif request.tokens_left <= 0:
            self._finish(request, FinishReason.LENGTH)

    def _finish(
        self, request: Request, reason: FinishReason, error: OsmiumError | None = None
    ) -> None:
        self._scheduler.remove(request)
        if request.done:
            return
        request.done = True
        self.meter.finish(request, reason)
        text = ""
        if error is None:
            try:
                text = request.stop_matcher.flush()
            except Exception as problem:  # the decoder's, when all that is left is to say the end
                reason, error = FinishReason.ERROR, _not_given_out(problem)
        if request.stop_matcher.matched and reason is FinishReason.LENGTH:
            reason = FinishReason.STOP  # the stop text ended in what the decoder still held
        counts = request.prompt_tokens, request.completion_tokens
        try:
            request.emit(Finish(reason, text, *counts, error))
        except Exception as problem:  # the caller's own: nobody is left to tell but the log
            _not_given_out(problem)


def _not_given_out(error: Exception) -> OsmiumError:
    LOG.warning("Could not deliver the response: %r", error)
    return OsmiumError(f"Could not deliver the response: {error!r}")
