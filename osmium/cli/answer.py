"""Generates one response and displays it while it streams: reasoning, answer, end."""

import contextlib
import queue
import signal
import sys
import termios
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from osmium.cli.progress import progress_bar
from osmium.cli.render import Display
from osmium.engine.engine import Engine
from osmium.engine.request import Event, Finish, SamplingParams, Token
from osmium.errors import CheckpointError, ConfigError
from osmium.text.reasoning import starts_in_reasoning
from osmium.text.response_parser import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    ResponseParser,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from osmium.text.tokenizer import Tokenizer

__all__ = ["Interrupt", "Rendered", "Response", "render", "respond", "tokenizer_of"]

_NO_TERMINAL = (termios.error, OSError, ValueError, TypeError, AttributeError)
"""Exceptions of the terminal's functions if stdin is no terminal, closed or replaced."""

POLL_S = 0.1
"""Seconds between checks for Ctrl-C and progress while a request has no new event."""


@dataclass(frozen=True)
class Rendered:
    """A prompt as token ids."""

    ids: list[int]
    thinking: bool
    """Whether the response begins inside of <think>."""
    raw: bool = False
    """A text to continue: the response has no reasoning."""


@dataclass(frozen=True)
class Response:
    """The generated text, and how it ended."""

    reasoning: str
    answer: str
    finish: Finish


class Interrupt:
    """Inside its `with`, the first Ctrl-C sets `requested`; a second one raises KeyboardInterrupt.

    The terminal does not echo keys meanwhile; the next prompt reads them.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous_handler: Any = None
        self._terminal: list[Any] | None = None

    def __enter__(self) -> "Interrupt":
        with contextlib.suppress(ValueError):  # not the main thread, which receives the signals
            self._previous_handler = signal.signal(signal.SIGINT, self._on_signal)
        with contextlib.suppress(*_NO_TERMINAL):
            saved = termios.tcgetattr(sys.stdin)
            quiet = [*saved[:3], saved[3] & ~termios.ECHO, *saved[4:]]
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
            self._terminal = saved
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_: object) -> None:
        if self._terminal is not None:
            with contextlib.suppress(*_NO_TERMINAL):
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._terminal)
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)


def tokenizer_of(engine: Engine) -> Tokenizer:
    """The model's tokenizer.  Raises: CheckpointError if it has none."""
    if engine.tokenizer is None:
        raise CheckpointError(
            f"{engine.name} has no tokenizer.json, which text input needs; put the file beside the "
            "model's config.json."
        )
    tokenizer: Tokenizer = engine.tokenizer
    return tokenizer


def render(engine: Engine, messages: list[dict[str, Any]], think: bool | None) -> Rendered:
    """Render a conversation by the model's chat template.  Raises: ConfigError, RequestError."""
    tokenizer = tokenizer_of(engine)
    if engine.template is None:
        raise ConfigError(f"{engine.name} has no chat template; use `osmium run --raw`.")
    variables = {} if think is None else {"enable_thinking": think}
    text = engine.template.render(messages, **variables)
    return Rendered(tokenizer.encode(text), starts_in_reasoning(text))


def respond(
    engine: Engine,
    prompt: Rendered,
    params: SamplingParams,
    display: Display,
    interrupt: Interrupt | None = None,
) -> Response:
    """Generate and display a response.  An interrupt ends it; the text so far is returned.

    Raises: RequestError if the prompt does not fit, EngineStopped, OsmiumError.
    """
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    request = engine.submit(prompt.ids, params, events.put)
    tool_format = engine.template.tool_format if engine.template is not None else None
    parser = ResponseParser(tool_format, None, prompt.thinking, any_tool=True)
    reasonings: list[str] = []
    answers: list[str] = []
    tokens = 0
    indicator = contextlib.ExitStack()
    try:
        progress = indicator.enter_context(progress_bar())
        while True:
            if tokens == 0:
                progress("prompt", *request.prompt_progress)
            elif parser.in_reasoning and not display.shows_thinking:
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
            reasoning, answer = "", event.text
            if not prompt.raw:
                deltas = parser.push(event.text)
                if isinstance(event, Finish):
                    deltas += parser.finish()
                reasoning, answer = _texts(deltas)
            if answer or (reasoning and display.shows_thinking):
                indicator.close()  # the text replaces the progress bar
            reasonings.append(reasoning)
            answers.append(answer)
            display.reasoning(reasoning)
            display.answer(answer)
            if isinstance(event, Finish):
                return Response("".join(reasonings), "".join(answers), event)
            if interrupt is not None and interrupt.requested:
                engine.cancel(request)
    finally:
        indicator.close()
        engine.cancel(request)
        display.end()


def _texts(deltas: Sequence[Delta]) -> tuple[str, str]:
    """Reasoning and answer; a call is a block of code in the answer, as nothing runs it."""
    reasoning = answer = ""
    for delta in deltas:
        match delta:
            case ReasoningDelta(text):
                reasoning += text
            case ContentDelta(text) | ToolCallArguments(_, text):
                answer += text
            case ToolCallStart(_, _, name):
                answer += f"\n```\n{name}("
            case ToolCallEnd():
                answer += ")\n```\n"
    return reasoning, answer
