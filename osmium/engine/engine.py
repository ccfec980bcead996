"""The engine of one model: what other threads call.  engine/loop.py is its thread."""

import queue
import secrets
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from osmium.engine.kv_cache_manager import KVCacheManager
from osmium.engine.loop import EngineLoop
from osmium.engine.min_tokens import end_mask
from osmium.engine.request import (
    Decoder,
    Event,
    Request,
    SamplingParams,
    Token,
    TokenMask,
    check_ids,
    check_params,
    check_prompt,
)
from osmium.engine.runner import ModelRunner
from osmium.engine.stops import StopMatcher
from osmium.engine.teacher_forcing import teacher_forced_logits
from osmium.errors import CudaError, EngineStopped, RequestError
from osmium.experts.routing import RoutingRecorder

__all__ = ["Engine"]

T = TypeVar("T")


class Engine(EngineLoop):
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
        self.name, self.context, self.device, self.plan = name, context, device, plan
        self.host_memory = host_memory
        """The kind of host memory that holds the experts."""
        self.max_step_tokens, self.max_num_seqs = runner.max_pass_tokens, kv_cache.num_slots
        """Most tokens of a prefill pass, and most sequences at once."""
        self.tokenizer, self.template = tokenizer, template
        self.defaults = defaults or {}
        """Sampling parameters recommended by the model's authors (generation_config.json)."""
        link_gb_s = getattr(plan, "link_gb_s", 0.0)
        super().__init__(runner, kv_cache, link_gb_s, decode_gap_s, on_thread, on_close)

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
        self._preempt_all()
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
                value = job()
                self._passes.invalidate()  # the job may have changed the expert cache
                outcome.put((True, value))
            except BaseException as error:
                outcome.put((False, error))
                if isinstance(error, CudaError) and error.context_lost:
                    raise
                self._passes.invalidate()

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
            self._preempt_all()  # the record has whole sequences
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
