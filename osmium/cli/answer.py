"""One response of the engine, shown while it comes: prompt, thinking, answer, end."""

import contextlib
import queue
import signal
import sys
import termios
from dataclasses import dataclass
from types import FrameType
from typing import Any

from osmium.cli.progress import progress_bar
from osmium.cli.render import Display
from osmium.engine.engine import Engine
from osmium.engine.request import Event, Finish, SamplingParams, Token
from osmium.errors import CheckpointError, ConfigError
from osmium.text.reasoning import DisplayedResponse, starts_in_reasoning
from osmium.text.tokenizer import Tokenizer

__all__ = ["Interrupt", "Rendered", "Response", "render", "respond", "tokenizer_of"]

_NO_TERMINAL = (termios.error, OSError, ValueError, TypeError, AttributeError)
"""What setting a terminal raises where stdin is none, closed or replaced."""

POLL_S = 0.1
"""Seconds between two looks at a request of which nothing comes."""


@dataclass(frozen=True)
class Rendered:
    """A prompt."""

    ids: list[int]
    thinking: bool
    """Whether the response begins inside of <think>."""
    raw: bool = False
    """Continue the text: nothing in the response is taken for thinking."""


@dataclass(frozen=True)
class Response:
    """What the model has generated."""

    thought: str
    answer: str
    finish: Finish


class Interrupt:
    """While entered, the first Ctrl-C sets `requested`; another one is KeyboardInterrupt.

    Keys that are pressed meanwhile are not echoed into the response: the next prompt reads them.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None
        self._terminal: list[Any] | None = None

    def __enter__(self) -> "Interrupt":
        with contextlib.suppress(ValueError):  # not the main thread: no signal comes here
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        with contextlib.suppress(*_NO_TERMINAL):
            before = termios.tcgetattr(sys.stdin)
            quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
            self._terminal = before
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_: object) -> None:
        if self._terminal is not None:
            with contextlib.suppress(*_NO_TERMINAL):
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._terminal)
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def tokenizer_of(engine: Engine) -> Tokenizer:
    """The model's tokenizer.  Raises: CheckpointError where it has none."""
    if engine.tokenizer is None:
        raise CheckpointError(
            f"{engine.name} has no tokenizer.json, so text has no ids; put the file beside the "
            "model's config.json."
        )
    found: Tokenizer = engine.tokenizer
    return found


def render(engine: Engine, messages: list[dict[str, Any]], think: bool | None) -> Rendered:
    """A conversation as the model's chat template has it.  Raises: ConfigError, RequestError."""
    tokenizer = tokenizer_of(engine)
    if engine.template is None:
        raise ConfigError(f"{engine.name} has no chat template; use `osmium run --raw`.")
    more = {} if think is None else {"enable_thinking": think}
    text = engine.template.render(messages, **more)
    return Rendered(tokenizer.encode(text), starts_in_reasoning(text))


def respond(
    engine: Engine,
    prompt: Rendered,
    params: SamplingParams,
    display: Display,
    interrupt: Interrupt | None = None,
) -> Response:
    """Generate, and show what comes.  An interrupt ends the response; what came until then counts.

    Raises: RequestError where the prompt does not fit, EngineStopped, OsmiumError.
    """
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    request = engine.submit(prompt.ids, params, events.put)
    reply, thoughts, answers, tokens = DisplayedResponse(prompt.thinking), [], [], 0
    waiting = contextlib.ExitStack()
    try:
        progress = waiting.enter_context(progress_bar())
        while True:
            if tokens == 0:
                progress("prompt", *request.prompt_progress)
            elif reply.thinking and not display.shows_thinking:
                progress("thinking", tokens, 0)
            try:
                event = events.get(timeout=POLL_S)
            except queue.Empty:
                display.tick()
                if interrupt is not None and interrupt.requested:
                    engine.cancel(request)
                continue
            if isinstance(event, Finish) and event.error is not None:
                raise event.error
            tokens += isinstance(event, Token)
            thought, answer = ("", event.text) if prompt.raw else reply.push(event.text)
            if isinstance(event, Finish) and not prompt.raw:
                more = reply.flush()
                thought, answer = thought + more[0], answer + more[1]
            if answer or (thought and display.shows_thinking):
                waiting.close()  # what shows that something is coming has served
            thoughts.append(thought)
            answers.append(answer)
            display.thought(thought)
            display.answer(answer)
            if isinstance(event, Finish):
                return Response("".join(thoughts), "".join(answers), event)
            if interrupt is not None and interrupt.requested:
                engine.cancel(request)
    finally:
        waiting.close()
        engine.cancel(request)
        display.end()
