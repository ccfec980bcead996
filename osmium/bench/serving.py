"""The server's cost over the bare engine: the same requests, submitted and sent over HTTP.

The engine and the server share this process, as in `osmium serve`.  Each stream is read by a client
process of its own, so that clients do not take the server's interpreter lock.  Method:
docs/benchmarks.md.
"""

import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from osmium.bench import stream_client
from osmium.bench.stream_client import StreamResult
from osmium.engine.decode_session import DecodeSession
from osmium.engine.engine import Engine
from osmium.engine.request import Event, Finish, Request, Token
from osmium.engine.scheduler import Batch
from osmium.errors import ConfigError, OsmiumError
from osmium.server.app import create_app
from osmium.server.completion import prepare_completion
from osmium.server.connections import HttpConfig
from osmium.server.limits import DEFAULT_LIMITS
from osmium.server.loading import BackgroundLoader
from osmium.server.prepare import Run, prepare_chat
from osmium.server.shutdown import Server, Shutdown

__all__ = [
    "ENGINE", "KINDS", "SHORTEST_RESPONSE", "Pace", "ServingConfig", "measure_serving", "set_pace",
    "tokens_per_s", "window_rate",
]  # fmt: skip

ENGINE = "engine"
"""The name of the plain requests that are submitted to the engine without HTTP."""

SHORTEST_RESPONSE = 8
"""Tokens of the shortest response that is timed."""

_ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "n": {"type": "integer"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
_SCHEMA = {"type": "array", "items": _ITEM, "minItems": 60}

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"ignore_eos": True},
    "json_object": {"response_format": {"type": "json_object"}},
    "json_schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}}
    },
    "penalty": {"presence_penalty": 0.5, "ignore_eos": True},
}
"""Fields of each kind of HTTP request."""


@dataclass(frozen=True)
class ServingConfig:
    """What to measure."""

    streams: tuple[int, ...] = (1, 4)
    """Numbers of parallel streams."""
    tokens: int = 256
    """Tokens of each response."""
    rounds: int = 5
    """Counted rounds; one more before them is not counted."""
    pace: float = 0.0
    """Most decode steps per second; 0: no limit."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Kinds of HTTP requests, `plain` among them."""


# -- pace ------------------------------------------------------------------------------------------


class Pace:
    """Ends steps at a constant rate, as a slower device would."""

    def __init__(self, rate: float) -> None:
        """`rate` is in steps per second."""
        self._period = 1 / rate
        self._due = 0.0

    def wait(self) -> None:
        """Wait until the next step is due.

        A step that is late by less than a period does not delay the ones after it.  It waits as
        DecodeSession.wait_tokens does: it sleeps, then polls and yields the interpreter lock.
        """
        now = time.perf_counter()
        if now - self._due > self._period:
            self._due = now
        if self._due - now > 1e-3:
            time.sleep(0.7 * (self._due - now))
        while time.perf_counter() < self._due:
            time.sleep(0)
        self._due += self._period


def set_pace(engine: Engine, rate: float) -> None:
    """Limit the engine to `rate` decode steps per second: that many tok/s of each sequence."""
    runner, pace = engine.runner, Pace(rate)
    start = runner.start_decode

    def start_decode(batch: Batch) -> DecodeSession:
        session = start(batch)
        wait = session.wait_tokens

        def wait_tokens() -> list[int]:
            tokens = wait()
            pace.wait()
            return tokens

        session.wait_tokens = wait_tokens  # type: ignore[method-assign]
        return session

    def install() -> None:
        runner.start_decode = start_decode  # type: ignore[method-assign]

    engine.run_on_engine_thread(install)


# -- the server and its clients --------------------------------------------------------------------


@contextmanager
def _served(engine: Engine) -> Iterator[tuple[int, threading.Thread]]:
    """Serve on a free port: the port, and the event loop's thread.  The end closes the engine."""
    loader, shutdown, ready = (
        BackgroundLoader(lambda progress: engine),
        Shutdown(),
        threading.Event(),
    )
    loader.on_done = ready.set
    config = HttpConfig(
        create_app(loader, shutdown=shutdown), DEFAULT_LIMITS, None, log_level="warning",
        access_log=False, timeout_graceful_shutdown=1, lifespan="on", backlog=64,
    )  # fmt: skip
    server = Server(config, shutdown)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listening]}, name="osmium-http", daemon=True
        )
        thread.start()
        try:
            while not ready.wait(0.1):
                if not thread.is_alive():
                    raise OsmiumError(
                        "The benchmark's server did not start; its log has the error."
                    )
            yield port, thread
        finally:
            server.should_exit = True
            thread.join()


class _Clients:
    """Client processes, one for each stream."""

    def __init__(self, port: int, count: int) -> None:
        command = [sys.executable, "-I", stream_client.__file__, "127.0.0.1", str(port)]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]

    def __enter__(self) -> "_Clients":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()

    def send(self, path: str, bodies: Sequence[dict[str, Any]]) -> list[StreamResult]:
        """Send all requests at once, one from each process, and wait for their responses.
        Raises: OsmiumError if one fails after its start."""
        clients = self._processes[: len(bodies)]
        lines = [json.dumps({"path": path, "body": body}) + "\n" for body in bodies]
        for client, line in zip(clients, lines, strict=True):
            assert client.stdin is not None, "a pipe"
            client.stdin.write(line)
            client.stdin.flush()
        results = []
        for client in clients:
            assert client.stdout is not None, "a pipe"
            line = client.stdout.readline()
            if not line:
                raise OsmiumError("A client process of the benchmark has ended; see its traceback.")
            results.append(StreamResult(**json.loads(line)))
        for result in results:
            if result.error and not 400 <= result.status < 500:
                raise OsmiumError(f"A request of the benchmark failed: {result.error}")
        return results


# -- rates -----------------------------------------------------------------------------------------


def tokens_per_s(responses: Sequence[tuple[int, float]]) -> float:
    """Tokens per second in all, by each response's (tokens, seconds from its first to its last)."""
    return sum((tokens - 1) / seconds for tokens, seconds in responses)


def window_rate(times: Sequence[Sequence[float]], tokens: Sequence[int]) -> float | None:
    """Tokens per second in all, from the last stream's first event to the last event.

    `times` are the events of each stream, and `tokens` the tokens of its events together.  None
    where that time has no event.
    """
    begin = max((one[0] if one else 0.0) for one in times)
    end = max((one[-1] if one else 0.0) for one in times)
    count = sum(
        total * sum(at > begin for at in one) / len(one)
        for one, total in zip(times, tokens, strict=True)
        if one
    )
    return count / (end - begin) if end > begin else None


@dataclass(frozen=True)
class _Sample:
    """One kind of request in one round."""

    tokens_per_s: float
    """By the engine's times, which are the responses' `timings`."""
    client_tokens_per_s: float | None
    """By the receiver's clock."""
    cpu_us: float
    """CPU time of the process per token."""
    loop_us: float
    """CPU time of the event loop's thread per token."""
    tokens: float
    """Tokens of a response; the mean of the streams."""
    events_per_token: float
    """Events with text."""


class _Measurement:
    """Requests of some streams to one served engine."""

    def __init__(
        self, engine: Engine, loop: threading.Thread, clients: _Clients, config: ServingConfig
    ) -> None:
        assert loop.ident is not None, "it runs"
        self.engine, self.clients, self.config = engine, clients, config
        self._loop_clock = time.pthread_getcpuclockid(loop.ident)
        has_chat = engine.template is not None
        self._path = "/v1/chat/completions" if has_chat else "/v1/completions"
        self._prepare = prepare_chat if has_chat else prepare_completion

    def _body(self, kind: str, stream: int) -> dict[str, Any]:
        text = f"Write list number {stream}."  # another text for each stream, so other experts
        prompt: dict[str, Any] = {"prompt": text}
        if self.engine.template is not None:
            prompt = {"messages": [{"role": "user", "content": text}]}
        tokens = self.config.tokens
        return {**prompt, "max_tokens": tokens, "temperature": 0, "stream": True, **KINDS[kind]}

    def check(self, count: int) -> None:
        """Raises: ConfigError if `count` plain requests do not fit the engine at once."""
        longest = max(len(run.ids) for run in self._runs(count)) + self.config.tokens
        engine = self.engine
        pages = count * -(-(longest + 1) // engine.plan.page_size)
        if count > engine.max_num_seqs or longest > engine.context or pages > engine.plan.num_pages:
            raise ConfigError(
                f"{count} streams of {longest} tokens do not fit: there is room for "
                f"{engine.max_num_seqs} sequences of {engine.context} tokens, in "
                f"{engine.plan.num_pages} KV pages of {engine.plan.page_size}. Lower --streams or "
                "--tokens, or raise --max-num-seqs, --context or --kv-cache-mb."
            )

    def _runs(self, count: int) -> list[Run]:
        """The plain requests as the engine gets them from the server."""
        bodies = [json.dumps(self._body("plain", i)).encode() for i in range(count)]
        prepare, engine = self._prepare, self.engine
        return [prepare(engine, engine.name, bytearray(body)).runs[0] for body in bodies]

    def sample(self, kind: str, count: int) -> _Sample | str:
        """Run one kind of request in `count` streams; the reason if it cannot be measured."""
        runs = self._runs(count) if kind == ENGINE else []
        cpu, loop = time.process_time(), time.clock_gettime(self._loop_clock)
        if kind == ENGINE:
            results = self._submit(runs)
        else:
            results = self.clients.send(self._path, [self._body(kind, i) for i in range(count)])
        cpu, loop = time.process_time() - cpu, time.clock_gettime(self._loop_clock) - loop
        for result in results:
            if result.error:
                return f"refused: {result.error}"
            if result.tokens < SHORTEST_RESPONSE or not result.decode_s:
                return f"its response ends after {result.tokens} tokens"
        total = sum(result.tokens for result in results)
        return _Sample(
            tokens_per_s([(result.tokens, result.decode_s) for result in results]),
            window_rate([result.times for result in results], [one.tokens for one in results]),
            1e6 * cpu / total,
            1e6 * loop / total,
            total / count,
            sum(len(result.times) for result in results) / total,
        )

    def _submit(self, runs: Sequence[Run]) -> list[StreamResult]:
        """Submit requests to the engine, and wait for their ends.  Raises: the engine's error."""
        done = threading.Semaphore(0)
        times: list[list[float]] = [[] for _ in runs]
        errors: list[OsmiumError] = []

        def receiver(own: list[float]) -> Callable[[Event], None]:
            def on_event(event: Event) -> None:
                if isinstance(event, Token):
                    own.append(time.perf_counter())
                elif isinstance(event, Finish):
                    errors.extend([event.error] if event.error is not None else [])
                    done.release()

            return on_event

        requests: list[Request] = [
            self.engine.submit(run.ids, run.params, receiver(own))
            for run, own in zip(runs, times, strict=True)
        ]
        for _ in runs:
            done.acquire()
        if errors:
            raise errors[0]
        return [
            StreamResult(
                own, request.completion_tokens, request.times.last_token - request.times.first_token
            )
            for own, request in zip(times, requests, strict=True)
        ]


# -- all rounds ------------------------------------------------------------------------------------


def measure_serving(
    engine: Engine, config: ServingConfig, on_round: Callable[[int, int], None]
) -> dict[str, dict[str, Any]]:
    """Serve the engine and measure; returns rows by number of streams and kind, then closes it.

    A kind that is not measured has the reason as its row.  `on_round(streams, round)` is called
    after each round.  Raises: ConfigError if the streams do not fit the engine.
    """
    most = max(config.streams)
    if config.pace:
        set_pace(engine, config.pace)
    with _served(engine) as (port, loop), _Clients(port, most) as clients:
        measurement = _Measurement(engine, loop, clients, config)
        measurement.check(most)
        found: dict[str, dict[str, Any]] = {}
        for count in config.streams:
            samples = _rounds(measurement, count, on_round)
            found[str(count)] = {
                kind: own if isinstance(own, str) else _row(own, samples)
                for kind, own in samples.items()
            }
        return found


def _rounds(
    measurement: _Measurement, count: int, on_round: Callable[[int, int], None]
) -> dict[str, list[_Sample] | str]:
    """The counted samples of each kind, or the reason why there are none."""
    names = [ENGINE, *measurement.config.kinds]
    samples: dict[str, list[_Sample]] = {name: [] for name in names}
    reasons: dict[str, str] = {}
    for number in range(measurement.config.rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            sample = reasons.get(name) or measurement.sample(name, count)
            if isinstance(sample, str):
                reasons[name] = sample
            elif number:
                samples[name].append(sample)
        on_round(count, number)
    for name in (ENGINE, "plain"):
        if name in reasons:
            raise OsmiumError(f"The requests of {name} cannot be measured: {reasons[name]}.")
    return {name: reasons.get(name) or own for name, own in samples.items()}


def _row(own: list[_Sample], samples: dict[str, list[_Sample] | str]) -> dict[str, Any]:
    """Medians of the rounds, and of the ratios to the engine and to plain of the same round."""
    engine, plain = samples[ENGINE], samples["plain"]
    assert not isinstance(engine, str) and not isinstance(plain, str), "see _rounds"

    def median(values: Iterator[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    def client_ratio(sample: _Sample, base: _Sample) -> float | None:
        a, b = sample.client_tokens_per_s, base.client_tokens_per_s
        return a / b if a and b else None

    with_engine = list(zip(own, engine, strict=True))
    with_plain = list(zip(own, plain, strict=True))
    return {
        **{name: median(getattr(one, name) for one in own) for name in asdict(own[0])},
        "of_engine": median(a.tokens_per_s / b.tokens_per_s for a, b in with_engine),
        "of_plain": median(a.tokens_per_s / b.tokens_per_s for a, b in with_plain),
        "client_of_engine": median(client_ratio(a, b) for a, b in with_engine),
        "cpu_us_over_engine": median(a.cpu_us - b.cpu_us for a, b in with_engine),
        "samples": [round(one.tokens_per_s, 2) for one in own],
    }
